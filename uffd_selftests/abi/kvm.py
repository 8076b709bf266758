# SPDX-License-Identifier: GPL-2.0-only
"""KVM's interface on x86-64: requests, structures, and each request that is used as a call (linux/kvm.h)."""

from __future__ import annotations

import ctypes
import errno
import os
from ctypes import addressof, c_uint8, c_uint16, c_uint32, c_uint64, sizeof
from enum import IntEnum
from typing import Any

from uffd_selftests.abi.errors import checked
from uffd_selftests.abi.native import lib

DEVICE = "/dev/kvm"
API_VERSION = 12
MACHINE = "x86_64"
"""The only architecture whose structures and code are known here (uname -m)."""


class Cap(IntEnum):
    """What KVM_CHECK_EXTENSION is asked for."""

    IRQCHIP = 0
    USER_MEMORY = 3
    DESTROY_MEMORY_REGION_WORKS = 21
    SET_IDENTITY_MAP_ADDR = 37
    ASYNC_PF = 59
    READONLY_MEM = 81
    IMMEDIATE_EXIT = 136
    MANUAL_DIRTY_LOG_PROTECT2 = 168
    ASYNC_PF_INT = 183
    USER_MEMORY2 = 231
    MEMORY_FAULT_INFO = 232
    MEMORY_ATTRIBUTES = 233
    GUEST_MEMFD = 234
    VM_TYPES = 235
    PRE_FAULT_MEMORY = 236
    GUEST_MEMFD_FLAGS = 244


class Exit(IntEnum):
    """Why KVM_RUN returned (kvm_run.exit_reason)."""

    UNKNOWN = 0
    EXCEPTION = 1
    IO = 2
    HYPERCALL = 3
    DEBUG = 4
    HLT = 5
    MMIO = 6
    IRQ_WINDOW_OPEN = 7
    SHUTDOWN = 8
    FAIL_ENTRY = 9
    INTR = 10
    INTERNAL_ERROR = 17
    MEMORY_FAULT = 39


MEM_LOG_DIRTY_PAGES = 1 << 0
MEM_READONLY = 1 << 1
MEM_GUEST_MEMFD = 1 << 2
GUEST_MEMFD_FLAG_MMAP = 1 << 0
GUEST_MEMFD_FLAG_INIT_SHARED = 1 << 1
MEMORY_ATTRIBUTE_PRIVATE = 1 << 3
VM_DEFAULT, VM_SW_PROTECTED = 0, 1
MP_STATE_RUNNABLE = 0


class Segment(ctypes.Structure):
    """struct kvm_segment."""

    _fields_ = [
        ("base", c_uint64), ("limit", c_uint32), ("selector", c_uint16), ("type", c_uint8), ("present", c_uint8),
        ("dpl", c_uint8), ("db", c_uint8), ("s", c_uint8), ("l", c_uint8), ("g", c_uint8), ("avl", c_uint8),
        ("unusable", c_uint8), ("padding", c_uint8),
    ]  # fmt: skip


class Dtable(ctypes.Structure):
    """struct kvm_dtable."""

    _fields_ = [("base", c_uint64), ("limit", c_uint16), ("padding", c_uint16 * 3)]


class Sregs(ctypes.Structure):
    """struct kvm_sregs."""

    _fields_ = [
        *((name, Segment) for name in ("cs", "ds", "es", "fs", "gs", "ss", "tr", "ldt")),
        *((name, Dtable) for name in ("gdt", "idt")),
        *((name, c_uint64) for name in ("cr0", "cr2", "cr3", "cr4", "cr8", "efer", "apic_base")),
        ("interrupt_bitmap", c_uint64 * 4),
    ]


class Regs(ctypes.Structure):
    """struct kvm_regs."""

    _fields_ = [
        (name, c_uint64)
        for name in (
            "rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp", "r8", "r9", "r10", "r11", "r12", "r13", "r14",
            "r15", "rip", "rflags",
        )
    ]  # fmt: skip


class MemoryRegion(ctypes.Structure):
    """struct kvm_userspace_memory_region."""

    _fields_ = [
        ("slot", c_uint32), ("flags", c_uint32), ("guest_phys_addr", c_uint64), ("memory_size", c_uint64),
        ("userspace_addr", c_uint64),
    ]  # fmt: skip


class MemoryRegion2(ctypes.Structure):
    """struct kvm_userspace_memory_region2."""

    _fields_ = [
        ("slot", c_uint32), ("flags", c_uint32), ("guest_phys_addr", c_uint64), ("memory_size", c_uint64),
        ("userspace_addr", c_uint64), ("guest_memfd_offset", c_uint64), ("guest_memfd", c_uint32),
        ("pad1", c_uint32), ("pad2", c_uint64 * 14),
    ]  # fmt: skip


