# SPDX-License-Identifier: GPL-2.0-only
"""The archive of a guest's files has all that a launcher needs, is made once, and its modules come in order."""

from __future__ import annotations

import gzip
import importlib.util
import lzma
import marshal
import os
import py_compile
import resource
import stat
import struct
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path
from types import CodeType
from typing import TYPE_CHECKING, NamedTuple

import pytest

from tests.machine.helpers import needs_root
from uffd_selftests.machine import kvm
from uffd_selftests.vm import bundle
from uffd_selftests.vm.bundle import Archive, modules_archive

if TYPE_CHECKING:
    from collections.abc import Callable

CHECK = """
import sys
sys.path[0] = {path!r}
import uffd_selftests.vm.init
import uffd_selftests.cases.contract.test_copy
print(sys.prefix, uffd_selftests.__file__)
"""


LIBRARIES = "_cffi_backend, ctypes, decimal, json, multiprocessing.shared_memory, pickle, random, tempfile, zlib"


class Entry(NamedTuple):
    """One entry of an archive."""

    mode: int
    data: bytes
    device: tuple[int, int]


def read(data: bytes) -> dict[str, Entry]:
    """Return what is in an archive, or in several after one another."""
    entries: dict[str, Entry] = {}
    position = 0
    while position < len(data):
        if not data[position]:  # the kernel skips zeroes between archives, in words
            position += 4
            continue
        assert data[position : position + 6] == b"070701"
        fields = [int(data[at : at + 8], 16) for at in range(position + 6, position + 110, 8)]
        size, length = fields[6], fields[11]
        name = data[position + 110 : position + 110 + length]
        assert name.endswith(b"\0")
        start = position + 110 + length + -(110 + length) % 4
        position = start + size + -size % 4
        path = "/" + name[:-1].decode()
        if path != "/TRAILER!!!":
            assert path not in entries
            assert os.path.dirname(path) == "/" or stat.S_ISDIR(entries[os.path.dirname(path)].mode)
            entries[path] = Entry(fields[1], data[start : start + size], (fields[9], fields[10]))
    return entries


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Entry]:
    """Return what is in the archive of this host."""
    said: list[str] = []
    path = bundle.bundle(tmp_path_factory.mktemp("cache") / "new", said.append)
    assert said == [f"making {path} (once)"]
    assert path.stat().st_size < 60 << 20
    assert path.stat().st_size % bundle.ALIGNMENT == 0
    return read(path.read_bytes())


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Let the archive be small, and return the only file of the suite."""
    file = tmp_path / "case.py"
    file.write_text("pass\n")

    def fill(archive: Archive) -> None:
        archive.file("/data", bytes(4 << 20))
        archive.close()

    monkeypatch.setattr(bundle, "_suite", lambda: [file])
    monkeypatch.setattr(bundle, "_fill", fill)
    return file


def unpack(archive: dict[str, Entry], root: Path) -> None:
    """Write an archive's folders, files and links below a folder."""
    for path, entry in archive.items():
        place = root / path.lstrip("/")
        if stat.S_ISDIR(entry.mode):
            place.mkdir(exist_ok=True)
        elif stat.S_ISLNK(entry.mode):
            place.symlink_to(entry.data.decode())
        elif stat.S_ISREG(entry.mode):
            place.write_bytes(entry.data)
            place.chmod(stat.S_IMODE(entry.mode))


def test_what_is_in_it(archive: dict[str, Entry]) -> None:
    """The archive has the first process, Python, devices, accounts, and every file of the suite as it is."""
    first, _, rest = archive["/init"].data.partition(b"\n")
    assert (first, stat.S_IMODE(archive["/init"].mode)) == (b"#!/python -S", 0o755)
    compile(rest, "/init", "exec")
    assert archive["/python"].data == archive["/proc/self/exe"].data
    assert archive[archive["/python"].data.decode()].data.startswith(b"\x7fELF")
    assert archive["/dev/console"] == Entry(stat.S_IFCHR | 0o666, b"", (5, 1))
    assert {"/proc", "/sys", "/tmp", "/run", "/root", "/etc/passwd", "/etc/group"} <= set(archive)
    for path in bundle.PACKAGE.rglob("*.py"):
        assert archive[str(path)].data == path.read_bytes()
    for path in (*bundle.PACKAGE.rglob("*.txt"), *bundle.EXAMPLES.glob("*.py")):
        assert archive[str(path)].data == path.read_bytes()
    modes = {name: entry.mode for name, entry in archive.items() if not stat.S_ISLNK(entry.mode)}
    assert [name for name, mode in modes.items() if not mode & 0o004] == []
    assert [name for name in modes if "/site-packages/" in name and "/uffd_selftests/" not in name] == []


