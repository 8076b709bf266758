# SPDX-License-Identifier: GPL-2.0-only
"""The options of --kernel are checked before anything is booted."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.vm.helpers import write_image

if TYPE_CHECKING:
    from tests.conftest import Starter
    from tests.vm.helpers import FakeQemu


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--vm-memory", "much"], "argument --vm-memory: 'much' is no size like 3G or 2048M"),
        (["--vm-cpus", "0"], "argument --vm-cpus: '0' is not a positive whole number"),
        (["--vm-append", "a 'b"], 'argument --vm-append: "a \'b": No closing quotation'),
        (["--deadline", "soon"], "--deadline: 'soon' is not a positive number"),
    ],
)
def test_usage_error(arguments: list[str], message: str, cli: Starter, qemu: FakeQemu) -> None:
    """A mistake is explained in one line before anything is booted."""
    run = cli.run("--kernel", str(write_image(qemu.folder / "bzImage")), *arguments)
    assert (run.code, run.stdout) == (2, "")
    assert run.stderr.startswith(f"uffd-selftests: {message}")
    assert run.stderr.count("\n") == 1
    assert qemu.log == []
