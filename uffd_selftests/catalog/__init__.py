# SPDX-License-Identifier: GPL-2.0-only
"""The documents made of the cases' declarations: the contract, and the bugs that were met in the field."""
