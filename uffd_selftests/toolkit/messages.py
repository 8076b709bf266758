# SPDX-License-Identifier: GPL-2.0-only
"""What a userfaultfd reports: one class for each event of struct uffd_msg."""

from __future__ import annotations

from ctypes import sizeof
from dataclasses import dataclass

from uffd_selftests.abi import uapi
from uffd_selftests.abi.uapi import Event, PagefaultFlag

__all__ = ["Fault", "Forked", "Remapped", "Removed", "Unmapped", "Message", "MESSAGE_SIZE", "parse_message"]


class _Told:
    """A message: addresses are told in hexadecimal, flags by their names."""

    ADDRESSES = ("address", "start", "end", "to", "len")

    def __repr__(self) -> str:
        fields = (f"{name}={f'{value:#x}' if name in self.ADDRESSES else value}" for name, value in vars(self).items())
        return f"{type(self).__name__}({', '.join(fields)})"


@dataclass(frozen=True, repr=False)
class Fault(_Told):
    """UFFD_EVENT_PAGEFAULT. ``ptid`` is 0 without UFFD_FEATURE_THREAD_ID."""

    address: int
    flags: PagefaultFlag
    ptid: int = 0


@dataclass(frozen=True, repr=False)
class Forked(_Told):
    """UFFD_EVENT_FORK: the descriptor that serves the child."""

    ufd: int


@dataclass(frozen=True, repr=False)
class Remapped(_Told):
    """UFFD_EVENT_REMAP, in bytes."""

    start: int
    to: int
    len: int


@dataclass(frozen=True, repr=False)
class Removed(_Told):
    """UFFD_EVENT_REMOVE."""

    start: int
    end: int


@dataclass(frozen=True, repr=False)
class Unmapped(_Told):
    """UFFD_EVENT_UNMAP."""

    start: int
    end: int


Message = Fault | Forked | Remapped | Removed | Unmapped
MESSAGE_SIZE = sizeof(uapi.uffd_msg)


def parse_message(raw: bytes) -> Message:
    """Return what one uffd_msg says; every byte that its event does not define must be zero."""
    msg = uapi.uffd_msg.from_buffer_copy(raw)
    arg = msg.arg
    message: Message
    match msg.event:
        case Event.PAGEFAULT:
            fault = arg.pagefault
            message, used = Fault(fault.address, PagefaultFlag(fault.flags), fault.feat.ptid), 20
        case Event.FORK:
            message, used = Forked(arg.fork.ufd), 4
        case Event.REMAP:
            message, used = Remapped(arg.remap.from_, arg.remap.to, arg.remap.len), 24
        case Event.REMOVE:
            message, used = Removed(arg.remove.start, arg.remove.end), 16
        case Event.UNMAP:
            message, used = Unmapped(arg.remove.start, arg.remove.end), 16
        case _:
            raise AssertionError(f"unknown event {msg.event:#x} in message {raw.hex()}")
    if any(raw[1:8]) or any(raw[8 + used :]):
        raise AssertionError(f"reserved bytes of {Event(msg.event)} are not zero: {raw.hex()}")
    return message
