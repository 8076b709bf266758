# SPDX-License-Identifier: GPL-2.0-only
"""The little of io_uring(7) that the cases need: a long-term pin (a fixed buffer), and one request at a time."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import select
import struct
from collections.abc import Iterator
from contextlib import contextmanager

from uffd_selftests.abi import syscalls
from uffd_selftests.abi.errors import KernelError, errno_name
from uffd_selftests.toolkit.expectations import DEADLINE, Skip
from uffd_selftests.toolkit.memory import Range

__all__ = [
    "IORING_OP_NOP",
    "IORING_OP_READ",
    "IORING_OP_WRITE",
    "IORING_OP_READ_FIXED",
    "IORING_OP_WRITE_FIXED",
    "IOSQE_ASYNC",
    "IORING_REGISTER_BUFFERS",
    "IORING_UNREGISTER_BUFFERS",
    "IORING_OFF_SQ_RING",
    "IORING_OFF_SQES",
    "IORING_FEAT_SINGLE_MMAP",
    "IoUring",
    "fixed_buffer",
]

# include/uapi/linux/io_uring.h
IORING_OP_NOP = 0
IORING_OP_READ_FIXED = 4  # with the first of the fixed buffers
IORING_OP_WRITE_FIXED = 5
IORING_OP_READ = 22  # Linux 5.6
IORING_OP_WRITE = 23
IOSQE_ASYNC = 1 << 4  # Linux 5.6: let a worker thread make the call, which may sleep
IORING_REGISTER_BUFFERS = 0
IORING_UNREGISTER_BUFFERS = 1
IORING_OFF_SQ_RING = 0
IORING_OFF_SQES = 0x10000000
IORING_FEAT_SINGLE_MMAP = 1 << 0  # Linux 5.4: one mapping holds both rings

# struct io_uring_params is ten words, then the offsets in the submission and in the completion ring.
_PARAMS_SIZE, _FEATURES, _SQ_OFF, _CQ_OFF = 120, 20, 40, 80
_SQE_SIZE, _CQE_SIZE = 64, 16


class IoUring:
    """A ring for one request at a time, in a ``with`` block.

    Raises Skip where the process may not have one, or the memory for it.
    """

    def __init__(self) -> None:
        params = ctypes.create_string_buffer(_PARAMS_SIZE)
        try:
            self.fd = syscalls.call("io_uring_setup", 1, ctypes.addressof(params))
        except KernelError as error:
            remedies = {
                errno.ENOSYS: "boot a kernel with CONFIG_IO_URING",
                errno.EPERM: "set kernel.io_uring_disabled to 0, or run as root",
                errno.ENOMEM: "raise RLIMIT_MEMLOCK (ulimit -l)",
            }
            remedy = remedies.get(error.errno or 0, "no ring, no reason known")
            raise Skip(f"io_uring_setup(2): {errno_name(error.errno or 0)}: {remedy}") from None
        sq_entries, cq_entries = struct.unpack_from("=2I", params, 0)
        self._sq = struct.unpack_from("=7I", params, _SQ_OFF)  # head, tail, mask, entries, flags, dropped, array
        self._cq = struct.unpack_from("=6I", params, _CQ_OFF)  # head, tail, mask, entries, overflow, cqes
        if not struct.unpack_from("=I", params, _FEATURES)[0] & IORING_FEAT_SINGLE_MMAP:
            os.close(self.fd)
            raise Skip("io_uring without IORING_FEAT_SINGLE_MMAP (Linux 5.4)")
        ring_size = max(self._sq[6] + 4 * sq_entries, self._cq[5] + _CQE_SIZE * cq_entries)
        self._ring = mmap.mmap(self.fd, ring_size, offset=IORING_OFF_SQ_RING)
        self._sqes = mmap.mmap(self.fd, sq_entries * _SQE_SIZE, offset=IORING_OFF_SQES)

    def _word(self, offset: int) -> int:
        value: int = struct.unpack_from("=I", self._ring, offset)[0]
        return value

    def submit(
        self, opcode: int, fd: int = -1, address: int = 0, length: int = 0, *, offset: int = -1, flags: int = 0
    ) -> None:
        """Hand one request to the kernel; what becomes of it is for complete().

        ``offset`` -1 is the file's own, ``flags`` are IOSQE_*.
        """
        _, tail, mask, _, _, _, array = self._sq
        index = self._word(tail) & self._word(mask)
        sqe = struct.pack("=BBHiQQI36x", opcode, flags, 0, fd, offset & (1 << 64) - 1, address, length)
        self._sqes[index * _SQE_SIZE : (index + 1) * _SQE_SIZE] = sqe
        struct.pack_into("=I", self._ring, array + 4 * index, index)
        struct.pack_into("=I", self._ring, tail, self._word(tail) + 1 & 0xFFFFFFFF)
        syscalls.call("io_uring_enter", self.fd, 1, 0, 0, 0, 0)

    @property
    def completed(self) -> bool:
        """Whether a completion waits for complete()."""
        head, tail, *_ = self._cq
        return self._word(head) != self._word(tail)

    def complete(self, timeout: float = DEADLINE) -> int:
        """Wait for the request and return its result: a count, or -errno."""
        poller = select.poll()
        poller.register(self.fd, select.POLLIN)
        if not self.completed and not poller.poll(timeout * 1000):
            raise AssertionError(f"the io_uring request did not complete within {timeout:g} seconds")
        head, _, mask, _, _, cqes = self._cq
        number = self._word(head)
        _, result, _ = struct.unpack_from("=QiI", self._ring, cqes + (number & self._word(mask)) * _CQE_SIZE)
        struct.pack_into("=I", self._ring, head, number + 1 & 0xFFFFFFFF)
        return int(result)

    def register_buffer(self, where: Range) -> None:
        """Pin the pages of one range for long (io_uring_register(2)); Skip when RLIMIT_MEMLOCK forbids it."""
        vector = struct.pack("@PN", where.start, where.len)
        buffer = ctypes.create_string_buffer(vector, len(vector))
        try:
            syscalls.call("io_uring_register", self.fd, IORING_REGISTER_BUFFERS, ctypes.addressof(buffer), 1)
        except KernelError as error:
            if error.errno == errno.ENOMEM:
                raise Skip("IORING_REGISTER_BUFFERS: ENOMEM: raise RLIMIT_MEMLOCK (ulimit -l)") from None
            raise

    def unregister_buffer(self) -> None:
        """Take the pin away, at once."""
        syscalls.call("io_uring_register", self.fd, IORING_UNREGISTER_BUFFERS, 0, 0)

    def close(self) -> None:
        """Give the ring back; the kernel ends what is pending in its own time."""
        self._sqes.close()
        self._ring.close()
        os.close(self.fd)

    def __enter__(self) -> IoUring:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@contextmanager
def fixed_buffer(where: Range) -> Iterator[None]:
    """Hold a long-term pin for writing on the range, which must be populated, as an io_uring fixed buffer."""
    with IoUring() as ring:
        ring.register_buffer(where)
        try:
            yield
        finally:
            ring.unregister_buffer()
