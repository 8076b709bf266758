# SPDX-License-Identifier: GPL-2.0-only
"""Tests of the tables of promises and bugs, and of the documents made from them."""
