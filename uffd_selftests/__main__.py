# SPDX-License-Identifier: GPL-2.0-only
"""``python -m uffd_selftests``."""

import gc
import signal
import sys

gc.disable()  # what is loaded first stays; whoever goes on for long enables it

if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # it is not ignored
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until there is something to undo Ctrl-C need not tell anything


def main() -> int:
    """Run the command line; EXIT_USAGE, in one line, where the package itself cannot be loaded."""
    try:
        from uffd_selftests import cli  # noqa: PLC0415  # which a program of 32 bits cannot
    except ImportError as error:
        if sys.maxsize > 1 << 32:
            raise
        print(f"uffd-selftests: {error}: PYTHON=/usr/bin/python3 ./run_tests.sh, of the system's own", file=sys.stderr)
        return 2
    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
