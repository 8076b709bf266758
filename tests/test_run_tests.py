# SPDX-License-Identifier: GPL-2.0-only
"""run_tests.sh sets itself up once, repairs itself, and says in one line what it lacks.

Most tests give it an interpreter that only writes down how it was called; one makes the real set-up.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
Result = subprocess.CompletedProcess[str]
OPTIONS = ["-f", "two words", "$HOME", "--", "-x"]

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounts a folder read-only: run as root")

INTERPRETER = """#!/bin/sh
# Writes its arguments down. A folder made by -m venv gets a copy of it; what is -c code goes to the real one.
echo "$*" | head -n 1 >>"{log}"
case "$*" in
"-I -m venv "*) {venv}; mkdir "$4/bin" && cp "$0" "$4/bin/python" ;;
"-I -m pip "*) {pip} ;;
"-c "*) exec "{python}" "$@" ;;
*)
    printf '%s\\n' "$$ in $PWD" "$@"
    exit 7
    ;;
esac
"""


@dataclass
class Checkout:
    """A copy of what run_tests.sh looks at, and the interpreter that writes its calls down."""

    root: Path

    @property
    def script(self) -> Path:
        """run_tests.sh."""
        return self.root / "run_tests.sh"

    @property
    def venv(self) -> Path:
        """The virtual environment."""
        return self.root / ".venv"

    @property
    def stamp(self) -> Path:
        """What says that the virtual environment is whole."""
        return self.venv / "uffd-selftests.stamp"

    @property
    def log(self) -> Path:
        """The calls of the interpreter."""
        return self.root.parent / "calls"

    def interpreter(self, name: str = "python", pip: str = "echo pip speaks", venv: str = ":") -> Path:
        """Write the interpreter, which runs some shell code as pip, and before it makes an environment."""
        path = self.root.parent / name
        path.write_text(INTERPRETER.format(log=self.log, python=sys.executable, pip=pip, venv=venv))
        path.chmod(0o755)
        return path

    def environment(self, **changes: str | None) -> dict[str, str]:
        """Return the environment with changes; None takes a variable away."""
        environment = dict(os.environ) | {"PYTHON": str(self.root.parent / "python")}
        for name, value in ({"UFFD_VENV": None, "PYTHONPATH": None, "CC": None} | changes).items():
            environment.pop(name, None)
            if value is not None:
                environment[name] = value
        return environment

    def run(self, *arguments: str, script: Path | None = None, **changes: str | None) -> Result:
        """Run the script to its end."""
        return subprocess.run(
            [script or self.script, *arguments],
            env=self.environment(**changes),
            text=True,
            capture_output=True,
            stdin=subprocess.DEVNULL,
            check=False,
        )

    def calls(self) -> list[str]:
        """Return how the interpreter was called since this was last asked: venv, pip, code or run."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        self.log.unlink(missing_ok=True)
        modules = [line.partition("-m ")[2].split()[0] for line in lines if "-m " in line]
        return ["run" if module.startswith("uffd_selftests") else module for module in modules]


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    """Return a checkout, in a folder with a space, whose set-up takes no time."""
    checkout = Checkout(tmp_path / "a copy")
    native = checkout.root / "uffd_selftests" / "abi" / "native"
    native.mkdir(parents=True)
    shutil.copy(ROOT / "run_tests.sh", checkout.root)
    shutil.copy(ROOT / "pyproject.toml", checkout.root)
    for name in ("uffd.c", "uffd.h", "build.py"):
        (native / name).write_text(f"/* {name} */\n")
    checkout.interpreter()
    return checkout


@pytest.fixture
def ready(checkout: Checkout) -> Checkout:
    """Return a checkout that is set up."""
    assert checkout.run().returncode == 7
    assert checkout.calls() == ["venv", "pip", "pip", "run"]
    return checkout


def one_line(result: Result) -> str:
    """Return what a failed set-up says."""
    assert result.returncode == 2
    assert result.stdout == ""
    (line,) = (line for line in result.stderr.splitlines() if "setting up" not in line)
    assert line.startswith("run_tests.sh: ")
    return line.removeprefix("run_tests.sh: ")


# ---- calls that go well --------------------------------------------------------------------------------------------


