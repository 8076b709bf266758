# SPDX-License-Identifier: GPL-2.0-only
"""The files of a guest: an archive that the kernel unpacks into memory, with all that a launcher needs.

A guest has no other file system, and so it can be saved as it is: what it would share with the host could not. Every
file lies where it does on the host. Format: Documentation/driver-api/early-userspace/buffer-format.rst (newc).
"""

from __future__ import annotations

import contextlib
import fnmatch
import hashlib
import importlib
import importlib.util
import io
import marshal
import os
import re
import shutil
import stat
import struct
import subprocess
import sys
import sysconfig
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from uffd_selftests.abi import native
from uffd_selftests.machine import kvm

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from typing import BinaryIO

PACKAGE = Path(__file__).resolve().parent.parent
NATIVE = Path(str(native._native.__file__)).resolve()
EXAMPLES = PACKAGE.parent / "examples"

PYTHON = "/python"
"""A short name of the interpreter: a script's first line has 127 bytes. It finds its library from where that leads."""
INIT = f"""#!{PYTHON} -S
import sys
sys.path[0] = {str(PACKAGE.parent)!r}
from uffd_selftests.vm.init import main
main()
"""
MODULES = "/modules"
"""Where the guest finds its kernel's modules."""

ACCOUNTS = {
    "/etc/passwd": b"root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n",
    "/etc/group": b"root:x:0:\nnogroup:x:65534:\n",
}
FOLDERS = ("/dev", "/proc", "/root", "/run", "/sys", "/tmp")
DEVICES = {"/dev/console": (5, 1), "/dev/null": (1, 3), "/dev/urandom": (1, 9)}
"""Those that are needed before devtmpfs is there: Python starts with random numbers, early ones if need be."""
PROGRAMS = ("cat", "sh")
"""What cases run, beside Python."""

NEEDLESS = (
    # What nobody imports; folders with all that is in them.
    *("*/test", "*/tests", "config-*", "dist-packages", "distutils", "ensurepip", "idlelib", "lib2to3", "pydoc_data"),
    *("site-packages", "test", "tkinter", "turtle.py", "turtledemo", "unittest", "venv", "_pyrepl"),
    *("asyncio", "curses", "dbm", "doctest.py", "html", "http", "pydoc.py", "sqlite3", "wsgiref", "xml", "xmlrpc"),
    # Encodings of texts that are not there.
    *("encodings/big5*", "encodings/cp*", "encodings/euc_*", "encodings/gb*", "encodings/hp_*", "encodings/hz*"),
    *("encodings/iso2022*", "encodings/iso8859_[!1]*", "encodings/iso8859_1?*", "encodings/johab*", "encodings/koi8*"),
    *("encodings/kz*", "encodings/mac_*", "encodings/palmos*", "encodings/ptcp*", "encodings/shift_*"),
    *("lib-dynload/_codecs_*", "lib-dynload/_multibytecodec.*"),
    # What needs libraries that would have to come along, and Python's own tests.
    *(f"lib-dynload/{name}.*" for name in ("_asyncio", "_crypt", "_curses*", "_dbm", "_elementtree", "_gdbm")),
    *(f"lib-dynload/{name}.*" for name in ("_hashlib", "_sqlite3", "_ssl", "_test*", "_tkinter", "_xxtest*", "nis")),
    *(f"lib-dynload/{name}.*" for name in ("_ctypes_test", "ossaudiodev", "pyexpat", "readline", "xxlimited*")),
)
"""Patterns of what stays out of the standard library, relative to its folder."""

FOREIGN_NEEDLESS = (
    *("/boot", "/dev", "/home", "/media", "/mnt", "/opt", "/proc", "/run", "/srv", "/sys", "/tmp", "/var"),
    *("/etc/*.d", "/usr/include", "/usr/local", "/usr/share", "/usr/lib/systemd", "/usr/lib/udev", "/lib/systemd"),
    *(
        "*/gconv",
        "*/perl*",
        "*/engines-3",
        "*/ossl-modules",
        "*.a",
        "*.o",
        "*/libicu*",
        "*/libpython*",
        "*/__pycache__",
    ),
    *("*/dist-packages", "*/valgrind", "/usr/games", "/usr/src", "/lib/udev", "/lib/modules"),
)
"""The same of Debian's packages: paths in the root folder."""

