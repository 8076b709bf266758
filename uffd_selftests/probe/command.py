# SPDX-License-Identifier: GPL-2.0-only
"""The command behind ``--probe``."""

from __future__ import annotations

import contextlib
import json
import sys

from uffd_selftests.abi.errors import errno_name
from uffd_selftests.command.interrupts import Interrupted, Signals
from uffd_selftests.command.program import EXIT_NOTHING, EXIT_OK, EXIT_USAGE, PROGRAM
from uffd_selftests.machine.repair import repair
from uffd_selftests.machine.requirements import no_userfaultfd
from uffd_selftests.probe.config import examine
from uffd_selftests.probe.consumers import judge
from uffd_selftests.probe.findings import look
from uffd_selftests.probe.report import Report
from uffd_selftests.probe.suite import prospect


def main(*, as_json: bool, area_bytes: int) -> int:
    """Look at the kernel and print what was found; 0 when userfaultfd can be had, 4 when not, 128 + N by signal N."""
    with contextlib.closing(Signals()) as signals:
        try:
            report = probe(area_bytes)
        except Interrupted:
            return 128 + signals.number
    text = json.dumps(report.to_dict(), indent=2) + "\n" if as_json else report.text()
    try:
        with open(1, "w", closefd=False) as stdout:
            stdout.write(text)
    except BrokenPipeError:  # whoever reads has read enough
        pass
    except OSError as error:
        sys.stderr.write(f"{PROGRAM}: cannot write: {errno_name(error.errno or 0)}\n")
        return EXIT_USAGE
    return EXIT_NOTHING if no_userfaultfd(report.findings.facts) else EXIT_OK


def probe(area_bytes: int) -> Report:
    """Look at everything; the machine is as before afterwards."""
    repair()
    findings = look()
    configuration = examine(findings.facts)
    lacking = {option.name for option in configuration.lacking}
    return Report(findings, judge(findings), configuration, prospect(findings.facts, area_bytes, lacking))
