# SPDX-License-Identifier: GPL-2.0-only
"""The project's own tests, from lint to the suite itself: ``./run_tests.sh --check``.

All steps run, whatever fails. Exit code 1 when one failed, 2 outside of a checkout.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
PYTEST = (sys.executable, "-m", "pytest")

STEPS: dict[str, tuple[str, ...]] = {
    "ruff": (sys.executable, "-m", "ruff", "check"),
    # Twice, for there are two modules of the name conftest.
    "mypy": (sys.executable, "-m", "mypy", "uffd_selftests", "conftest.py"),
    "mypy of the tests": (sys.executable, "-m", "mypy", "tests", "benchmarks"),
    "C compiler": (
        *("cc", "-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-pthread", "-o", "/dev/null"),
        *(f"uffd_selftests/abi/native/{name}.c" for name in ("uffd", "handler", "races", "stress", "stress_threads")),
    ),
    "shellcheck": ("shellcheck", "run_tests.sh", ".ci/run", "ci/kselftest/install.sh", "ci/lava/ktap-to-lava.sh"),
    "suite in other kernels": (sys.executable, "-m", "uffd_selftests.checks.kernels"),
    "harness tests": (*PYTEST, "tests"),
    "suite": PYTEST,
    "suite with two workers": (*PYTEST, "-n", "2"),
}


def main() -> int:
    """Run every step in the checkout; what is not installed of the system's tools is said and left out."""
    if not (ROOT / "tests").is_dir():
        print("--check needs a checkout of the project, with its tests", file=sys.stderr)
        return 2
    failed = []
    for step, command in STEPS.items():
        print(f"--- {step}", flush=True)
        if not shutil.which(command[0]):
            print(f"left out: no {command[0]} here")
        elif subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL, check=False).returncode:
            failed.append(step)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
