# SPDX-License-Identifier: GPL-2.0-only
"""What a launcher does for a run: plain cases, and all else that touches the kernel under test.

That is probing, changing the machine and putting it back, and listening to what the kernel has to say.
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import importlib
import io
import os
import random
import struct
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from uffd_selftests.catalog.contract import functions
from uffd_selftests.harness import plain, proc
from uffd_selftests.harness.health import NOTE, HugepageUse, KernelHealth
from uffd_selftests.harness.isolation import Ending, How
from uffd_selftests.harness.plain import Lacking, Passed, Task
from uffd_selftests.machine.facts import KMSG, probe
from uffd_selftests.machine.hugepages import HugepagePool, lack_of_hugepages
from uffd_selftests.machine.hugetlb_cgroup import hugetlb_limit
from uffd_selftests.machine.kvm import hold_machine, probe_kvm
from uffd_selftests.machine.repair import repair
from uffd_selftests.machine.system import available_memory

if TYPE_CHECKING:
    from collections.abc import Iterator

    from uffd_selftests.harness.isolation import Send, Work

RNDADDENTROPY = 0x40085203  # include/uapi/linux/random.h: _IOW('R', 0x03, int[2])
RNDRESEEDCRNG = 0x5207
RAND_POOL_INFO = struct.Struct("=ii")
"""struct rand_pool_info: bits of entropy and bytes that follow."""

MAX_LOG_BYTES = 8 << 20
MEMORY_SHARE = 0.5
"""A guest with less than this share of the memory that it had at first has lost some."""


class Setting(TypedDict, total=False):
    """What holds for all tasks, as plain data; what is not there stays as it is."""

    environ: dict[str, str]
    """The environment of the cases, in place of that which is there, or of what it has of UFFD_."""
    path: list[str]
    """Where Python looks for modules."""
    hugepage_size: int
    sole: bool
    """Nobody else runs cases now, so that what the kernel says and loses is the doing of the case."""
    kmsg: bool
    """Note in the kernel's log which case begins."""
    hugepages: int
    """How many free ones there shall be; whoever asks for some takes care of the machine."""
    now: float
    """Seconds since the epoch: what the machine's clock shall show."""
    entropy: str
    """Hexadecimal digits for the kernel's random numbers, which are else the same in all machines of one file."""