OPENED_LATER = ("libgcc_s.so.1", "libnss_files.so.2")
"""Libraries beside libc.so.6 that it opens by itself: when a thread ends early, and for /etc/passwd (before 2.34)."""
CACHE_OF_LIBRARIES = Path("/etc/ld.so.cache")
"""How the loader finds libraries in folders that only the host's settings name."""

UNCHECKED = 1
"""Flags of bytecode that is used without a look at the source (PEP 552)."""

FORGOTTEN_SECONDS = 86400
"""An archive that was not asked for during that time is removed when another one is made."""
ALIGNMENT = 512
"""Archives are a multiple of it, so that one can follow another."""

WANTED_MODULES = (
    *("virtio_pci", "virtio_console"),
    *("lzo", "lzo_rle", "lz4", "zstd", "zram"),  # it asks for its compression by name, and nobody there loads that
    "loop",
    "hwpoison_inject",
)
"""The kernel's modules that a guest loads, in this order, each after those that it needs."""
KVM_MODULES = ("kvm_amd", "kvm_intel")
"""Those that it loads when a case wants them (machine/kvm.py), which few runs do."""


class Tool(NamedTuple):
    """What unpacks files of a kind."""

    module: str
    program: str
    package: str
    """Debian's package of the program."""


TOOLS = {
    ".gz": Tool("gzip", "gzip", "gzip"),
    ".xz": Tool("lzma", "xz", "xz-utils"),
    ".zst": Tool("compression.zstd", "zstd", "zstd"),  # since Python 3.14
}
"""By the ending of a module's name."""


class Archive:
    """Writes an archive: files and folders as they are on the host, and others; each path once."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._seen: set[str] = {"/"}
        self._size = 0

    def copy(self, path: Path | str, data: bytes | None = None) -> None:
        """Add a file of the host, or data in its place, with the folders and the links that lead to it."""
        self._lead(os.path.abspath(path))
        real = os.path.realpath(path)
        if real not in self._seen:
            mode = stat.S_IMODE(os.stat(real).st_mode) & 0o755 | 0o444
            self.file(real, Path(real).read_bytes() if data is None else data, mode)

    def file(self, path: str, data: bytes, mode: int = 0o644) -> None:
        """Add a file."""
        self._entry(path, stat.S_IFREG | mode, data)

    def link(self, path: str, target: str) -> None:
        """Add a symbolic link."""
        self._entry(path, stat.S_IFLNK | 0o777, target.encode())

    def folder(self, path: str, mode: int = 0o755) -> None:
        """Add a folder."""
        self._entry(path, stat.S_IFDIR | mode)

    def device(self, path: str, number: tuple[int, int]) -> None:
        """Add a character device."""
        self._entry(path, stat.S_IFCHR | 0o666, device=number)

    def close(self) -> None:
        """Complete the archive; the file stays open."""
        self._write("TRAILER!!!", 0)
        self._put(bytes(-self._size % ALIGNMENT))

    def _lead(self, path: str) -> None:
        """Add the folders and the links on the way to a file of the host."""
        here = ""
        for part in path.strip("/").split("/"):
            here += f"/{part}"
            if os.path.islink(here):
                target = os.readlink(here)
                if here not in self._seen:
                    self.link(here, target)
                here = os.path.dirname(here) if not os.path.isabs(target) else ""
                self._lead(os.path.normpath(f"{os.path.realpath(here or '/')}/{target}"))
                here = os.path.realpath(f"{here}/{target}")
            elif here not in self._seen and os.path.isdir(here):
                self.folder(here)

    def _entry(self, path: str, mode: int, data: bytes = b"", device: tuple[int, int] = (0, 0)) -> None:
        if path not in self._seen:
            parent = os.path.dirname(path)
            if parent not in self._seen:
                self.folder(parent)
            self._seen.add(path)
            self._write(path.lstrip("/"), mode, data, device)

    def _write(self, name: str, mode: int, data: bytes = b"", device: tuple[int, int] = (0, 0)) -> None:
        encoded = os.fsencode(name) + b"\0"
        numbers = (len(self._seen), mode, 0, 0, 1, 0, len(data), 0, 0, *device, len(encoded), 0)
        header = b"070701" + "".join(f"{number:08x}" for number in numbers).encode() + encoded
        self._put(header + bytes(-len(header) % 4))
        self._put(data + bytes(-len(data) % 4))

    def _put(self, data: bytes) -> None:
        self._file.write(data)
        self._size += len(data)


@dataclass(frozen=True)
class Foreign:
    """The programs of a guest of another architecture (userland.py)."""

    root: Path
    """A root folder with Python."""
    module: Path
    """The native part."""


def bundle(folder: Path, say: Callable[[str], None], foreign: Foreign | None = None) -> Path:
    """Return the archive with Python and the suite, made in a folder if it is not there; raises OSError.

    It holds what was on the host when it was made; when that changes, another one is made.
    """
    path = folder / f"guest-{_key(foreign)}.cpio"
    with contextlib.suppress(OSError):
        os.utime(path)
        return path
    folder.mkdir(parents=True, exist_ok=True)
    say(f"making {path} (once)")
    draft, name = tempfile.mkstemp(dir=folder, prefix="guest-", suffix=".part")
    try:
        with open(draft, "wb") as file:
            archive = Archive(file)
            _begin(archive)
            if foreign:
                _fill_foreign(archive, foreign)
            else:
                _fill(archive)
            archive.close()
        os.rename(name, path)
    except BaseException:
        os.unlink(name)
        raise
    _forget(folder, path)
    return path


def _forget(folder: Path, made: Path) -> None:
    """Remove what is old; a younger one may be another checkout's, whose guest is about to read it."""
    until = time.time() - FORGOTTEN_SECONDS
    for path in folder.glob("guest-*"):
        with contextlib.suppress(OSError):
            if path.suffix in (".cpio", ".part") and path != made and path.stat().st_mtime < until:
                path.unlink()