def test_first_call(checkout: Checkout) -> None:
    """It sets up, says so on stderr, and runs with the arguments as they were; the exit code is the run's."""
    result = checkout.run(*OPTIONS)
    assert checkout.calls() == ["venv", "pip", "pip", "run"]
    assert result.returncode == 7
    assert result.stdout.splitlines()[1:] == ["-I", "-m", "uffd_selftests", *OPTIONS]
    assert result.stderr == f"run_tests.sh: setting up {checkout.venv} (once)\n"


def test_second_call(ready: Checkout) -> None:
    """It only runs, and says nothing of its own."""
    result = ready.run(*OPTIONS)
    assert ready.calls() == ["run"]
    assert (result.returncode, result.stderr) == (7, "")


def test_call_through_symlinks(ready: Checkout, tmp_path: Path) -> None:
    """A link to the script, and a link to that, are the script; the current folder stays the caller's."""
    (tmp_path / "link").symlink_to("a copy/run_tests.sh")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "uffd").symlink_to("../link")
    result = ready.run(script=tmp_path / "bin" / "uffd")
    assert ready.calls() == ["run"]
    assert result.stdout.splitlines()[0].endswith(f" in {Path.cwd()}")


@pytest.mark.parametrize("call", [["./run_tests.sh"], ["sh", "run_tests.sh"], ["sh", "../a copy/run_tests.sh"]])
def test_call_by_relative_name(ready: Checkout, call: list[str]) -> None:
    """As people type it."""
    result = subprocess.run(call, cwd=ready.root, env=ready.environment(), capture_output=True, check=False)
    assert (result.returncode, ready.calls()) == (7, ["run"])


@pytest.mark.parametrize("shell", ["bash --posix", "busybox sh", "dash", "ksh", "mksh", "yash"])
def test_shells(checkout: Checkout, shell: str) -> None:
    """Any POSIX shell will do."""
    command = shell.split()
    if not shutil.which(command[0]):
        pytest.skip(f"no {command[0]} here")
    for calls in (["venv", "pip", "pip", "run"], ["run"]):
        subprocess.run([*command, checkout.script], env=checkout.environment(), capture_output=True, check=False)
        assert checkout.calls() == calls


def test_run_replaces_the_shell(ready: Checkout) -> None:
    """The run has the script's process ID, so signals reach it."""
    with subprocess.Popen([ready.script], env=ready.environment(), stdout=subprocess.PIPE, text=True) as process:
        output, _ = process.communicate()
    assert output.split()[0] == str(process.pid)


def test_environment_elsewhere(checkout: Checkout, tmp_path: Path) -> None:
    """UFFD_VENV names another folder, which may exist if it is empty."""
    elsewhere = tmp_path / "else where"
    elsewhere.mkdir()
    assert checkout.run(UFFD_VENV=str(elsewhere)).returncode == 7
    assert (elsewhere / "bin" / "python").exists()
    assert not checkout.venv.exists()


def test_environment_elsewhere_by_relative_name(checkout: Checkout) -> None:
    """A relative name counts from the current folder."""
    script, environment = [checkout.script], checkout.environment(UFFD_VENV="mine")
    subprocess.run(script, cwd=checkout.root.parent, env=environment, capture_output=True, check=False)
    assert (checkout.root.parent / "mine" / "bin" / "python").exists()


def test_no_environment(checkout: Checkout) -> None:
    """UFFD_VENV=none takes the interpreter as it is."""
    (checkout.root / "uffd_selftests" / "abi" / "native" / "__init__.py").touch()
    (checkout.root / "uffd_selftests" / "abi" / "native" / "_native.so").touch()
    result = checkout.run(*OPTIONS, UFFD_VENV="none")
    assert checkout.calls() == ["run"]
    assert result.stdout.splitlines()[1:] == ["-m", "uffd_selftests", *OPTIONS]


def test_no_environment_and_nothing_built(checkout: Checkout) -> None:
    """The line says that the interpreter lacks something."""
    python = checkout.root.parent / "python"
    python.write_text("#!/bin/sh\nexit 1\n")
    line = one_line(checkout.run(UFFD_VENV="none"))
    assert line == f"{python} lacks uffd-selftests, cffi or pytest: do without UFFD_VENV=none"


