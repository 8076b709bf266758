# SPDX-License-Identifier: GPL-2.0-only
"""A virtual processor that takes interrupts, and so can do something else while a page is missing.

KVM has the interrupt controllers then, and answers a fault asynchronously where it can: a thread of the kernel waits
for the page, and the processor is halted or, if it has asked for that, told by an exception (Documentation/virt/kvm/x86
/msr.rst, MSR_KVM_ASYNC_PF_EN).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import c_uint32

from uffd_selftests.abi import kvm
from uffd_selftests.abi.kvm import Exit
from uffd_selftests.mem_types import Area
from uffd_selftests.toolkit.access import poke
from uffd_selftests.toolkit.expectations import Skip
from uffd_selftests.toolkit.memory import Range
from uffd_selftests.toolkit.vcpu import DONE, OUT, Cap, Machine, Processor

__all__ = ["PAGE_NOT_PRESENT", "Interruptible", "interruptible"]

HANDLERS, GDT, IDT, APF, NOTES, STACK, PAGES = 0x2000, 0x3000, 0x3100, 0x4000, 0x4100, 0x7000, 0x20000
"""Where all of it lies in the machine's own memory."""
IDLE = HANDLERS + 0x300
INTERRUPTS, ABSENT, TOKEN, READY, READY_TOKEN, REASON = (NOTES + 4 * word for word in range(6))
"""What the handlers note: how many interrupts, exceptions of absent pages with the last token, and ready pages."""
INTERRUPTIBLE = 0x202
"""rflags with interrupts allowed."""

VECTOR, READY_VECTOR, PAGE_FAULT = 0x40, 0x41, 14
APIC_SPURIOUS, APIC_EOI = 0xFEE000F0, 0xFEE000B0
ABSENT_PORT = 0x10
MSR_EN, MSR_INT, MSR_ACK = 0x4B564D02, 0x4B564D06, 0x4B564D07
ENABLED, SEND_ALWAYS, AS_INTERRUPT = 1, 2, 8
KVM_LEAF, ASYNC_PF, ASYNC_PF_INT = 0x40000001, 1 << 4, 1 << 14
EVERYBODY = 0xFFFFFFFF
"""The token of all pages at once."""
PAGE_NOT_PRESENT = 1
"""The reason of an exception, in the words that the guest shares with KVM."""


def _word(value: int) -> str:
    return struct.pack("<I", value).hex()


def _increment(place: int) -> str:
    return f"ff05{_word(place)}"


def _store(place: int, value: int) -> str:
    return f"c705{_word(place)}{_word(value)}"


def _copy(source: int, place: int) -> str:
    return f"a1{_word(source)}a3{_word(place)}"


END_OF_INTERRUPT = _store(APIC_EOI, 0) + "cf"  # iret
CODES = {
    VECTOR: _increment(INTERRUPTS) + END_OF_INTERRUPT,
    # mov eax, cr2; then to whoever runs the processor
    PAGE_FAULT: f"{_increment(ABSENT)}0f20d0a3{_word(TOKEN)}{_copy(APF, REASON)}{_store(APF, 0)}e6{ABSENT_PORT:02x}",
    # mov ecx, MSR_ACK; mov eax, 1; xor edx, edx; wrmsr
    READY_VECTOR: f"{_increment(READY)}{_copy(APF + 4, READY_TOKEN)}{_store(APF + 4, 0)}"
    f"b9{_word(MSR_ACK)}b80100000031d20f30{END_OF_INTERRUPT}",
}
IDLE_CODE = f"fbf390833d{_word(READY)}0074f5"
"""sti; again: pause; cmp dword [READY], 0; je again."""