def _key(foreign: Foreign | None = None) -> str:
    """Return a name for the state of all that goes in."""
    recipe = [sys.version, Path(__file__).read_text(), str(foreign)]
    for path in (_interpreter(), _backend(), *_suite()):
        status = path.stat()
        recipe.append(f"{path} {status.st_size} {status.st_mtime_ns}")
    return hashlib.sha256("\n".join(recipe).encode()).hexdigest()[:16]


def _interpreter() -> Path:
    """Return Python itself, not the link to it in a virtual environment."""
    return Path(os.path.realpath(getattr(sys, "_base_executable", sys.executable)))


def _library() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def _backend() -> Path:
    """Return what the native part needs of cffi."""
    spec = importlib.util.find_spec("_cffi_backend")
    return Path(str(spec and spec.origin))


def _suite() -> list[Path]:
    """Return the files of the suite."""
    kinds = (".py", ".txt", ".config")
    texts = [path for path in sorted(PACKAGE.rglob("*")) if path.suffix in kinds and path.is_file()]
    return [*texts, NATIVE, *sorted(EXAMPLES.glob("*.py"))]


def _standard_library(library: Path) -> Iterator[Path]:
    """Return the files of a standard library that are of use."""
    for place, folders, files in os.walk(library):
        here = Path(place)

        def needed(name: str, here: Path = here) -> bool:
            relative = str((here / name).relative_to(library))
            return not any(fnmatch.fnmatchcase(relative, pattern) for pattern in NEEDLESS)

        folders[:] = sorted(name for name in folders if name != "__pycache__" and needed(name))
        for name in sorted(files):
            if name.endswith((".py", ".so")) and (here / name).is_file() and needed(name):
                yield here / name


def _begin(archive: Archive) -> None:
    """Add what every guest has."""
    for folder in FOLDERS:
        archive.folder(folder, 0o1777 if folder == "/tmp" else 0o755)
    for name, number in DEVICES.items():
        archive.device(name, number)
    for name, data in ACCOUNTS.items():
        archive.file(name, data)
    archive.file("/init", INIT.encode(), 0o755)


def _fill(archive: Archive) -> None:
    interpreter, backend = _interpreter(), _backend()
    archive.link(PYTHON, str(interpreter))
    archive.link("/proc/self/exe", str(interpreter))  # by which the loader knows $ORIGIN, until /proc is mounted
    if CACHE_OF_LIBRARIES.exists():
        archive.copy(CACHE_OF_LIBRARIES)

    programs = [Path(found) for name in PROGRAMS if (found := shutil.which(name, path="/bin:/usr/bin"))]
    binaries = [interpreter, *programs]
    for path in (*_standard_library(_library()), *_suite()):
        if path.suffix == ".py":
            _add_source(archive, path)
        elif path.suffix == ".so":
            binaries.append(path)
        else:
            archive.copy(path)
    for path in (*binaries, *_libraries([*binaries, backend])):
        archive.copy(path, _loaded_part(path.read_bytes()))
    archive.file(f"{_library()}/lib-dynload/{backend.name}", _loaded_part(backend.read_bytes()), 0o755)


