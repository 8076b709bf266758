# SPDX-License-Identifier: GPL-2.0-only
"""The kernel options that the suite can use are known, and found by their effects as well."""

from __future__ import annotations

import re

import pytest

from tests.conftest import ROOT
from tests.helpers import FACTS
from uffd_selftests.probe import config


def test_fragment_has_what_skips_name() -> None:
    """Whatever option the package tells its users to set is in one of its fragments, each with its purpose."""
    named = set()
    for path in (ROOT / "uffd_selftests").rglob("*.py"):
        named |= set(re.findall(r"\bCONFIG_([A-Z0-9_]+[A-Z0-9])", path.read_text()))
    options = config.fragment()
    guests = re.findall(r"^CONFIG_(\w+)=", (ROOT / "uffd_selftests/vm/guest.config").read_text(), re.MULTILINE)
    assert named - {option.name for option in options} - set(guests) == set()
    assert len({option.name for option in options}) == len(options)
    assert all(option.purpose and option.value == "y" for option in options)


def test_options_by_their_effects(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a configuration to read, the effects tell the same as far as they tell anything."""
    read = config.examine(FACTS)
    if not read.source:
        pytest.skip("no configuration of the running kernel to compare with")
    monkeypatch.setattr(config, "PLACES", ())
    looked = config.examine(FACTS)
    assert looked.source is None
    unknown = set(looked.unknown)
    assert set(read.lacking) - unknown == set(looked.lacking)
    assert len(unknown) < len(config.fragment()) / 2
