# SPDX-License-Identifier: GPL-2.0-only
"""The userfaultfd conformance suite: pytest cases that drive the real Linux kernel."""

__version__ = "0.1.0"