def _fill_foreign(archive: Archive, foreign: Foreign) -> None:
    """Add the programs of another architecture, each where its root folder has it, and the suite."""
    root = foreign.root
    library = next(root.glob("usr/lib/python3.*"))
    archive.link(PYTHON, f"/usr/bin/{library.name}")
    same = library.name.removeprefix("python") == "{}.{}".format(*sys.version_info)
    wanted = {*_standard_library(library), *library.glob("_sysconfigdata*.py")}
    for place, folders, files in os.walk(root):
        here = Path(place)
        inside = "/" + str(here.relative_to(root))
        folders[:] = [name for name in folders if not _is_needless(f"{inside}/{name}")]
        for name in [*folders, *files]:
            path, inner = here / name, os.path.normpath(f"{inside}/{name}")
            if path.is_symlink():
                archive.link(inner, os.readlink(path))
            elif path.is_dir():
                archive.folder(inner)
            elif (library not in path.parents or path in wanted) and path.is_file() and not _is_needless(inner):
                data = path.read_bytes()
                archive.file(inner, _loaded_part(data), 0o755 if os.access(path, os.X_OK) else 0o644)
                if path.suffix == ".py" and same:
                    _add_bytecode(archive, Path(inner), bytecode(path, data, Path(inner)))
    for path in _suite():
        if path.suffix != ".so":
            archive.copy(path)
        if path.suffix == ".py" and same:
            _add_bytecode(archive, Path(os.path.realpath(path)), bytecode(path, path.read_bytes()))
    archive.file(str(NATIVE), foreign.module.read_bytes(), 0o755)
    backend = next(root.glob("usr/local/lib/python3*/dist-packages/_cffi_backend*.so"))
    archive.file(f"/{library.relative_to(root)}/lib-dynload/{backend.name}", backend.read_bytes(), 0o755)


def _is_needless(inner: str) -> bool:
    """Whether a guest does without a file or a folder of a root folder."""
    return any(fnmatch.fnmatchcase(inner, pattern) for pattern in FOREIGN_NEEDLESS)


def _add_source(archive: Archive, path: Path) -> None:
    """Add a file of Python with its bytecode."""
    source = path.read_bytes()
    archive.copy(path, source)
    _add_bytecode(archive, Path(os.path.realpath(path)), bytecode(path, source))


def _add_bytecode(archive: Archive, path: Path, code: bytes) -> None:
    archive.folder(f"{path.parent}/__pycache__")
    archive.file(f"{path.parent}/__pycache__/{path.stem}.{sys.implementation.cache_tag}.pyc", code)


def bytecode(path: Path, source: bytes, inner: Path | None = None) -> bytes:
    """Return the bytecode of a source, which counts as valid whatever time a guest's file system tells of either.

    Inner is the source's path there, if it is another one.
    """
    header = importlib.util.MAGIC_NUMBER + struct.pack("<I", UNCHECKED) + importlib.util.source_hash(source)
    with contextlib.suppress(OSError):
        status = path.stat()
        here = b"" if inner else Path(importlib.util.cache_from_source(str(path), optimization="")).read_bytes()
        stamp = struct.pack("<III", 0, int(status.st_mtime) & 0xFFFFFFFF, status.st_size & 0xFFFFFFFF)
        if here[:16] == importlib.util.MAGIC_NUMBER + stamp:
            return header + here[16:]
    try:
        code = compile(source, str(inner or path), "exec", dont_inherit=True, optimize=0)
    except SyntaxError:  # then whoever imports it learns of it
        return b""
    return header + marshal.dumps(code)


def _libraries(binaries: Iterable[Path]) -> list[Path]:
    """Return the loader and all shared libraries of some programs and libraries, at the paths where it finds them."""
    call = ["ldd", *map(str, binaries)]
    env = {**os.environ, "LC_ALL": "C"}
    try:
        listing = subprocess.run(
            call, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
        ).stdout
    except FileNotFoundError:
        raise FileNotFoundError("ldd is missing: apt-get install libc-bin") from None
    found = {Path(path) for path in re.findall(r"^\t(?:\S+ => )?(/\S+) \(0x", listing, re.MULTILINE)}
    beside = [path.parent / name for path in found if path.name == "libc.so.6" for name in OPENED_LATER]
    return sorted({*found, *(path for path in beside if path.exists())})


