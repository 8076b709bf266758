# SPDX-License-Identifier: GPL-2.0-only
"""uffd-stress: pages bounced between two areas, under racing accesses, copies and changes of protection."""

from __future__ import annotations

from uffd_selftests.case import uffd_case
from uffd_selftests.common import ALL, ASYNC_RWP, Context, stress


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


@uffd_case(
    "stress-rwp",
    mem=ALL,
    features=ASYNC_RWP,
    needs=("pagemap",),
    variants=("poll", "read"),
    spare_hugepages=stress.SPARE_HUGEPAGES,
    rows=("RW-74", "SM-01"),
    smp=True,
    stress=True,
)
def test_stress_rwp(ctx: Context, variant: str) -> None:
    """However accesses race with protection, round after round, none passes unseen and each goes on with its bytes.

    Accesses are reported and answered in the first bounce, the kernel lets them go on in the second, and in the third
    that changes while they are under way (UFFDIO_SET_MODE).
    """
    name = f"stress-rwp ({variant}) on {ctx.mem}"
    stress.run(ctx, name, stress.Options.of_environment(), blocking=variant == "read", rwp=True)
