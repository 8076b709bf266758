# SPDX-License-Identifier: GPL-2.0-only
"""What the unit tests print, upstream's and ours."""

from __future__ import annotations

# As Linux 6.12 prints it.
LINES = """\
Testing UFFDIO_API (with syscall)... done
Testing UFFDIO_API (with /dev/userfaultfd)... skipped [reason: cannot open userfaultfd handle]
Testing zeropage on anon... done
Testing wp-fork-pin on shmem... skipped [reason: Possible CONFIG_GUP_TEST missing or unprivileged]
Testing poison on hugetlb-private... failed [reason: SIGBUS count 3 (expected 4)]
Userfaults unit tests: pass=2, skip=2, fail=1 (total=5)
"""

# The same results as Linux 7.2 prints them.
KSELFTEST = """\
TAP version 13
1..5
ok 1 UFFDIO_API (with syscall)
ok 2 # SKIP UFFDIO_API (with /dev/userfaultfd) (cannot open userfaultfd handle)
ok 3 zeropage on anon
ok 4 # SKIP wp-fork-pin on shmem (Possibly CONFIG_GUP_TEST missing or unprivileged)
# failed reason: [SIGBUS count 3 (expected 4)]
not ok 5 poison on hugetlb-private
# Totals: pass:2 fail:1 xfail:0 xpass:0 skip:2 error:0
"""

# And as we do.
OURS = """\
TAP version 13
1..6
ok 1 UFFDIO_API (with syscall)
ok 2 UFFDIO_API (with /dev/userfaultfd) # SKIP /dev/userfaultfd: ENOENT
ok 3 zeropage on anon
ok 4 wp-fork-pin on shmem # SKIP CONFIG_GUP_TEST: /sys/kernel/debug/gup_test: ENOENT
# promise: a poisoned page raises SIGBUS
not ok 5 poison on hugetlb-private # TIMEOUT 30 seconds
ok 6 unregister-wakes on anon # XFAIL the kernel leaves the thread asleep
# Totals: pass:2 fail:1 xfail:1 xpass:0 skip:2 error:0
"""
