# SPDX-License-Identifier: GPL-2.0-only
"""The results of runs in the formats of CI systems, made from results.json (docs/ci.md)."""
