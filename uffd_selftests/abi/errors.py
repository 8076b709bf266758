# SPDX-License-Identifier: GPL-2.0-only
"""What a system call answers when it fails, by name."""

from __future__ import annotations

import errno
import os

__all__ = ["EHWPOISON", "errno_name", "KernelError", "checked"]


EHWPOISON: int = getattr(errno, "EHWPOISON", 133)
"""The standard library has the name since Python 3.14; a few old architectures have another number."""


def errno_name(number: int) -> str:
    """Return the symbolic name of an error number of either sign: ``EEXIST``, ``-EEXIST``; others as they are."""
    name = {EHWPOISON: "EHWPOISON", **errno.errorcode}.get(abs(number))
    if name is None:
        return str(number)
    return name if number > 0 else f"-{name}"


class KernelError(OSError):
    """A system call failed. ``errno`` as usual; the text names the call, its arguments and the symbolic errno."""

    def __init__(self, number: int, call: str) -> None:
        super().__init__(number, os.strerror(number))
        self.call = call

    def __str__(self) -> str:
        return f"{self.call}: {errno_name(self.errno or 0)}"


def checked(result: int, call: str) -> int:
    """Return the result of a native call, or raise KernelError when it is -errno."""
    if -4096 < result < 0:
        raise KernelError(-result, call)
    return result