def test_bytecode_of_all_sources(archive: dict[str, Entry]) -> None:
    """Every source has its bytecode, which is used without a look at the source's time."""
    sources = [path for path in archive if path.endswith(".py")]
    assert len(sources) > 300
    for source in sources:
        name = f"{os.path.basename(source)[:-3]}.{sys.implementation.cache_tag}.pyc"
        compiled = archive[f"{os.path.dirname(source)}/__pycache__/{name}"].data
        assert compiled[:4] == importlib.util.MAGIC_NUMBER
        assert struct.unpack_from("<I", compiled, 4) == (1,)
        assert compiled[8:16] == importlib.util.source_hash(archive[source].data)
    assert isinstance(marshal.loads(compiled[16:]), CodeType)


def test_bytecode(tmp_path: Path) -> None:
    """Bytecode of the host is taken when it is that of the source, and otherwise made."""
    source = tmp_path / "module.py"
    source.write_text("x = 1\n")
    cache = Path(str(py_compile.compile(str(source))))
    marked = cache.read_bytes()[:16] + b"as it is"
    cache.write_bytes(marked)
    assert bundle.bytecode(source, source.read_bytes())[16:] == b"as it is"
    source.write_text("x = 12\n")
    code = marshal.loads(bundle.bytecode(source, source.read_bytes())[16:])
    assert (code.co_filename, 12 in code.co_consts) == (str(source), True)
    source.write_text("x =\n")
    assert bundle.bytecode(source, source.read_bytes()) == b""


@needs_root
def test_it_runs(archive: dict[str, Entry], tmp_path: Path) -> None:
    """With nothing but the archive's files Python starts, without site, and finds its library and the suite."""
    unpack(archive, tmp_path)
    (tmp_path / "proc/meminfo").write_text("Hugepagesize: 2048 kB\n")

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        def enter() -> None:
            os.chroot(tmp_path)
            os.chdir("/")

        call = ["/python", *arguments]
        return subprocess.run(call, preexec_fn=enter, env={}, capture_output=True, text=True, check=False)

    done = run("-S", "-c", CHECK.format(path=str(bundle.PACKAGE.parent)))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split() == [sys.base_prefix, str(bundle.PACKAGE / "__init__.py")]
    done = run("-ISc", f"import {LIBRARIES}")
    assert (done.returncode, done.stderr) == (0, "")
    done = subprocess.run(
        ["chroot", tmp_path, "/bin/sh", "-c", "cat /init"], capture_output=True, text=True, check=True
    )
    assert done.stdout == bundle.INIT


def test_links(tmp_path: Path) -> None:
    """A file is where a link leads, and the links are there as well, those of folders, too, and each thing once."""
    (tmp_path / "usr/lib").mkdir(parents=True)
    (tmp_path / "usr/lib/libx.so.1.2").write_bytes(b"x")
    (tmp_path / "usr/lib/libx.so.1").symlink_to("libx.so.1.2")
    (tmp_path / "lib").symlink_to("usr/lib")
    (tmp_path / "lib64").symlink_to(tmp_path / "lib")
    with (tmp_path / "archive").open("wb") as file:
        archive = Archive(file)
        for name in ("lib64/libx.so.1", "lib/libx.so.1.2", "usr/lib/libx.so.1"):
            archive.copy(tmp_path / name)
        archive.close()
    entries = read((tmp_path / "archive").read_bytes())
    found = {path.removeprefix(f"{tmp_path}/"): entry for path, entry in entries.items()}
    assert found["usr/lib/libx.so.1.2"].data == b"x"
    assert found["usr/lib/libx.so.1"].data == b"libx.so.1.2"
    assert (found["lib"].data, found["lib64"].data) == (b"usr/lib", str(tmp_path / "lib").encode())
    assert len([path for path in entries if path.startswith(f"{tmp_path}/")]) == 6