def test_check(ready: Checkout) -> None:
    """--check adds what development needs, once, and runs the project's own tests."""
    result = ready.run("--check")
    assert f"--editable {ready.root}[dev]\n" in ready.log.read_text()
    assert ready.calls() == ["pip", "pip", "run"]
    assert result.stdout.splitlines()[1:] == ["-I", "-m", "uffd_selftests.checks"]
    for arguments in (["--check"], []):
        ready.run(*arguments)
        assert ready.calls() == ["run"]


def test_argument_for_pytest(ready: Checkout) -> None:
    """What stands behind -- is not looked at."""
    ready.run("--", "--kernel")
    assert ready.calls() == ["run"]


# ---- what is out of date -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path", ["pyproject.toml", "uffd_selftests/abi/native/uffd.c", "uffd_selftests/abi/native/_native.so"]
)
def test_changed_source(ready: Checkout, path: str) -> None:
    """A changed source is built again; so is a module that a build for another environment replaced."""
    with (ready.root / path).open("a") as file:
        file.write("# changed\n")
    assert ready.run().stderr == f"run_tests.sh: updating {ready.venv}\n"
    assert ready.calls() == ["pip", "pip", "run"]
    ready.run()
    assert ready.calls() == ["run"]


def test_changed_case(ready: Checkout) -> None:
    """Python sources are used where they are."""
    (ready.root / "uffd_selftests" / "common.py").write_text("# changed\n")
    ready.run()
    assert ready.calls() == ["run"]


def test_moved_checkout(ready: Checkout) -> None:
    """An environment knows its folder: in another place it is made anew."""
    moved = Checkout(ready.root.rename(ready.root.parent / "moved"))
    moved.run()
    assert moved.calls()[-3:] == ["pip", "pip", "run"]


def test_interrupted_setup(checkout: Checkout) -> None:
    """A half-made environment is made from scratch."""
    checkout.interpreter(pip="kill -9 $PPID")
    assert checkout.run().returncode == -signal.SIGKILL
    (checkout.venv / "half made").touch()
    checkout.interpreter()
    checkout.calls()
    assert checkout.run().returncode == 7
    assert checkout.calls() == ["venv", "pip", "pip", "run"]
    assert not (checkout.venv / "half made").exists()


def test_interpreter_that_went_away(ready: Checkout) -> None:
    """An environment whose interpreter is gone is made from scratch."""
    python = ready.venv / "bin" / "python"
    python.unlink()
    python.symlink_to("/usr/bin/python2.4")
    assert ready.run().returncode == 7
    assert ready.calls() == ["venv", "pip", "pip", "run"]


def test_other_interpreter(ready: Checkout) -> None:
    """PYTHON makes an environment of its own; without it whatever is there is good."""
    other = ready.interpreter("other python")
    ready.run(PYTHON=str(other))
    assert ready.calls() == ["venv", "pip", "pip", "run"]
    ready.run(PYTHON=None)
    assert ready.calls() == ["run"]


