# SPDX-License-Identifier: GPL-2.0-only
"""``python -m uffd_selftests``."""

import sys

from uffd_selftests.cli import main

sys.exit(main())
