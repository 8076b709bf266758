# SPDX-License-Identifier: GPL-2.0-only
"""KVM's structures have the kernel's layout, and its requests the kernel's numbers."""

from __future__ import annotations

import ctypes
from ctypes import sizeof
from pathlib import Path

import pytest

from uffd_selftests.abi import kvm

SIZES: dict[type[ctypes.Structure], int] = {
    kvm.Segment: 24,
    kvm.Dtable: 16,
    kvm.Sregs: 312,
    kvm.Regs: 144,
    kvm.MemoryRegion: 32,
    kvm.MemoryRegion2: 160,
    kvm.DirtyLog: 16,
    kvm.Msi: 32,
    kvm.CreateGuestMemfd: 64,
    kvm.MemoryAttributes: 32,
    kvm.SignalMask: 12,
    kvm.Msr: 24,
    kvm.CpuidEntry: 40,
}
REQUESTS = {  # as strace knows them
    kvm.CREATE_VM: 0xAE01,
    kvm.CHECK_EXTENSION: 0xAE03,
    kvm.GET_VCPU_MMAP_SIZE: 0xAE04,
    kvm.GET_SUPPORTED_CPUID: 0xC008AE05,
    kvm.CREATE_VCPU: 0xAE41,
    kvm.GET_DIRTY_LOG: 0x4010AE42,
    kvm.SET_USER_MEMORY_REGION: 0x4020AE46,
    kvm.SET_TSS_ADDR: 0xAE47,
    kvm.SET_IDENTITY_MAP_ADDR: 0x4008AE48,
    kvm.SET_USER_MEMORY_REGION2: 0x40A0AE49,
    kvm.CREATE_IRQCHIP: 0xAE60,
    kvm.RUN: 0xAE80,
    kvm.GET_REGS: 0x8090AE81,
    kvm.SET_REGS: 0x4090AE82,
    kvm.GET_SREGS: 0x8138AE83,
    kvm.SET_SREGS: 0x4138AE84,
    kvm.SET_MSRS: 0x4008AE89,
    kvm.SET_SIGNAL_MASK: 0x4004AE8B,
    kvm.SET_CPUID2: 0x4008AE90,
    kvm.SIGNAL_MSI: 0x4020AEA5,
    kvm.SET_MEMORY_ATTRIBUTES: 0x4020AED2,
    kvm.CREATE_GUEST_MEMFD: 0xC040AED4,
}


@pytest.mark.parametrize("structure", SIZES, ids=lambda structure: structure.__name__)
def test_sizes(structure: type[ctypes.Structure]) -> None:
    """Each structure is as long as the kernel's."""
    assert sizeof(structure) == SIZES[structure]


def test_requests() -> None:
    """Each request has the number that the kernel's header makes of it."""
    assert [hex(request) for request in REQUESTS] == [hex(number) for number in REQUESTS.values()]


def test_run_state() -> None:
    """The details of an exit begin where kvm_run has them."""
    assert kvm.RunState.exit_reason.offset == 8
    assert kvm.RunState.details.offset == 32


@pytest.mark.skipif(
    not Path("/usr/include/linux/kvm.h").exists(), reason="no linux/kvm.h: apt-get install linux-libc-dev"
)
def test_caps() -> None:
    """The numbers of what can be asked for are those of the header, as far as that is new enough."""
    defined = dict(
        line.split()[1:3]
        for line in Path("/usr/include/linux/kvm.h").read_text().splitlines()
        if line.startswith("#define KVM_CAP_") and len(line.split()) >= 3
    )
    known = {name: int(value) for name, value in defined.items() if value.isdigit()}
    for cap in kvm.Cap:
        assert known.get(f"KVM_CAP_{cap.name}", cap) == cap, cap.name


@pytest.mark.parametrize("number", [2, 19, 6])
def test_is_absent(number: int) -> None:
    """A device that is not there, or nobody's, means that no module is loaded."""
    assert kvm.is_absent(number)
    assert not kvm.is_absent(13)
