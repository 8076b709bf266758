# SPDX-License-Identifier: GPL-2.0-only
"""A handle in other hands: of a process without privilege, in another user namespace, after execve(2), of 32 bits."""

from __future__ import annotations

import os
import sys
from ctypes import sizeof
from errno import EEXIST, EINVAL

from uffd_selftests.case import Kind, uffd_case
from uffd_selftests.common import (
    ALL, ANON, ASYNC, MAP_32BIT, MAP_ANONYMOUS, MAP_PRIVATE, MISSING, PAGE_SIZE, RESTART, SCAN, WP, WRITTEN, Channel,
    Child, Context, CopyMode, Fault, Ia32, PagefaultFlag, Pagemap, Waiter, WriteprotectMode, become_nobody,
    enter_user_namespace, expect, expect_bytes, fails, mapped, peek, promise, refuses, run_as, touch, uapi,
    undisturbed,
)  # fmt: skip

PROGRAM = """
import ctypes, fcntl, os, struct, sys
fd, request, length, page = map(int, sys.argv[1:])
message = os.read(fd, 32)
event, flags, address = message[0], *struct.unpack_from("=QQ", message, 8)
assert (event, flags, address) == (0x12, 0, page), (event, flags, hex(address))
data = ctypes.create_string_buffer(b"Z" * length, length)
arg = bytearray(struct.pack("=QQQQq", page, ctypes.addressof(data), length, 0, 0))
fcntl.ioctl(fd, request, arg)
assert struct.unpack("=QQQQq", arg)[4] == length
"""
"""A monitor that serves one missing fault out of its own memory."""


@uffd_case("handed-on", mem=ALL, pages=4, variants=("nobody", "user namespace"), rows=("PR-21",))
def test_handed_on(ctx: Context, variant: str) -> None:
    """A handle that was handed on serves whoever has it: messages, fills, protection and wakes need no privilege."""
    area, uffd = ctx.dst, ctx.uffd
    ctx.src.fill()
    uffd.register(area.range, MISSING)

    def serve() -> None:
        message = uffd.wait("a message of the missing page")
        expect(message, Fault(area.page(1).start, PagefaultFlag(0)), "the message")
        if ctx.mem.hugetlb:
            uffd.copy(area.page(2).start, ctx.src.page(2).start, area.page_size)
        else:
            uffd.zeropage(area.page(2))
        with refuses(EEXIST):
            uffd.copy(area.page(2).start, ctx.src.page(2).start, area.page_size)
        uffd.copy(area.page(1).start, ctx.src.page(1).start, area.page_size, CopyMode.DONTWAKE)
        uffd.wake(area.page(1))

    with promise("PR-21", variant), Waiter(lambda: peek(area.page(1).start)) as waiter:
        run_as(become_nobody if variant == "nobody" else enter_user_namespace, serve)
        waiter.result()
    area.expect_pattern_of(ctx.src, 1, 1)
    Pagemap.expect_present(area, 1, 2)
    uffd.expect_no_message()


@uffd_case("handed-on-exec", mem=(ANON,), pages=2, rows=("PR-21",))
def test_handed_on_exec(ctx: Context) -> None:
    """A handle serves the program that its holder has become by execve(2)."""
    page = ctx.dst.page(1)
    ctx.uffd.register(ctx.dst.range, MISSING)
    words = [ctx.uffd.fd, uapi.UFFDIO_COPY, page.len, page.start]

    def life(_: Channel) -> None:
        os.set_blocking(ctx.uffd.fd, True)
        os.set_inheritable(ctx.uffd.fd, True)
        os.execv(sys.executable, [sys.executable, "-I", "-S", "-c", PROGRAM, *map(str, words)])

    with promise("PR-21", "execve(2)"), Waiter(lambda: peek(page.start)) as waiter:
        with Child(life):
            pass
        waiter.result()
    expect_bytes(page, ord("Z"), "what the program has copied")
    os.set_blocking(ctx.uffd.fd, False)
    ctx.uffd.expect_no_message()


@uffd_case(
    "ia32-writeprotect", mem=(ANON,), features=ASYNC, needs=SCAN, pages=5, rows=("PR-20",), kind=Kind.DETAIL
)
def test_ia32_writeprotect(ctx: Context) -> None:
    """UFFDIO_WRITEPROTECT and PAGEMAP_SCAN do for a 32-bit program what they do for one of 64 bits."""
    area = ctx.dst
    area.fill()
    ctx.uffd.register(area.range, WP)
    where = area.page(1, 3)
    with Ia32() as ia32, open("/proc/self/pagemap", "rb", buffering=0) as pagemap, promise("PR-20"):
        protect_ = uapi.uffdio_writeprotect(uapi.uffdio_range(where.start, where.len), WriteprotectMode.WP)
        ia32.ioctl(ctx.uffd.fd, uapi.UFFDIO_WRITEPROTECT, protect_)
        Pagemap.expect_protected(area, {1, 2, 3}, "after UFFDIO_WRITEPROTECT")
        undisturbed(ctx.uffd, lambda: touch(area.page(2), PAGE_SIZE, write=True))
        with mapped(PAGE_SIZE, flags=MAP_PRIVATE | MAP_ANONYMOUS | MAP_32BIT) as low:
            arg = uapi.pm_scan_arg(
                size=sizeof(uapi.pm_scan_arg), flags=RESTART, start=area.start, end=area.range.end, vec=low.start,
                vec_len=8, category_mask=WRITTEN, return_mask=WRITTEN,
            )  # fmt: skip
            done = ia32.ioctl(pagemap.fileno(), uapi.PAGEMAP_SCAN, arg)
            found = list((uapi.page_region * 3).from_buffer_copy(peek(low.start, 3 * sizeof(uapi.page_region))))
        expect(done.walk_end, area.range.end, "walk_end")
        seen = [((one.start - area.start) // PAGE_SIZE, (one.end - area.start) // PAGE_SIZE) for one in found]
        expect(seen, [(0, 1), (2, 3), (4, 5)], "pages written, as the scan has them")
        Pagemap.expect_protected(area, range(5), "after a scan that protects")
        bad = uapi.uffdio_writeprotect(uapi.uffdio_range(where.start + 1, where.len), WriteprotectMode.WP)
        with fails(EINVAL):
            ia32.ioctl(ctx.uffd.fd, uapi.UFFDIO_WRITEPROTECT, bad)
