# SPDX-License-Identifier: GPL-2.0-only
"""What /proc says about processes: who belongs to a case, and what each of its tasks is doing (proc(5))."""

from __future__ import annotations

import ctypes
import os
import re
import resource
import signal
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from uffd_selftests.abi.uapi import Feature
from uffd_selftests.toolkit.memory import FIRST_PLACE, LAST_PLACE

if TYPE_CHECKING:
    from collections.abc import Container, Iterable, Iterator

INITIALIZED = 1 << 31
"""UFFD_FEATURE_INITIALIZED of fs/userfaultfd.c: UFFDIO_API was called. It is no feature."""

USERFAULTFD_LINK = "anon_inode:[userfaultfd]"

VOLATILE = re.compile(
    "^(?:State|FDSize|SigQ|(?:non)?voluntary_ctxt_switches|Vm(?:Peak|Size|HWM|RSS|Data|Stk|Exe|Lib|PTE|Swap)|RssAnon|RssFile"
    "|Cpus_allowed(?:_list)?"  # each case gets its own
    "):.*\n?",
    re.MULTILINE,
)
"""Lines of /proc/PID/status that say nothing of what a process has changed."""

FATAL = (signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE, signal.SIGABRT)
"""Signals that faulthandler handles: /proc/PID/status does not show when somebody else does instead."""

NAMESPACES = ("cgroup", "ipc", "mnt", "net", "pid_for_children", "time_for_children", "user", "uts")
"""What unshare(2) and setns(2) can change of the calling process: names in /proc/PID/ns."""

LIMITS = {getattr(resource, name) for name in dir(resource) if name.startswith("RLIMIT_")}

PR_GET_TIMERSLACK = 30  # include/uapi/linux/prctl.h

_libc = ctypes.CDLL(None)

SETTLE_SECONDS = 0.005

MAX_FRAMES = 10
MAX_TASKS = 40


@dataclass(frozen=True)
class Process:
    """One line of /proc/PID/stat."""

    pid: int
    name: str
    state: str
    parent: int
    group: int

    def __str__(self) -> str:
        return f"{self.pid} ({self.name}) {self.state}"


def processes() -> dict[int, Process]:
    """Return every process that can be seen, by process ID."""
    found = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit() and (process := _process(int(entry))):
            found[process.pid] = process
    return found


def _process(pid: int) -> Process | None:
    stat = _read(f"/proc/{pid}/stat")
    before, _, after = stat.rpartition(") ")  # the name may hold blanks and brackets, what follows it may not
    if not before:
        return None
    state, parent, group = after.split()[:3]
    return Process(pid, before.partition("(")[2], state, int(parent), int(group))


def children(parent: int, but: Container[int] = ()) -> dict[int, Process]:
    """Return the direct children of a process, zombies included, but for some."""
    if lists_children():
        tasks = os.listdir(f"/proc/{parent}/task")
        pids = [int(pid) for tid in tasks for pid in _read(f"/proc/{parent}/task/{tid}/children").split()]
        return {pid: process for pid in pids if pid not in but and (process := _process(pid))}
    return {pid: process for pid, process in processes().items() if process.parent == parent and pid not in but}


def has_children() -> bool:
    """Whether this process has any child, zombies included."""
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True


def lists_children() -> bool:
    """Whether the kernel lists a process's children (proc_tid_children(5)): else all processes must be looked at."""
    return os.path.exists(f"/proc/self/task/{os.getpid()}/children")


def family(pid: int, adopted: Iterable[int] = ()) -> list[Process]:
    """Return a process, the members of its group, the adopted ones, and all their descendants, oldest first."""
    everyone = processes()
    members = {pid, *adopted} | {process.pid for process in everyone.values() if process.group == pid}
    grown = True
    while grown:
        more = {process.pid for process in everyone.values() if process.parent in members} - members
        members |= more
        grown = bool(more)
    return [everyone[member] for member in sorted(members) if member in everyone]


