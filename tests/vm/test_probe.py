# SPDX-License-Identifier: GPL-2.0-only
"""``--probe`` in other kernels tells of them what it tells of the running one."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from tests.helpers import FACTS, needs_userfaultfd
from uffd_selftests import cli as command

if TYPE_CHECKING:
    from tests.vm.conftest import Lab


@needs_userfaultfd
def test_probe(lab: Lab) -> None:
    """One kernel has one report, as text or as JSON; several have one each; one that does not boot is one line."""
    first, second = str(lab.image(1)), str(lab.image(2))
    lab.capfd.readouterr()
    assert command.main(["--probe", "--kernel", first, "--vm-memory", "64M"]) == 0
    assert lab.capfd.readouterr().out.startswith(f"Linux {FACTS.release} ")
    assert command.main(["--probe", "--json", "--kernel", first, "--vm-memory", "64M"]) == 0
    assert json.loads(lab.capfd.readouterr().out)["facts"]["release"] == FACTS.release
    lab.qemu.go_wrong("no boot.of-bzImage2")
    assert command.main(["--probe", "--json", "--kernel", first, "--kernel", second, "--vm-memory", "64M"]) == 1
    out, err = lab.capfd.readouterr()
    assert list(json.loads(out)) == ["6.99.1"]
    assert err.splitlines()[-1].startswith("uffd-selftests: 6.99.2: does not boot: ")
