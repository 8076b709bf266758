# SPDX-License-Identifier: GPL-2.0-only
"""Tests of what is found out about the machine, and of what is changed on it and put back."""