def _loaded_part(data: bytes) -> bytes:
    """Return an ELF file without what only linkers and debuggers read: its sections' table, and symbols at its end.

    Header and program headers: elf(5). The libpython of a build of one's own is four times as long with them.
    """
    if data[:6] != b"\x7fELF\x02\x01":  # 64 bits, little-endian
        return data
    start, size, count = *struct.unpack_from("<Q", data, 0x20), *struct.unpack_from("<HH", data, 0x36)
    segments = [struct.unpack_from("<QQQQ", data, start + index * size + 8) for index in range(count)]
    end = max([start + size * count, *(offset + length for offset, _, _, length in segments)])
    header = bytearray(data[:0x40])
    header[0x28:0x30] = bytes(8)  # e_shoff
    header[0x3C:0x40] = bytes(4)  # e_shnum, e_shstrndx
    return bytes(header) + data[0x40:end]


def modules_archive(kernel_modules: Path | None, release: str) -> bytes:
    """Return an archive, to follow the other, with the modules of a kernel for a guest; empty if there are none.

    kernel_modules is a folder lib/modules, or a build tree. What is not there is part of the kernel, or missing
    altogether. Raises OSError, and ValueError when a module cannot be unpacked.
    """
    places = [kernel_modules / release, kernel_modules] if kernel_modules else []
    marks = ("modules.order", "kernel")  # Debian has the list in another package than the modules
    place = next((place for place in places if any((place / mark).exists() for mark in marks)), None)
    found = {
        folder: modules
        for folder, wanted in ((MODULES, WANTED_MODULES), (str(kvm.MODULES), KVM_MODULES))
        if place and (modules := _modules(place, wanted))
    }
    if not found:
        return b""
    buffer = io.BytesIO()
    archive = Archive(buffer)
    for folder, modules in found.items():
        for index, (name, data) in enumerate(modules.items()):
            archive.file(f"{folder}/{index:02}-{name}.ko", data)
    archive.close()
    return buffer.getvalue()


def _modules(folder: Path, wanted: Iterable[str]) -> dict[str, bytes]:
    """Return these modules of a kernel and what they depend on, in the order to load them."""
    listed = dict(_listed(folder))
    paths = {_module_name(path): path for path in listed or folder.rglob("*.ko*")}
    loaded: dict[str, bytes] = {}
    under_way: set[str] = set()

    def load(name: str) -> None:
        if name in under_way or name not in paths:
            return
        under_way.add(name)
        path = paths[name]
        data = _unpacked(path)
        for needed in listed[path] if listed else _depends(data):
            load(needed)
        loaded[name] = data

    for name in wanted:
        load(name)
    return loaded


def _listed(folder: Path) -> Iterator[tuple[Path, list[str]]]:
    """Read modules.dep, if there is one: each file with the names of what it depends on, in the order to load them."""
    with contextlib.suppress(FileNotFoundError):
        for line in (folder / "modules.dep").read_text().splitlines():
            path, _, needed = line.partition(":")
            if (folder / path).exists():  # else it is that of another installation
                yield folder / path, [_module_name(Path(each)) for each in reversed(needed.split())]


def _depends(module: bytes) -> list[str]:
    """Return the names of the modules that a module says it depends on."""
    told = re.search(rb"\0depends=([^\0]*)\0", module)
    return [name.replace("-", "_") for name in told[1].decode().split(",") if name] if told else []


def _module_name(path: Path) -> str:
    return path.name.partition(".ko")[0].replace("-", "_")


def _unpacked(path: Path) -> bytes:
    """Read a module; raises ValueError when that takes what is not installed."""
    data = path.read_bytes()
    if path.suffix == ".ko":
        return data
    tool = TOOLS.get(path.suffix)
    if not tool:
        raise ValueError(f"{path}: nothing is known that unpacks it")
    with contextlib.suppress(ImportError):
        decompress: Any = importlib.import_module(tool.module).decompress
        return bytes(decompress(data))
    try:
        return subprocess.run([tool.program, "-dc"], input=data, capture_output=True, check=True).stdout
    except FileNotFoundError:
        raise ValueError(f"{path} cannot be unpacked: apt-get install {tool.package}") from None
    except subprocess.CalledProcessError as error:
        raise ValueError(f"{path} cannot be unpacked: {error.stderr.decode(errors='replace').strip()}") from None
