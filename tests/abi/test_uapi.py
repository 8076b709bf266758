# SPDX-License-Identifier: GPL-2.0-only
"""uapi.py says what the C headers say, wherever they say anything.

The installed headers are compared; with UFFD_UAPI_HEADERS=DIR also those in DIR, the include folder that the kernel's
``make headers_install`` makes.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from uffd_selftests.abi import syscalls, uapi
from uffd_selftests.abi.uapi import ApiIoctls, CopyMode, Event, Feature, Mask, RangeIoctls

if TYPE_CHECKING:
    from collections.abc import Iterator

    Aggregate = type[ctypes.Structure] | type[ctypes.Union]

INCLUDES = """\
#include <stddef.h>
#include <stdio.h>
#include <asm/unistd.h>
#include <linux/fs.h>
#include <linux/userfaultfd.h>
#include <linux/version.h>
"""

NEWEST = 7 << 16 | 3 << 8
"""The LINUX_VERSION_CODE that uapi.py is complete for."""

OUR_PREFIXES = ("UFFD_FEATURE_", "UFFD_EVENT_", "UFFD_PAGEFAULT_FLAG_", "UFFDIO_", "_UFFDIO_", "PAGE_IS_", "PM_SCAN_")
"""Of macros that uapi.py has all of."""

STRUCTURES = {
    name: value
    for name, value in vars(uapi).items()
    if isinstance(value, type) and issubclass(value, ctypes.Structure) and name in uapi.__all__
}


def constants() -> dict[str, int]:
    """Return every constant of uapi.py under its name in C."""
    found = {name: getattr(uapi, name) for name in ("UFFD_API", "UFFD_USER_MODE_ONLY")}
    found |= {f"__NR_{name}": syscalls.number(name) for name in (*syscalls._UNIFORM, "userfaultfd")}
    found |= {name: code for code, name in uapi.IOCTL_NAMES.items()}
    found |= {str(event): event.value for event in Event}
    for mask in Mask.__subclasses__():
        # Not by iteration, which leaves out a second member of one value.
        found |= {f"{mask.prefix}{name}": member.value for name, member in mask.__members__.items()}
    for ioctls in (ApiIoctls, RangeIoctls):  # C names the number, not the bit
        found |= {str(member): member.value.bit_length() - 1 for member in ioctls}
    return found


def fields(kind: Aggregate, path: str = "", base: int = 0) -> Iterator[tuple[str, type[Any], int]]:
    """Yield the path in C, the type and the offset in bytes of every field, those of nested structures too."""
    for name, inner, *_ in kind._fields_:
        place = f"{path}{name.rstrip('_')}"
        offset = base + getattr(kind, name).offset
        yield place, inner, offset
        if issubclass(inner, ctypes.Structure | ctypes.Union):
            yield from fields(inner, f"{place}.", offset)


def describe(name: str, structure: Aggregate) -> Iterator[tuple[str, int, str]]:
    """Yield what can be compared of a structure: its name, our value, the expression for it in C."""
    yield f"sizeof {name}", ctypes.sizeof(structure), f"sizeof(struct {name})"
    yield f"alignof {name}", ctypes.alignment(structure), f"_Alignof(struct {name})"
    for path, kind, offset in fields(structure):
        field = f"((struct {name} *)0)->{path}"
        yield f"offsetof {name}.{path}", offset, f"offsetof(struct {name}, {path})"
        yield f"sizeof {name}.{path}", ctypes.sizeof(kind), f"sizeof({field})"
        if issubclass(kind, ctypes._SimpleCData):
            yield f"signed {name}.{path}", kind(-1).value < 0, f"(__typeof__({field}))-1 < 1"


@dataclass(frozen=True)
class Headers:
    """The headers to compare with, and a folder to compile in."""

    cc: str
    options: tuple[str, ...]
    text: str
    """After preprocessing, with the definitions of macros."""
    folder: Path

    def find(self, pattern: str) -> set[str]:
        """Return what the pattern's group matches."""
        return set(re.findall(pattern, self.text, re.MULTILINE))

    def evaluate(self, expressions: dict[str, str]) -> dict[str, int]:
        """Compile and run a program; return the value of each C expression, as unsigned 64 bits, by its key."""
        lines = "".join(
            f'\tprintf("%s %llu\\n", "{key}", (unsigned long long)({expression}));\n'
            for key, expression in expressions.items()
        )
        source = self.folder / "evaluate.c"
        source.write_text(f"{INCLUDES}\nint main(void)\n{{\n{lines}\treturn 0;\n}}\n")
        program = source.with_suffix("")
        subprocess.run([self.cc, *self.options, "-o", str(program), str(source)], check=True)
        output = subprocess.run([str(program)], check=True, capture_output=True, text=True).stdout
        return {key: int(value) for key, value in (line.rsplit(" ", 1) for line in output.splitlines())}


@pytest.fixture(params=["installed", "UFFD_UAPI_HEADERS"])
def headers(request: pytest.FixtureRequest, tmp_path: Path) -> Headers:
    """Preprocess the headers, or skip when there are none."""
    options: tuple[str, ...] = ()
    if request.param == "UFFD_UAPI_HEADERS":
        folder = os.environ.get("UFFD_UAPI_HEADERS")
        if not folder:
            pytest.skip("UFFD_UAPI_HEADERS is not set: make headers_install in a kernel tree, give its usr/include")
        if not Path(folder, "linux/userfaultfd.h").is_file():
            pytest.fail(f"UFFD_UAPI_HEADERS={folder}: no linux/userfaultfd.h there")
        options = ("-isystem", folder)
    cc = shutil.which("cc")
    if not cc:
        pytest.skip("no C compiler: apt-get install gcc")
    command = [cc, *options, "-E", "-dD", "-P", "-"]
    result = subprocess.run(command, check=False, input=INCLUDES, capture_output=True, text=True)
    if result.returncode and not options:
        pytest.skip("no kernel headers for programs: apt-get install linux-libc-dev libc6-dev")
    assert not result.returncode, result.stderr
    return Headers(cc, options, result.stdout, tmp_path)


