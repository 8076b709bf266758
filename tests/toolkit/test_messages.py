# SPDX-License-Identifier: GPL-2.0-only
"""Messages are read strictly."""

from __future__ import annotations

import pytest

from uffd_selftests.toolkit.messages import parse_message


def test_messages_are_read_strictly() -> None:
    """Bytes that an event does not define must be zero, and an unknown event is an error."""
    fork = bytearray(32)
    fork[0], fork[8] = 0x13, 7
    assert parse_message(bytes(fork)).ufd == 7  # type: ignore[union-attr]
    fork[20] = 1
    with pytest.raises(AssertionError, match="reserved bytes of UFFD_EVENT_FORK are not zero"):
        parse_message(bytes(fork))
    with pytest.raises(AssertionError, match="unknown event 0x99"):
        parse_message(b"\x99" + bytes(31))
