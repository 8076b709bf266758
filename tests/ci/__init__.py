# SPDX-License-Identifier: GPL-2.0-only
"""Tests of what lies in ci/."""
