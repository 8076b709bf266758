# SPDX-License-Identifier: GPL-2.0-only
"""Tests of the results for CI systems."""
