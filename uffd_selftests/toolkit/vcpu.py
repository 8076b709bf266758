# SPDX-License-Identifier: GPL-2.0-only
"""Virtual processors: a machine of KVM without a monitor, whose memory are areas of the case.

A processor executes some bytes of code in flat 32-bit protected mode and comes to its end with an OUT. Its physical
addresses lie like the addresses here, so that KVM can map huge pages as such. A processor has the two calls that
threads have, peek() and poke(), so that whatever waits for a thread's access waits for one of a processor.
"""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from ctypes import addressof, c_uint32
from functools import partial
from types import TracebackType
from typing import NamedTuple

from uffd_selftests.abi import kvm, syscalls
from uffd_selftests.abi.kvm import Cap, Exit
from uffd_selftests.abi.uapi import PagefaultFlag
from uffd_selftests.machine.kvm import open_kvm
from uffd_selftests.mem_types import Area
from uffd_selftests.toolkit.access import Trap, peek, poke
from uffd_selftests.toolkit.context import Context
from uffd_selftests.toolkit.expectations import Skip, eventually, expect, promise
from uffd_selftests.toolkit.faulting import NEW, faulting, undisturbed
from uffd_selftests.toolkit.handle import KERNEL_FAULTS, Uffd
from uffd_selftests.toolkit.memory import MAP_ANONYMOUS, MAP_PRIVATE, PAGE_SIZE, Range, map_memory, unmap
from uffd_selftests.toolkit.threads import Waiter, handled

__all__ = [
    "Cap",
    "KVM",
    "KVM_PAGING",
    "Machine",
    "Processor",
    "Program",
    "PROGRAM",
    "reports_kvm",
    "guest",
    "vcpu_faulting",
    "vcpu_access",
    "vcpu_trapped",
    "expect_vcpu_trapped",
    "expect_vcpu_free",
    "expect_vcpu_sees",
    "fetched",
    "require_cap",
    "signals_of_kvm",
    "sweeping",
]

KVM = ("kernel_faults", "kvm")
"""What a case needs that has a virtual processor; its faults are the kernel's, for which see reports_kvm()."""
KVM_PAGING = ("kernel_faults", "kvm", "kvm_paging")
"""The same for one to which it matters that an access is a fault of a page, not the kernel's own."""

OWN_BYTES = 0x40000
CODE = 0x1000
STEPS = 0x8000
"""Where a processor notes how far it is: a word for each of them, in a cache line of its own."""
BUFFERS = 0x10000
"""A page for each processor, for more bytes than a register has."""
FIRST, WINDOW = 0x40000000, 0x40000000
"""Where the areas are in the guest's physical memory, each in a window of its own."""
ALIGNMENT = WINDOW // 2
"""By how much a place in the guest's memory lies like the one here, so that KVM can map huge pages as such."""
DONE = 0x0F
"""The port that says that a program has come to its end."""
OUT = bytes([0xE6, DONE])


def reports_kvm(ctx: Context) -> None:
    """Have a handle that reports faults of the kernel, which those of a processor are."""
    ctx.uffd = Uffd.open(ctx.features, KERNEL_FAULTS)


class Program(NamedTuple):
    """Code, and where it lies."""

    code: bytes
    place: int


def _programs() -> dict[str, Program]:
    codes = {
        "load": "8b07",  # mov eax, [edi]
        "load byte": "8a07",  # mov al, [edi]
        "store": "8907",  # mov [edi], eax
        "store byte": "8807",  # mov [edi], al
        "increment": "f0ff07",  # lock inc dword [edi]
        "copy": "fcf3a4",  # cld; rep movsb
        # ecx times: increment [edi], then the own word at [esi]
        "count": "f0ff07 ff06 49 75f8",
        # ecx times: increment a word in eax pages from ebx on, ebp bytes apart, then the own word at [esi]
        "sweep": "89df 89c2 f0ff07 01ef 4a 75f8 ff06 49 75ef",
        # the same, but each word is only compared with esp, and those that differ are counted at [esi + 4]
        "check": "89df 89c2 3927 7403 ff4604 01ef 4a 75f4 ff06 49 75eb",
    }
    found, place = {}, CODE
    for name, code in codes.items():
        found[name] = Program(bytes.fromhex(code) + OUT, place)
        place += 64
    return found


