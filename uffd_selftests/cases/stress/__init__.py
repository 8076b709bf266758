# SPDX-License-Identifier: GPL-2.0-only
"""Many threads at once: what single shots do not show."""
