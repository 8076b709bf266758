# SPDX-License-Identifier: GPL-2.0-only
"""The native layer; uffd.h and stress.h say what each function does. Every call releases the interpreter's lock."""

import sys

if sys.maxsize < 1 << 32:  # its system calls and structures have other numbers and sizes than those meant here
    raise ImportError("this Python is a program of 32 bits; uffd-selftests needs one of 64 bits")

from uffd_selftests.abi.native._native import ffi, lib

__all__ = ["ffi", "lib"]
