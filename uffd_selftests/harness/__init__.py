# SPDX-License-Identifier: GPL-2.0-only
"""The harness: a pytest plugin that gates, isolates, watches and reports; the cases know nothing of it."""