def hugetlb_users() -> list[int]:
    """Return the processes that have huge pages mapped now (HugetlbPages in /proc/PID/status)."""
    mapped = re.compile(r"^HugetlbPages:\s+[1-9]", re.MULTILINE)
    return [pid for pid in processes() if mapped.search(_read(f"/proc/{pid}/status"))]


def userfaultfds(pid: int | str = "self") -> list[int]:
    """Return the descriptors of a process that are userfaultfds; empty when it cannot be looked into."""
    return sorted(int(fd) for fd, link in _links(pid) if link == USERFAULTFD_LINK)


def _links(pid: int | str) -> Iterator[tuple[str, str]]:
    folder = f"/proc/{pid}/fd"
    try:
        entries = os.listdir(folder)
    except OSError:
        return
    for entry in entries:
        try:
            yield entry, os.readlink(f"{folder}/{entry}")
        except OSError:  # the descriptor with which the folder itself was read, or the process is gone
            continue


class Descriptors:
    """The open descriptors of this process when this is made."""

    def __init__(self) -> None:
        self._count = self._now()
        self._files = {int(fd): self._file(int(fd)) for fd in os.listdir("/proc/self/fd")}

    @staticmethod
    def _now() -> int:
        return os.stat("/proc/self/fd").st_size  # proc_pid_fd(5): how many there are, since Linux 6.2; before, 0

    @staticmethod
    def _file(fd: int) -> tuple[int, int, int] | None:
        """Return what a descriptor is open on; None for that with which the folder was read."""
        try:
            file = os.fstat(fd)
        except OSError:
            return None
        return file.st_dev, file.st_ino, file.st_mode

    def are_the_same(self) -> bool:
        """Whether none has come, gone or become another; raises OSError when nobody can say."""
        if self._count and self._now() != self._count:
            return False
        files = self._files if self._count else {int(fd): None for fd in os.listdir("/proc/self/fd")}
        return files.keys() == self._files.keys() and all(self._file(fd) == file for fd, file in self._files.items())


class State:
    """What this process may change of itself and would keep: rights, limits, signals, descriptors, children...

    It is kept as it is when this is made. Of memory only what is shared, locked, of huge pages or in the place of the
    cases: Python itself takes more and more of the rest.
    """

    def __init__(self) -> None:
        self._descriptors = Descriptors()
        self._others = _others()

    def lasts(self) -> bool:
        """Whether it is still the same; soon, for a thread that was joined takes a moment to vanish."""
        until = time.monotonic() + SETTLE_SECONDS
        try:
            while not self._descriptors.are_the_same() or _others() != self._others:
                if time.monotonic() > until:
                    return False
                time.sleep(SETTLE_SECONDS / 10)
        except OSError:  # without rights, descriptors, a folder or /proc it cannot even look
            return False
        return True


def _others() -> list[object]:
    status = VOLATILE.sub("", _read("/proc/self/status"))
    files = [_read(f"/proc/self/{name}") for name in ("cgroup", "oom_score_adj", "coredump_filter", "timers")]
    namespaces = [_link(f"/proc/self/ns/{name}") for name in NAMESPACES]
    limits = [resource.getrlimit(limit) for limit in LIMITS]
    scheduling = [os.sched_getscheduler(0), os.getpriority(os.PRIO_PROCESS, 0), _libc.prctl(PR_GET_TIMERSLACK)]
    timers = [signal.getitimer(timer) for timer in (signal.ITIMER_REAL, signal.ITIMER_VIRTUAL, signal.ITIMER_PROF)]
    handlers = [signal.getsignal(number) for number in FATAL]
    rest = [os.getcwd(), dict(os.environ), has_children()]
    personality = _libc.personality(0xFFFFFFFF)  # changes nothing: personality(2)
    return [status, files, namespaces, limits, scheduling, timers, handlers, personality, _mappings(), *rest]


