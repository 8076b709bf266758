# SPDX-License-Identifier: GPL-2.0-only
"""Results as a page for people: ``uffd-selftests report RESULTS.json... -o report.html``.

It reads what docs/results.md describes and needs neither the kernel nor the cases that made it.
"""