def test_two_first_calls_at_once(checkout: Checkout, tmp_path: Path) -> None:
    """One makes the environment, the other waits for it."""
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    checkout.interpreter(venv=f'cat "{gate}"')
    processes = [
        subprocess.Popen([checkout.script], env=checkout.environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for _ in range(2)
    ]
    gate.write_text("go\n")
    for process in processes:
        process.communicate()
        assert process.returncode == 7
    assert sorted(checkout.calls()) == ["pip", "pip", "run", "run", "venv"]


# ---- what is missing -----------------------------------------------------------------------------------------------


def test_no_python(checkout: Checkout) -> None:
    """The line names the packages to install."""
    line = one_line(checkout.run(PYTHON="/nowhere/python3"))
    assert line == "no /nowhere/python3: apt-get install python3-venv python3-dev gcc"


def test_old_python(checkout: Checkout) -> None:
    """The line says how to name another interpreter."""
    python = checkout.root.parent / "python"
    python.write_text("#!/bin/sh\nexit 1\n")
    assert one_line(checkout.run()) == (
        f"{python} is older than 3.10: name a newer one: PYTHON=python3.12 ./run_tests.sh"
    )


def test_no_compiler(checkout: Checkout) -> None:
    """The line names what is missing and nothing else; no half-made environment stays."""
    line = one_line(checkout.run(CC="nowhere-gcc"))
    assert line.endswith(": apt-get install gcc")
    assert not checkout.venv.exists()


@pytest.mark.parametrize(
    "reason",
    ["ERROR: No matching distribution found for pytest", "uffd.c:7:10: fatal error: stdio.h: No such file"],
)
def test_pip_fails(checkout: Checkout, reason: str) -> None:
    """The line has the reason and the place of the log; the next call tries again."""
    checkout.interpreter(pip=f"echo error: subprocess-exited-with-error; echo '   {reason}'; exit 1")
    assert one_line(checkout.run()) == f"set-up: pip failed: {reason} (log: {checkout.venv}/setup.log)"
    checkout.interpreter()
    checkout.calls()
    assert checkout.run().returncode == 7
    assert checkout.calls() == ["venv", "pip", "pip", "run"]


def test_environment_of_somebody_else(checkout: Checkout, tmp_path: Path) -> None:
    """A folder that this script did not make is neither used nor touched."""
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis").write_text("draft 17")
    line = one_line(checkout.run(UFFD_VENV=str(tmp_path / "home")))
    assert line.endswith("/home is not of this script's making: move it, or name another in UFFD_VENV")
    assert [path.name for path in (tmp_path / "home").iterdir()] == ["thesis"]


def test_environment_where_nobody_may_write(checkout: Checkout) -> None:
    """The line says what to set."""
    line = one_line(checkout.run(UFFD_VENV="/proc/venv"))
    assert line == "cannot write to /proc/venv: name a folder in UFFD_VENV"


@needs_root
def test_read_only_checkout(ready: Checkout) -> None:
    """It runs when it is set up, else the line says what to do."""
    call = 'mount --bind "$1" "$1" && mount -o remount,ro,bind "$1" && exec "$1/run_tests.sh"'
    command = ["unshare", "--mount", "sh", "-c", call, "sh", str(ready.root)]

    def run_read_only() -> Result:
        return subprocess.run(command, env=ready.environment(), text=True, capture_output=True, check=False)

    result = run_read_only()
    if "mount" in result.stderr:
        pytest.skip(result.stderr.strip())
    assert (result.returncode, ready.calls()) == (7, ["run"])
    shutil.rmtree(ready.venv)
    assert one_line(run_read_only()) == f"cannot write to {ready.root}: copy the project to a folder of yours"


# ---- the real thing ------------------------------------------------------------------------------------------------


def test_requirements_of_the_build() -> None:
    """The script installs what pyproject.toml says the build needs."""
    needed = re.search(r"^requires = \[(.*)\]$", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert needed
    script = (ROOT / "run_tests.sh").read_text()
    for requirement in re.findall(r'"([^"]+)"', needed[1]):
        assert f"'{requirement}'" in script


def test_real_setup(tmp_path: Path) -> None:
    """A fresh copy in a folder with spaces sets itself up from the index, and runs from anywhere."""
    copy = tmp_path / "a fresh copy"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".*", "*.so", "build", "*.egg-info", "__pycache__"))
    checkout = Checkout(copy)
    first = checkout.run("-l", PYTHON=None)
    if "Could not find a version" in first.stderr:
        pytest.skip(f"no package index: {first.stderr.strip()}")
    assert (first.returncode, first.stderr) == (0, f"run_tests.sh: setting up {checkout.venv} (once)\n")
    assert "zeropage on anon\n" in first.stdout
    made = checkout.stamp.stat()

    # Nor do modules in the current folder or in PYTHONPATH matter, not even to workers.
    trap = tmp_path / "trap"
    trap.mkdir()
    for module in ("pytest", "queue", "uffd_selftests"):
        (trap / f"{module}.py").write_text("raise SystemExit('trapped')\n")
    environment = checkout.environment(PYTHON=None, PYTHONPATH=str(trap))
    command = [str(checkout.script), "-n", "2", "-f", "UFFDIO_API"]
    second = subprocess.run(command, cwd=trap, env=environment, capture_output=True, text=True, check=False)
    assert second.returncode in (0, 4)
    assert second.stderr == ""
    assert "1..2\n" in second.stdout
    assert made.st_mtime_ns == checkout.stamp.stat().st_mtime_ns
