# SPDX-License-Identifier: GPL-2.0-only
"""uffd-stress: pages bounced between two areas, under racing accesses, copies and changes of protection."""

from __future__ import annotations

from uffd_selftests.case import uffd_case
from uffd_selftests.common import ALL, Context, stress


@uffd_case(
    "stress",
    mem=ALL,
    variants=("poll", "read"),
    spare_hugepages=stress.SPARE_HUGEPAGES,
    rows=("CP-01", "CP-10", "CP-35", "CP-41", "CP-50"),
    smp=True,
    stress=True,
)
def test_stress(ctx: Context, variant: str) -> None:
    """However faults, copies and protection race, a page is filled once and whole, and whoever waits for it wakes."""
    name = f"stress ({variant}) on {ctx.mem}"
    stress.run(ctx, name, stress.Options.of_environment(), blocking=variant == "read")
