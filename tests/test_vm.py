# SPDX-License-Identifier: GPL-2.0-only
"""Running in other kernels: what --kernel takes, and what becomes of a machine that ends in one way or another.

No kernel is booted here: in place of virtme-ng a shell says what a guest would say. uffd_selftests.vm.check boots some.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from uffd_selftests import cli as command
from uffd_selftests.harness import reporter
from uffd_selftests.harness.results import Planned
from uffd_selftests.vm import check, guests, images, session, userland, vng
from uffd_selftests.vm.guests import Accelerator, Ending, Guest
from uffd_selftests.vm.images import Kernel
from uffd_selftests.vm.verdict import judge
from uffd_selftests.vm.watch import Lines, Watch

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.conftest import Starter

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


# ---- what --kernel takes -------------------------------------------------------------------------------------------


def test_image(tmp_path: Path) -> None:
    """An image tells its release."""
    image = write_image(tmp_path / "vmlinuz-of-mine")
    assert images.find(str(image), "x86_64") == images.Kernel(image, "6.99.0-test", image)


def test_arm64_image(tmp_path: Path) -> None:
    """The release of an arm64 image is where its first message is; of a compressed one the file's name has to do."""
    image, packed = tmp_path / "Image", tmp_path / "vmlinuz-6.99.0-16k"
    image.write_bytes(bytes(0x38) + b"ARM\x64" + bytes(0x30000) + b"Linux version 6.99.0-rc1+ (someone@somewhere)")
    packed.write_bytes(b"\x1f\x8b rubbish")
    assert [images.find(str(path), "arm64").name for path in (image, packed)] == ["6.99.0-rc1+", "6.99.0-16k"]


def test_build_tree(tmp_path: Path) -> None:
    """A build tree is booted as such, for its modules, and named by the release it was built as."""
    write_image(tmp_path / "arch/x86/boot/bzImage", "6.99.0")
    (tmp_path / "include/config").mkdir(parents=True)
    (tmp_path / "include/config/kernel.release").write_text("6.99.0-rc1+\n")
    assert images.find(str(tmp_path), "x86_64") == images.Kernel(tmp_path, "6.99.0-rc1+", tmp_path)


def write_package(folder: Path, *files: str) -> Path:
    """Build a Debian package with these files, which are kernels if they are below boot."""
    if not shutil.which("dpkg-deb"):
        pytest.skip("no dpkg-deb: apt-get install dpkg")
    control = folder / "content/DEBIAN/control"
    for name in files:
        write_image(folder / "content" / name)
    control.parent.mkdir(parents=True)
    control.write_text("Package: linux\nVersion: 1\nArchitecture: all\nMaintainer: me <me@x>\nDescription: none\n")
    subprocess.run(["dpkg-deb", "-b", "content", "linux.deb"], cwd=folder, check=True, capture_output=True)
    return folder / "linux.deb"


