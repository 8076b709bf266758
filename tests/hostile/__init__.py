# SPDX-License-Identifier: GPL-2.0-only
"""Suites that misbehave, run by the tests of the harness."""
