# SPDX-License-Identifier: GPL-2.0-only
"""What two processes of the harness say to each other, in order, through a pair of descriptors.

The other end may be in another machine, whose kernel nobody trusts: a pipe, a socket, the port of a virtual machine,
the stdin and stdout of a command. So a message is JSON, which can make nothing but plain data, and it has a version, a
length and a bound.
"""

from __future__ import annotations

import json
import os
import select
import struct
import time
from typing import Any

HEADER = struct.Struct(">4sBI")
"""Before each message: magic, version and how many bytes of JSON follow."""
MAGIC = b"uffd"
VERSION = 1
MAX_BYTES = 64 << 20
"""More is no message but a mistake."""


encode = json.JSONEncoder(separators=(",", ":")).encode
"""Returns the text of plain data."""


class Nonsense(EOFError):
    """What came is no message of this version: nothing more can be understood."""


class Channel:
    """One end: where to read, and where to write; either may be missing, and both may be the same."""

    def __init__(self, reader: int, writer: int) -> None:
        self._reader = reader
        self._writer = writer

    def fileno(self) -> int:
        """Return the descriptor that is readable when something can be received."""
        return self._reader

    @property
    def descriptors(self) -> set[int]:
        """The descriptors that are open."""
        return {fd for fd in (self._reader, self._writer) if fd >= 0}

    def send(self, value: object, until: float | None = None) -> None:
        """Send plain data.

        Raises OSError: BrokenPipeError when nobody can receive it any more, TimeoutError when nobody has taken it
        before time.monotonic() says until, for which the descriptor has to be one that does not block.
        """
        data = encode(value).encode()
        if len(data) > MAX_BYTES:
            raise ValueError(f"a message of {len(data)} bytes")
        view = memoryview(HEADER.pack(MAGIC, VERSION, len(data)) + data)
        while view:
            if until is not None:
                _await(self._writer, select.POLLOUT, until)
            view = view[os.write(self._writer, view) :]

    def receive(self, until: float | None = None) -> Any:
        """Wait for the next message and return it.

        Raises EOFError when none can come any more, Nonsense for what is none, TimeoutError when it is not whole before
        time.monotonic() says until.
        """
        magic, version, length = HEADER.unpack(self._read(HEADER.size, until))
        if magic != MAGIC:
            raise Nonsense(f"what came is no message: it begins with {magic!r}")
        if version != VERSION:
            raise Nonsense(f"what came is of version {version}, and this is version {VERSION}")
        if length > MAX_BYTES:
            raise Nonsense(f"a message of {length} bytes")
        try:
            return json.loads(self._read(length, until))
        except (ValueError, RecursionError):
            raise Nonsense("what came is no JSON") from None

    def _read(self, length: int, until: float | None) -> bytearray:
        data = bytearray()
        while len(data) < length:
            if until is not None:
                _await(self._reader, select.POLLIN, until)
            part = os.read(self._reader, length - len(data))
            if not part:
                raise EOFError
            data += part
        return data

    def close(self) -> None:
        """Close the descriptors; once."""
        for fd in self.descriptors:
            os.close(fd)
        self._reader = self._writer = -1


def _await(fd: int, event: int, until: float) -> None:
    """Wait until a descriptor is ready; raises TimeoutError."""
    poll = select.poll()
    poll.register(fd, event)
    if not poll.poll(max(0.0, until - time.monotonic()) * 1000):
        raise TimeoutError


def one_way() -> tuple[Channel, Channel]:
    """Return the end that receives and the end that sends."""
    reader, writer = os.pipe()  # both are close-on-exec
    return Channel(reader, -1), Channel(-1, writer)


def two_way() -> tuple[Channel, Channel]:
    """Return two ends of the same kind."""
    (here, there), (from_there, from_here) = os.pipe(), os.pipe()
    return Channel(here, from_here), Channel(from_there, there)
