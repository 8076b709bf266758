# SPDX-License-Identifier: GPL-2.0-only
"""What two processes of the harness say to each other: objects, in order, through a pair of descriptors."""

from __future__ import annotations

import os
import pickle
import struct
from typing import Any

LENGTH = struct.Struct("=I")
"""Before each object: how many bytes its pickle has."""


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

    def send(self, value: object) -> None:
        """Send an object; raises OSError, BrokenPipeError when nobody can receive it any more."""
        data = pickle.dumps(value, pickle.HIGHEST_PROTOCOL)
        view = memoryview(LENGTH.pack(len(data)) + data)
        while view:
            view = view[os.write(self._writer, view) :]

    def receive(self) -> Any:
        """Wait for the next object and return it; raises EOFError when none can come any more."""
        (length,) = LENGTH.unpack(self._read(LENGTH.size))
        return pickle.loads(self._read(length))

    def _read(self, length: int) -> bytearray:
        data = bytearray()
        while len(data) < length:
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


def one_way() -> tuple[Channel, Channel]:
    """Return the end that receives and the end that sends."""
    reader, writer = os.pipe()  # both are close-on-exec
    return Channel(reader, -1), Channel(-1, writer)


def two_way() -> tuple[Channel, Channel]:
    """Return two ends of the same kind."""
    (here, there), (from_there, from_here) = os.pipe(), os.pipe()
    return Channel(here, from_here), Channel(from_there, there)