class DirtyLog(ctypes.Structure):
    """struct kvm_dirty_log."""

    _fields_ = [("slot", c_uint32), ("padding", c_uint32), ("dirty_bitmap", c_uint64)]


class Msi(ctypes.Structure):
    """struct kvm_msi."""

    _fields_ = [
        ("address_lo", c_uint32), ("address_hi", c_uint32), ("data", c_uint32), ("flags", c_uint32),
        ("devid", c_uint32), ("pad", c_uint8 * 12),
    ]  # fmt: skip


class CreateGuestMemfd(ctypes.Structure):
    """struct kvm_create_guest_memfd."""

    _fields_ = [("size", c_uint64), ("flags", c_uint64), ("reserved", c_uint64 * 6)]


class MemoryAttributes(ctypes.Structure):
    """struct kvm_memory_attributes."""

    _fields_ = [("address", c_uint64), ("size", c_uint64), ("attributes", c_uint64), ("flags", c_uint64)]


class PreFaultMemory(ctypes.Structure):
    """struct kvm_pre_fault_memory."""

    _fields_ = [("gpa", c_uint64), ("size", c_uint64), ("flags", c_uint64), ("padding", c_uint64 * 5)]


class SignalMask(ctypes.Structure):
    """struct kvm_signal_mask with the 8 bytes of a sigset."""

    _pack_ = 1
    _fields_ = [("len", c_uint32), ("sigset", c_uint64)]


class MpState(ctypes.Structure):
    """struct kvm_mp_state."""

    _fields_ = [("mp_state", c_uint32)]


class Msr(ctypes.Structure):
    """struct kvm_msrs with one entry."""

    _fields_ = [
        ("nmsrs", c_uint32), ("pad", c_uint32), ("index", c_uint32), ("reserved", c_uint32), ("data", c_uint64),
    ]  # fmt: skip


class CpuidEntry(ctypes.Structure):
    """struct kvm_cpuid_entry2."""

    _fields_ = [
        ("function", c_uint32), ("index", c_uint32), ("flags", c_uint32), ("eax", c_uint32), ("ebx", c_uint32),
        ("ecx", c_uint32), ("edx", c_uint32), ("padding", c_uint32 * 3),
    ]  # fmt: skip


CPUID_ENTRIES = 256


class Cpuid(ctypes.Structure):
    """struct kvm_cpuid2 with room for CPUID_ENTRIES."""

    _fields_ = [("nent", c_uint32), ("padding", c_uint32), ("entries", CpuidEntry * CPUID_ENTRIES)]


class _Io(ctypes.Structure):
    _fields_ = [
        ("direction", c_uint8), ("size", c_uint8), ("port", c_uint16), ("count", c_uint32), ("data_offset", c_uint64),
    ]  # fmt: skip


class _Mmio(ctypes.Structure):
    _fields_ = [("phys_addr", c_uint64), ("data", c_uint8 * 8), ("len", c_uint32), ("is_write", c_uint8)]


class _MemoryFault(ctypes.Structure):
    _fields_ = [("flags", c_uint64), ("gpa", c_uint64), ("size", c_uint64)]


class _Details(ctypes.Union):
    _fields_ = [("io", _Io), ("mmio", _Mmio), ("memory_fault", _MemoryFault), ("words", c_uint64 * 32)]


class RunState(ctypes.Structure):
    """struct kvm_run, as far as it is used."""

    _anonymous_ = ("details",)
    _fields_ = [
        ("request_interrupt_window", c_uint8), ("immediate_exit", c_uint8), ("padding1", c_uint8 * 6),
        ("exit_reason", c_uint32), ("ready_for_interrupt_injection", c_uint8), ("if_flag", c_uint8),
        ("flags", c_uint16), ("cr8", c_uint64), ("apic_base", c_uint64), ("details", _Details),
    ]  # fmt: skip


def _request(direction: int, number: int, size: int) -> int:
    return direction << 30 | size << 16 | 0xAE << 8 | number


def _io(number: int) -> int:
    return _request(0, number, 0)


def _iow(number: int, kind: Any, size: int | None = None) -> int:
    return _request(1, number, sizeof(kind) if size is None else size)


def _ior(number: int, kind: Any) -> int:
    return _request(2, number, sizeof(kind))


