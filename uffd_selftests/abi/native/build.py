# SPDX-License-Identifier: GPL-2.0-only
"""Builds the native layer: cffi in API mode, limited to the stable ABI."""

from __future__ import annotations

from pathlib import Path

from cffi import FFI
from setuptools import Extension
from setuptools.command.build_ext import build_ext

HERE = Path(__file__).parent
HEADERS = ("uffd.h", "races.h", "stress.h")


def ffi_builder() -> FFI:
    """Describe the extension from its headers, which are C headers and cdef in one."""
    ffi = FFI()
    for header in HEADERS:
        ffi.cdef((HERE / header).read_text())
    includes = ["<stddef.h>", "<stdint.h>", *(f'"{header}"' for header in HEADERS)]
    ffi.set_source("uffd_selftests.abi.native._native", "".join(f"#include {name}\n" for name in includes))
    return ffi


class BuildExt(build_ext):
    """build_ext that writes cffi's C source before it compiles."""

    def build_extension(self, ext: Extension) -> None:
        """Generate the source named first in the extension, then build as usual."""
        ffi_builder().emit_c_code(str(next(iter(ext.sources))))
        ext.py_limited_api = True
        ext.define_macros.append(("Py_LIMITED_API", "0x030A0000"))
        super().build_extension(ext)