class Cases:
    """Plain cases as a launcher's jobs."""

    def __init__(self, describe: plain.Describe | None = None, *, own_machine: bool = False) -> None:
        """Own machine: it is there for the cases alone, and everything is loaded at once."""
        self.ready = False
        self.fragile = own_machine
        self._describe = describe
        self._own_machine = own_machine
        self._kmsg = -1
        self._hugepage_size = 0
        self._limited = False
        """A cgroup has a limit on huge pages."""
        self._sole = False
        self._memory = 0
        self._pages = self._pages_at_first = HugepageUse(0)
        self._pool: HugepagePool | None = None
        self._held: list[int] = []
        """Descriptors of a virtual machine that is there as long as this one."""
        self._cleanup = contextlib.ExitStack()
        self._variants: dict[str, tuple[str, ...]] = {}
        """Those of all cases, by their names."""
        self._before: proc.Descriptors | None = None
        """Of a child, before its first case; it does another one only when that has changed nothing."""

    def preload(self) -> None:
        """Load what all cases need."""
        importlib.import_module("uffd_selftests.common")
        if self._own_machine:
            self._variants = {case.name: case.variants for case, _ in functions() if case.variants}
        self._health = KernelHealth()
        gc.freeze()
        gc.enable()

    def close(self) -> dict[str, object]:
        """Put the machine back; say what no single case can be blamed for."""
        found: dict[str, object] = {
            "complaints": self._health.complaints(),
            "lost": [] if self._own_machine else self._pages_at_first.lost(),
            "tainted": self._health.taints(),
            "unreadable": self._health.unreadable,
            "records": self._health.records,
            "stress": _text(os.environ.get("UFFD_STRESS_LOG", "")) if self._own_machine else "",
        }
        self._cleanup.close()
        self._pool = None
        return found

    # ---- what can be asked for ----

    def answer(self, name: str, *arguments: Any) -> object:
        """Do what can be asked for: the methods whose names begin with ask_."""
        method = getattr(self, f"ask_{name}")
        return method(*arguments)

    def ask_survey(self) -> dict[str, object]:
        """Look at the kernel; what it says counts from here on.

        Variants of cases can depend on it, as on the sizes of its huge pages: where all are loaded they are told.
        """
        return {"facts": probe().to_dict(), "unreadable": self._health.unreadable, "variants": self._variants}

    def ask_kvm(self) -> dict[str, str | None]:
        """Try a virtual processor; on a machine of its own keep one, too."""
        if self._own_machine and not self._held:
            with contextlib.suppress(OSError):
                self._held = hold_machine()
        return probe_kvm()

    def ask_set_up(self, setting: Setting) -> dict[str, Any]:
        """Take over from pytest's process what cases can see of it, and make the machine ready."""
        if "now" in setting:
            with contextlib.suppress(OSError):
                time.clock_settime(time.CLOCK_REALTIME, setting["now"])
        if "entropy" in setting:
            _stir(bytes.fromhex(setting["entropy"]))
        if "path" in setting:
            os.environ.clear()
            sys.path[:] = setting["path"]
        os.environ.update(setting["environ"])
        self._hugepage_size = setting["hugepage_size"]
        self._limited = hugetlb_limit(self._hugepage_size) is not None
        self._sole = setting["sole"]
        if setting.get("kmsg") and self._kmsg < 0:
            self._kmsg = os.open(KMSG, os.O_WRONLY | os.O_CLOEXEC)
        if not self.ready:
            self._null = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
            self._captures = (_Capture(1, "stdout"), _Capture(2, "stderr"))
        self.ready = True
        if "hugepages" in setting:
            self._care(setting["hugepages"])
        if self._own_machine:
            self._memory = available_memory() or 0
        added = {"size": self._pool.size, "added": self._pool.added} if self._pool else None
        return {"shortage": self._pool.shortage if self._pool else None, "hugepages": added}

    def _care(self, pages: int) -> None:
        repair()
        self._cleanup.callback(repair)  # a case that was killed may have left a setting changed
        self._pages_at_first = HugepageUse(self._hugepage_size)
        if pages:
            self._pool = self._cleanup.enter_context(HugepagePool(self._hugepage_size, pages))

    def ask_supply(self, folder: str, files: dict[str, str]) -> None:
        """Have case files that do not come with the package: their text by their path below a folder."""
        for name, text in files.items():
            path = Path(folder, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, "utf-8", "surrogateescape")
        if folder not in sys.path:
            sys.path.insert(0, folder)
        importlib.invalidate_caches()

    def ask_begin(self, pages: int) -> str | None:
        """Look how many huge pages are taken; return why a test that runs elsewhere cannot have so many."""
        return self._lack(pages)

    def ask_end(self) -> dict[str, list[str]]:
        """Say what a test that ran elsewhere has left behind, and what the kernel said meanwhile."""
        return {
            "leftovers": self._pages.lost() if self._sole else [],
            "complaints": self._health.complaints() if self._sole else [],
        }

    ask_finish = close

    # ---- what a launcher asks ----

    def _lack(self, pages: int) -> str | None:
        self._pages = HugepageUse(self._hugepage_size if pages else 0)
        looks = self._limited or self._pages.available < pages  # to look at limits in each case's time would cost
        return lack_of_hugepages(self._hugepage_size, pages) if looks else None

    def begin(self, task: list[Any], *, early: bool) -> Ending | None:
        """Look for huge pages; a case may be early while the kernel is silent."""
        refusal = Ending(How.DONE, "", [], [], [], 0.0)
        if early and self._health.listen():
            return refusal
        wanted = Task(*task)
        if lacking := self._lack(wanted.hugepages):
            refusal.records.append(plain.pack(Lacking(lacking)))
            return refusal
        if self._kmsg >= 0:
            with contextlib.suppress(OSError):
                os.write(self._kmsg, f"{NOTE}{wanted.name}\n".encode())
        return None

    def find(self, task: list[Any]) -> Work:
        """Make the process ready for a case and return what runs it."""
        wanted = Task(*task)
        cpus = sorted(_cpus_at_first)
        plain.keep_to({cpus[wanted.cpu % len(cpus)]} if wanted.cpu is not None else set(cpus))
        if os.getpriority(os.PRIO_PROCESS, 0) != wanted.nice:
            with contextlib.suppress(PermissionError):  # only the privileged can be less nice again
                os.setpriority(os.PRIO_PROCESS, 0, wanted.nice)
        if wanted.captured:
            os.dup2(self._null, 0)
            for capture in self._captures:
                capture.install()
        self._before = before = self._before or proc.Descriptors()
        return lambda send: self._call(wanted, send, before)

    def _call(self, task: Task, send: Send, descriptors: proc.Descriptors) -> bool:
        """Run a case and send what became of it; return whether it went as it should."""
        well = False
        for outcome in plain.perform(task, self._describe):
            if isinstance(outcome, dict):
                send(outcome)
                continue
            send(plain.pack(outcome), at_once=not isinstance(outcome, Passed))  # after which comes little
            if isinstance(outcome, Passed):
                well = descriptors.are_the_same() or not plain.send_leaks(send)
            elif isinstance(outcome, plain.Expected):
                well = True
        return well

    def get_ready(self, task: list[Any]) -> None:
        """Load the module of a case; what is wrong with it, the case will tell."""
        module = Task(*task).module
        if module not in sys.modules:
            with contextlib.suppress(Exception):
                importlib.import_module(module)
                gc.freeze()

    def end(self, task: list[Any], ending: Ending) -> None:  # it is the one that begin() was given
        """Add lost huge pages, what was printed and what the kernel said."""
        immortal = bool(ending.leftovers) and ending.leftovers[-1].endswith("cannot be killed")
        lost = self._pages.lost() if self._sole else []
        ending.leftovers += lost
        ending.printed = [section for capture in self._captures for section in capture.take()]
        if self._sole:
            ending.complaints = self._health.complaints()
        low = self._memory and (available_memory() or 0) < MEMORY_SHARE * self._memory
        ending.damaged = bool(immortal or lost or ending.complaints or low)


