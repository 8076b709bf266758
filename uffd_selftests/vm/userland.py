# SPDX-License-Identifier: GPL-2.0-only
"""The programs of a guest that cannot run the host's: Debian's packages for its architecture, Python's, and the suite.

Made once, without privileges and without running any of it, and kept in the cache.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from uffd_selftests.abi import native
from uffd_selftests.vm import images
from uffd_selftests.vm.bundle import Foreign

SUITE = "bookworm"
"""The release of Debian that the programs come from."""
PACKAGES = ("base-files", "coreutils", "dash", "python3", "libpython3-dev")
"""Of Debian; the headers are for the native part."""

NATIVE = Path(native.__file__).parent
MODULE = "native.so"


@dataclass(frozen=True)
class Toolchain:
    """What makes programs for an architecture."""

    debian: str
    """Debian's name of it."""
    wheels: str
    """That of Python's wheels."""
    compiler: str
    package: str
    """Debian's package of the compiler."""


TOOLCHAINS = {"arm64": Toolchain("arm64", "aarch64", "aarch64-linux-gnu-gcc", "gcc-aarch64-linux-gnu")}
"""By the kernel's name of the architecture."""


def tools(arch: str) -> dict[str, str]:
    """Return the programs that make and boot it, and Debian's packages of them."""
    toolchain = TOOLCHAINS[arch]
    return {"mmdebstrap": "mmdebstrap", toolchain.compiler: toolchain.package}


def prepare(arch: str, say: Callable[[str], None]) -> Foreign:
    """Return the programs for an architecture, made now if need be; raises ValueError when they cannot be made."""
    packages = [package for program, package in tools(arch).items() if not shutil.which(program)]
    if packages:
        raise ValueError(f"missing for --arch {arch}: apt-get install {' '.join(packages)}")
    toolchain = TOOLCHAINS[arch]
    wanted = _requirements()
    recipe = [inspect.getsource(_make_root), SUITE, *PACKAGES, *wanted]
    root = _once(f"root-{arch}", recipe, lambda draft: _make_root(draft, toolchain, wanted), say)
    sources = [path.read_text() for path in sorted(NATIVE.glob("*.[ch]")) if path.name != "_native.c"]
    folder = _once(f"native-{arch}", [str(root), *sources], lambda draft: _build(draft, toolchain, root), say)
    return Foreign(root, folder / MODULE)


def _once(name: str, recipe: list[str], make: Callable[[Path], None], say: Callable[[str], None]) -> Path:
    """Return a folder of the cache, made if there is none that was made in this way."""
    folder = images.cache() / f"{name}-{hashlib.sha256(repr(recipe).encode()).hexdigest()[:12]}"
    if folder.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    say(f"making {folder} (once)")
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix="making-", ignore_cleanup_errors=True) as draft:
        made = Path(draft) / "made"
        made.mkdir()
        make(made)
        try:
            made.rename(folder)
        except OSError:
            if not folder.exists():  # else somebody was faster
                raise
    return folder


def _requirements() -> list[str]:
    """Return what the suite needs of Python's packages."""
    try:
        lines = metadata.requires("uffd-selftests") or []
    except metadata.PackageNotFoundError:
        raise ValueError("--arch: the suite is not installed: ./run_tests.sh does that") from None
    return sorted(line for line in lines if "extra ==" not in line)


def _make_root(root: Path, toolchain: Toolchain, requirements: list[str]) -> None:
    """Unpack Debian's packages and Python's into a folder, and do what their scripts would do that is needed here."""
    scratch = root.parent
    tar = scratch / "packages.tar"
    _run(
        scratch,
        *("mmdebstrap", "--quiet", "--mode=chrootless", "--variant=extract", f"--architectures={toolchain.debian}"),
        *(f"--include={','.join(PACKAGES)}", SUITE, str(tar)),
    )
    _run(scratch, "tar", "--extract", "--no-same-owner", "--exclude=./dev/*", f"--directory={root}", f"--file={tar}")
    for link, target in (("bin/sh", "dash"),):
        (root / link).unlink(missing_ok=True)
        (root / link).symlink_to(target)
    library = next(root.glob("usr/lib/python3.*"))
    packages = root / "usr/local/lib" / library.name / "dist-packages"
    version = library.name.removeprefix("python")
    pip = [sys.executable, "-I", "-m", "pip", "install", "--quiet", "--only-binary=:all:", "--no-compile"]
    platforms = [f"--platform={policy}_{toolchain.wheels}" for policy in ("manylinux_2_17", "manylinux2014")]
    _run(scratch, *pip, f"--target={packages}", f"--python-version={version}", *platforms, *requirements)


def _build(folder: Path, toolchain: Toolchain, root: Path) -> None:
    """Compile the native part with the root folder's headers and libraries."""
    from uffd_selftests.abi.native.build import ffi_builder  # noqa: PLC0415  # needs setuptools

    generated = folder.parent / "_native.c"
    with contextlib.redirect_stdout(None):  # it tells what it does
        ffi_builder().emit_c_code(str(generated))
    own = [path for path in sorted(NATIVE.glob("*.c")) if path.name != generated.name]
    headers = next(root.glob("usr/include/python3.*"))
    _run(
        folder.parent,
        *(toolchain.compiler, f"--sysroot={root}", "-shared", "-fPIC", "-pthread", "-std=gnu11", "-O2"),
        *("-DPy_LIMITED_API=0x030A0000", f"-I{headers}", f"-I{NATIVE}", "-o", str(folder / MODULE)),
        *map(str, [generated, *own]),
    )


def _run(folder: Path, *command: str) -> None:
    """Run a program, with its temporary files in a folder; raises ValueError with the first thing it complains of."""
    environment = {**os.environ, "LC_ALL": "C", "TMPDIR": str(folder)}
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=environment, start_new_session=True,
    ) as process:  # fmt: skip
        try:
            output, _ = process.communicate()
        except BaseException:  # Ctrl-C: it and whatever it started
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            raise
    if process.returncode:
        lines = [line.strip() for line in output.splitlines() if line.strip()]
        why = next((line for line in lines if "error" in line.lower() or line.startswith("E:")), (lines or [""])[-1])
        raise ValueError(f"{Path(command[0]).name} failed: {why}")
