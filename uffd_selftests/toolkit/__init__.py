# SPDX-License-Identifier: GPL-2.0-only
"""What cases are written with, one idea a file; common.py hands it on."""
