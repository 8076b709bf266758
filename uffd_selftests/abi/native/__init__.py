# SPDX-License-Identifier: GPL-2.0-only
"""The native layer; uffd.h and stress.h say what each function does. Every call releases the interpreter's lock."""

from uffd_selftests.abi.native._native import ffi, lib

__all__ = ["ffi", "lib"]
