# SPDX-License-Identifier: GPL-2.0-only
"""What is sent through a channel arrives whole and in order, and an end of it is told."""

from __future__ import annotations

import os
import threading
import time

import pytest

from uffd_selftests.harness.channel import HEADER, MAGIC, MAX_BYTES, VERSION, Nonsense, one_way, two_way


def test_one_way() -> None:
    """Objects of any size go from one end to the other."""
    receiver, sender = one_way()
    things = [None, {"name": [1, 2]}, "much" * 100_000]

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
    os.write(fd, HEADER.pack(MAGIC, VERSION, 16) + b"half")
    sender.close()
    assert receiver.receive() == "whole"
    with pytest.raises(EOFError):
        receiver.receive()
    receiver.close()


NONSENSE = {
    "no message": b"Linux version 7.3\n",
    "another version": HEADER.pack(MAGIC, VERSION + 1, 2) + b"[]",
    "a flood": HEADER.pack(MAGIC, VERSION, MAX_BYTES + 1) + b"[" * 1000,
    "no JSON": HEADER.pack(MAGIC, VERSION, 4) + b"\xff\x80[]",
    "too deep": HEADER.pack(MAGIC, VERSION, 200_000) + b"[" * 200_000,
    "a pickle": HEADER.pack(MAGIC, VERSION, 5) + b"\x80\x05}\x94.",
}


@pytest.mark.parametrize("what", NONSENSE)
def test_nonsense(what: str) -> None:
    """What is no message of this version is told as such, at once."""
    ours, theirs = two_way()
    (fd,) = theirs.descriptors - {theirs.fileno()}
    thread = threading.Thread(target=os.write, args=(fd, NONSENSE[what]))
    thread.start()
    with pytest.raises(Nonsense):
        ours.receive()
    ours.close()
    thread.join()
    theirs.close()


def test_nobody_answers() -> None:
    """Who waits for a message, or for somebody to take one, waits no longer than it wants to."""
    ours, theirs = two_way()
    with pytest.raises(TimeoutError):
        ours.receive(time.monotonic() + 0.01)
    (writer,) = theirs.descriptors - {theirs.fileno()}
    os.write(writer, HEADER.pack(MAGIC, VERSION, 100) + b'["half')
    with pytest.raises(TimeoutError):
        ours.receive(time.monotonic() + 0.01)
    (fd,) = ours.descriptors - {ours.fileno()}
    os.set_blocking(fd, False)
    with pytest.raises(TimeoutError):
        ours.send("much" * 100_000, time.monotonic() + 0.01)
    ours.close()
    theirs.close()
