# SPDX-License-Identifier: GPL-2.0-only
"""The suite: unit/ holds the cases that upstream has, under their names there."""
