# SPDX-License-Identifier: GPL-2.0-only
"""UFFDIO_WRITEPROTECT of parts of large folios, of several sizes, each of their pages looked at."""

from __future__ import annotations

from uffd_selftests.case import Kind, uffd_case
from uffd_selftests.common import (
    AGAINST_WRITES, ANON, ASYNC, FOLIOS, SHMEM, WRITEPROTECT, Context, Feature, folio_async, folio_forked,
    folio_forked_event, folio_migrated, folio_mprotected, folio_parts, folio_remapped, folio_remapped_event,
    folio_swapped, folio_unregistered, folio_zapped, folios,
)  # fmt: skip

@uffd_case(
    "writeprotect-folio-parts",
    mem=(ANON, SHMEM),
    variants=FOLIOS,
    features=WRITEPROTECT,
    needs=("thp",),
    pages=1,
    rows=("WP-24", "WP-25"),
    kind=Kind.DETAIL,
)
def test_writeprotect_folio_parts(ctx: Context, variant: str) -> None:
    """Of folios protected in part exactly the pages named are protected, and trap."""
    folio_parts(ctx, folios(ctx, variant), AGAINST_WRITES)


@uffd_case(
    "writeprotect-folio-dontneed",
    mem=(ANON, SHMEM),
    variants=FOLIOS,
    features=WRITEPROTECT,
    needs=("thp",),
    pages=1,
    rows=("WP-15", "WP-24"),
    kind=Kind.DETAIL,
)
def test_writeprotect_folio_dontneed(ctx: Context, variant: str) -> None:
    """Of folios protected in part pages that are dropped leave the others' protection as it is."""
    folio_zapped(ctx, folios(ctx, variant), AGAINST_WRITES)


@uffd_case(
    "writeprotect-folio-fork",
    mem=(ANON, SHMEM),
    variants=FOLIOS,
    features=WRITEPROTECT,
    needs=("thp",),
    pages=1,
    rows=("WP-18", "WP-33"),
    kind=Kind.DETAIL,
)
def test_writeprotect_folio_fork(ctx: Context, variant: str) -> None:
    """Of folios protected in part a child without a handle of its own is free, and its parent is not."""
    folio_forked(ctx, folios(ctx, variant), AGAINST_WRITES)


@uffd_case(
    "writeprotect-folio-fork-event",
    mem=(ANON, SHMEM),
    variants=FOLIOS,
    features=WRITEPROTECT | Feature.EVENT_FORK,
    needs=("thp",),
    pages=1,
    rows=("WP-19",),
    kind=Kind.DETAIL,
)
def test_writeprotect_folio_fork_event(ctx: Context, variant: str) -> None:
    """Of folios protected in part a child with a handle of its own has its parent's protected pages."""
    folio_forked_event(ctx, folios(ctx, variant), AGAINST_WRITES)


@uffd_case(
    "writeprotect-folio-swap",
    mem=(ANON,),
    variants=FOLIOS,
    features=WRITEPROTECT,
    needs=("thp", "swap"),
    pages=1,
    rows=("WP-23", "WP-24"),
    kind=Kind.DETAIL,
)
def test_writeprotect_folio_swap(ctx: Context, variant: str) -> None:
    """Of folios protected in part each page is in swap, and comes back, as it was."""
    folio_swapped(ctx, folios(ctx, variant), AGAINST_WRITES)


@uffd_case(
    "writeprotect-folio-mremap",
    mem=(ANON, SHMEM),
    variants=FOLIOS,
    features=WRITEPROTECT,
    needs=("thp",),
    pages=1,
    rows=("WP-24", "WP-27"),
    kind=Kind.DETAIL,
)
def test_writeprotect_folio_mremap(ctx: Context, variant: str) -> None:
    """Of folios protected in part what mremap(2) moves, without its event, is free, and the rest is as it was."""
    folio_remapped(ctx, folios(ctx, variant), AGAINST_WRITES)


@uffd_case(
    "writeprotect-folio-mremap-event",
    mem=(ANON, SHMEM),
    variants=FOLIOS,
    features=WRITEPROTECT | Feature.EVENT_REMAP,
    needs=("thp",),
    pages=1,
    rows=("WP-24", "WP-28"),
    kind=Kind.DETAIL,
)
def test_writeprotect_folio_mremap_event(ctx: Context, variant: str) -> None:
    """Of folios protected in part each page that mremap(2) moves, with its event, is as it was."""
    folio_remapped_event(ctx, folios(ctx, variant), AGAINST_WRITES)


@uffd_case(
    "writeprotect-folio-mprotect",
    mem=(ANON, SHMEM),
    variants=FOLIOS,
    features=WRITEPROTECT,
    needs=("thp",),
    pages=1,
    rows=("WP-20", "WP-24"),
    kind=Kind.DETAIL,
)
def test_writeprotect_folio_mprotect(ctx: Context, variant: str) -> None:
    """Of folios protected in part each is as it was when mprotect(2) has taken access away and given it back."""
    folio_mprotected(ctx, folios(ctx, variant), AGAINST_WRITES)


@uffd_case(
    "writeprotect-folio-unregister",
    mem=(ANON, SHMEM),
    variants=FOLIOS,
    features=WRITEPROTECT,
    needs=("thp",),
    pages=1,
    rows=("UNR-13", "WP-24"),
    kind=Kind.DETAIL,
)
def test_writeprotect_folio_unregister(ctx: Context, variant: str) -> None:
    """Of folios protected in part what is unregistered is free, and the rest is as it was."""
    folio_unregistered(ctx, folios(ctx, variant), AGAINST_WRITES)


@uffd_case(
    "writeprotect-folio-migrated",
    mem=(ANON, SHMEM),
    variants=FOLIOS,
    features=WRITEPROTECT,
    needs=("thp", "cap_sys_admin"),
    pages=1,
    rows=("WP-24",),
    kind=Kind.DETAIL,
)
def test_writeprotect_folio_migrated(ctx: Context, variant: str) -> None:
    """Of folios protected in part each page is as it was in other memory."""
    folio_migrated(ctx, folios(ctx, variant), AGAINST_WRITES)


@uffd_case(
    "writeprotect-folio-async",
    mem=(ANON, SHMEM),
    variants=FOLIOS,
    features=ASYNC,
    needs=("thp",),
    pages=1,
    rows=("AS-01", "WP-24"),
    kind=Kind.DETAIL,
)
def test_writeprotect_folio_async(ctx: Context, variant: str) -> None:
    """Of folios protected in part, without anybody being told, a write frees just its page."""
    folio_async(ctx, folios(ctx, variant), AGAINST_WRITES)