def _mappings() -> list[bytes]:
    """Return the lines of the mappings that lie where the cases have theirs (memory.map_memory)."""
    fd = os.open("/proc/self/maps", os.O_RDONLY | os.O_CLOEXEC)
    try:
        first = os.read(fd, 128)  # the kernel makes no more lines than that takes
        if int(first.partition(b"-")[0], 16) >= LAST_PLACE:
            return []
        os.lseek(fd, 0, os.SEEK_SET)
        lines: list[bytes] = []
        while chunk := os.read(fd, 1 << 16):  # a page of whole lines, in the order of their addresses
            lines += chunk.splitlines()
            if int(lines[-1].partition(b"-")[0], 16) >= LAST_PLACE:
                break
    finally:
        os.close(fd)
    return [line for line in lines if FIRST_PLACE <= int(line.partition(b"-")[0], 16) < LAST_PLACE]


def describe(members: list[Process]) -> list[str]:
    """Say in lines what the tasks of these processes are blocked in and how their userfaultfds stand.

    The most telling task comes first: one that sleeps in the kernel's userfaultfd code, else the first main thread.
    """
    tasks = [task for process in members for task in _tasks(process)]
    tasks.sort(key=_dullness)
    lines = tasks[:MAX_TASKS]
    if len(tasks) > MAX_TASKS:
        lines.append(f"{len(tasks) - MAX_TASKS} more tasks")
    return lines + [line for process in members for line in _userfaultfd_lines(process.pid)]


def _dullness(task: str) -> int:
    """Rank what is said about a task: first those that wait for somebody to resolve a fault or to read an event."""
    if "handle_userfault" in task or "userfaultfd_event_wait_completion" in task:
        return 0
    return 1 if "userfault" in task else 2


def _tasks(process: Process) -> Iterator[str]:
    try:
        tids = sorted(map(int, os.listdir(f"/proc/{process.pid}/task")))
    except OSError:
        return
    for tid in tids:
        yield _task(process.pid, tid)


def _task(pid: int, tid: int) -> str:
    folder = f"/proc/{pid}/task/{tid}"
    status = dict(line.split(":\t", 1) for line in _read(f"{folder}/status").splitlines() if ":\t" in line)
    wchan = _read(f"{folder}/wchan")
    frames = re.findall(r"^\[<.*?>\] ([^+\s]+)", _read(f"{folder}/stack"), re.MULTILINE)
    # "NUMBER ARGUMENT... STACK PC", "-1 STACK PC" outside of a system call (as in a page fault), or "running"
    call = _read(f"{folder}/syscall").split()
    line = f"task {tid} ({status.get('Name', '?')}) {status.get('State', '?').split()[0]}"
    if wchan not in ("", "0"):
        line += f" in {wchan}"
    if len(call) > 3:
        line += f", system call {call[0]} ({', '.join(call[1:4])})"
    elif call[:1] == ["-1"]:
        line += ", not in a system call"
    if frames:
        line += ": " + " <- ".join(frames[:MAX_FRAMES])
    return line


def _userfaultfd_lines(pid: int) -> Iterator[str]:
    for fd in userfaultfds(pid):
        # fs/userfaultfd.c, userfaultfd_show_fdinfo: "pending:\tN\ntotal:\tN\nAPI:\tAA:FEATURES:IOCTLS\n"
        info = dict(re.findall(r"^(pending|total|API):\s*(\S+)", _read(f"/proc/{pid}/fdinfo/{fd}"), re.MULTILINE))
        line = f"userfaultfd {fd} of {pid}: pending {info.get('pending', '?')}, total {info.get('total', '?')}"
        if match := re.fullmatch(r"[0-9a-f]+:([0-9a-f]+):[0-9a-f]+", info.get("API", "")):
            line += f", features {Feature(int(match[1], 16) & ~INITIALIZED)}"
        yield line


def _link(path: str) -> str:
    """Return where a link of /proc leads; empty when it cannot be read, or the kernel has none."""
    try:
        return os.readlink(path)
    except OSError:
        return ""


def _read(path: str) -> str:
    """Return the text of a /proc file without the last line end; empty when it cannot be read (EPERM, ESRCH...)."""
    try:
        with open(path, "rb", buffering=0) as file:
            return file.readall().decode(errors="replace").rstrip("\n")
    except OSError:
        return ""
