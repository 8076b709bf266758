# SPDX-License-Identifier: GPL-2.0-only
"""What is sent through a channel arrives whole and in order, and an end of it is told."""

from __future__ import annotations

import os
import threading

import pytest

from uffd_selftests.harness.channel import one_way, two_way


def test_one_way() -> None:
    """Objects of any size go from one end to the other."""
    receiver, sender = one_way()
    things = [None, {"name": (1, 2)}, "much" * 100_000]

    def send() -> None:
        for thing in things:
            sender.send(thing)

    thread = threading.Thread(target=send)
    thread.start()
    assert [receiver.receive() for _ in things] == things
    thread.join()
    sender.close()
    with pytest.raises(EOFError):
        receiver.receive()
    receiver.close()


def test_two_way() -> None:
    """Both ends send and receive; what nobody can receive any more is refused."""
    ours, theirs = two_way()
    ours.send("question")
    assert theirs.receive() == "question"
    theirs.send("answer")
    assert ours.receive() == "answer"
    assert len(ours.descriptors | theirs.descriptors) == 4
    theirs.close()
    theirs.close()
    with pytest.raises(BrokenPipeError):
        ours.send("anything")
    ours.close()
    assert ours.descriptors == set()


def test_half_an_object() -> None:
    """An end in the middle of an object is an end."""
    receiver, sender = one_way()
    sender.send("whole")
    (fd,) = sender.descriptors
    os.write(fd, b"\x10\x00\x00\x00half")
    sender.close()
    assert receiver.receive() == "whole"
    with pytest.raises(EOFError):
        receiver.receive()
    receiver.close()
