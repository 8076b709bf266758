# SPDX-License-Identifier: GPL-2.0-only
"""Small files of the kernel that hold numbers, and programs of the system's administrator."""

from __future__ import annotations

import errno
import os
from pathlib import Path

OWN_MACHINE = "UFFD_OWN_MACHINE"
"""Environment variable: this machine is there for the suite alone, as a guest of --kernel is."""


def number(path: Path | str) -> int:
    """Read a number; 0 from a file that this kernel lacks."""
    try:
        with open(path, "rb", buffering=0) as file:
            return int(file.readall())
    except FileNotFoundError:
        return 0


def numbers(path: Path) -> dict[str, int]:
    """Read lines of a name and a number."""
    return {name: int(number) for name, number in (line.split() for line in path.read_text().splitlines())}


def available_memory() -> int | None:
    """Return the bytes that processes could still have (MemAvailable of proc_meminfo(5)); None when nobody says."""
    with open("/proc/meminfo", "rb", buffering=0) as file:
        for line in file.read(1 << 12).splitlines():
            if line.startswith(b"MemAvailable:"):
                return int(line.split()[1]) * 1024
    return None


def run(*command: str) -> None:
    """Run a program of the system's administrator; raises OSError, with what it complained about."""
    import subprocess  # noqa: PLC0415  # which takes long to load, and few runs need it

    path = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"
    try:
        subprocess.run(
            command, env={**os.environ, "PATH": path},
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=True,
        )  # fmt: skip
    except subprocess.CalledProcessError as error:
        raise OSError(errno.EIO, f"{' '.join(command)}: {error.stderr.strip()}") from None
