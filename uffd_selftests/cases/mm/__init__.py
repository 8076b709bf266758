# SPDX-License-Identifier: GPL-2.0-only
"""What the kernel's other memory selftests and LTP check of userfaultfd, as far as nothing else here checks it."""
