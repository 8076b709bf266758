# SPDX-License-Identifier: GPL-2.0-only
"""The cases of tools/testing/selftests/mm/uffd-unit-tests.c."""
