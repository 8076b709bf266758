# SPDX-License-Identifier: GPL-2.0-only
"""``python -m uffd_selftests``."""

import signal
import sys

if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # it is not ignored
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until there is something to undo Ctrl-C need not tell anything

from uffd_selftests.cli import main

sys.exit(main())
