# SPDX-License-Identifier: GPL-2.0-only
"""What every command has: a name, exit codes, one line for a bad call, and an end in order."""
