# SPDX-License-Identifier: GPL-2.0-only
"""What the kernel promises to user space, one file a topic."""
