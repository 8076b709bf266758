# SPDX-License-Identifier: GPL-2.0-only
"""The suite again and again with short memory."""
