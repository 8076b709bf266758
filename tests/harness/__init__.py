# SPDX-License-Identifier: GPL-2.0-only
"""Tests of the harness, which gates, isolates, watches and reports."""