def test_constants(headers: Headers) -> None:
    """Each constant that the headers define too has their value."""
    words = headers.find(r"\w+")
    ours = {name: value for name, value in constants().items() if name in words}
    assert ours == headers.evaluate({name: name for name in ours})
    # The comparison was one: every <linux/userfaultfd.h> there ever was has these.
    assert ours.keys() >= {"__NR_userfaultfd", "UFFD_API", "UFFDIO_API", "_UFFDIO_COPY", "UFFD_EVENT_PAGEFAULT"}


def test_structures(headers: Headers) -> None:
    """Each structure that the headers define too has their size and alignment, and its fields their place and type."""
    declared = headers.find(r"\bstruct (\w+) {")
    known = {name: structure for name, structure in STRUCTURES.items() if name in declared}
    rows = [row for name, structure in known.items() for row in describe(name, structure)]
    assert {key: value for key, value, _ in rows} == headers.evaluate({key: c for key, _, c in rows})
    assert known.keys() >= {"uffdio_api", "uffdio_copy", "uffd_msg"}


def test_complete(headers: Headers) -> None:
    """The headers define nothing that uapi.py lacks, unless they are of a kernel after it."""
    defined = headers.find(r"^#define (\w+)") - constants().keys()
    lacking = sorted(name for name in defined if name.startswith(OUR_PREFIXES))
    version = headers.evaluate({"version": "LINUX_VERSION_CODE"})["version"]
    if lacking and version >> 8 > NEWEST >> 8:
        pytest.xfail(f"headers of Linux {version >> 16}.{version >> 8 & 255} also have {', '.join(lacking)}")
    assert not lacking


def test_request_codes() -> None:
    """The request codes are the known ones, also those that the headers at hand do not have."""
    if uapi._ioctl_layout(os.uname().machine) != (0, 2, 1, 30):
        pytest.skip("this architecture lays request codes out in its own way")
    assert uapi.IOCTL_NAMES == {
        0xAA00: "USERFAULTFD_IOC_NEW",
        0xC018AA3F: "UFFDIO_API",
        0xC020AA00: "UFFDIO_REGISTER",
        0x8010AA01: "UFFDIO_UNREGISTER",
        0x8010AA02: "UFFDIO_WAKE",
        0xC028AA03: "UFFDIO_COPY",
        0xC020AA04: "UFFDIO_ZEROPAGE",
        0xC028AA05: "UFFDIO_MOVE",
        0xC018AA06: "UFFDIO_WRITEPROTECT",
        0xC020AA07: "UFFDIO_CONTINUE",
        0xC020AA08: "UFFDIO_POISON",
        0xC018AA09: "UFFDIO_RWPROTECT",
        0x4010AA0A: "UFFDIO_SET_MODE",
        0xC0606610: "PAGEMAP_SCAN",
    }


MACHINES = ("x86_64", "i686", "aarch64", "riscv64", "loongarch64", "s390x", "ppc64le", "mips64")


@pytest.mark.parametrize("machine", MACHINES)
def test_architectures(machine: str) -> None:
    """Each architecture has its bits for an ioctl that reads and writes."""
    _, read, write, shift = uapi._ioctl_layout(machine)
    assert (read | write) << shift == 0xC0000000


def test_ioctl_bit() -> None:
    """A request's bit is the member of the masks that UFFDIO_API and UFFDIO_REGISTER answer with."""
    assert RangeIoctls(uapi.ioctl_bit(uapi.UFFDIO_RWPROTECT)) is RangeIoctls.RWPROTECT
    assert ApiIoctls(uapi.ioctl_bit(uapi.UFFDIO_API)) is ApiIoctls.API


def test_masks_show_the_kernels_names() -> None:
    """Whatever prints a mask prints the names to search the kernel for, and a bit without one by its number."""
    mask = Feature.MOVE | Feature.SIGBUS | 1 << 23
    assert mask.names == ("UFFD_FEATURE_SIGBUS", "UFFD_FEATURE_MOVE", "bit 23")
    assert f"{mask}" == str(mask) == "UFFD_FEATURE_SIGBUS|UFFD_FEATURE_MOVE|bit 23"
    assert f"{mask:#x}" == "0x810080"
    assert str(Feature(0)) == "0"
    assert str(CopyMode.WP) == "UFFDIO_COPY_MODE_WP"
    assert str(ApiIoctls(1 << 63)) == "_UFFDIO_API"
    assert f"{Event.FORK}" == "UFFD_EVENT_FORK"


def test_masks_keep_unknown_bits() -> None:
    """A newer kernel's bits survive every operation."""
    mask = Feature.MOVE | 1 << 23
    assert mask.without(Feature.MOVE) == 1 << 23
    assert mask & Feature(1 << 23) == 1 << 23
    assert isinstance(mask.without(Feature.MOVE), Feature)


def test_since() -> None:
    """Each feature has a first release; several have the last of theirs, unknown bits none."""
    assert all(re.fullmatch(r"\d\.\d+", feature.since) for feature in Feature)
    assert (Feature.THREAD_ID | Feature.WP_UNPOPULATED | Feature.EVENT_FORK).since == "6.4"
    assert (Feature.EVENT_FORK | Feature.MINOR_SHMEM).since == "5.14"
    assert Feature(0).since == ""
    assert (Feature.MOVE | 1 << 23).since == ""
