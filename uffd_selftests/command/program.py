# SPDX-License-Identifier: GPL-2.0-only
"""What all commands of the program have in common: its name, its exit codes, how it refuses a call."""

from __future__ import annotations

import argparse
from typing import NoReturn

PROGRAM = "uffd-selftests"

EXIT_OK, EXIT_FAILED, EXIT_USAGE, EXIT_NOTHING = 0, 1, 2, 4


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        """Complain and leave."""
        self.exit(EXIT_USAGE, f"{self.prog}: {message}; --help shows the options\n")
