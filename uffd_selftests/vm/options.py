# SPDX-License-Identifier: GPL-2.0-only
"""The options of ``--kernel``."""

from __future__ import annotations

import argparse
import platform
import re
import shlex

ARCHITECTURES = ("x86_64", "arm64")


def native() -> str:
    """Return this machine's architecture, by the kernel's name for it."""
    machine = platform.machine()
    return {"aarch64": "arm64"}.get(machine, machine)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add them to the command line's parser."""
    group = parser.add_argument_group("other kernels than the running one, in virtual machines")
    add = group.add_argument
    add("--kernel", action="append", default=[], metavar="PATH",
        help="run in this bzImage, build tree or Debian package (can be repeated; -n N boots N at once)")  # fmt: skip
    add("--arch", choices=ARCHITECTURES, default=native(), help="what the kernels are built for")
    add("--vm-memory", metavar="SIZE", type=_memory, default="3G", help="memory of a virtual machine (3G)")
    add("--vm-cpus", metavar="N", type=_count, default=1, help="its processors (1)")
    for flag, what in (("--vm-append", "the kernel's command line"), ("--vm-qemu", "QEMU's: --vm-qemu='-cpu max'")):
        add(flag, metavar="ARGS", action="extend", type=_words, default=[], help=f"add to {what}")
    add("--pristine", action="store_true", help="give each result a virtual machine as it was after the boot")
    add("--vm-deaths", metavar="N", type=_count, default=20, help="give a kernel up that has died N times (20)")
    add("--vm-forget", action="store_true", help="remove the saved machines, and say how much space that gives back")
    add("--vm-accel", choices=("auto", "kvm", "tcg"), default="auto", help="KVM, emulation, or what works (auto)")


def machine_options(args: argparse.Namespace) -> list[str]:
    """Return those of the options, as given, that mean nothing without --kernel."""
    parser = argparse.ArgumentParser()
    add_options(parser)
    plain = vars(parser.parse_args([]))
    return [f"--{name.replace('_', '-')}" for name, default in plain.items() if getattr(args, name) != default]


def _words(text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error}") from None


def _memory(text: str) -> str:
    if re.fullmatch(r"[1-9]\d*[MG]", text):
        return text
    raise argparse.ArgumentTypeError(f"{text!r} is no size like 3G or 2048M")


def _count(text: str) -> int:
    if text.isdecimal() and int(text) > 0:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
