# SPDX-License-Identifier: GPL-2.0-only
"""Tests of the kernel's interface, in Python and in C."""