_cpus_at_first = os.sched_getaffinity(0)
"""Before a case could change that."""


def _stir(seed: bytes) -> None:
    """Have random numbers of one's own (drivers/char/random.c), in the kernel and in Python."""
    random.seed(seed)
    with contextlib.suppress(OSError), open("/dev/urandom", "wb", buffering=0) as device:
        fcntl.ioctl(device, RNDADDENTROPY, RAND_POOL_INFO.pack(8 * len(seed), len(seed)) + seed)
        fcntl.ioctl(device, RNDRESEEDCRNG)


def _text(path: str) -> str:
    """Return the end of a file; nothing if it is not there."""
    with contextlib.suppress(OSError), open(path, "rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - MAX_LOG_BYTES))
        return file.read().decode(errors="replace")
    return ""


class _Capture:
    """Takes what is written to stdout or stderr."""

    def __init__(self, number: int, name: str) -> None:
        self._number = number
        self._name = name
        self._fd = os.memfd_create(name)
        self._file = io.TextIOWrapper(io.FileIO(self._fd, "w", closefd=False), errors="replace", write_through=True)

    def install(self) -> None:
        """Have this process, and those that it starts, write here."""
        if getattr(sys, self._name) is not self._file:
            os.dup2(self._fd, self._number)
            setattr(sys, self._name, self._file)

    def take(self) -> Iterator[tuple[str, str]]:
        """Yield the title and the text of what was written since the last call, if something was."""
        if size := os.fstat(self._fd).st_size:
            text = os.pread(self._fd, size, 0).decode(errors="replace")
            os.ftruncate(self._fd, 0)
            os.lseek(self._fd, 0, os.SEEK_SET)
            yield f"Captured {self._name}", text
