# SPDX-License-Identifier: GPL-2.0-only
"""Build the kernel's own userfaultfd tests, or a program of ours with their code, and read what they print."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

SOURCE_TARBALL = Path("/usr/src/linux-source-6.12.tar.xz")
SOURCE_PACKAGE = "linux-source-6.12"
PROGRAM = "uffd-unit-tests"
FAULTS = "upstream_faults"

SELFTESTS = "tools/testing/selftests"
# What the program and the headers it needs are made of.
PARTS = (
    "Makefile",
    "arch/{arch}",
    "include",
    "mm/gup_test.h",
    "scripts",
    "tools/include",
    "tools/lib",
    f"{SELFTESTS}/*.h",
    f"{SELFTESTS}/mm",
    "usr",
)
MAIN = f"{SELFTESTS}/mm/uffd-unit-tests.c"
# The other sources; which of the helpers there are depends on the version.
SOURCES = (
    f"{SELFTESTS}/mm/uffd-common.c",
    f"{SELFTESTS}/mm/vm_util.c",
    f"{SELFTESTS}/mm/thp_settings.c",
    f"{SELFTESTS}/mm/hugepage_settings.c",
    "tools/lib/mm/file_utils.c",
    "tools/lib/mm/hugepage_settings.c",
)


class UpstreamError(Exception):
    """The program cannot be had; the message says what to do."""


# ---- building ------------------------------------------------------------------------------------------------------


def build(folder: Path, tree: Path | None) -> Path:
    """Build the program below folder, from a kernel tree or from Debian's sources; return its path.

    Both are left as they are; a program that is there already is taken.  Raises UpstreamError.
    """
    program = folder / PROGRAM
    if not program.is_file():
        source = _prepare(folder, tree)
        _compile(program, source, [MAIN])
    return program


def build_faults(folder: Path, tree: Path | None) -> Path:
    """Build upstream_faults.c with upstream's fault handler below folder, likewise."""
    program = folder / FAULTS
    here = Path(__file__).resolve().parent
    sources = [here / f"{FAULTS}.c", here / "loop.c", here / "loop.h"]
    if not program.is_file() or program.stat().st_mtime < max(path.stat().st_mtime for path in sources):
        source = _prepare(folder, tree)
        if "uffd_global_test_opts" in (source / SELFTESTS / "mm/uffd-common.h").read_text():
            raise UpstreamError(f"upstream's handler takes other arguments since Linux 6.18: use {SOURCE_PACKAGE}")
        _compile(program, source, [*map(str, sources[:2]), f"-I{source / SELFTESTS / 'mm'}"])
    return program


def _prepare(folder: Path, tree: Path | None) -> Path:
    """Have the needed parts of a kernel tree below folder, with its headers made; return the place."""
    source = folder / "linux"
    done = source / SELFTESTS / "mm/local_config.h"  # the last file that is made
    if done.is_file():
        return source
    source.mkdir(parents=True, exist_ok=True)
    if tree:
        _copy(tree, source)
    else:
        _unpack(source)
    _run("make", f"ARCH={_arch()}", f"-j{os.cpu_count()}", "headers", cwd=source)
    done.touch()
    return source


def _compile(program: Path, source: Path, own: Sequence[str]) -> None:
    """Compile and link what is given and upstream's helpers."""
    options = ["-O2", "-w", "-D_GNU_SOURCE=", "-U_FORTIFY_SOURCE", "-pthread"]
    options += ["-I.", "-Itools/lib", f"-I{SELFTESTS}", "-isystem", "usr/include", "-isystem", "tools/include/uapi"]
    sources = [name for name in SOURCES if (source / name).is_file()]
    draft = program.with_suffix(".new")  # an interrupted build leaves no program
    _run("cc", *options, *own, *sources, "-lrt", "-lm", "-o", str(draft), cwd=source)
    draft.rename(program)


def _arch() -> str:
    """Return the kernel's name for the architecture of this machine: the folder below arch/."""
    machine = platform.machine()
    if re.fullmatch(r"x86_64|i.86", machine):
        return "x86"
    if machine == "aarch64":
        return "arm64"
    families = {"ppc": "powerpc"} | {name: name for name in ("arm", "riscv", "loongarch", "s390", "mips")}
    for prefix, arch in families.items():
        if machine.startswith(prefix):
            return arch
    raise UpstreamError(f"{machine}: do not know the kernel's name of this architecture")


