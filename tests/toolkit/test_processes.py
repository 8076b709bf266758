# SPDX-License-Identifier: GPL-2.0-only
"""Children talk, and what fails in them is told in their own words."""

from __future__ import annotations

import os
import time

import pytest

from tests.helpers import needs_userfaultfd
from uffd_selftests.toolkit.context import Context
from uffd_selftests.toolkit.processes import Channel, Child, ChildError


@pytest.mark.isolated  # a hang here must not hang the rest
@needs_userfaultfd
def test_child_talks_and_tells(context: Context) -> None:
    """Values and descriptors cross between processes; a child's failure is told in its own words."""

    def target(channel: Channel) -> None:
        channel.send({"page": 3}, context.uffd.fd)
        assert channel.receive() == "go"
        raise AssertionError("this broke")

    with pytest.raises(ChildError, match=r"in the child process: this broke \(at test_processes.py:\d+\)"):
        with Child(target) as child:
            value, fds = child.receive_fds()
            assert value == {"page": 3}
            assert len(fds) == 1
            os.close(fds[0])
            child.send("go")


def test_child_that_fails_says_why() -> None:
    """Its own words are told also when they come a moment after its end of the channel has gone."""

    def child(channel: Channel) -> None:
        channel.close()
        time.sleep(0.1)
        raise AssertionError("the cause")

    with pytest.raises(ChildError, match="the cause"), Child(child) as process:
        process.receive()