def _iowr(number: int, kind: Any, size: int | None = None) -> int:
    return _request(3, number, sizeof(kind) if size is None else size)


GET_API_VERSION = _io(0x00)
CREATE_VM = _io(0x01)
CHECK_EXTENSION = _io(0x03)
GET_VCPU_MMAP_SIZE = _io(0x04)
GET_SUPPORTED_CPUID = _iowr(0x05, Cpuid, 8)
CREATE_VCPU = _io(0x41)
GET_DIRTY_LOG = _iow(0x42, DirtyLog)
SET_USER_MEMORY_REGION = _iow(0x46, MemoryRegion)
SET_TSS_ADDR = _io(0x47)
SET_IDENTITY_MAP_ADDR = _iow(0x48, c_uint64)
SET_USER_MEMORY_REGION2 = _iow(0x49, MemoryRegion2)
CREATE_IRQCHIP = _io(0x60)
RUN = _io(0x80)
GET_REGS = _ior(0x81, Regs)
SET_REGS = _iow(0x82, Regs)
GET_SREGS = _ior(0x83, Sregs)
SET_SREGS = _iow(0x84, Sregs)
SET_MSRS = _iow(0x89, Msr, 8)
SET_SIGNAL_MASK = _iow(0x8B, SignalMask, 4)
SET_CPUID2 = _iow(0x90, Cpuid, 8)
SET_MP_STATE = _iow(0x99, MpState)
SIGNAL_MSI = _iow(0xA5, Msi)
SET_MEMORY_ATTRIBUTES = _iow(0xD2, MemoryAttributes)
CREATE_GUEST_MEMFD = _iowr(0xD4, CreateGuestMemfd)
PRE_FAULT_MEMORY = _iowr(0xD5, PreFaultMemory)

TSS_ADDR, IDENTITY_MAP_ADDR = 0xFFFBD000, 0xFFFBC000
"""Where Intel's processors that cannot do without get pages of their own; below 4 GiB, and nobody's memory."""


def call(fd: int, request: int, name: str, argument: Any = 0) -> int:
    """Issue a request without the interpreter's lock; KernelError when it fails."""
    word = argument if isinstance(argument, int) else addressof(argument)
    return checked(lib.uffd_ioctl(fd, request, word), f"KVM_{name}")


