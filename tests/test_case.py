# SPDX-License-Identifier: GPL-2.0-only
"""What a case declares is read as people mean it."""

from __future__ import annotations

import pytest

from uffd_selftests.case import first_sentence


@pytest.mark.parametrize(
    ("docstring", "sentence"),
    [
        (None, ""),
        ("One line without a full stop", "One line without a full stop"),
        ("One sentence. Another one.", "One sentence."),
        ("A sentence over\n    two lines (ROW-1). More.\n\n    And more.", "A sentence over two lines (ROW-1)."),
        ("A title\n\nMore.", "A title"),
    ],
)
def test_first_sentence(docstring: str | None, sentence: str) -> None:
    """The promise in a diagnostic is the first sentence of the docstring, in one line."""
    assert first_sentence(docstring) == sentence
