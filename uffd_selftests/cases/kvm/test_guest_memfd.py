# SPDX-License-Identifier: GPL-2.0-only
"""guest_memfd: what of it can be registered, and what a virtual processor's accesses to it report."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from errno import EFAULT, EINVAL
from functools import partial

from uffd_selftests.case import Kind, uffd_case
from uffd_selftests.common import (
    ANON, KERNEL_FAULTS, KVM_PAGING, MAP_SHARED, MINOR, MISSING, PAGE_SIZE, RWP, WP, Cap, Context, Feature, KernelError,
    Machine, Processor, Range, RegisterMode, Skip, Uffd, copy, expect, expect_modes, fails, kvm, mapped, peek, poke,
    prepare, promise, reports_kvm, require_cap, syscalls, undisturbed, vcpu_faulting,
)  # fmt: skip

PAGES = 4
FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE = 1, 2
ELSEWHERE = 0xC0000000
"""Where the memory is that only the guest_memfd gives, in the guest."""


@contextmanager
def _shared_memory(machine: Machine) -> Iterator[tuple[int, Range]]:
    """Have a guest_memfd of PAGES pages that this process can map, and a mapping of it."""
    require_cap(machine, Cap.GUEST_MEMFD_FLAGS, "6.18")
    flags = kvm.GUEST_MEMFD_FLAG_MMAP | kvm.GUEST_MEMFD_FLAG_INIT_SHARED
    if flags & ~machine.vm.has(Cap.GUEST_MEMFD_FLAGS):
        raise Skip("/dev/kvm: no guest_memfd that can be mapped (Linux 6.18)")
    fd = machine.vm.guest_memfd(PAGES * PAGE_SIZE, flags)
    try:
        with mapped(PAGES * PAGE_SIZE, flags=MAP_SHARED, fd=fd) as where:
            yield fd, where
    finally:
        os.close(fd)


def _offered(uffd: Uffd) -> list[RegisterMode]:
    return [MISSING, WP, MINOR, *([RWP] if Feature.RWP & uffd.offered else [])]


@uffd_case(
    "kvm-memfd-registered",
    mem=(ANON,),
    needs=KVM_PAGING,
    post_alloc=reports_kvm,
    pages=PAGES,
    rows=("KV-12",),
    kind=Kind.VERSION,
)
def test_kvm_memfd_registered(ctx: Context) -> None:
    """UFFDIO_REGISTER refuses a mapping of a guest_memfd with EINVAL, or takes it and is asked for its ioctls."""
    with Machine() as machine, _shared_memory(machine) as (_, where), promise("KV-12"):
        features = ctx.uffd.offered & (Feature.MINOR_SHMEM | Feature.MINOR_HUGETLBFS | Feature.RWP)
        with Uffd.open(features, KERNEL_FAULTS) as uffd:
            for mode in _offered(uffd):
                with promise(f"mode {mode}"):
                    try:
                        uffd.register(where, mode)
                    except KernelError as error:
                        expect(error.errno, EINVAL, "errno of UFFDIO_REGISTER")
                        expect_modes(where, RegisterMode(0))
                    else:
                        expect_modes(where, mode)
                        uffd.unregister(where)
            poke(where.start, b"ours")
            uffd.expect_no_message()
        expect(peek(where.start, 4), b"ours", "what was written")


@uffd_case(
    "kvm-memfd-shared",
    mem=(ANON,),
    needs=KVM_PAGING,
    post_alloc=reports_kvm,
    pages=PAGES,
    rows=("KV-12",),
    kind=Kind.VERSION,
)
def test_kvm_memfd_shared(ctx: Context) -> None:
    """A processor's access to memory of a guest_memfd alone reports nothing; what is beside it does, as ever."""
    prepare(ctx)
    with Machine(ctx.dst) as machine, _shared_memory(machine) as (fd, where), promise("KV-12"):
        machine.vm.set_memfd_slot(9, ELSEWHERE, (where.start, where.len), fd)
        (cpu,) = machine.processors
        poke(where.start + PAGE_SIZE, b"ours")
        expect(_load(ctx.uffd, cpu, ELSEWHERE + PAGE_SIZE), b"ours", "what the processor reads of the guest_memfd")
        expect(_load(ctx.uffd, cpu, ELSEWHERE + 3 * PAGE_SIZE), bytes(4), "what it reads of a hole in it")
        store = partial(cpu.execute, "store", rdi=ELSEWHERE + 2 * PAGE_SIZE, rax=int.from_bytes(b"kvm!", "little"))
        undisturbed(ctx.uffd, store)
        expect(peek(where.start + 2 * PAGE_SIZE, 4), b"kvm!", "what the processor wrote")
        with vcpu_faulting(cpu, ctx.uffd, ctx.dst.page(1).start):
            copy(ctx, 1)
        machine.vm.set_slot(9, ELSEWHERE, where.start, 0)


@uffd_case(
    "kvm-memfd-mapped",
    mem=(ANON,),
    needs=KVM_PAGING,
    post_alloc=reports_kvm,
    pages=PAGES,
    rows=("KV-12",),
    kind=Kind.VERSION,
)
def test_kvm_memfd_mapped(ctx: Context) -> None:
    """A page that UFFDIO_COPY takes from a mapped guest_memfd a processor reads elsewhere; hole punched, it is zero."""
    ctx.uffd.register(ctx.dst.range, MISSING)
    with Machine(ctx.dst) as machine, _shared_memory(machine) as (fd, where), promise("KV-12"):
        (cpu,) = machine.processors
        poke(where.start, b"memfd")
        with vcpu_faulting(cpu, ctx.uffd, ctx.dst.page(2).start) as waiter:
            ctx.uffd.copy(ctx.dst.page(2).start, where.start, PAGE_SIZE)
        expect(waiter.result(), b"memf", "what the processor read")
        machine.vm.set_memfd_slot(9, ELSEWHERE, (where.start, where.len), fd)
        expect(_load(ctx.uffd, cpu, ELSEWHERE), b"memf", "what it reads of the guest_memfd")
        syscalls.call("fallocate", fd, FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE, 0, PAGE_SIZE)
        expect(_load(ctx.uffd, cpu, ELSEWHERE), bytes(4), "what it reads where a hole was punched")
        expect(undisturbed(ctx.uffd, partial(cpu.peek, ctx.dst.page(2).start)), b"memf", "what it reads of the copy")
        machine.vm.set_slot(9, ELSEWHERE, where.start, 0)


@uffd_case(
    "kvm-memfd-private",
    mem=(ANON,),
    needs=KVM_PAGING,
    post_alloc=reports_kvm,
    pages=PAGES,
    rows=("KV-12",),
    kind=Kind.VERSION,
)
def test_kvm_memfd_private(ctx: Context) -> None:
    """Of memory with private pages a processor's access to those ends KVM_RUN or reaches them; shared ones report."""
    prepare(ctx)
    with Machine(ctx.dst, private=True) as machine, promise("KV-12"):
        (cpu,) = machine.processors
        machine.set_private(ctx.dst.page(2))
        with vcpu_faulting(cpu, ctx.uffd, ctx.dst.page(1).start):
            copy(ctx, 1)
        ctx.uffd.expect_no_message()
        with fails(EFAULT):
            undisturbed(ctx.uffd, partial(cpu.peek, ctx.dst.page(2).start))


def _load(uffd: Uffd, cpu: Processor, gpa: int) -> bytes:
    """Have a processor load 4 bytes, at a physical address, without a message."""
    return undisturbed(uffd, partial(cpu.execute, "load", rdi=gpa)).to_bytes(4, "little")
