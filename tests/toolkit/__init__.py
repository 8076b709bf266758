# SPDX-License-Identifier: GPL-2.0-only
"""Tests of what cases are written in."""