PROGRAM = _programs()
FETCHED = 0xB8
"""The code of what a fetch finds: mov eax, with 4 bytes that follow, then OUT."""


class Machine:
    """A virtual machine, in a ``with`` block: areas of this process are its memory, and it has some processors.

    With ``irqchip`` KVM has the interrupt controllers itself, and answers faults asynchronously where it can; with
    ``log_dirty`` it keeps a log of the pages that were written; with ``private`` pages can be private to the guest.
    """

    def __init__(
        self,
        *memory: Area | Range,
        processors: int = 1,
        irqchip: bool = False,
        log_dirty: bool = False,
        private: bool = False,
    ) -> None:
        self.memory = [each if isinstance(each, Range) else each.range for each in memory]
        self._own = Range(map_memory(OWN_BYTES, flags=MAP_PRIVATE | MAP_ANONYMOUS), OWN_BYTES)
        self.system = open_kvm()
        kind = kvm.VM_SW_PROTECTED if private else kvm.VM_DEFAULT
        if private and not kvm.call(self.system, kvm.CHECK_EXTENSION, "CHECK_EXTENSION", Cap.VM_TYPES) >> kind & 1:
            os.close(self.system)
            raise Skip("/dev/kvm: no KVM_X86_SW_PROTECTED_VM: boot a kernel with CONFIG_KVM_SW_PROTECTED_VM")
        self.processors: list[Processor] = []
        try:
            self.vm = kvm.Vm(self.system, irqchip=irqchip, kind=kind)
        except OSError:
            os.close(self.system)
            unmap(self._own)
            raise
        try:
            for program in PROGRAM.values():
                poke(self.own(program.place), program.code)
            self.vm.set_slot(0, 0, self._own.start, self._own.len)
            for number, where in enumerate(self.memory):
                flags = kvm.MEM_LOG_DIRTY_PAGES if log_dirty else 0
                self.vm.set_slot(number + 1, self._base(number), where.start, where.len, flags)
            for number in range(processors):
                self.processors.append(Processor(self, number))
        except OSError:
            self.close()
            raise

    def own(self, gpa: int) -> int:
        """Return where a place in the machine's own memory lies in this process."""
        return self._own.start + gpa

    def _base(self, number: int) -> int:
        where = self.memory[number]
        if where.len > ALIGNMENT:
            raise Skip(f"{where.len >> 20} MiB do not fit into the guest's memory: pages are too large")
        return FIRST + number * WINDOW + where.start % ALIGNMENT

    def gpa(self, address: int) -> int:
        """Return the guest's physical address of one here."""
        for number, where in enumerate(self.memory):
            if where.start <= address < where.end:
                return self._base(number) + address - where.start
        raise ValueError(f"{address:#x} is not in the guest's memory")

    def set_private(self, where: Range) -> None:
        """Make a part of the memory private to the guest."""
        self.vm.set_private(self.gpa(where.start), where.len)

    def dirty_pages(self, number: int = 0) -> list[int]:
        """Return the base pages of a piece of memory written since the last call (KVM_GET_DIRTY_LOG)."""
        return self.vm.dirty_log(number + 1, self.memory[number].len // PAGE_SIZE)

    def close(self) -> None:
        """Close everything."""
        for processor in self.processors:
            processor.vcpu.close()
        self.vm.close()
        os.close(self.system)
        unmap(self._own)

    def __enter__(self) -> Machine:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if kind is None:  # else a processor may sleep in a fault, and its descriptor goes with the process
            self.close()


class Processor:
    """A virtual processor; each method that executes something sleeps in KVM_RUN, without the interpreter's lock."""

    def __init__(self, machine: Machine, number: int) -> None:
        self.machine = machine
        self._number = number
        self._buffer = BUFFERS + number * PAGE_SIZE
        self._steps = STEPS + number * 64
        self.vcpu = kvm.Vcpu(machine.vm, number)

    def begin(self, program: str, **regs: int) -> None:
        """Be about to execute a program."""
        self.vcpu.set_regs(rip=PROGRAM[program].place, **regs)

    def go_on(self) -> int:
        """Execute what was begun to its end; returns eax. KernelError when KVM_RUN fails: EFAULT, EINTR."""
        reason = self.vcpu.run()
        if reason != Exit.IO or self.vcpu.state.io.port != DONE:
            raise AssertionError(f"KVM_RUN: expected the program to come to its end, got {self._told(reason)}")
        return int(self.vcpu.regs().rax) & 0xFFFFFFFF

    def _told(self, reason: int) -> str:
        name = f"KVM_EXIT_{Exit(reason).name}" if reason in set(Exit) else f"exit reason {reason}"
        if reason in (Exit.MMIO, Exit.MEMORY_FAULT):
            name += f" of guest address {self.vcpu.state.details.words[0]:#x}"
        return f"{name} at eip {self.vcpu.regs().rip:#x}"

    def execute(self, program: str, **regs: int) -> int:
        """Execute a program from its beginning to its end; returns eax."""
        self.begin(program, **regs)
        return self.go_on()

    def peek(self, address: int, length: int = 4) -> bytes:
        """Read bytes: up to 4 of them with one load (of 1 or 4), else with as many as there are bytes."""
        if length in (1, 4):
            value = self.execute("load byte" if length == 1 else "load", rdi=self.machine.gpa(address))
            return value.to_bytes(4, "little")[:length]
        parts = []
        for at in range(0, length, PAGE_SIZE):
            part = min(PAGE_SIZE, length - at)
            self.execute("copy", rsi=self.machine.gpa(address + at), rdi=self._buffer, rcx=part)
            parts.append(peek(self.machine.own(self._buffer), part))
        return b"".join(parts)

    def poke(self, address: int, data: bytes) -> None:
        """Write bytes: 1 or 4 of them with one store, else with as many as there are bytes."""
        if len(data) in (1, 4):
            value = int.from_bytes(data, "little")
            self.execute("store byte" if len(data) == 1 else "store", rdi=self.machine.gpa(address), rax=value)
        else:
            poke(self.machine.own(self._buffer), data)
            self.execute("copy", rdi=self.machine.gpa(address), rsi=self._buffer, rcx=len(data))

    def fetch(self, address: int) -> bytes:
        """Execute the code at an address: what fetched() says must be there; returns its 4 bytes."""
        self.vcpu.set_regs(rip=self.machine.gpa(address))
        return self.go_on().to_bytes(4, "little")

    def increment(self, address: int) -> None:
        """Increment a word, with one locked instruction."""
        self.execute("increment", rdi=self.machine.gpa(address))

    def counting(self, address: int, times: int) -> Callable[[], int]:
        """Return a call that increments a word so many times."""
        self._rewind()
        return partial(
            self.execute, "count", rdi=self.machine.gpa(address), rsi=self._steps, rcx=times,
        )  # fmt: skip

    def sweeping(self, where: Range, stride: int, times: int) -> Callable[[], int]:
        """Return a call that so many times increments the first word of each ``stride`` bytes of a range."""
        self._rewind()
        return partial(
            self.execute, "sweep", rbx=self.machine.gpa(where.start), rax=where.len // stride, rbp=stride,
            rsi=self._steps, rcx=times,
        )  # fmt: skip

    def checking(self, where: Range, stride: int, times: int, value: int) -> Callable[[], int]:
        """Return a call that so many times reads the first word of each ``stride`` bytes; ``wrong`` counts others."""
        self._rewind()
        return partial(
            self.execute, "check", rbx=self.machine.gpa(where.start), rax=where.len // stride, rbp=stride,
            rsi=self._steps, rcx=times, rsp=value,
        )  # fmt: skip

    def _rewind(self) -> None:
        poke(self.machine.own(self._steps), bytes(8))

    @property
    def steps(self) -> int:
        """How far counting(), sweeping() or checking() has come."""
        return int(c_uint32.from_address(self.machine.own(self._steps)).value)

    @property
    def wrong(self) -> int:
        """How often checking() has read another value."""
        return int(c_uint32.from_address(self.machine.own(self._steps + 4)).value)

    def stop_early(self) -> None:
        """Have a program that goes round end after this round, once a signal has ended KVM_RUN."""
        self.vcpu.state.immediate_exit = 0
        regs = self.vcpu.regs()
        regs.rcx = 1
        self.vcpu.load(regs)


def fetched(value: bytes) -> bytes:
    """Return the code that fetch() executes, which returns these 4 bytes."""
    return bytes([FETCHED]) + value + OUT


@contextmanager
def guest(*memory: Area | Range, irqchip: bool = False, log_dirty: bool = False) -> Iterator[Processor]:
    """Have a virtual machine with one processor."""
    with Machine(*memory, irqchip=irqchip, log_dirty=log_dirty) as machine:
        yield machine.processors[0]


def require_cap(machine: Machine, cap: Cap, since: str) -> None:
    """Skip where KVM lacks a capability, which came with this release."""
    if not machine.vm.has(cap):
        raise Skip(f"/dev/kvm: no KVM_CAP_{cap.name} (Linux {since})")


def vcpu_access(processor: Processor, access: str, address: int) -> Callable[[], object]:
    """Return a call: a "read" of 4 bytes, a "write" of NEW's first 4, an "increment", or a "fetch" there."""
    if access == "write":
        return partial(processor.poke, address, NEW[:4])
    others = {"read": processor.peek, "fetch": processor.fetch, "increment": processor.increment}
    return partial(others[access], address)


def vcpu_faulting(
    processor: Processor,
    uffd: Uffd,
    address: int,
    access: str = "read",
    *,
    flags: PagefaultFlag | None = None,
    at: int | None = None,
) -> AbstractContextManager[Waiter]:
    """Have a thread in which a processor makes an access that faults; like faulting(), which waits for its message."""
    if flags is None:
        flags = PagefaultFlag.WRITE if access in ("write", "increment") else PagefaultFlag(0)
    return faulting(uffd, address, call=vcpu_access(processor, access, address), flags=flags, at=at)


@contextmanager
def vcpu_trapped(
    processor: Processor, uffd: Uffd, area: Area, page: int, *, flags: PagefaultFlag, access: str = "write"
) -> Iterator[Waiter]:
    """Have a processor access the first bytes of a protected page; somebody has to let it go on.

    A write stores NEW's first bytes, which must be found there, here and by the processor.
    """
    start = area.page(page).start
    with vcpu_faulting(processor, uffd, start, access, flags=flags) as waiter:
        yield waiter
    uffd.expect_no_message()
    if access == "write":
        expect(undisturbed(uffd, partial(processor.peek, start)), NEW[:4], "what the processor reads of what it wrote")
        expect(peek(start, 4), NEW[:4], "what the processor wrote")


def expect_vcpu_trapped(
    processor: Processor,
    uffd: Uffd,
    area: Area,
    *pages: int,
    flags: PagefaultFlag,
    resolve: Callable[[Range], None],
    access: str = "write",
) -> None:
    """Assert that an access to each of the pages is trapped, and goes on when its protection is resolved."""
    for page in pages:
        with promise(f"page {page}, {access} of a processor"):
            before = peek(area.page(page).start, 4) if access == "write" and not flags & PagefaultFlag.RWP else b""
            with vcpu_trapped(processor, uffd, area, page, flags=flags, access=access) as waiter:
                uffd.expect_still_asleep(1)
                if before:
                    expect(peek(area.page(page).start, 4), before, "what is there before the write is let go on")
                resolve(area.page(page))
            if access == "read":
                expect(waiter.result(), peek(area.page(page).start, 4), "what the processor read")


def expect_vcpu_free(processor: Processor, uffd: Uffd, area: Area, pages: Sequence[int], *accesses: str) -> None:
    """Assert that nothing stops these accesses to the pages; a write changes nothing."""
    for page in pages:
        start = area.page(page).start
        for access in accesses:
            with promise(f"page {page}, {access} of a processor"):
                call = partial(processor.poke, start, peek(start, 4)) if access == "write" else None
                undisturbed(uffd, call or vcpu_access(processor, access, start))


def expect_vcpu_sees(processor: Processor, uffd: Uffd, where: Range, data: bytes | None = None) -> None:
    """Assert that a processor reads in a range what is there (or these bytes), all of them, without a message."""
    seen = undisturbed(uffd, partial(processor.peek, where.start, where.len))
    there = peek(where.start, where.len) if data is None else data
    if seen != there:
        first = next(at for at in range(where.len) if seen[at] != there[at])
        text = f"byte {first} of {where}: expected {there[first]:#04x}, got {seen[first]:#04x}"
        raise AssertionError(f"what the processor reads: {text}")


# ---- a processor at work ------------------------------------------------------------------------------------------


class Sweeps:
    """What a processor is at that increments words over and over."""

    def __init__(self, processor: Processor, waiter: Waiter) -> None:
        self._processor = processor
        self._waiter = waiter

    @property
    def steps(self) -> int:
        """How often it has gone over all of them."""
        return self._processor.steps

    def await_sweeps(self, count: int) -> None:
        """Wait until it has gone over all of them so many times more."""
        until = self.steps + count
        eventually(lambda: self._waiter.done or self.steps >= until, "the processor to go on")
        if self._waiter.done:
            self._waiter.result()
            raise AssertionError("expected the processor to go on; it has come to its end")


@contextmanager
def sweeping(processor: Processor, where: Range, stride: int) -> Iterator[Sweeps]:
    """Have a processor increment the first word of each ``stride`` bytes, over and over, while the block runs.

    At the end of the block nothing may stop it: it comes to the end of its round, and all words must have been
    incremented equally often, if they were equal.
    """
    ended = threading.Event()

    def work() -> None:
        call = processor.sweeping(where, stride, 0xFFFFFFFF)
        while True:
            try:
                call()
                return
            except OSError as error:
                if error.errno != errno.EINTR:
                    raise
            if ended.is_set():
                processor.stop_early()
            call = processor.go_on

    with handled(signal.SIGUSR1), Waiter(work) as waiter:
        work_done = Sweeps(processor, waiter)
        yield work_done
        ended.set()
        processor.vcpu.state.immediate_exit = 1
        waiter.signal(signal.SIGUSR1)
        waiter.result()
    first = peek(where.start, 4)
    for start in range(where.start, where.end, stride):
        expect(peek(start, 4), first, f"the counter at {start:#x}, as against the first one")


# ---- signals -------------------------------------------------------------------------------------------------------


class _SigInfo(ctypes.Structure):
    """siginfo_t of a fault, 128 bytes."""

    _fields_ = [
        ("signo", ctypes.c_int32), ("errno", ctypes.c_int32), ("code", ctypes.c_int32), ("padding", ctypes.c_int32),
        ("addr", ctypes.c_uint64), ("addr_lsb", ctypes.c_int16), ("rest", ctypes.c_uint8 * 102),
    ]  # fmt: skip


@contextmanager
def signals_of_kvm(processor: Processor, number: signal.Signals) -> Iterator[Callable[[], Trap]]:
    """Have a signal end KVM_RUN in this thread, and stay pending: the block gets what takes it.

    Monitors do so (KVM_SET_SIGNAL_MASK), for a handler could not tell what the processor was at.
    """

    def take() -> Trap:
        info, none = _SigInfo(), (ctypes.c_int64 * 2)()
        mask = ctypes.c_uint64(1 << number - 1)
        syscalls.call("rt_sigtimedwait", addressof(mask), addressof(info), addressof(none), 8)
        return Trap(signal.Signals(info.signo), info.code, info.addr, info.addr_lsb)

    before = signal.pthread_sigmask(signal.SIG_BLOCK, {number})
    processor.vcpu.set_signal_mask(0)
    try:
        yield take
    finally:
        processor.vcpu.set_signal_mask(None)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
