# SPDX-License-Identifier: GPL-2.0-only
"""What was said on the command line, said again to a run of the suite that this one starts."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from uffd_selftests.harness.settings import MAY_HANG_KERNEL, OPTIONS

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

PRESSURE_SCALE = 4.0
"""How much longer everything may take while memory is short."""


def suite_arguments(args: argparse.Namespace, passed: Sequence[str], scale: float = 1.0) -> list[str]:
    """Say again, for the suite elsewhere, what was said here on the command line or in the environment.

    scale is that of deadlines, unless another was given.
    """
    arguments = [f"--filter={part}" for part in args.filter]
    if args.keyword is not None:
        arguments += ["-k", args.keyword]
    flags = {
        "--documented-only": args.documented_only,
        "--strict": args.strict,
        "--no-sharing": args.no_sharing,
        "--no-isolation": args.no_isolation,
        "--pristine": args.pristine,
        MAY_HANG_KERNEL.flag: args.may_hang_kernel or MAY_HANG_KERNEL.value(None),
    }
    arguments += [flag for flag, given in flags.items() if given]
    values = {each.flag: getattr(args, each.name) or os.environ.get(each.variable) for each in OPTIONS}
    values["--deadline-scale"] = values["--deadline-scale"] or f"{scale:g}"
    arguments += [f"{flag}={value}" for flag, value in values.items() if value]
    return [*arguments, *(["--", *map(_absolute, passed)] if passed else [])]


def _absolute(argument: str) -> str:
    """Return an argument for pytest with its path, if it is one, made independent of the current folder."""
    path, colons, test = argument.partition("::")
    if argument.startswith("-") or not os.path.exists(path):
        return argument
    return os.path.abspath(path) + colons + test