def test_made_once(small: Path, tmp_path: Path) -> None:
    """The archive is made anew, under another name, when a file has changed, and only then."""
    said: list[str] = []
    first = bundle.bundle(tmp_path / "cache", said.append)
    assert bundle.bundle(tmp_path / "cache", said.append) == first
    small.write_text("pass  # changed\n")
    second = bundle.bundle(tmp_path / "cache", said.append)
    assert second != first
    assert said == [f"making {path} (once)" for path in (first, second)]
    assert first.exists()  # another checkout may be about to use it


def test_old_ones_are_removed(small: Path, tmp_path: Path) -> None:
    """What was not used for a day goes when another archive is made, and so do drafts."""
    first = bundle.bundle(tmp_path / "cache", print)
    kept = tmp_path / "cache/other.cpio"
    for path in (first, tmp_path / "cache/guest-x.part", kept):
        path.touch()
        os.utime(path, times=(0, time.time() - bundle.FORGOTTEN_SECONDS - 60))
    assert bundle.bundle(tmp_path / "cache", print) == first
    assert first.stat().st_mtime > time.time() - 60
    os.utime(first, (0, 0))
    small.write_text("pass  # changed\n")
    second = bundle.bundle(tmp_path / "cache", print)
    assert set((tmp_path / "cache").iterdir()) == {second, kept}


