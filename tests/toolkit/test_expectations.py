# SPDX-License-Identifier: GPL-2.0-only
"""What a failure says is readable: signals and flags by name, addresses in hexadecimal."""

from __future__ import annotations

import errno
import signal

import pytest

from uffd_selftests.abi.uapi import PagefaultFlag
from uffd_selftests.toolkit.access import Trap
from uffd_selftests.toolkit.expectations import expect, expect_errno, expect_one_of
from uffd_selftests.toolkit.messages import Fault, Forked, Removed


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (signal.SIGSEGV, "SIGSEGV"),
        (Trap(signal.SIGBUS, 4, 0x7000, 12), "SIGBUS si_code=4 si_addr=0x7000 si_addr_lsb=12"),
        ([Trap(signal.SIGSEGV, 1, 0x7000, 0)], "[SIGSEGV si_code=1 si_addr=0x7000]"),
        (
            [Fault(0x7000, PagefaultFlag.WRITE, 12)],
            "[Fault(address=0x7000, flags=UFFD_PAGEFAULT_FLAG_WRITE, ptid=12)]",
        ),
        (Removed(0x7000, 0x9000), "Removed(start=0x7000, end=0x9000)"),
        (Forked(7), "Forked(ufd=7)"),
    ],
)
def test_what_expect_says(value: object, told: str) -> None:
    """Nobody has to look a number up."""
    with pytest.raises(AssertionError) as caught:
        expect(value, None, "the message")
    assert str(caught.value) == f"the message: expected None, got {told}"


def test_errno_by_name() -> None:
    """An errno is told by its name, as everything else."""
    with pytest.raises(AssertionError) as caught:
        expect_errno(OSError(errno.EPERM, ""), errno.EINVAL, "errno of the call")
    assert str(caught.value) == "errno of the call: expected EINVAL, got EPERM"


def test_one_of_several_forms(capsys: pytest.CaptureFixture[str]) -> None:
    """Where the kernel has a choice it is told which it took; where it has none, nothing is."""
    expect_one_of("EBUSY", ["EBUSY"], "errno of the call")
    expect_errno(OSError(errno.EPERM, ""), (errno.EINVAL, errno.EPERM), "errno of the call")
    assert capsys.readouterr().out == "saw: errno of the call: EPERM\n"
    with pytest.raises(AssertionError) as caught:
        expect_errno(OSError(errno.EIO, ""), (errno.EINVAL, errno.EPERM), "errno of the call")
    assert str(caught.value) == "errno of the call: expected EINVAL or EPERM, got EIO"
