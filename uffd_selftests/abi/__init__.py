# SPDX-License-Identifier: GPL-2.0-only
"""The kernel's interface as it is: numbers, structures, system calls, and the C that runs without the lock."""
