# SPDX-License-Identifier: GPL-2.0-only
"""What several rooms' tests need: what this machine has, and the ways to run a case."""

from __future__ import annotations

import pytest

from uffd_selftests.machine.facts import probe
from uffd_selftests.machine.requirements import no_userfaultfd

FACTS = probe()
UNAVAILABLE = no_userfaultfd(FACTS)
needs_userfaultfd = pytest.mark.skipif(UNAVAILABLE is not None, reason=str(UNAVAILABLE))

ONE_OF_EACH = """
    @uffd_case("passes", mem=(ANON, SHMEM), kind=Kind.DETAIL)
    def test_passes(mem):
        '''The kernel keeps its word. And more.'''

    @uffd_case("varies", variants=("with syscall", "with device"), mem=(ANON,), rows=("ROW-1", "ROW-2"))
    def test_varies(variant, mem):
        '''It does so either way.'''
        if variant == "with device":
            pytest.skip("no device")

    @uffd_case("breaks", defect=Defect("D-ROW-3", "sleeps for ever", "6.18", "wake it", "assert False"))
    def test_breaks():
        '''It is known to break its word here.'''
        assert False
"""

WAYS = {"serially": ["--case-file"], "told of pytest": ["--"], "with workers": ["-n", "2", "--"]}
"""What stands before the path of a file, for each way to run it: the first is that of the suite's own cases."""

either_way = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
