# SPDX-License-Identifier: GPL-2.0-only
"""Numbers of system calls: those of programs like this one, whatever uname says, and never a wrong one."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys

import pytest

from uffd_selftests.abi import syscalls

PER_LINUX32 = 8  # include/uapi/linux/personality.h


def test_unknown_name() -> None:
    """A name that is not known is an error, not a number that stands for another call."""
    with pytest.raises(KeyError):
        syscalls.number("frobnicate")


def test_numbers_work() -> None:
    """A call by its number does what it should."""
    assert syscalls.call("set_tid_address", 0) == os.getpid()
    fd = syscalls.call("pidfd_open", os.getpid(), 0)
    os.close(fd)


def test_personality() -> None:
    """A kernel that says it is one of 32 bits (setarch linux32) has the same numbers for this program."""
    show = "from uffd_selftests.abi import syscalls; print(syscalls.number('userfaultfd'), syscalls.number('brk'))"
    libc = ctypes.CDLL(None)
    done = subprocess.run(
        [sys.executable, "-c", show],
        preexec_fn=lambda: libc.personality(PER_LINUX32),
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout.split() == [str(syscalls.number(name)) for name in ("userfaultfd", "brk")]


def test_program_of_32_bits() -> None:
    """It is refused in one line, before anything else is looked at."""
    code = "import sys; sys.maxsize = 2**31 - 1; from uffd_selftests.__main__ import main; sys.exit(main())"
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines() == [
        "uffd-selftests: this Python is a program of 32 bits; uffd-selftests needs one of 64 bits: "
        "PYTHON=/usr/bin/python3 ./run_tests.sh, of the system's own"
    ]
