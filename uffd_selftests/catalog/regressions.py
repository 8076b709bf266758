# SPDX-License-Identifier: GPL-2.0-only
"""The bugs as a document: each one, and the cases that look for it.

``python -m uffd_selftests.catalog.regressions > docs/regressions.md`` writes it from the declarations of the cases.
"""

from __future__ import annotations

from uffd_selftests.catalog.bugs import Bug, known_bugs, untested
from uffd_selftests.catalog.contract import Declared, declared, gate

DISTRIBUTIONS = (
    "## Where they were seen",
    "",
    "On kernels that Debian ships, each of which ran the whole suite. These bugs are the only failures there; what is",
    "a known defect of newer kernels, too, is an expected failure, and listed at the end of",
    "[contract.md](contract.md).",
    "",
    "| kernel | package | bugs | failing cases |",
    "|---|---|---|---|",
    "| 5.10.223 | linux-image-5.10.0-32-amd64-unsigned 5.10.223-1 | 6 | `event-output-field`, `race-fills-events`,"
    " `race-fills-remaps` |",
    "| | | 11 | `copy-hugetlb-gives-back`, `copy-hugetlb-beyond-file-gives-back`, `copy-beyond-file`,"
    " `copy-overtaken-in-file` on hugetlb |",
    "| | | 12 | `copy-overtaken-by-empty-pool` on hugetlb |",
    "| | | 62 | `event-holds-up-each` |",
    "| 6.1.192 | linux-image-6.1.0-57-amd64 6.1.192-3 | 6 | `event-output-field`, `continue-beside-remap`,"
    " `race-fills-events`, `race-fills-remaps` |",
    "| | | 55 | `thp-collapse-hole` on shmem |",
    "| | | 56 | `writeprotect-soft-dirty` on shmem |",
    "| | | 57 | `writeprotect-no-table` on shmem |",
    "| | | 58 | `wp-fork`, `writeprotect-fork` on hugetlb-private |",
    "| | | 63 | `ksm-unmerge-writeprotected` |",
    "| 6.12.117 | linux-image-6.12.117+deb13-amd64 6.12.117-1 | none | |",
    "| 6.16.12, 6.17.13, 6.18.15 | linux-image-6.16.12+deb13-amd64 6.16.12-1~bpo13+1, linux-image-6.17.13+deb13-amd64"
    " 6.17.13-1~bpo13+1, linux-image-6.18.15+deb13-amd64 6.18.15-1~bpo13+1 | 4 | `register-vdso-async` |",
    "| | | 9 | `copy-against-touch` on hugetlb, now and then |",
    "| | | 34 | `scan-huge-hole` on hugetlb |",
    "| | | 36 | `async-scan-holes`, `async-scan-no-vector-holes`, `pagemap-hpage` on shmem, `pagemap-sanity`,"
    " `pagemap-unpopulated-thp`, `scan-limit-hole`, `scan-mixed`, `scan-mixed-cached`, `scan-mixed-limit`,"
    " `scan-room-hole`, `scan-thp-mixed` |",
    "| | | 60 | `move-huge-zeropage` |",
    "| 6.16.12 alone | | 61 | `writeprotect-thp-split` |",
    "| 7.2.12, 7.3.4 | linux-binary-7.2.12+deb13-amd64 7.2.12-1~bpo13+1, linux-binary-7.3.4+deb13-amd64 7.3.4-1~bpo13+1"
    " | none | |",
)

SHOWS = {"D": "every time", "R": "in a race", "K": "in the log"}


def cases_by_bug() -> dict[int, list[Declared]]:
    """Return the cases that cite each bug."""
    found: dict[int, list[Declared]] = {}
    for one in declared():
        for number in one.case.bugs:
            found.setdefault(number, []).append(one)
    return found


def document() -> str:
    """Return docs/regressions.md."""
    table, left_out, by_bug = known_bugs(), untested(), cases_by_bug()
    lines = [
        "# Kernel bugs as regression cases",
        "",
        "Bugs of userfaultfd that were met in the field: the releases that have them, the change that fixed them, what",
        "a user of a broken kernel sees, and the cases that look for them. Made from `uffd_selftests/catalog/bugs.txt`",
        "and the declarations of the cases by `python -m uffd_selftests.catalog.regressions > docs/regressions.md`;",
        "do not edit.",
        "",
        f"{len(table)} bugs; cases look for {len(by_bug)} of them, not for {len(left_out)}, with the reason given.",
        "",
        "A bug shows *every time*, *in a race* now and then, or *in the log* of the kernel alone, which the harness",
        "reads after each case. The case of a race does a fixed amount of work: when it passes, the bug is unlikely,",
        "not disproved. Stable kernels may have a fix although their release is among the affected ones. The case of a",
        "bug that leaves a process which nothing can end (*may hang the kernel*) runs last, and only with",
        "`--may-hang-kernel`.",
        "",
        "| bug | affected | fixed by | what a user sees | shows | memory types | gate | cases |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [_line(bug, by_bug.get(bug.number, []), left_out.get(bug.number, "")) for bug in table.values()]
    lines += ["", *DISTRIBUTIONS]
    return "\n".join([*lines, ""])


def _line(bug: Bug, checks: list[Declared], reason: str) -> str:
    mem = ", ".join(dict.fromkeys(mem.name for check in checks for mem in check.case.mem))
    gates = "<br>".join(dict.fromkeys(filter(None, (_gate(check) for check in checks))))
    names = "<br>".join(f"`{check.case.name}`" for check in checks) or f"*none: {reason}*"
    cells = (str(bug.number), bug.affected, bug.fix, bug.effect, SHOWS[bug.shows], mem, gates, names)
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _gate(check: Declared) -> str:
    return ", ".join(filter(None, (gate(check.case), "may hang the kernel" if check.case.may_hang_kernel else "")))


if __name__ == "__main__":
    print(document(), end="")
