# SPDX-License-Identifier: GPL-2.0-only
"""Tests of the harness, of what cases are written in, and of the scripts."""
