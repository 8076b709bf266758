# SPDX-License-Identifier: GPL-2.0-only
"""The header of a swap device is what the kernel expects, and its refusals are told with their names."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest

from uffd_selftests.abi.errors import KernelError
from uffd_selftests.machine.swapfile import make_swap, swap_header, swap_off, swap_on


@pytest.mark.parametrize("page", [4096, 16384, 65536])
def test_header(page: int) -> None:
    """The header fills a page: version 1 and the last page's number behind the boot block, the signature at the end."""
    header = swap_header(512 << 20, page)
    assert len(header) == page
    assert header[:1024] == bytes(1024)
    assert struct.unpack_from("=III", header, 1024) == (1, (512 << 20) // page - 1, 0)
    assert header[1036:] == bytes(page - 1036 - 10) + b"SWAPSPACE2"


def test_make_swap(tmp_path: Path) -> None:
    """Only the first page is written."""
    page = os.sysconf("SC_PAGE_SIZE")
    device = tmp_path / "device"
    device.write_bytes(b"x" * 16 * page)
    make_swap(device)
    assert device.read_bytes() == swap_header(16 * page, page) + b"x" * 15 * page


def test_refusals(tmp_path: Path) -> None:
    """An error has its number, and names the call and the device."""
    device = tmp_path / "none"
    with pytest.raises(OSError, match="none"):
        make_swap(device)
    for call, name in ((swap_on, "swapon"), (swap_off, "swapoff")):
        with pytest.raises(KernelError) as error:
            call(device)
        assert str(error.value) in {f"{name}({device}): {each}" for each in ("ENOENT", "EPERM")}