def _copy(tree: Path, to: Path) -> None:
    """Copy the needed parts of a kernel tree, without what was built in it."""
    if not (tree / MAIN).is_file():
        raise UpstreamError(f"--kernel-tree {tree}: no {MAIN} there")
    for part in PARTS:
        for path in tree.glob(part.format(arch=_arch())):
            target = to / path.relative_to(tree)
            target.parent.mkdir(parents=True, exist_ok=True)
            if path.is_dir():
                ignore = shutil.ignore_patterns("*.o", "*.ko", "*.a", "*.cmd")
                shutil.copytree(path, target, symlinks=True, ignore=ignore, dirs_exist_ok=True)
            else:
                shutil.copy2(path, target)


def _unpack(to: Path) -> None:
    """Unpack the needed parts of Debian's kernel sources."""
    if not SOURCE_TARBALL.is_file():
        raise UpstreamError(
            f"no {SOURCE_TARBALL}: apt-get install {SOURCE_PACKAGE}, or name a kernel tree with --kernel-tree PATH"
        )
    members = [f"{SOURCE_PACKAGE}/{part.format(arch=_arch())}" for part in PARTS]
    _run("tar", "-xf", str(SOURCE_TARBALL), "--strip-components=1", "--wildcards", *members, cwd=to)


def _run(*command: str, cwd: Path) -> None:
    try:
        result = subprocess.run(command, cwd=cwd, check=False, capture_output=True, text=True)
    except FileNotFoundError:
        raise UpstreamError(f"{command[0]} is missing: apt-get install gcc make xz-utils") from None
    if result.returncode:
        lines = (result.stderr or result.stdout).strip().splitlines()
        reason = next((line for line in lines if "error" in line.lower()), lines[-1] if lines else "no message")
        raise UpstreamError(f"{command[0]} failed in {cwd}: {reason}")


# ---- reading -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verdict:
    """One result."""

    outcome: str
    """"ok", "skip", "fail", "xfail", or "none" when the program ended within the case."""
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.outcome} ({self.reason})" if self.reason else self.outcome


# Up to Linux 7.1: "Testing minor on shmem... skipped [reason: feature missing]".
_OLD = re.compile(r"^Testing (?P<name>.+?)\.\.\. *(?:(?P<word>done|skipped|failed)(?: \[reason: (?P<reason>.*)\])?)?")
_OLD_OUTCOMES = {"done": "ok", "skipped": "skip", "failed": "fail", None: "none"}
_OLD_END = re.compile(r"^Userfaults unit tests: ", re.MULTILINE)

_KTAP = re.compile(r"^(?P<verdict>ok|not ok) \d+ (?:- )?(?P<name>.*?) ?(?:# (?P<directive>[A-Z]+) ?(?P<text>.*))?$")
_KTAP_PLAN = re.compile(r"^1\.\.(\d+)", re.MULTILINE)
# kselftest.h writes "ok 3 # SKIP minor on shmem (feature missing)": the name follows the directive.
_KSELFTEST = re.compile(r"(?P<name>UFFDIO_API \(with [^)]*\)|\S+ on \S+) ?(?:\((?P<reason>.*)\))?$")


def parse(output: str) -> tuple[dict[str, Verdict], bool]:
    """Return the verdicts in a program's output by name, and whether it ran to its end.

    Reads the unit tests' own lines as well as KTAP, be it kselftest.h's or ours.
    """
    if plan := _KTAP_PLAN.search(output):
        verdicts = _parse_ktap(output)
        return verdicts, len(verdicts) == int(plan[1])
    verdicts = {}
    for match in filter(None, map(_OLD.match, output.splitlines())):
        verdicts[match["name"]] = Verdict(_OLD_OUTCOMES[match["word"]], match["reason"] or "")
    return verdicts, bool(_OLD_END.search(output))


def _parse_ktap(output: str) -> dict[str, Verdict]:
    verdicts = {}
    for match in filter(None, map(_KTAP.match, output.splitlines())):
        name, directive, text = match["name"], match["directive"] or "", match["text"] or ""
        if not name and (inner := _KSELFTEST.match(text)):
            name, text = inner["name"], inner["reason"] or ""
        if match["verdict"] == "ok":
            outcome = {"SKIP": "skip", "XFAIL": "xfail"}.get(directive, "ok")
        else:
            outcome, text = "fail", f"{directive} {text}".strip()
        verdicts[name] = Verdict(outcome, text)
    return verdicts