def test_two_at_once(small: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Two that make the archive at the same time do not disturb each other."""
    assert small.exists()
    both = threading.Barrier(2, timeout=30)
    fill = bundle._fill

    def slowly(archive: Archive) -> None:
        archive.folder("/first")
        both.wait()
        fill(archive)
        both.wait()

    monkeypatch.setattr(bundle, "_fill", slowly)
    made: list[Path] = []
    threads = [threading.Thread(target=lambda: made.append(bundle.bundle(tmp_path / "cache", print))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == [made[0]] * 2
    assert list((tmp_path / "cache").iterdir()) == [made[0]]
    assert {"/first", "/data"} <= set(read(made[0].read_bytes()))


@pytest.mark.usefixtures("small")
def test_no_space(tmp_path: Path) -> None:
    """When it cannot be written, nothing half made stays."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        with pytest.raises(OSError, match="too large"):
            bundle.bundle(tmp_path / "cache", lambda _: None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list((tmp_path / "cache").iterdir()) == []


# ---- modules ---------------------------------------------------------------------------------------------------------

TREE = {
    "drivers/char/virtio_console.ko": "virtio_ring,virtio",
    "drivers/virtio/virtio_pci.ko.xz": "virtio-pci-modern-dev,virtio",
    "drivers/virtio/virtio_pci_modern_dev.ko.gz": "",
    "drivers/virtio/virtio.ko": "virtio_ring",
    "drivers/virtio/virtio_ring.ko.xz": "",
    "drivers/net/virtio_net.ko": "virtio",
    "drivers/block/zram/zram.ko.xz": "zsmalloc",
    "mm/zsmalloc.ko.xz": "",
    "crypto/lzo-rle.ko.xz": "lzo_compress",
}
"""Modules and what they say of those that they depend on."""
ORDER = ["virtio_pci_modern_dev", "virtio_ring", "virtio", "virtio_pci", "virtio_console"]
DEPENDENCIES = """
kernel/drivers/char/virtio_console.ko: kernel/drivers/virtio/virtio.ko kernel/drivers/virtio/virtio_ring.ko.xz
kernel/drivers/virtio/virtio_pci.ko.xz: {0}/virtio.ko {0}/virtio_ring.ko.xz {0}/virtio_pci_modern_dev.ko.gz
kernel/drivers/virtio/virtio_pci_modern_dev.ko.gz:
kernel/drivers/virtio/virtio.ko: kernel/drivers/virtio/virtio_ring.ko.xz
kernel/drivers/virtio/virtio_ring.ko.xz:
kernel/drivers/block/zram/zram.ko.xz: kernel/mm/zsmalloc.ko.xz
kernel/mm/zsmalloc.ko.xz:
kernel/crypto/lzo-rle.ko.xz:
kernel/crypto/zstd.ko.xz:
""".format("kernel/drivers/virtio").lstrip()
"""modules.dep, with a module that is not there any more."""


def content(name: str, depends: str) -> bytes:
    """Return what looks like a module."""
    return f"\x7fELF\0license=GPL\0depends={depends}\0retpoline=Y\0name={name}\0".encode()


@pytest.fixture
def kernel_modules(tmp_path: Path) -> Path:
    """Return a folder lib/modules."""
    pack: dict[str, Callable[[bytes], bytes]] = {".ko": bytes, ".xz": lzma.compress, ".gz": gzip.compress}
    for path, depends in TREE.items():
        place = tmp_path / "modules/6.99/kernel" / path
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(pack[place.suffix](content(place.name.partition(".")[0], depends)))
    (tmp_path / "modules/6.99/modules.order").touch()
    return tmp_path / "modules"


@pytest.mark.parametrize("listed", [False, True])
def test_modules(kernel_modules: Path, listed: bool) -> None:
    """Modules are unpacked, come after what they depend on, and nothing comes that is not wanted; also from a tree."""
    if listed:
        (kernel_modules / "6.99/modules.dep").write_text(DEPENDENCIES)
    data = modules_archive(kernel_modules, "6.99")
    assert data == modules_archive(kernel_modules / "6.99", "6.99")
    assert len(data) % bundle.ALIGNMENT == 0
    entries = {path: entry for path, entry in read(data).items() if path != "/modules"}
    names = [path.removeprefix("/modules/") for path in entries]
    assert names == [f"{i:02}-{name}.ko" for i, name in enumerate([*ORDER, "lzo_rle", "zsmalloc", "zram"])]
    assert names == sorted(names)
    for path, entry in entries.items():
        assert entry.data.endswith(b"\0") and entry.data.startswith(b"\x7fELF"), path  # noqa: PT018


def test_kvm_modules(kernel_modules: Path) -> None:
    """KVM's modules lie in a folder of their own, from which nobody loads them before a case wants them."""
    for name, depends in (("kvm", "irqbypass"), ("kvm-amd", "kvm,ccp,irqbypass"), ("irqbypass", ""), ("ccp", "")):
        (kernel_modules / f"6.99/kernel/{name}.ko").write_bytes(content(name.replace("-", "_"), depends))
    entries = read(modules_archive(kernel_modules, "6.99"))
    names = [path.removeprefix(f"{kvm.MODULES}/") for path in entries if path.startswith(f"{kvm.MODULES}/")]
    assert names == ["00-irqbypass.ko", "01-kvm.ko", "02-ccp.ko", "03-kvm_amd.ko"]
    beside = [Path(path).name for path in entries if Path(path).parent == Path("/modules")]
    assert [name for name in beside if "kvm" in name or "ccp" in name] == ["kvm"]


def test_no_modules(kernel_modules: Path) -> None:
    """A kernel that has all built in gets none, and its archive follows the other without harm."""
    assert modules_archive(None, "6.99") == b""
    assert modules_archive(kernel_modules, "6.98") == b""


def test_zstd(kernel_modules: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What Python cannot unpack a program unpacks, and where there is none, one line says how to get it."""
    packed = kernel_modules / "6.99/kernel/mm/zstd.ko.zst"
    packed.write_bytes(b"packed")
    tool = bundle.Tool("no_such_module", "zstd", "zstd")
    monkeypatch.setitem(bundle.TOOLS, ".zst", tool)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match=r"zstd\.ko\.zst cannot be unpacked: apt-get install zstd$"):
        modules_archive(kernel_modules, "6.99")
    (tmp_path / "zstd").write_text("#!/bin/sh\necho 'not in zstd format' >&2; exit 1\n")
    (tmp_path / "zstd").chmod(0o755)
    with pytest.raises(ValueError, match=r"zstd\.ko\.zst cannot be unpacked: not in zstd format$"):
        modules_archive(kernel_modules, "6.99")
    (tmp_path / "zstd").write_text("#!/bin/sh\nprintf 'unpacked\\000'\n")
    assert b"unpacked\0" in modules_archive(kernel_modules, "6.99")


def test_loaded_part() -> None:
    """Of a library remains what the loader reads: less, and the same at the same place."""
    data = bundle.NATIVE.read_bytes()
    part = bundle._loaded_part(data)
    assert len(part) < len(data)
    assert part[0x40:] == data[0x40 : len(part)]
    assert bundle._loaded_part(b"text") == b"text"
    assert zlib.crc32(bundle._loaded_part(part)) == zlib.crc32(part)
