# SPDX-License-Identifier: GPL-2.0-only
"""Boot kernels in virtual machines and run the suite inside, with virtme-ng: ``--kernel PATH``."""
