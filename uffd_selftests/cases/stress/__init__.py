# SPDX-License-Identifier: GPL-2.0-only
"""What shows only under load, after a while, or on a kernel with an old bug."""
