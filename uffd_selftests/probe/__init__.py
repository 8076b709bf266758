# SPDX-License-Identifier: GPL-2.0-only
"""``--probe``: what this kernel can do, for people who choose one."""
