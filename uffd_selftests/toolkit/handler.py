# SPDX-License-Identifier: GPL-2.0-only
"""The fault handler: a native thread that answers the messages of a userfaultfd."""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from types import TracebackType
from typing import Any, NamedTuple

from uffd_selftests.abi import uapi
from uffd_selftests.abi.errors import KernelError, errno_name
from uffd_selftests.abi.native import ffi, lib
from uffd_selftests.abi.uapi import ContinueMode, CopyMode, MoveMode, PoisonMode, ZeropageMode
from uffd_selftests.toolkit.expectations import eventually
from uffd_selftests.toolkit.handle import Uffd
from uffd_selftests.toolkit.memory import Range
from uffd_selftests.toolkit.messages import Message, parse_message

__all__ = ["Action", "Stats", "HandlerError", "FaultHandler", "stats_report"]


class Action(IntEnum):
    """What the handler thread does about a fault."""

    RECORD = lib.UFFD_RECORD
    COPY = lib.UFFD_COPY
    ZEROPAGE = lib.UFFD_ZEROPAGE
    MOVE = lib.UFFD_MOVE
    POISON = lib.UFFD_POISON
    CONTINUE = lib.UFFD_CONTINUE
    UNPROTECT = lib.UFFD_UNPROTECT
    WAKE = lib.UFFD_WAKE


class Stats(NamedTuple):
    """What a handler has seen and done so far."""

    messages: int
    logged: int
    missing: int
    minor: int
    wp: int
    rwp: int
    write: int
    """Missing faults that were writes."""
    fork: int
    remap: int
    remove: int
    unmap: int
    resolved: int
    eexist: int
    eagain: int
    gone: int


class HandlerError(AssertionError):
    """The handler thread met something that it should not have met."""


