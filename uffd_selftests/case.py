# SPDX-License-Identifier: GPL-2.0-only
"""How a case is declared: once, above its function; parametrisation, gating and every report follow from it."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, TypeVar

from uffd_selftests.abi.uapi import Feature

if TYPE_CHECKING:
    from uffd_selftests.mem_types import MemType
    from uffd_selftests.toolkit.context import Context

F = TypeVar("F", bound=Callable[..., None])
ContextHook = Callable[["Context"], None]

ATTRIBUTE = "uffd_case"
"""The attribute of the test function under which the harness finds the declaration."""


class Kind(Enum):
    """What stands behind a case."""

    PROMISE = "promise"
    """A document or a header states it."""
    DETAIL = "detail"
    """Only the kernel's source shows it; it could change. Left out with ``--documented-only``."""
    VERSION = "version"
    """It depends on the kernel's version or configuration; the case accepts each documented form."""


@dataclass(frozen=True)
class Defect:
    """A known defect of current kernels: the case asserts the promise, its failure is expected and shown as XFAIL."""

    id: str
    """``D-`` and the first row it breaks: ``D-UNR-11``."""
    summary: str
    """What happens, in one sentence."""
    kernels: str
    """Where it was seen: ``6.12.117, 6.18.44``."""
    advice: str
    """What a user of such a kernel should do."""
    shows: str
    """Regular expression: how the AssertionError that it causes reads. Any other one is a failure."""

    def explains(self, error: BaseException) -> bool:
        """Whether this is the error that it causes; on a kernel that has it mended (toolkit: mended) none is."""
        if getattr(error, "unexplained", False):
            return False
        text = "\n".join([str(error), *getattr(error, "__notes__", ())])
        return isinstance(error, AssertionError) and re.search(self.shows, text) is not None


@dataclass(frozen=True)
class Case:
    """One declared case, before it is multiplied by its variants and memory types."""

    name: str
    """The name in every report; upstream's where upstream has the case. No ``#``, for KTAP's sake."""
    mem: tuple[MemType, ...] = ()
    """The memory types it runs on; empty when the case needs no memory of a type."""
    variants: tuple[str, ...] = ()
    """Named variants, shown in brackets behind the name; the function takes the name as ``variant``."""
    features: Feature = Feature(0)
    """Feature bits the case enables; the kernel must offer them all."""
    needs: tuple[str, ...] = ()
    """Whatever else must be there: names from REQUIREMENTS of machine/requirements.py."""
    pages: int | None = None
    """Pages of the source and of the destination area; None is the run's default area size (32 MiB)."""
    spare_hugepages: int = 0
    """Huge pages a hugetlb run takes beyond its two areas: copies on write, second mappings."""
    pre_alloc: ContextHook | None = None
    """Called before the areas are mapped; may raise Skip."""
    post_alloc: ContextHook | None = None
    """Called when the areas are mapped and still empty; may raise Skip."""
    rows: tuple[str, ...] = ()
    """The promises of docs/contract.md that the case checks."""
    bugs: tuple[int, ...] = ()
    """The bugs of docs/regressions.md that would make it fail."""
    kind: Kind = Kind.PROMISE
    defect: Defect | None = None
    """The known defect because of which one certain AssertionError of this case is an expected failure."""
    smp: bool = False
    """Let the case run on every CPU. The others are kept on one: a fault is then a switch to the handler and back
    instead of two wake-ups of a sleeping CPU, which takes several times longer."""
    deadline: float = 0
    """Seconds after which it is killed, if that is before --deadline; for what takes moments, or for ever where a
    known bug is, so that nobody waits for it long. --deadline-scale counts here, too."""
    may_hang_kernel: bool = False
    """A kernel with the bug leaves a process that nothing can end: it runs last, and only with --may-hang-kernel."""
    stress: bool = False
    """``--stress-mib`` is the size of its areas, and it repeats its work for as long as ``--duration`` says."""

    def result_name(self, variant: str | None = None, mem: MemType | None = None) -> str:
        """Return the name of one result: ``name (variant) on mem``."""
        return self.name + (f" ({variant})" if variant else "") + (f" on {mem.name}" if mem else "")


def uffd_case(
    name: str,
    *,
    mem: tuple[MemType, ...] = (),
    variants: tuple[str, ...] = (),
    features: Feature = Feature(0),
    needs: tuple[str, ...] = (),
    pages: int | None = None,
    spare_hugepages: int = 0,
    pre_alloc: ContextHook | None = None,
    post_alloc: ContextHook | None = None,
    rows: tuple[str, ...] = (),
    bugs: tuple[int, ...] = (),
    kind: Kind = Kind.PROMISE,
    defect: Defect | None = None,
    smp: bool = False,
    deadline: float = 0,
    may_hang_kernel: bool = False,
    stress: bool = False,
) -> Callable[[F], F]:
    """Declare the decorated function as a case; the fields are those of Case."""
    case = Case(
        name=name,
        mem=mem,
        variants=variants,
        features=features,
        needs=needs,
        pages=pages,
        spare_hugepages=spare_hugepages,
        pre_alloc=pre_alloc,
        post_alloc=post_alloc,
        rows=rows,
        bugs=bugs,
        kind=kind,
        defect=defect,
        smp=smp,
        deadline=deadline,
        may_hang_kernel=may_hang_kernel,
        stress=stress,
    )

    def declare(function: F) -> F:
        setattr(function, ATTRIBUTE, case)
        return function

    return declare


def first_sentence(docstring: str | None) -> str:
    """Return the first sentence of a docstring in one line."""
    paragraph = (docstring or "").strip().partition("\n\n")[0]
    text = " ".join(paragraph.split())
    sentence, dot, _ = text.partition(". ")
    return sentence + dot.strip()
