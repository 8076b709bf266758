# SPDX-License-Identifier: GPL-2.0-only
"""The contract as a document: every row, where it is stated, and the cases that check it.

``python -m uffd_selftests.catalog.contract > docs/contract.md`` writes it from the declarations of the cases.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType

from uffd_selftests import cases
from uffd_selftests.case import ATTRIBUTE, Case, first_sentence

HERE = Path(__file__).parent

GROUPS = {
    "CR": "Creation by userfaultfd(2)",
    "DEV": "/dev/userfaultfd",
    "API": "The UFFDIO_API handshake",
    "REG": "UFFDIO_REGISTER",
    "UNR": "UFFDIO_UNREGISTER",
    "WK": "UFFDIO_WAKE",
    "CP": "UFFDIO_COPY",
    "ZP": "UFFDIO_ZEROPAGE",
    "CT": "UFFDIO_CONTINUE and minor faults",
    "PO": "UFFDIO_POISON",
    "WP": "UFFDIO_WRITEPROTECT, synchronous",
    "RW": "UFFDIO_RWPROTECT and read-write-protect faults",
    "SM": "UFFDIO_SET_MODE",
    "AS": "Asynchronous write protection and PAGEMAP_SCAN",
    "MV": "UFFDIO_MOVE",
    "RD": "read(2) and the messages",
    "PL": "poll, select, epoll",
    "CL": "close",
    "FI": "/proc/PID/fdinfo",
    "FL": "Faults: flags, addresses, signals, kernel mode",
    "EV": "Events of processes that do not cooperate",
    "PR": "Processes, descriptors passed on, other users in the kernel",
    "KV": "Virtual processors of KVM",
    "TH": "Transparent huge pages",
    "NM": "Memory that runs out",
    "AC": "What is counted, and who pays",
    "CG": "Control groups",
    "NU": "Memory nodes",
    "KS": "Pages that are merged (KSM)",
    "HI": "History",
    "DM": "The manual page's program",
}
KINDS = {"P": "promise", "K": "detail", "V": "version", "X": "contradiction", "H": "historic"}


@dataclass(frozen=True)
class Row:
    """A row of the contract."""

    id: str
    kind: str
    """P, K, V, X or H: see the head of contract_rows.txt."""
    stated: str
    """Where; empty when only a run showed it."""


@dataclass(frozen=True)
class Declared:
    """A case as its module declares it."""

    case: Case
    promise: str
    path: str
    function: str


def rows() -> dict[str, Row]:
    """Return the rows of the contract by their ID."""
    return {fields[0]: Row(*fields) for fields in _table("contract_rows.txt", 3)}


def untested() -> dict[str, str]:
    """Return the rows that no case can check, with the reason."""
    return dict(_table("contract_untested.txt", 2))


def _table(name: str, columns: int) -> Iterator[list[str]]:
    for line in (HERE / name).read_text().splitlines():
        if line and not line.startswith("#"):
            fields = line.split("\t")
            if len(fields) != columns:
                raise ValueError(f"{name}: expected {columns} columns: {line}")
            yield fields


def functions() -> Iterator[tuple[Case, FunctionType]]:
    """Yield every declared case with its function, in the order of files and lines; imports all cases."""
    for module in pkgutil.walk_packages(cases.__path__, f"{cases.__name__}."):
        for function in vars(importlib.import_module(module.name)).values():
            case = getattr(function, ATTRIBUTE, None)
            if isinstance(case, Case) and function.__module__ == module.name:
                yield case, function


def declared() -> list[Declared]:
    """Return what is told of every declared case, in the order of files and lines."""
    found = []
    for case, function in functions():
        path = function.__module__.replace(".", "/") + ".py"
        found.append(Declared(case, first_sentence(function.__doc__), path, function.__name__))
    return found


def gate(case: Case) -> str:
    """Say what the kernel and the machine must offer for a case."""
    return ", ".join([*(f"`{name}`" for name in case.features.names), *case.needs])


def document() -> str:
    """Return docs/contract.md."""
    table, left_out, by_row = rows(), untested(), _by_row(declared())
    checked = sum(row in by_row for row in table)
    lines = [
        "# The contract",
        "",
        "What user space may rely on, row by row, and the cases that check it. Made from the declarations of the cases",
        "by `python -m uffd_selftests.catalog.contract > docs/contract.md`; do not edit.",
        "",
        f"{len(table)} rows; {checked} are checked, {len(left_out)} cannot be, with the reason given.",
        "",
        "Kinds: *promise*, a document or a header states it; *detail*, only the kernel's source shows it, and it may",
        "change; *version*, it depends on version or configuration; *contradiction*, what kernels do is not what is",
        "stated: the case asserts what is stated and its failure is expected; *historic*, current kernels cannot show",
        "it. Sources: man2 and manI are userfaultfd(2) and ioctl_userfaultfd(2) of man-pages 6.03, D17 the 2017 draft",
        "of userfaultfd(2), L15 the patch of March 2015, RST Documentation/admin-guide/mm/userfaultfd.rst, H",
        "include/uapi/linux/userfaultfd.h, K and M fs/userfaultfd.c and mm/userfaultfd.c of Linux 6.12, S54",
        "fs/userfaultfd.c of Linux 5.4, UT uffd-unit-tests.c.",
        "",
    ]
    for group, title in GROUPS.items():
        lines += [f"## {title}", "", "| ID | kind | promise | stated in | memory types | gate | cases |"]
        lines += ["|---|---|---|---|---|---|---|"]
        for row in table.values():
            if row.id.partition("-")[0] == group:
                lines.append(_line(row, by_row.get(row.id, []), left_out.get(row.id, "")))
        lines.append("")
    lines += _defects(declared())
    return "\n".join(lines)


def _by_row(found: list[Declared]) -> dict[str, list[Declared]]:
    by_row: dict[str, list[Declared]] = {}
    for one in found:
        for row in one.case.rows:
            by_row.setdefault(row, []).append(one)
    return by_row


def _line(row: Row, checks: list[Declared], reason: str) -> str:
    promise = "<br>".join(dict.fromkeys(check.promise for check in checks)) or f"*not checked: {reason}*"
    mem = ", ".join(dict.fromkeys(mem.name for check in checks for mem in check.case.mem))
    gates = "<br>".join(dict.fromkeys(filter(None, (gate(check.case) for check in checks))))
    names = "<br>".join(dict.fromkeys(f"`{check.case.name}`" for check in checks))
    cells = (row.id, KINDS[row.kind], promise, row.stated, mem, gates, names)
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _defects(found: list[Declared]) -> list[str]:
    lines = ["## Known defects", "", "| ID | what happens | seen in | what to do | case |", "|---|---|---|---|---|"]
    defects = [(one.case.defect, one.case.name) for one in found if one.case.defect]
    for defect, name in sorted(defects, key=lambda pair: pair[0].id):
        lines.append(f"| {defect.id} | {defect.summary} | {defect.kernels} | {defect.advice} | `{name}` |")
    return [*lines, ""]


if __name__ == "__main__":
    print(document(), end="")
