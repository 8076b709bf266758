# SPDX-License-Identifier: GPL-2.0-only
"""Virtual processors of KVM that touch registered memory, as those of a virtual machine monitor do."""
