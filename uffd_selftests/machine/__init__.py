# SPDX-License-Identifier: GPL-2.0-only
"""What the running kernel offers, and what a run changes on the machine and puts back, one resource a file."""
