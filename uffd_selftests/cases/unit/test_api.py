# SPDX-License-Identifier: GPL-2.0-only
"""The UFFDIO_API handshake, on a handle from either door."""

from __future__ import annotations

from errno import EINVAL

from uffd_selftests.case import uffd_case
from uffd_selftests.common import ApiIoctls, Feature, Uffd, expect, refuses, uapi


def handshake(via: str) -> None:
    """Two refused calls, the accepted one, and one too many."""
    with Uffd.create(via=via) as uffd:
        for api, features, what in (
            (0xAB, Feature(0), "UFFDIO_API with another api"),
            (uapi.UFFD_API, Feature(1 << 63), "UFFDIO_API with an unknown feature"),
        ):
            arg = uapi.uffdio_api(api, features, ~0)
            with refuses(EINVAL):
                uffd.ioctl(uapi.UFFDIO_API, arg, what)
            expect((arg.api, arg.features, arg.ioctls), (0, 0, 0), f"{what}: the struct afterwards")

        answer = uffd.api()
        expect(answer.api, uapi.UFFD_API, "api")
        always = ApiIoctls.API | ApiIoctls.REGISTER | ApiIoctls.UNREGISTER
        expect(ApiIoctls(answer.ioctls) & always, always, "ioctls")
        with refuses(EINVAL):
            uffd.api(Feature.PAGEFAULT_FLAG_WP)


@uffd_case("UFFDIO_API (with syscall)", needs=("syscall",), rows=("API-01", "API-02", "API-03", "API-04", "API-05"))
def test_api_syscall() -> None:
    """UFFDIO_API accepts its own version once, with features it knows, and zeroes what it refuses."""
    handshake("syscall")


@uffd_case("UFFDIO_API (with /dev/userfaultfd)", needs=("device",), rows=("DEV-02", "API-01"))
def test_api_device() -> None:
    """A handle from /dev/userfaultfd shakes hands as one from userfaultfd(2) does."""
    handshake("device")
