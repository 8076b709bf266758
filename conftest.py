# SPDX-License-Identifier: GPL-2.0-only
"""Run the suite with plain pytest, too."""

pytest_plugins = ["uffd_selftests.harness.plugin"]
