# SPDX-License-Identifier: GPL-2.0-only
"""System calls as a 32-bit program makes them on x86-64 (CONFIG_IA32_EMULATION): int 0x80, pointers below 4 GiB.

A 64-bit process may make them too, and the kernel takes them for those of a 32-bit one.
"""

from __future__ import annotations

import ctypes
import os
from contextlib import ExitStack
from typing import TypeVar

from uffd_selftests.abi.errors import KernelError, checked
from uffd_selftests.toolkit.access import poke
from uffd_selftests.toolkit.expectations import Skip
from uffd_selftests.toolkit.memory import MAP_ANONYMOUS, MAP_PRIVATE, PAGE_SIZE, PROT_EXEC, PROT_READ, mapped, protect
from uffd_selftests.toolkit.processes import Child, ChildError

__all__ = ["S", "MAP_32BIT", "Ia32"]

S = TypeVar("S", bound=ctypes.Structure)

MAP_32BIT = 0x40

# arch/x86/entry/syscalls/syscall_32.tbl
_NUMBERS = {"read": 3, "getpid": 20, "ioctl": 54, "userfaultfd": 374}

# A function of the number and three arguments: from edi, esi, edx, ecx to eax, ebx, ecx, edx.
_CODE = bytes.fromhex(
    "f30f1efa"  # endbr64
    "53"  # push rbx
    "89f8"  # mov eax, edi
    "89f3"  # mov ebx, esi
    "87d1"  # xchg ecx, edx
    "cd80"  # int 0x80
    "5b"  # pop rbx
    "c3"  # ret
)


class Ia32:
    """The 32-bit system calls, in a ``with`` block. Skip where there are none."""

    def __enter__(self) -> Ia32:
        if os.uname().machine != "x86_64":
            raise Skip(f"no system calls of another word size are made on {os.uname().machine}")
        with ExitStack() as stack:
            code = stack.enter_context(mapped(PAGE_SIZE, flags=MAP_PRIVATE | MAP_ANONYMOUS))
            self._low = stack.enter_context(mapped(PAGE_SIZE, flags=MAP_PRIVATE | MAP_ANONYMOUS | MAP_32BIT))
            poke(code.start, _CODE)
            try:
                protect(code, PROT_READ | PROT_EXEC)
            except KernelError as error:
                raise Skip(f"no code can be made at run time: {error}") from None
            self._function = ctypes.CFUNCTYPE(ctypes.c_int, *[ctypes.c_uint32] * 4)(code.start)
            self._probe()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _probe(self) -> None:
        """Make a call in a process of its own, which a kernel without them kills."""
        try:
            with Child(lambda _: self.call("getpid")):
                pass
        except ChildError as error:
            raise Skip(f"no 32-bit system calls ({error}): boot a kernel with CONFIG_IA32_EMULATION") from None

    def call(self, name: str, *arguments: int) -> int:
        """Make a system call, without the interpreter's lock; arguments are cut to 32 bits. KernelError if it fails."""
        words = [value & 0xFFFF_FFFF for value in (*arguments, 0, 0, 0)[:3]]
        text = f"32-bit {name}({', '.join(f'{value:#x}' for value in words[: len(arguments)])})"
        return checked(self._function(_NUMBERS[name], *words), text)

    def ioctl(self, fd: int, request: int, arg: S) -> S:
        """ioctl(2) with a struct; returns it as the kernel left it."""
        low = type(arg).from_buffer_copy(arg)
        ctypes.memmove(self._low.start, bytes(low), ctypes.sizeof(low))
        self.call("ioctl", fd, request, self._low.start)
        return type(arg).from_buffer_copy(ctypes.string_at(self._low.start, ctypes.sizeof(low)))

    def read(self, fd: int, length: int) -> bytes:
        """read(2) of up to a page."""
        count = self.call("read", fd, self._low.start, length)
        return ctypes.string_at(self._low.start, count)
