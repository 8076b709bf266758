# SPDX-License-Identifier: GPL-2.0-only
"""Core files: had of a child process, and what they say of a range of its memory (core(5), elf(5))."""

from __future__ import annotations

import os
import resource
import signal
import struct
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

from uffd_selftests.machine.settings import Sysctl
from uffd_selftests.toolkit.expectations import Skip, eventually, expect
from uffd_selftests.toolkit.handle import Uffd
from uffd_selftests.toolkit.memory import Range
from uffd_selftests.toolkit.processes import Channel, Child

__all__ = ["CORE_FILTER", "dumps_here", "core_dump", "core_bytes"]

CORE_PATTERN = Path("/proc/sys/kernel/core_pattern")
CORE_FILTER = Path("/proc/self/coredump_filter")
_EVERYTHING = 0x7F
"""All kinds of memory of CORE_FILTER but DAX."""


@contextmanager
def dumps_here() -> Iterator[None]:
    """Have core dumps written to the working directory, a temporary one meanwhile; Skip where that cannot be had."""
    if not CORE_FILTER.exists():
        raise Skip(f"{CORE_FILTER}: ENOENT: boot a kernel with CONFIG_ELF_CORE")
    if resource.getrlimit(resource.RLIMIT_CORE)[1] != resource.RLIM_INFINITY:
        raise Skip("the hard limit of core dumps is too low: ulimit -Hc unlimited")
    with ExitStack() as stack:
        pattern = CORE_PATTERN.read_text().strip()
        if not pattern or pattern[0] in "/|@":
            try:
                stack.enter_context(Sysctl(CORE_PATTERN, "core"))
            except OSError:
                raise Skip(f"core dumps go to {pattern}: as root, sysctl kernel.core_pattern=core") from None
        stack.callback(os.chdir, os.getcwd())
        os.chdir(stack.enter_context(tempfile.TemporaryDirectory()))
        yield


@contextmanager
def core_dump(life: Callable[[Channel], object]) -> Iterator[Path]:
    """Have a child process abort after ``life``, which sends the descriptor of its handle; the block has its core file.

    AssertionError when the dump does not come to its end, or a message comes.
    """

    def target(channel: Channel) -> None:
        signal.signal(signal.SIGABRT, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        CORE_FILTER.write_text(hex(_EVERYTHING))
        life(channel)
        os.abort()

    with dumps_here(), Child(target) as child, Uffd(child.receive_fds()[1][0]) as uffd:
        ended = partial(os.waitid, os.P_PID, child.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        eventually(lambda: uffd.readable() or ended() is not None, "the process to end")
        uffd.expect_still_asleep(0)
        end = ended()
        expect(end and (end.si_status, end.si_code), (signal.SIGABRT, os.CLD_DUMPED), "how the process ended")
        child.kill()
        (core,) = Path.cwd().iterdir()
        yield core


def core_bytes(core: Path, where: Range) -> bytes:
    """Return what a core file of 64 bits has of a range, which must lie in one of its segments; "" if it does not."""
    with core.open("rb") as file:
        header = file.read(64)
        (offset,) = struct.unpack_from("=Q", header, 32)
        size, count = struct.unpack_from("=2H", header, 54)
        file.seek(offset)
        table = file.read(size * count)
        for number in range(count):
            kind, _, at, start, _, stored = struct.unpack_from("=2I4Q", table, size * number)
            if kind == 1 and start <= where.start and where.end <= start + stored:  # PT_LOAD
                file.seek(at + where.start - start)
                return file.read(where.len)
    return b""