class Interruptible:
    """A processor with interrupts, in flat 32-bit protected mode.

    With ``told`` it has asked KVM to tell it of absent pages, for which it has its own page tables: 4 GiB as they are.
    """

    def __init__(self, machine: Machine, *, told: bool = False) -> None:
        self.machine = machine
        self.cpu: Processor = machine.processors[0]
        if told:
            self._be_able_to_ask()  # before it has run at all
        descriptors = struct.pack("<QQQ", 0, 0x00CF9B000000FFFF, 0x00CF93000000FFFF)
        self._put(GDT, descriptors)
        for number, (vector, code) in enumerate(CODES.items()):
            place = HANDLERS + number * 0x100
            self._put(place, bytes.fromhex(code))
            self._put(IDT + 8 * vector, struct.pack("<HHHH", place, 8, 0x8E00, 0))
        self._put(IDLE, bytes.fromhex(IDLE_CODE) + OUT)
        sregs = self.cpu.vcpu.sregs()
        sregs.gdt.base, sregs.gdt.limit = GDT, len(descriptors) - 1
        sregs.idt.base, sregs.idt.limit = IDT, 8 * 256 - 1
        if told:  # PSE: 4 MiB an entry, present, writable, for all
            self._put(PAGES, struct.pack("<1024I", *(page << 22 | 0x87 for page in range(1024))))
            sregs.cr3, sregs.cr4, sregs.cr0 = PAGES, sregs.cr4 | 0x10, sregs.cr0 | 1 << 31
        self.cpu.vcpu.load_sregs(sregs)
        self.cpu.execute("store", rdi=APIC_SPURIOUS, rax=0x1FF)  # the local APIC is on
        if told:
            self._ask()

    def _put(self, place: int, data: bytes) -> None:
        poke(self.machine.own(place), data)

    def note(self, place: int) -> int:
        """Return what a handler has noted there."""
        return int(c_uint32.from_address(self.machine.own(place)).value)

    def begin(self, program: str, address: int, value: int = 0) -> None:
        """Be about to load from an address, or to store there, with interrupts allowed."""
        self.cpu.begin(program, rdi=self.machine.gpa(address), rax=value, rsp=STACK, rflags=INTERRUPTIBLE)

    def interrupt(self) -> None:
        """Send the processor an interrupt, whatever it is at."""
        message = kvm.Msi(address_lo=0xFEE00000, data=VECTOR)
        kvm.call(self.machine.vm.fd, kvm.SIGNAL_MSI, "SIGNAL_MSI", message)

    @property
    def interrupts(self) -> int:
        """How many it has taken."""
        return self.note(INTERRUPTS)

    def _be_able_to_ask(self) -> None:
        """Have the processor features that the guest asks with; Skip where there are none."""
        cpuid = kvm.supported_cpuid(self.machine.system)
        leaf = next((entry for entry in cpuid.entries[: cpuid.nent] if entry.function == KVM_LEAF), None)
        if not leaf or ~leaf.eax & (ASYNC_PF | ASYNC_PF_INT):
            raise Skip("/dev/kvm: no KVM_FEATURE_ASYNC_PF_INT (Linux 5.8)")
        kvm.call(self.cpu.vcpu.fd, kvm.SET_CPUID2, "SET_CPUID2", cpuid)

    def _ask(self) -> None:
        for index, value in (MSR_INT, READY_VECTOR), (MSR_EN, APF | ENABLED | SEND_ALWAYS | AS_INTERRUPT):
            done = kvm.call(self.cpu.vcpu.fd, kvm.SET_MSRS, "SET_MSRS", kvm.Msr(nmsrs=1, index=index, data=value))
            if done != 1:
                raise AssertionError(f"KVM_SET_MSRS of {index:#x} = {value:#x}: expected 1 to be set, got {done}")
        told = self.idle()
        if told != (1, EVERYBODY):  # with which KVM begins
            raise AssertionError(f"expected one interrupt that tells of all pages, got {told}")

    @property
    def token(self) -> int:
        """By which the last exception named its page."""
        return self.note(TOKEN)

    def run_to_exception(self) -> int:
        """Execute what was begun until an exception tells of an absent page; return its reason."""
        reason = self.cpu.vcpu.run()
        port = self.cpu.vcpu.state.io.port if reason == Exit.IO else None
        if port != ABSENT_PORT:
            what = "came to its end" if port == DONE else f"got exit reason {reason}"
            raise AssertionError(f"expected an exception that tells of an absent page; the processor {what}")
        return self.note(REASON)

    def idle(self) -> tuple[int, int]:
        """Execute other code until an interrupt tells of a ready page; return how many have, and the last token."""
        self._put(READY, bytes(4))
        self.cpu.vcpu.set_regs(rip=IDLE, rsp=STACK)
        self.cpu.go_on()
        return self.note(READY), self.note(READY_TOKEN)


@contextmanager
def interruptible(*memory: Area | Range, told: bool = False) -> Iterator[Interruptible]:
    """Have a virtual machine with a processor that takes interrupts; Skip where faults are never asynchronous."""
    with Machine(*memory, irqchip=True) as machine:
        if not machine.vm.has(Cap.ASYNC_PF):
            raise Skip("/dev/kvm: no KVM_CAP_ASYNC_PF")
        yield Interruptible(machine, told=told)
