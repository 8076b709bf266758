# SPDX-License-Identifier: GPL-2.0-only
"""``--probe`` in other kernels: each tells in a guest what it can do."""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from uffd_selftests.command.interrupts import Interrupted, Signals
from uffd_selftests.command.program import EXIT_FAILED, EXIT_NOTHING, EXIT_OK, EXIT_USAGE, PROGRAM
from uffd_selftests.harness.site import Lost, Site
from uffd_selftests.vm import session
from uffd_selftests.vm.machines import Maker, Unbootable

if TYPE_CHECKING:
    import argparse

    from uffd_selftests.vm.images import Kernel


def main(args: argparse.Namespace, area_bytes: int) -> int:
    """Print what each kernel can do; as JSON, of several kernels an object with a member for each."""
    found: dict[str, dict[str, Any]] = {}
    failed = False
    with contextlib.closing(Signals()) as signals, tempfile.TemporaryDirectory(prefix=f"{PROGRAM}-") as common:
        try:
            kernels, shape = session.wanted(args)
            maker = Maker(shape, session.accelerator(args), Path(common), session.say)
            for kernel in kernels:
                try:
                    found[kernel.name] = _look(maker, kernel, Path(common), args, area_bytes)
                except (Unbootable, Lost, EOFError) as error:
                    session.say(f"{kernel.name}: does not boot: {error.args[0]}")
                    failed = True
            reports = {name: each["report"] for name, each in found.items()}
            told = next(iter(reports.values())) if len(kernels) == len(reports) == 1 else reports
            texts = (each["text"] for each in found.values())
            sys.stdout.write(json.dumps(told, indent=2) + "\n" if args.json else "\n".join(texts))
            sys.stdout.flush()
        except ValueError as error:
            session.say(str(error))
            return EXIT_USAGE
        except Interrupted:
            return 128 + signals.number
        except OSError as error:
            session.say(f"{error.filename or PROGRAM}: {error.strerror or error}")
            return EXIT_FAILED
    if failed:
        return EXIT_FAILED
    return EXIT_OK if any(each["usable"] for each in found.values()) else EXIT_NOTHING


def _look(maker: Maker, kernel: Kernel, common: Path, args: argparse.Namespace, area_bytes: int) -> dict[str, Any]:
    """Probe a kernel in a guest; raises Unbootable, Lost, EOFError."""
    machine = maker.make(kernel, common, session.scale_of(args), places=1, max_deaths=1)
    with contextlib.closing(Site(machine.source(kernel.name), remote=True)) as site:
        site.set_up({"environ": {}, "hugepage_size": machine.survey["facts"]["hugepage_size"], "sole": False})
        found: dict[str, Any] = site.ask("probe", area_bytes)
    return found
