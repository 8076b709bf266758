# SPDX-License-Identifier: GPL-2.0-only
"""Boot kernels in virtual machines and have the suite's cases run inside: ``--kernel PATH``."""
