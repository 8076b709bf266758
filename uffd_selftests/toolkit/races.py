# SPDX-License-Identifier: GPL-2.0-only
"""Races: native threads that make one call, or one access, over and over, and count what became of it.

The work is fixed, the time is not: a racer goes its rounds, a companion goes round for as long as one of the racers
still works. None of them holds the interpreter's lock, so that they meet as often as the processors let them.
"""

from __future__ import annotations

import errno
import os
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from errno import EAGAIN, EFAULT, EINVAL
from types import TracebackType
from typing import Any

from uffd_selftests.abi import syscalls, uapi
from uffd_selftests.abi.errors import KernelError, errno_name
from uffd_selftests.abi.native import ffi, lib
from uffd_selftests.abi.uapi import RwprotectMode, WriteprotectMode
from uffd_selftests.toolkit.expectations import DEADLINE, Skip
from uffd_selftests.toolkit.handle import Uffd
from uffd_selftests.toolkit.memory import MREMAP_FIXED, MREMAP_MAYMOVE, Advice, Range, drops_hugepages, moves_hugepages
from uffd_selftests.toolkit.threads import Waiter

__all__ = [
    "SUCCESS",
    "COMPANION",
    "Racer",
    "toucher",
    "copier",
    "mover",
    "continuer",
    "zeroer",
    "protector",
    "rwprotector",
    "waker",
    "adviser",
    "remapper",
    "vm_reader",
    "Outcomes",
    "Race",
    "run_race",
]

SUCCESS = 0
COMPANION = 0
"""Rounds of a racer that goes round until the others have ended."""


@dataclass(frozen=True)
class Racer:
    """A thread and its steps: step ``i`` of a round has the arguments ``args`` + ``i`` * ``strides``."""

    what: str
    kind: int
    number: int
    args: tuple[int, ...]
    strides: tuple[int, ...]
    count: int
    rounds: int = 1
    fd: int = -1
    output: int = -1
    """Which word of an ioctl's argument is its output field."""
    again: tuple[int, ...] = ()
    """Repeat a step for as long as it fails with one of these: two at most."""
    keeps: tuple[object, ...] = ()
    """What its arguments point to."""


def _stepped(where: Range, unit: int, *, backwards: bool) -> tuple[int, int, int]:
    """Return where the steps through a range begin, how far one goes, and how many there are."""
    count = where.len // unit
    return (where.end - unit, -unit, count) if backwards else (where.start, unit, count)


def toucher(where: Range, unit: int, *, write: bool = False, rounds: int = 1, backwards: bool = False) -> Racer:
    """Access the first byte of each unit: a load, or a write access that changes nothing; counts signals."""
    start, stride, count = _stepped(where, unit, backwards=backwards)
    access = lib.UFFD_WRITE if write else lib.UFFD_READ
    what = f"{'writes to' if write else 'reads of'} {where}"
    return Racer(what, lib.UFFD_RACE_TOUCH, access, (start,), (stride,), count, rounds)


def copier(uffd: Uffd, where: Range, src: int, unit: int, *, backwards: bool = False, rounds: int = 1) -> Racer:
    """UFFDIO_COPY unit by unit, from ``src`` on."""
    start, stride, count = _stepped(where, unit, backwards=backwards)
    args = (start, src + start - where.start, unit, 0, 0)
    return Racer(
        f"UFFDIO_COPY to {where}", lib.UFFD_RACE_IOCTL, uapi.UFFDIO_COPY, args, (stride, stride), count,
        rounds, fd=uffd.fd, output=4, again=(EAGAIN,),
    )  # fmt: skip


def mover(
    uffd: Uffd, dst: int, src: int, unit: int, count: int, *, stride: int | None = None, again: tuple[int, ...] = ()
) -> Racer:
    """UFFDIO_MOVE unit by unit, without ALLOW_SRC_HOLES."""
    stride = stride or unit
    return Racer(
        f"UFFDIO_MOVE to {dst:#x}", lib.UFFD_RACE_IOCTL, uapi.UFFDIO_MOVE, (dst, src, unit, 0, 0), (stride, stride),
        count, fd=uffd.fd, output=4, again=again,
    )  # fmt: skip


def continuer(uffd: Uffd, where: Range, unit: int) -> Racer:
    """UFFDIO_CONTINUE unit by unit."""
    return Racer(
        f"UFFDIO_CONTINUE of {where}", lib.UFFD_RACE_IOCTL, uapi.UFFDIO_CONTINUE, (where.start, unit, 0, 0), (unit,),
        where.len // unit, fd=uffd.fd, output=3, again=(EAGAIN,),
    )  # fmt: skip