class FaultHandler:
    """A native thread that answers the messages of a userfaultfd, in a ``with`` block.

    ``where`` is the registered area, ``src`` where COPY and MOVE take its data from; a fault outside the area is an
    error. ``unit`` is how many bytes a fault resolves (default: a page), ``plan`` the actions for missing faults
    unit by unit. ``flip`` is a second mapping of the area through which a minor fault's page is bit flipped first.
    ``retry`` repeats every fill, at the second mapping ``retry_at`` if given, and wants EEXIST. At the end of the
    block the thread answers what is queued and ends; if it met an error, that is raised.
    """

    def __init__(
        self,
        uffd: Uffd,
        where: Range,
        page_size: int,
        *,
        src: Range | None = None,
        unit: int | None = None,
        missing: Action = Action.COPY,
        minor: Action = Action.CONTINUE,
        wp: Action = Action.UNPROTECT,
        rwp: Action = Action.UNPROTECT,
        plan: Sequence[Action] | None = None,
        copy_mode: CopyMode = CopyMode(0),
        zeropage_mode: ZeropageMode = ZeropageMode(0),
        move_mode: MoveMode = MoveMode(0),
        continue_mode: ContinueMode = ContinueMode(0),
        poison_mode: PoisonMode = PoisonMode(0),
        flip: Range | None = None,
        retry: bool = False,
        retry_at: Range | None = None,
        unregister_removed: bool = False,
        blocking: bool = False,
        log_size: int = 64,
        log_events_only: bool = False,
    ) -> None:
        self._plan = ffi.new("uint8_t[]", [int(action) for action in plan]) if plan is not None else ffi.NULL
        self._log = ffi.new("struct uffd_message[]", log_size)
        self._config = ffi.new(
            "struct uffd_handler_config *",
            {
                "uffd": uffd.fd,
                "blocking": blocking,
                "dst": where.start,
                "src": src.start if src else 0,
                "len": where.len,
                "unit": unit or page_size,
                "flip": flip.start if flip else 0,
                "missing": int(missing),
                "minor": int(minor),
                "wp": int(wp),
                "rwp": int(rwp),
                "plan": self._plan,
                "copy_mode": int(copy_mode),
                "zeropage_mode": int(zeropage_mode),
                "move_mode": int(move_mode),
                "continue_mode": int(continue_mode),
                "poison_mode": int(poison_mode),
                "retry": retry,
                "retry_at": retry_at.start if retry_at else 0,
                "unregister_removed": unregister_removed,
                "log": self._log,
                "log_size": log_size,
                "log_events_only": log_events_only,
            },
        )
        self._handler: Any = None
        self._final: Stats | None = None

    def __enter__(self) -> FaultHandler:
        self._handler = lib.uffd_handler_start(self._config)
        if self._handler == ffi.NULL:
            raise KernelError(ffi.errno, "pthread_create")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        lib.uffd_handler_stop(self._handler)
        self._final = self.stats
        failure = self._failure()
        lib.uffd_handler_free(self._handler)
        self._handler = None
        # What the handler met came first: the error in the block is its consequence.
        if failure is not None:
            raise HandlerError(failure) from error

    @property
    def stats(self) -> Stats:
        """Counters; final after the block."""
        if self._final is not None:
            return self._final
        stats = ffi.new("struct uffd_stats *")
        lib.uffd_handler_stats(self._handler, stats)
        return Stats(*(getattr(stats, name) for name in Stats._fields))

    @property
    def messages(self) -> list[Message]:
        """The first ``log_size`` messages, in the order in which they were read; without faults if so asked."""
        return [parse_message(bytes(ffi.buffer(self._log[i].bytes))) for i in range(self.stats.logged)]

    @property
    def children(self) -> list[Uffd]:
        """The descriptors that FORK events brought, oldest first; they belong to the handler and end with it."""
        fds = ffi.new("int[]", 64)
        count = lib.uffd_handler_children(self._handler, fds, len(fds))
        return [Uffd(fds[i]) for i in range(count)]

    @property
    def only_child(self) -> Uffd:
        """The descriptor that the one FORK event brings: the fork may have returned before the handler has noted it."""
        eventually(lambda: bool(self.children), "UFFD_EVENT_FORK")
        (child,) = self.children
        return child

    def _failure(self) -> str | None:
        failure = ffi.new("struct uffd_failure *")
        lib.uffd_handler_failure(self._handler, failure)
        call = f"{uapi.IOCTL_NAMES.get(failure.request, failure.request)} at {failure.address:#x}"
        error = errno_name(failure.err) if failure.err else "success"
        match failure.kind:
            case lib.UFFD_OK:
                return None
            case lib.UFFD_IOCTL_FAILED:
                return f"{call}: expected success, got {error} with output {errno_name(failure.output)}"
            case lib.UFFD_SHORT_OUTPUT:
                return f"{call}: returned 0, expected output {self._config.unit}, got {errno_name(failure.output)}"
            case lib.UFFD_NO_EEXIST:
                output = errno_name(failure.output)
                return f"{call} repeated: expected EEXIST with output -EEXIST, got {error} with output {output}"
            case lib.UFFD_OUTSIDE:
                where = Range(self._config.dst, self._config.len)
                return f"page fault at {failure.address:#x}, outside the registered area {where}"
            case lib.UFFD_UNKNOWN_EVENT:
                return f"unknown event {failure.output:#x}"
            case lib.UFFD_READ_FAILED:
                return f"poll or read of the userfaultfd: {error} (result {failure.output})"
            case _:
                return f"more than {failure.output} forks or postponed faults"


def stats_report(handlers: Sequence[FaultHandler]) -> str:
    """One line with the faults by kind: total, and in brackets the part of each handler (one per CPU, usually)."""
    parts = []
    for kind in ("missing", "minor", "wp", "rwp"):
        counts = [getattr(handler.stats, kind) for handler in handlers]
        if any(counts):
            parts.append(f"{sum(counts)} {kind} ({'+'.join(map(str, counts))})")
    return "userfaults: " + (" ".join(parts) or "none")
