# SPDX-License-Identifier: GPL-2.0-only
"""Kernel images that are none, and what a guest says, said by a shell.

No kernel is booted in these tests: uffd_selftests.checks.kernels boots some.
"""

from __future__ import annotations

from pathlib import Path

from uffd_selftests.vm import images, vng
from uffd_selftests.vm.guests import Ending, Guest

PLAN = ["move on anon", "move on shmem", "poison on anon"]

BOOTS = "echo 'Linux version 6.99.0' >&2; "
BEGINS = BOOTS + "printf 'TAP version 13\\n1..3\\n# Linux 6.99.0 x86_64\\n'; "
CASE = "echo '[    1.5] uffd-selftests: case {}' >&2; "
PASSES = (
    BEGINS
    + "printf 'ok 1 move on anon\\nok 2 move on shmem\\nok 3 poison on anon # SKIP no\\n"
    + "# Totals: pass:2 fail:0 xfail:0 xpass:0 skip:1 error:0\\n'; "
)
BUG = "[    2.0] BUG: unable to handle page fault"
FATAL = "[    2.0] Kernel panic - not syncing: Fatal"
PANIC = f"echo '{BUG}' >&2; echo '{FATAL}' >&2; "
DIES = (
    BEGINS
    + CASE.format("move on anon")
    + "echo 'ok 1 move on anon'; sleep 0.1; "
    + CASE.format("move on shmem")
    + PANIC
    + "exit 255"
)


def write_image(path: Path, release: str = "6.99.0-test", magic: bytes = b"HdrS") -> Path:
    """Write what looks like a bzImage of this release."""
    header = bytearray(0x1000)
    header[0x202:0x206] = magic
    header[0x20E:0x210] = (0x300).to_bytes(2, "little")
    text = f"{release} (someone@somewhere) #1 SMP".encode() + b"\0"
    header[0x500 : 0x500 + len(text)] = text
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes(header))
    return path


def run_shell(script: str, folder: Path, patience: float = 60) -> Ending:
    """Run a shell in place of virtme-ng."""
    guest = Guest(images.Kernel(folder, "6.99.0", folder), folder)
    return guest.run(["/bin/sh", "-c", script], vng.TCG, patience, lambda _: None, lambda: None)