def zeroer(uffd: Uffd, where: Range, unit: int, *, backwards: bool = False) -> Racer:
    """UFFDIO_ZEROPAGE unit by unit."""
    start, stride, count = _stepped(where, unit, backwards=backwards)
    return Racer(
        f"UFFDIO_ZEROPAGE of {where}", lib.UFFD_RACE_IOCTL, uapi.UFFDIO_ZEROPAGE, (start, unit, 0, 0), (stride,), count,
        fd=uffd.fd, output=3, again=(EAGAIN,),
    )  # fmt: skip


def protector(
    uffd: Uffd, where: Range, unit: int, mode: WriteprotectMode = WriteprotectMode.WP, *, rounds: int = 1
) -> Racer:
    """UFFDIO_WRITEPROTECT unit by unit."""
    args = (where.start, unit, int(mode))
    what = f"UFFDIO_WRITEPROTECT of {where}"
    return Racer(
        what, lib.UFFD_RACE_IOCTL, uapi.UFFDIO_WRITEPROTECT, args, (unit,), where.len // unit, rounds, fd=uffd.fd
    )


def rwprotector(uffd: Uffd, where: Range, unit: int, mode: RwprotectMode, *, rounds: int = 1) -> Racer:
    """UFFDIO_RWPROTECT unit by unit."""
    args = (where.start, unit, int(mode))
    what = f"UFFDIO_RWPROTECT({mode}) of {where}"
    return Racer(what, lib.UFFD_RACE_IOCTL, uapi.UFFDIO_RWPROTECT, args, (unit,), where.len // unit, rounds, fd=uffd.fd)


def waker(uffd: Uffd, where: Range, *, rounds: int = COMPANION) -> Racer:
    """UFFDIO_WAKE of the whole range."""
    what, args = f"UFFDIO_WAKE of {where}", (where.start, where.len)
    return Racer(what, lib.UFFD_RACE_IOCTL, uapi.UFFDIO_WAKE, args, (), 1, rounds, fd=uffd.fd)


def adviser(where: Range, unit: int, advice: Advice, *, rounds: int = 1) -> Racer:
    """madvise(2) unit by unit."""
    args = (where.start, unit, int(advice))
    number = syscalls.number("madvise")
    return Racer(f"{advice} of {where}", lib.UFFD_RACE_SYSCALL, number, args, (unit,), where.len // unit, rounds)


def remapper(one: Range, other: int, *, rounds: int = 1) -> Racer:
    """mremap(2) of a range to another place, where nothing is lost, and back."""
    args = (one.start, one.len, one.len, MREMAP_MAYMOVE | MREMAP_FIXED, other)
    way = other - one.start
    what, number = f"mremap(2) of {one}", syscalls.number("mremap")
    return Racer(what, lib.UFFD_RACE_SYSCALL, number, args, (way, 0, 0, 0, -way), 2, rounds)


def vm_reader(where: Range, unit: int, *, rounds: int = 1) -> Racer:
    """Have the kernel look pages up: process_vm_readv(2) of the first byte of each unit, by this process of itself."""
    count = where.len // unit
    byte = ffi.new("char[1]")
    # struct iovec: where the byte goes, then where it comes from, one a step
    places = [int(ffi.cast("uintptr_t", byte)), *range(where.start, where.end, unit)]
    vectors = ffi.new("uint64_t[]", [word for place in places for word in (place, 1)])
    local = int(ffi.cast("uintptr_t", vectors))
    args = (os.getpid(), local, 1, local + 16, 1, 0)
    what, number = f"process_vm_readv(2) of {where}", syscalls.number("process_vm_readv")
    return Racer(what, lib.UFFD_RACE_SYSCALL, number, args, (0, 0, 0, 16), count, rounds, keeps=(byte, vectors))


class Outcomes(Counter[int]):
    """How often a racer's steps ended how: by errno, 0 for success, from UFFD_RACE_SIGNALS on by signal."""

    def __init__(self, what: str, counts: dict[int, int]) -> None:
        super().__init__(counts)
        self.what = what

    def __str__(self) -> str:
        return ", ".join(f"{count} times {_outcome_name(outcome)}" for outcome, count in self.items()) or "nothing"

    def expect_only(self, *outcomes: int) -> None:
        """Assert that no other outcome came; SUCCESS is one."""
        if set(self) - set(outcomes):
            if "mremap" in self.what and not moves_hugepages() and {EINVAL, EFAULT} & set(self):
                raise Skip(f"{self.what}: {self}: kernel cannot move huge pages (Linux 5.16)")
            if str(Advice.DONTNEED) in self.what and not drops_hugepages() and EINVAL in self:
                raise Skip(f"{self.what}: {self}: kernel cannot drop huge pages (Linux 5.18)")
            wanted = " or ".join(map(_outcome_name, outcomes))
            raise AssertionError(f"{self.what}: expected {wanted}; got {self}")


def _outcome_name(outcome: int) -> str:
    if outcome >= lib.UFFD_RACE_SIGNALS:
        return {7: "SIGBUS", 11: "SIGSEGV"}.get(outcome - lib.UFFD_RACE_SIGNALS, f"signal {outcome}")
    return errno_name(outcome) if outcome else "success"


class Race:
    """A race, in a ``with`` block: it starts at once; leaving the block waits until it is over.

    AssertionError when a racer does not come to its end within the deadline, with how far each came, and when the
    output field of a fill does not say what its errno says. Skip where there cannot be so many threads.
    """

    def __init__(self, *racers: Racer) -> None:
        self._racers = racers
        self._native: Any = ffi.new("struct uffd_racer[]", [_native(racer) for racer in racers])
        self._race: Any = ffi.NULL
        self._waiter: Waiter | None = None

    def __enter__(self) -> Race:
        race = self._race = lib.uffd_race_start(self._native, len(self._racers))
        if race == ffi.NULL:
            name = errno.errorcode.get(ffi.errno, str(ffi.errno))
            if ffi.errno in (errno.EAGAIN, errno.ENOMEM):
                raise Skip(f"{len(self._racers)} threads: pthread_create: {name}: raise RLIMIT_NPROC and pids.max")
            raise KernelError(ffi.errno, "pthread_create")
        self._waiter = Waiter(lambda: lib.uffd_race_join(race)).__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        lib.uffd_race_finish(self._race)
        if kind is None:
            self._wait()

    @property
    def run(self) -> bool:
        """Whether all racers that have an end have come to it."""
        return all(native.steps == native.count * native.rounds for native in self._native if native.rounds)

    def steps(self, number: int) -> int:
        """How many steps a racer, counted from 0 on, has made so far."""
        steps: int = self._native[number].steps
        return steps

    def reached(self, number: int, steps: int) -> None:
        """Wait until a racer, counted from 0 on, has made so many steps."""
        native, what = self._native[number], self._racers[number].what
        end = time.monotonic() + DEADLINE
        while native.steps < steps:  # without a pause, in which the race would be over
            if time.monotonic() > end:
                raise AssertionError(f"expected {what} to make {steps} steps within {DEADLINE:g} seconds")
            os.sched_yield()

    def _wait(self) -> None:
        assert self._waiter
        before = -1
        while not self._waiter.done:  # as long as there are steps: a busy machine makes few of them
            steps = sum(native.steps for native in self._native if native.rounds)
            if steps == before:
                raise AssertionError(f"expected the race to go on within {DEADLINE:g} seconds; {self._progress()}")
            before = steps
            self._waiter.join(DEADLINE)
        for racer, native in zip(self._racers, self._native, strict=True):
            if native.wrong_outputs:
                text = f"{racer.what}: {native.wrong_outputs} times the output field is neither the length nor -errno"
                raise AssertionError(text)

    def _progress(self) -> str:
        unfinished = [
            f"{racer.what}: {native.steps} of {racer.count * racer.rounds} steps done, {_outcomes(racer, native)}"
            for racer, native in zip(self._racers, self._native, strict=True)
            if native.steps < native.count * native.rounds
        ]
        return "; ".join(unfinished[:3]) or "all racers have ended, but a companion has not"

    @property
    def outcomes(self) -> list[Outcomes]:
        """What became of the steps of each racer, in their order; final when the race is over."""
        return [_outcomes(racer, native) for racer, native in zip(self._racers, self._native, strict=True)]


def _native(racer: Racer) -> dict[str, Any]:
    def words(values: Sequence[int]) -> list[int]:
        return [value % (1 << 64) for value in values]

    return {
        "kind": racer.kind,
        "fd": racer.fd,
        "number": racer.number,
        "args": words(racer.args),
        "strides": words(racer.strides),
        "count": racer.count,
        "rounds": racer.rounds,
        "output": racer.output,
        "again": racer.again,
    }


def _outcomes(racer: Racer, native: Any) -> Outcomes:
    return Outcomes(racer.what, {outcome: count for outcome, count in enumerate(native.outcomes) if count})


def run_race(*racers: Racer) -> list[Outcomes]:
    """Run a race and return what became of the steps of each racer."""
    with Race(*racers) as race:
        pass
    return race.outcomes
