# SPDX-License-Identifier: GPL-2.0-only
"""The project's own checks: ``./run_tests.sh --check``."""
