# SPDX-License-Identifier: GPL-2.0-only
"""``python -m uffd_selftests``."""

import gc
import signal
import sys

gc.disable()  # what is loaded first stays; whoever goes on for long enables it

if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # it is not ignored
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until there is something to undo Ctrl-C need not tell anything

from uffd_selftests.cli import main  # noqa: E402

sys.exit(main())