class Vcpu:
    """A virtual processor, in flat 32-bit protected mode without paging: its addresses are physical ones."""

    def __init__(self, vm: Vm, number: int) -> None:
        self.fd = call(vm.fd, CREATE_VCPU, f"CREATE_VCPU({number})", number)
        self._map = -1
        try:
            self._length = call(vm.system, GET_VCPU_MMAP_SIZE, "GET_VCPU_MMAP_SIZE")
            self._map = checked(lib.uffd_mmap(0, self._length, 3, 1, self.fd, 0), "mmap(vCPU)")
            self.state = RunState.from_address(self._map)
            self._be_flat()
        except OSError:
            self.close()
            raise

    def _be_flat(self) -> None:
        sregs = self.sregs()
        flat = {"base": 0, "limit": 0xFFFFFFFF, "present": 1, "s": 1, "db": 1, "g": 1}
        for name, kind, selector in ("cs", 11, 8), *((each, 3, 16) for each in ("ds", "es", "fs", "gs", "ss")):
            setattr(sregs, name, Segment(**flat, type=kind, selector=selector))
        sregs.cr0 |= 1
        self.load_sregs(sregs)

    def sregs(self) -> Sregs:
        """Return the special registers."""
        sregs = Sregs()
        call(self.fd, GET_SREGS, "GET_SREGS", sregs)
        return sregs

    def load_sregs(self, sregs: Sregs) -> None:
        """Set the special registers."""
        call(self.fd, SET_SREGS, "SET_SREGS", sregs)

    def set_regs(self, **values: int) -> None:
        """Set registers, all others to 0."""
        self.load(Regs(**{"rflags": 2, **values}))

    def load(self, regs: Regs) -> None:
        """Set all registers."""
        call(self.fd, SET_REGS, "SET_REGS", regs)

    def regs(self) -> Regs:
        """Return the registers."""
        regs = Regs()
        call(self.fd, GET_REGS, "GET_REGS", regs)
        return regs

    def run(self) -> int:
        """KVM_RUN; returns why it returned. KernelError when it failed: EFAULT, EINTR."""
        call(self.fd, RUN, "RUN")
        return int(self.state.exit_reason)

    def prefault(self, gpa: int, length: int) -> None:
        """KVM_PRE_FAULT_MEMORY: map memory as if it were read, repeated until all of it is."""
        left = PreFaultMemory(gpa=gpa, size=length)
        while left.size:
            call(self.fd, PRE_FAULT_MEMORY, f"PRE_FAULT_MEMORY({left.gpa:#x}, {left.size})", left)

    def set_signal_mask(self, mask: int | None) -> None:
        """KVM_SET_SIGNAL_MASK: what is blocked while it runs; None for what the thread has blocked."""
        call(self.fd, SET_SIGNAL_MASK, "SET_SIGNAL_MASK", 0 if mask is None else SignalMask(8, mask))

    def close(self) -> None:
        """Close it."""
        if self._map != -1:
            lib.uffd_munmap(self._map, self._length)
            self._map = -1
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class Vm:
    """A virtual machine."""

    def __init__(self, system: int, *, irqchip: bool = False, kind: int = VM_DEFAULT) -> None:
        """System is a descriptor of /dev/kvm; with ``irqchip`` KVM has the interrupt controllers itself."""
        self.system = system
        self.fd = call(system, CREATE_VM, f"CREATE_VM({kind})", kind)
        self.slots = 0
        try:
            lib.uffd_ioctl(self.fd, SET_TSS_ADDR, TSS_ADDR)  # who cannot do this needs it not
            where = c_uint64(IDENTITY_MAP_ADDR)
            lib.uffd_ioctl(self.fd, SET_IDENTITY_MAP_ADDR, addressof(where))
            if irqchip:
                call(self.fd, CREATE_IRQCHIP, "CREATE_IRQCHIP")
        except OSError:
            self.close()
            raise

    def has(self, cap: Cap) -> int:
        """KVM_CHECK_EXTENSION."""
        return call(self.fd, CHECK_EXTENSION, f"CHECK_EXTENSION({cap.name})", int(cap))

    def set_slot(self, slot: int, gpa: int, address: int, length: int, flags: int = 0) -> None:
        """Have memory of this process at a physical address of the guest; length 0 takes the slot away."""
        region = MemoryRegion(slot, flags, gpa, length, address)
        call(self.fd, SET_USER_MEMORY_REGION, f"SET_USER_MEMORY_REGION({slot}, {gpa:#x}, {length})", region)

    def guest_memfd(self, length: int, flags: int) -> int:
        """KVM_CREATE_GUEST_MEMFD: return its descriptor."""
        argument = CreateGuestMemfd(size=length, flags=flags)
        return call(self.fd, CREATE_GUEST_MEMFD, f"CREATE_GUEST_MEMFD({length}, {flags:#x})", argument)

    def set_memfd_slot(self, slot: int, gpa: int, where: tuple[int, int], memfd: int) -> None:
        """Have memory of a guest_memfd, mapped at an address in such a length, at a physical address of the guest."""
        address, length = where
        region = MemoryRegion2(slot, MEM_GUEST_MEMFD, gpa, length, address, 0, memfd)
        call(self.fd, SET_USER_MEMORY_REGION2, f"SET_USER_MEMORY_REGION2({slot}, {gpa:#x}, {length})", region)

    def set_private(self, gpa: int, length: int) -> None:
        """KVM_SET_MEMORY_ATTRIBUTES: the guest's memory there is private."""
        attributes = MemoryAttributes(gpa, length, MEMORY_ATTRIBUTE_PRIVATE, 0)
        call(self.fd, SET_MEMORY_ATTRIBUTES, f"SET_MEMORY_ATTRIBUTES({gpa:#x}, {length})", attributes)

    def dirty_log(self, slot: int, pages: int) -> list[int]:
        """KVM_GET_DIRTY_LOG: return the base pages of a slot written since the last call."""
        bitmap = (c_uint64 * -(-pages // 64))()
        call(self.fd, GET_DIRTY_LOG, f"GET_DIRTY_LOG({slot})", DirtyLog(slot, 0, addressof(bitmap)))
        return [page for page in range(pages) if bitmap[page // 64] >> page % 64 & 1]

    def close(self) -> None:
        """Close it; it is gone when its processors are closed as well."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def supported_cpuid(system: int) -> Cpuid:
    """KVM_GET_SUPPORTED_CPUID."""
    cpuid = Cpuid(nent=CPUID_ENTRIES)
    call(system, GET_SUPPORTED_CPUID, "GET_SUPPORTED_CPUID", cpuid)
    return cpuid


def is_absent(number: int) -> bool:
    """Whether this errno of open(2) says that no KVM is loaded."""
    return number in (errno.ENOENT, errno.ENODEV, errno.ENXIO)