def test_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Debian package is unpacked once, beside its modules."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    package = write_package(tmp_path, "boot/vmlinuz-6.99.0-test", "lib/modules/6.99.0-test/modules.order")
    kernel = images.find(str(package), "x86_64")
    assert (kernel.name, kernel.origin) == ("6.99.0-test", package)
    root = kernel.path.parent.parent
    assert (root / "lib/modules/6.99.0-test/modules.order").exists()
    (root / "mark").touch()
    assert images.find(str(package), "x86_64") == kernel
    assert sorted(path.name for path in (tmp_path / "cache/uffd-selftests").iterdir()) == [root.name]
    assert (root / "mark").exists()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "no such file"),
        (lambda path: path.write_bytes(b""), "is empty"),
        (os.mkfifo, "is a pipe: name a file"),
        (lambda path: path.write_text("#!/bin/sh\n"), "is no kernel image, build tree or Debian package"),
        (lambda path: path.write_bytes(b"\x7fELF" + bytes(600)), "is an ELF file, not a boot image: name arch/"),
        (lambda path: path.write_bytes(bytes(0x38) + b"ARM\x64"), "is an image for arm64: say --arch arm64"),
        (lambda path: path.mkdir(), "has neither arch/x86/boot/bzImage nor boot/vmlinuz-*: build it, or name an image"),
        (lambda path: path.write_bytes(b"!<arch>\nrubbish"), "cannot be unpacked: dpkg-deb: error: "),
        (
            lambda path: [write_image(path / "boot" / name) for name in ("vmlinuz-1", "vmlinuz-2")],
            "has several kernels: name one of vmlinuz-1, vmlinuz-2",
        ),
    ],
)
def test_no_kernel(
    make: Callable[[Path], object],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """What is no kernel is said in one line, before anything is booted."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "thing"
    make(path)
    assert command.main(["--kernel", str(path)]) == 2
    out, err = capfd.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith(f"uffd-selftests: {path}")
    assert message in err


def test_empty_path(capfd: pytest.CaptureFixture[str]) -> None:
    """An empty path, of a variable that is not set, is not the current folder."""
    assert command.main(["--kernel", ""]) == 2
    assert capfd.readouterr() == ("", "uffd-selftests: --kernel: the path is empty\n")


def test_package_without_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Headers or debug symbols are the wrong package, and nothing of them stays."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(ValueError, match="has no boot/vmlinuz-.: name the linux-image package"):
        images.find(str(write_package(tmp_path, "usr/src/linux-headers-6.99/Makefile")), "x86_64")
    assert not list((tmp_path / "cache/uffd-selftests").iterdir())


def test_names() -> None:
    """Kernels of one release are told apart with what the user named, then by number."""
    names = [("6.1", "a/vmlinuz-6.1"), ("6.12", "tree"), ("6.12", "vmlinuz-6.12-debug"), ("6.12", "other/tree")]
    kernels = [images.Kernel(Path(path), name, Path(path)) for name, path in names]
    assert [kernel.name for kernel in images.distinguish(kernels)] == [
        *("6.1", "6.12-tree", "6.12-vmlinuz-6.12-debug", "6.12-tree-2"),
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--vm-memory", "much"], "argument --vm-memory: 'much' is no size like 3G or 2048M"),
        (["--vm-cpus", "0"], "argument --vm-cpus: '0' is not a positive whole number"),
        (["--vm-append", "a 'b"], 'argument --vm-append: "a \'b": No closing quotation'),
        (["--deadline", "soon"], "--deadline: 'soon' is not a positive number"),
        (["-f", "nonesuch"], "nothing matches the given -f nonesuch"),
    ],
)
def test_usage_error(arguments: list[str], message: str, cli: Starter, tmp_path: Path, tools: Path) -> None:
    """A mistake is explained in one line before anything is booted."""
    run = cli.run("--kernel", str(write_image(tmp_path / "bzImage")), *arguments, env={"PATH": str(tools)})
    assert (run.code, run.stdout) == (2, "")
    assert run.stderr.startswith(f"uffd-selftests: {message}")
    assert run.stderr.count("\n") == 1


# ---- the call of virtme-ng -----------------------------------------------------------------------------------------


@pytest.fixture
def tools(tmp_path: Path) -> Path:
    """Return a folder with everything that is looked for, none of which does anything."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("vng", vng.QEMU["x86_64"][0], *vng.TOOLS, *vng.GUEST_TOOLS):
        (folder / name).write_text("#!/bin/sh\n")
        (folder / name).chmod(0o755)
    return folder


def test_missing_tools(tools: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line names all packages that are missing."""
    monkeypatch.setattr(vng, "SBIN", ())
    monkeypatch.setattr(vng, "native", lambda: "x86_64")
    monkeypatch.setenv("PATH", str(tools))
    assert vng.missing("x86_64") is None
    packages = "qemu-system-arm mmdebstrap gcc-aarch64-linux-gnu binutils"
    assert vng.missing("arm64") == f"missing for --kernel: apt-get install {packages}"
    for name in ("qemu-system-x86_64", "udevadm"):
        (tools / name).unlink()
    assert vng.missing("x86_64") == "missing for --kernel: apt-get install qemu-system-x86 udev"
    (tools / "vng").unlink()
    monkeypatch.setattr(sys, "executable", str(tools / "python"))
    assert vng.missing("x86_64") == "virtme-ng is missing: pip install 'uffd-selftests[vm]'"


def test_command(tools: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Options reach virtme-ng, quoted for its shell; emulation has a clock that does not run away."""
    monkeypatch.setenv("PATH", str(tools))
    kernel = images.Kernel(tmp_path / "a tree", "6.99", tmp_path / "a tree")
    shape = vng.Shape(memory="2G", cpus=2, append=("quiet",), qemu=("-cpu", "max,-la57"))
    results = tmp_path / "out put"
    results.mkdir()
    call = vng.command(kernel, shape, vng.TCG, results, ["-k", "move and anon"])
    assert call[call.index("--run") + 1] == f"'{tmp_path}/a tree'"
    assert call[call.index("--memory") + 1 :][:3] == ["2G", "--cpus", "2"]
    assert call[call.index("--rwdir") + 1] == f"'{vng.RESULTS}={tmp_path}/out put'"
    assert call[call.index("--append") + 1].endswith(" tsc=unstable clocksource=hpet quiet")
    assert "--disable-kvm" in call
    assert call[-4:-2] == ["--qemu-opts=-cpu", "--qemu-opts=max,-la57"]
    assert call[-1] == f"sh {vng.RESULTS}/guest.sh"
    assert (results / "guest.sh").read_text().endswith("-S -m uffd_selftests.vm.guest -k 'move and anon'\n")
    assert call[call.index("--rodir") + 1].endswith(f"/udev/rules.d={vng.UDEV}")
    assert list(vng.UDEV.glob("*.rules"))
    assert not {"--disable-kvm", "tsc=unstable"} & set(vng.command(kernel, shape, vng.KVM, tmp_path, []))


def test_foreign_command(tools: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A guest of another architecture has programs of its own; of the host it gets suite, modules and named tests."""
    monkeypatch.setenv("PATH", str(tools))
    image, tests = tmp_path / "boot/vmlinuz-6.99", tmp_path / "my tests"
    (tmp_path / "lib/modules").mkdir(parents=True)
    tests.mkdir()
    (tests / "test_mine.py").touch()
    own = userland.Userland(tmp_path / "root", tmp_path / "native.so")
    shape = vng.Shape("arm64", userland=own)
    kernel = images.Kernel(image, "6.99", image)
    call = vng.command(kernel, shape, vng.TCG, tmp_path, ["-k", "move", "--", f"{tests}/test_mine.py::test_a"])
    assert call[call.index("--arch") + 1 :][:5] == ["arm64", "--root", f"{own.root}", "--busybox", f"{own.busybox}"]
    assert "--qemu-opts=cortex-a76" in call
    assert "tsc=unstable" not in call[call.index("--append") + 1]
    script = (tmp_path / "guest.sh").read_text()
    assert f"for folder in {vng.PROJECT} '{tests}'; do" in script
    assert f'mount --bind "/run/uffd-host"{tmp_path}/native.so {userland.BUILT}' in script
    assert f"for folder in {tmp_path}/lib/modules; do" in script
    assert script.endswith(f"/usr/bin/python3 -m uffd_selftests.vm.guest -k move -- '{tests}/test_mine.py::test_a'\n")
    for folder in (vng.PROJECT, tests):
        assert (own.root / folder.relative_to("/")).is_dir()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--arch", "arm64", "--vm-accel", "kvm"], "--vm-accel kvm: a kernel for arm64 can only be emulated here"),
        (["--arch", "arm64"], "mmdebstrap failed: E: no such suite"),
        (["--arch", "x86_64"], "--arch x86_64: only kernels for riscv can be booted here"),
    ],
)
def test_foreign_usage_error(
    arguments: list[str], message: str, *, tools: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """What cannot be done for another architecture is said in one line, and nothing half made stays."""
    toolchain = userland.TOOLCHAINS["arm64"]
    for name in (vng.QEMU["arm64"][0], toolchain.compiler, "strings"):
        shutil.copy(tools / "vng", tools / name)
    (tools / "mmdebstrap").write_text("#!/bin/sh\necho 'I: working' >&2; echo 'E: no such suite' >&2; exit 1\n")
    (tools / "mmdebstrap").chmod(0o755)
    monkeypatch.setattr(vng, "native", lambda: "riscv")
    monkeypatch.setattr(session, "native", lambda: "riscv")
    monkeypatch.setattr(session, "_plan", lambda *_: session.Plan(PLAN, []))
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    magic = bytes(0x38) + b"ARM\x64" if "arm64" in arguments else bytes(0x202) + b"HdrS" + bytes(0x1000)
    (tmp_path / "Image").write_bytes(magic)
    assert command.main(["--kernel", str(tmp_path / "Image"), *arguments]) == 2
    assert capfd.readouterr().err.splitlines()[-1] == f"uffd-selftests: {message}"
    assert not list(tmp_path.glob("cache/uffd-selftests/*"))


def test_strange_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that virtme-ng's shell would take apart is refused."""
    monkeypatch.setenv("XDG_CACHE_HOME", "/a b")
    with pytest.raises(ValueError, match="cannot take a root folder in /a b/uffd-selftests: name another in XDG_"):
        userland.prepare("arm64", print)


def test_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was made is kept until it would be made in another way."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    said: list[str] = []

    def make(draft: Path) -> None:
        (draft / "file").touch()

    first, again, other = (userland._once("root", [recipe], make, said.append) for recipe in ("a", "a", "b"))
    assert first == again
    assert sorted(tmp_path.glob("uffd-selftests/*")) == sorted([first, other])
    assert said == [f"making {folder} (once)" for folder in (first, other)]
    assert (other / "file").exists()


def test_arguments(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The suite in the guest is told what was said here, in the environment as well."""
    for name in [name for name in os.environ if name.startswith("UFFD_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("UFFD_REQUIRE", "wp")
    monkeypatch.setenv("UFFD_MAY_HANG_KERNEL", "1")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "test_mine.py").touch()
    args = command.parser().parse_args(["-f", "move", "-k", "anon", "--strict", "--deadline", "5"])
    passed = session.suite_arguments(args, ["-x", "test_mine.py::test_a", "test_b"], 8)
    assert passed == [
        *("--filter=move", "-k", "anon", "--strict", "--may-hang-kernel"),
        *("--deadline=5", "--deadline-scale=8", "--require=wp"),
        *("--", "-x", f"{tmp_path}/test_mine.py::test_a", "test_b"),
    ]
    args = command.parser().parse_args(["--deadline-scale", "3"])
    assert session.suite_arguments(args, [], 8) == ["--may-hang-kernel", "--deadline-scale=3", "--require=wp"]


def test_plan(cli: Starter, monkeypatch: pytest.MonkeyPatch) -> None:
    """A guest collects only the files that have something to run."""
    args = command.parser().parse_args(["-k", "unit and zeropage"])
    names, files = session._plan(args, [])
    assert names == [f"zeropage on {mem}" for mem in ("anon", "shmem", "shmem-private", "hugetlb", "hugetlb-private")]
    assert files == [Path(command.__file__).parent / "cases/unit/test_zeropage.py"]
    assert [session._is_ours(path) for path in (str(files[0]), "-x", f"{files[0]}::test_zeropage", "/proc")] == [
        *(True, False, False, False),
    ]
    listing = cli.run("-l", *(f"--case-file={path}" for path in files), "-k", "unit")
    assert listing.stdout.splitlines() == names


# ---- the streams of a guest ----------------------------------------------------------------------------------------


def test_lines() -> None:
    """A stream is cut into whole lines, free of what a terminal would make of them."""
    lines = Lines()
    assert [lines.feed(chunk) for chunk in (b"o", b"k 1\r\nok", b" \x1b[1m2\x1b[m\n\nok 3", b"")] == [
        *([], ["ok 1"], ["ok 2", ""], []),
    ]


def test_running_case() -> None:
    """The case that runs is the last that began, until its result is there."""
    watch = Watch()
    assert watch.running == ""
    assert watch.console("[    1.0] uffd-selftests: case move on anon")
    assert watch.running == "move on anon"
    watch.ktap("not ok 1 move on anon # TIMEOUT 30 seconds")
    assert watch.running == ""
    assert not watch.console("uffd-selftests: something for people")
    assert watch.messages == ["something for people"]


def test_notes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The suite notes in the kernel's log what the watch reads on the console."""
    monkeypatch.setattr(reporter, "KMSG", str(tmp_path / "kmsg"))
    settings: Any = SimpleNamespace(folder=None, data_only=False, ktap_fd=None, progress=False, kmsg=True)
    signals: Any = None
    writer = reporter.Reporter(settings, signals)
    writer.begin([Planned("test_move.py::test_move[anon]", "move on anon", "move")], [])
    writer.pytest_runtest_logstart("test_move.py::test_move[anon]")
    watch = Watch()
    assert watch.console(f"[    1.0] {(tmp_path / 'kmsg').read_text().rstrip()}")
    assert watch.running == "move on anon"
    writer.close()


# ---- how a machine ends --------------------------------------------------------------------------------------------


def run_shell(script: str, folder: Path, patience: float = 60) -> Ending:
    """Run a shell in place of virtme-ng."""
    guest = Guest(images.Kernel(folder, "6.99.0", folder), folder)
    return guest.run(["/bin/sh", "-c", script], vng.TCG, patience, lambda _: None, lambda: None)


@pytest.mark.parametrize(
    ("script", "outcome", "reason"),
    [
        (PASSES, "pass", ""),
        (PASSES + "exit 1", "fail", ""),
        (PASSES + "exit 4", "skip", "nothing could be tested"),
        (PASSES + PANIC + "exit 255", "error", "kernel panic: Fatal"),
        (PASSES + "exit 255", "error", "the virtual machine went away"),
        (DIES, "error", "kernel panic: Fatal in move on shmem"),
        (BEGINS + CASE.format("move on anon") + "exit 255", "error", "the virtual machine went away in move on anon"),
        (BEGINS + "exit 1", "error", "the suite ended early (exit code 1)"),
        (BOOTS + "exit 127", "error", "the kernel did not get as far as the suite (exit code 127)"),
        (BOOTS + PANIC + "exit 255", "error", "kernel panic: Fatal"),
        ("echo 'qemu: no such machine' >&2; exit 1", "error", "the kernel never said anything"),
    ],
)
def test_ending(script: str, outcome: str, reason: str, tmp_path: Path) -> None:
    """Each end of a machine has its verdict."""
    result = judge("6.99.0", run_shell(script, tmp_path))
    assert (result.outcome, result.reason) == (outcome, reason)


def test_last_words(tmp_path: Path) -> None:
    """A dead kernel's console is shown from its complaint on, and kept as a whole."""
    noise = "i=0; while [ $i -lt 50 ]; do echo line $i; i=$((i+1)); done >&2; "
    result = judge("6.99.0", run_shell(BEGINS + noise + PANIC + "exit 255", tmp_path))
    assert result.diagnostics == [f"console: {BUG}", f"console: {FATAL}"]
    assert "line 0\nline 1\n" in (tmp_path / "console.txt").read_text()


@pytest.mark.parametrize(
    ("said", "shown"), [("", "the console was silent since the case began"), ("rcu: stall", "console: rcu: stall")]
)
def test_last_words_of_a_case(said: str, shown: str, tmp_path: Path) -> None:
    """Nobody is shown what the console said before the case that is to blame."""
    script = BOOTS + BEGINS + CASE.format("move on anon") + (f"echo '{said}' >&2; " if said else "") + "exit 255"
    assert judge("6.99.0", run_shell(script, tmp_path)).diagnostics == [shown]


def test_kernel_without_9p(tmp_path: Path) -> None:
    """A kernel that cannot read the host's files is told from one with a bug."""
    panic = "echo 'Kernel panic - not syncing: VFS: Unable to mount root fs on unknown-block(0,0)' >&2; exit 255"
    result = judge("6.99.0", run_shell(BOOTS + panic, tmp_path))
    assert result.diagnostics[0].startswith("it cannot read the host's files: give it the options in ")


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        (BEGINS + CASE.format("move on anon") + "exec sleep 1000", "0.2 seconds without progress in move on anon"),
        (BEGINS + "while :; do echo 'rcu: stall' >&2; sleep 0.01; done", "0.2 seconds without progress"),
        (BOOTS + "sleep 1000 & wait", "0.2 seconds without getting as far as the suite"),
    ],
)
def test_hang(script: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that makes no progress is ended with all its processes, whatever it still says on its console."""
    monkeypatch.setitem(guests.BOOT_SECONDS, vng.TCG, 0.2)
    result = judge("6.99.0", run_shell(script, tmp_path, patience=0.2))
    assert (result.outcome, result.reason) == ("timeout", reason)


def test_last_of_a_machine(tmp_path: Path) -> None:
    """The folder of a machine is not removed before all its processes have gone, which would write there."""
    mark = tmp_path / "mark"
    script = f"(sleep 0.2; touch {mark}) & exit 255"
    with subprocess.Popen(["/bin/sh", "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as shell:
        shell.wait()
        assert not mark.exists()
        guests._await_end(shell)
    assert mark.exists()


@pytest.mark.parametrize("reader", ["full", "gone"])
def test_nobody_reads(reader: str, cli: Starter, tools: Path, tmp_path: Path) -> None:
    """When the document cannot be written the exit code says so, and nothing else complains."""
    image = write_image(tmp_path / "bzImage")
    (tools / "vng").write_text("#!/bin/sh\nexec sleep 1000\n")
    env = {"PATH": f"{tools}:{os.environ['PATH']}"}
    arguments = ["--kernel", str(image), "--vm-accel", "tcg", "-f", "UFFDIO_API"]
    if reader == "full":
        stdout = os.open("/dev/full", os.O_WRONLY)
    else:
        end, stdout = os.pipe()
        os.close(end)
    run = subprocess.run(
        [sys.executable, "-m", "uffd_selftests", *arguments],
        stdout=stdout, stderr=subprocess.PIPE, text=True, env={**os.environ, **env}, check=False,
    )  # fmt: skip
    os.close(stdout)
    said = ["uffd-selftests: cannot write the results: No space left on device"] if reader == "full" else []
    assert run.stderr.splitlines() == ["uffd-selftests: 6.99.0-test: booting, emulated", *said]
    assert run.returncode == (1 if reader == "full" else 128 + signal.SIGPIPE)


def test_console_cannot_be_written(tmp_path: Path) -> None:
    """The run goes on, and the trouble is told."""
    (tmp_path / "console.txt").symlink_to("/dev/full")
    ending = run_shell(PASSES, tmp_path)
    assert (ending.code, ending.trouble) == (0, "cannot write console.txt: No space left on device")


# ---- KVM or not ----------------------------------------------------------------------------------------------------


def lively(watch: Watch) -> Watch:
    """Return a watch of a kernel that came to life."""
    watch.console("Linux version 6.99.0")
    return watch


def test_kvm_that_does_not_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """KVM is tried once, by the first to boot; who comes later does as that found out."""
    monkeypatch.setattr(vng, "kvm_present", lambda: True)
    accelerator = Accelerator("auto")
    tried: list[str] = []
    said: list[str] = []

    def boot(how: str, alive: Callable[[], None]) -> Ending:
        tried.append(how)
        if how == "tcg":
            alive()
        return Ending(Watch(), 255)

    threads = [threading.Thread(target=accelerator.run, args=(boot, said.append)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert tried == ["kvm", "tcg", "tcg"]
    assert said == ["KVM is there but boots no kernel"]


@pytest.mark.parametrize("works", [True, False])
def test_kvm_is_tried_early(works: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that is ended once it lives tells whether KVM works; in vain it is not tried with that kernel again."""
    monkeypatch.setattr(vng, "kvm_present", lambda: True)
    accelerator = Accelerator("auto")
    said = "Linux version 6.99.0" if works else "nothing"
    guest = Guest(Kernel(tmp_path, "6.99.0", tmp_path), tmp_path)
    started = time.monotonic()
    accelerator.try_early(guest, lambda: ["/bin/sh", "-c", f"echo {said} >&2; {'sleep 1000' if works else ''}"])
    assert time.monotonic() - started < 500, "the machine was not ended"
    tried = []

    def boot(how: str, _alive: Callable[[], None]) -> Ending:
        tried.append(how)
        return Ending(Watch(), 255)

    accelerator.run(boot, pytest.fail, "6.99.0")
    accelerator.run(boot, pytest.fail, "other")
    assert tried == (["kvm", "kvm"] if works else ["tcg", "kvm", "tcg"])


def test_kvm_and_what_is_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """What boots nowhere says nothing about KVM: the next kernel tries it."""
    monkeypatch.setattr(vng, "kvm_present", lambda: True)
    accelerator = Accelerator("auto")
    tried = []

    def boot(how: str, _alive: Callable[[], None]) -> Ending:
        tried.append(how)
        return Ending(Watch(), 255)

    for _ in range(2):
        accelerator.run(boot, pytest.fail)
    assert tried == ["kvm", "tcg"] * 2


def test_kvm_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that was ended says nothing about KVM, and no other follows."""
    monkeypatch.setattr(vng, "kvm_present", lambda: True)
    tried = []

    def boot(how: str, _alive: Callable[[], None]) -> Ending:
        tried.append(how)
        return Ending(Watch(), 255, stopped=True)

    Accelerator("auto").run(boot, pytest.fail)
    assert tried == ["kvm"]


def test_kvm_that_works(monkeypatch: pytest.MonkeyPatch) -> None:
    """As soon as a kernel is alive the others may boot; that it dies later is not KVM's fault."""
    monkeypatch.setattr(vng, "kvm_present", lambda: True)
    accelerator = Accelerator("auto")
    second = threading.Event()

    def boot(how: str, alive: Callable[[], None]) -> Ending:
        assert how == "kvm"
        alive()
        if not second.is_set():
            second.set()
            other = threading.Thread(target=accelerator.run, args=(boot, pytest.fail))
            other.start()
            other.join(10)
            assert not other.is_alive()
        return Ending(lively(Watch()), 255)

    accelerator.run(boot, pytest.fail)


@pytest.mark.parametrize(
    ("wanted", "present", "used"), [("auto", False, "tcg"), ("tcg", True, "tcg"), ("kvm", False, "kvm")]
)
def test_accelerator_that_was_chosen(wanted: str, present: bool, used: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was asked for is used, and without KVM there is only one way."""
    monkeypatch.setattr(vng, "kvm_present", lambda: present)
    tried = []

    def boot(how: str, _alive: Callable[[], None]) -> Ending:
        tried.append(how)
        return Ending(Watch(), 255)

    Accelerator(wanted).run(boot, pytest.fail)
    assert tried == [used]


# ---- the whole document --------------------------------------------------------------------------------------------


@dataclass
class Lab:
    """Runs --kernel with shells in place of virtual machines."""

    folder: Path
    monkeypatch: pytest.MonkeyPatch
    capfd: pytest.CaptureFixture[str]

    def run(self, *scripts: str, options: tuple[str, ...] = ()) -> tuple[int, list[str]]:
        """Run with a kernel for each script; returns the exit code and the lines of KTAP."""
        arguments = ["-o", str(self.folder), "--vm-accel", "tcg", *options]
        for number, script in enumerate(scripts, 1):
            image = write_image(self.folder / f"bzImage{number}", f"6.99.{number}")
            image.with_suffix(".sh").write_text(script)
            arguments += ["--kernel", str(image)]
        self.monkeypatch.setattr(vng, "missing", lambda _arch: None)
        self.monkeypatch.setattr(session, "_plan", lambda *_: session.Plan(PLAN, []))
        self.monkeypatch.setattr(vng, "command", lambda kernel, *_: ["/bin/sh", f"{kernel.path.with_suffix('.sh')}"])
        code = command.main(arguments)
        return code, self.capfd.readouterr().out.splitlines()


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Lab:
    """Return the means to run --kernel without virtual machines."""
    return Lab(tmp_path, monkeypatch, capfd)


INNER = [
    "  1..3",
    "  # Linux 6.99.0 x86_64",
    "  ok 1 move on anon",
    "  ok 2 move on shmem",
    "  ok 3 poison on anon # SKIP no",
    "  # Totals: pass:2 fail:0 xfail:0 xpass:0 skip:1 error:0",
]


@pytest.mark.parametrize("at_once", ["0", "2"])
def test_document(lab: Lab, at_once: str) -> None:
    """Each kernel is a subtest, in the order of the command line, whichever ends first; a copy is kept."""
    slow = BEGINS + "sleep 0.2; " + PASSES.removeprefix(BEGINS)
    code, lines = lab.run(slow, PASSES + "exit 1", options=("-n", at_once))
    assert code == 1
    assert lines == [
        *("KTAP version 1", "1..2"),
        *("  KTAP version 1", "  # Subtest: 6.99.1", *INNER, "ok 1 6.99.1"),
        *("  KTAP version 1", "  # Subtest: 6.99.2", *INNER, "not ok 2 6.99.2"),
        "# Totals: pass:1 fail:1 xfail:0 xpass:0 skip:0 error:0",
    ]
    assert (lab.folder / "results.tap").read_text().splitlines() == lines
    assert (lab.folder / "6.99.1/console.txt").read_text() == "Linux version 6.99.0\n"


def test_dead_kernel(lab: Lab) -> None:
    """The case that was running is to blame, what never ran is skipped, and the next kernel has its turn."""
    code, lines = lab.run(DIES, PASSES)
    assert code == 1
    assert lines[2:15] == [
        *("  KTAP version 1", "  # Subtest: 6.99.1", "  1..3", "  # Linux 6.99.0 x86_64", "  ok 1 move on anon"),
        *(f"  # console: {BUG}", f"  # console: {FATAL}"),
        "  not ok 2 move on shmem # ERROR kernel panic: Fatal",
        "  ok 3 poison on anon # SKIP never ran: the kernel was gone",
        "  # Totals: pass:1 fail:0 xfail:0 xpass:0 skip:1 error:1",
        "not ok 1 6.99.1 # ERROR kernel panic: Fatal in move on shmem",
        *("  KTAP version 1", "  # Subtest: 6.99.2"),
    ]
    document = json.loads((lab.folder / "6.99.1/results.json").read_text())
    assert [(result["name"], result["outcome"]) for result in document["results"]] == [
        *(("move on anon", "pass"), ("move on shmem", "error"), ("poison on anon", "skip")),
    ]
    assert (document["totals"], document["interrupted"]) == (
        {"pass": 1, "error": 1, "skip": 1},
        "kernel panic: Fatal in move on shmem",
    )
    inner = [line.removeprefix("  ") for line in lines[2:12]]
    kept = (lab.folder / "6.99.1/results.tap").read_text().splitlines()
    assert kept == ["TAP version 13", *inner[2:]]


def test_kernel_that_never_boots(lab: Lab) -> None:
    """There is nothing inside, and the outer result shows the console."""
    code, lines = lab.run("echo 'qemu: bad option' >&2; exit 1")
    assert (code, lines) == (
        1,
        [
            *("KTAP version 1", "1..1", "# console: qemu: bad option"),
            "not ok 1 6.99.1 # ERROR the kernel never said anything",
            "# Totals: pass:0 fail:0 xfail:0 xpass:0 skip:0 error:1",
        ],
    )


def test_nothing_testable(lab: Lab) -> None:
    """A kernel without userfaultfd is skipped; if all are, the exit code says so."""
    assert lab.run(PASSES + "exit 4")[0] == 4
    assert lab.run(PASSES + "exit 4", PASSES)[0] == 0


def test_old_results_are_gone(lab: Lab) -> None:
    """A kernel's folder has nothing of an earlier run."""
    lab.run(DIES)
    lab.run("exit 1")
    assert sorted(path.name for path in (lab.folder / "6.99.1").iterdir()) == [
        *("console.txt", "junit.xml", "report.html", "results.json"),
    ]
    document = json.loads((lab.folder / "6.99.1/results.json").read_text())
    assert (document["results"], document["interrupted"]) == ([], "the kernel never said anything")


def test_overviews(lab: Lab) -> None:
    """A page shows the kernels side by side, dead ones too, and so does junit.xml."""
    lab.run(DIES, "exit 1")
    junit = (lab.folder / "junit.xml").read_text()
    assert 'name="move on shmem"' in junit
    assert 'message="ERROR kernel panic: Fatal' in junit
    assert 'classname="6.99.2.uffd-selftests" name="run"' in junit
    page = (lab.folder / "report.html").read_text()
    assert "6.99.1" in page
    assert "6.99.2" in page
    assert "kernel panic: Fatal in move on shmem" in page


def test_full_disk(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """The document on stdout is whole, and that its copy is not makes the run fail."""
    document = session.Document(Path("/dev/full"))
    monkeypatch.setattr(session, "Document", lambda _: document)
    code, lines = lab.run(PASSES)
    assert (code, lines[-2]) == (1, "ok 1 6.99.1")
    assert document.trouble == "cannot write /dev/full: No space left on device"


def test_full_disk_in_the_guest(lab: Lab) -> None:
    """A kernel of which no result failed, but which is a failure, says why."""
    code, lines = lab.run(PASSES + "echo 'uffd-selftests: cannot write the results: No space' >&2; exit 1")
    assert (code, lines[-3:-1]) == (1, ["# cannot write the results: No space", "not ok 1 6.99.1"])


def test_full_disk_before_anything_boots(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """The document is not left without a result: it bails out."""

    def unwritable(*_: object) -> list[str]:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Guest, "run", unwritable)
    code, lines = lab.run(PASSES)
    assert (code, lines[-1]) == (1, "Bail out! cannot write the results: No space left on device")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_interrupted(number: signal.Signals, cli: Starter, tools: Path, tmp_path: Path) -> None:
    """Whatever ends the run ends the machines, too, and removes what they left in the temporary folder."""
    begun = tmp_path / "begun"
    os.mkfifo(begun)
    (tools / "vng").write_text(f"#!/bin/sh\ntouch $TMPDIR/file\n(sleep 1000 & echo >{begun}; wait) & wait\n")
    image = write_image(tmp_path / "bzImage")
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    env = {"PATH": f"{tools}:{os.environ['PATH']}", "TMPDIR": str(scratch)}
    run = cli.start("--kernel", str(image), "--vm-accel", "tcg", "-f", "UFFDIO_API", env=env)
    begun.read_text()
    assert list(scratch.glob("*/file"))
    run.process.send_signal(number)
    run.wait()
    if number == signal.SIGKILL:
        assert run.code == -number
    else:
        assert (run.code, run.stdout.splitlines()[-1]) == (128 + number, f"Bail out! interrupted by {number.name}")
    until = time.monotonic() + 10
    while (left := [*run.survivors(), *map(str, scratch.iterdir())]) and time.monotonic() < until:
        time.sleep(0.01)
    assert left == []


# ---- the step of --check ---------------------------------------------------------------------------------------------


def write_apt(folder: Path, download: str) -> None:
    """Write programs that stand for apt's; a shell command downloads the package "$2"."""
    names = "linux-image-6.1.0-9-amd64\nlinux-image-6.1.0-56-amd64\nlinux-image-6.1.0-57-cloud-amd64\n"
    for name, script in {"apt-cache": f"printf '{names}'", "apt-get": download}.items():
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)


def test_stock_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The newest of Debian's 6.1 kernels is downloaded once; a download that fails leaves nothing."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    write_apt(tmp_path, 'touch "$2_6.1.deb"; echo "E: no space" >&2; exit 100')
    with pytest.raises(check.LeftOut, match="apt-get download linux-image-6.1.0-56-amd64 failed: E: no space"):
        check.stock()
    write_apt(tmp_path, 'touch "$2_6.1.deb"')
    package = check.stock()
    assert package.name == "linux-image-6.1.0-56-amd64_6.1.deb"
    write_apt(tmp_path, "exit 1")
    assert check.stock() == package


def test_given_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The variable names kernels by patterns; none is a reason to leave the step out."""
    for name in ("a1", "a2", "b"):
        (tmp_path / name).touch()
    monkeypatch.setenv(check.VARIABLE, f"{tmp_path}/a*:{tmp_path}/b")
    assert [path.name for path in check.given()] == ["a1", "a2", "b"]
    monkeypatch.setenv(check.VARIABLE, f"{tmp_path}/c*")
    with pytest.raises(check.LeftOut, match="no kernel at .*: name some in UFFD_TEST_KERNELS"):
        check.given()


def test_nothing_to_boot(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A machine that can boot nothing says why, and the step does not fail."""
    monkeypatch.setattr(vng, "missing", lambda _arch: "missing for --kernel: apt-get install udev")
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    assert check.main() == 0
    assert capsys.readouterr().out == "left out: missing for --kernel: apt-get install udev\n"
