# SPDX-License-Identifier: GPL-2.0-only
"""The command line does what it says, ends as it says, and leaves stdout to KTAP."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from typing import TYPE_CHECKING

import pytest

import uffd_selftests
from tests.conftest import ROOT
from uffd_selftests import cli as command
from uffd_selftests import kernel
from uffd_selftests.harness import settings
from uffd_selftests.uapi import Feature
from uffd_selftests.vm.options import native

if TYPE_CHECKING:
    from tests.conftest import Run, Starter, SuiteWriter

FACTS = kernel.probe()
UNAVAILABLE = kernel.no_userfaultfd(FACTS)
needs_userfaultfd = pytest.mark.skipif(UNAVAILABLE is not None, reason=str(UNAVAILABLE))

ONE_OF_EACH = """
    @uffd_case("passes", mem=(ANON, SHMEM), kind=Kind.DETAIL)
    def test_passes(mem):
        '''The kernel keeps its word. And more.'''

    @uffd_case("varies", variants=("with syscall", "with device"), mem=(ANON,), rows=("ROW-1", "ROW-2"))
    def test_varies(variant, mem):
        '''It does so either way.'''
        if variant == "with device":
            pytest.skip("no device")

    @uffd_case("breaks", defect=Defect("D-ROW-3", "sleeps for ever", "6.18", "wake it", "assert False"))
    def test_breaks():
        '''It is known to break its word here.'''
        assert False
"""


# ---- usage errors ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--bogus"], "unrecognized arguments: --bogus"),
        (["extra"], "unrecognized arguments: extra"),
        (["--dead", "3"], "unrecognized arguments: --dead"),
        (["-n", "many"], "argument -n: 'many' is neither a number nor auto"),
        (["-n", "1000000"], "argument -n: 1000000 processes are too many for this machine: at most "),
        (["-n", "-1"], "argument -n: '-1' is neither a number nor auto"),
        (["--deadline", "soon"], "--deadline: 'soon' is not a positive number"),
        (["--deadline", "0"], "--deadline: '0' is not a positive number"),
        (["--deadline", "inf"], "--deadline: 'inf' is not a positive number"),
        (["--deadline-scale", "nan"], "--deadline-scale: 'nan' is not a positive number"),
        (["--area-mib", "0"], "--area-mib: '0' is not a positive whole number"),
        (["--area-mib", "1.5"], "--area-mib: '1.5' is not a positive whole number"),
        (["--require", "wp,bogus"], "--require: unknown requirement bogus; there are "),
        (["-k", "and"], "-k 'and': "),
        (["-k", "a b"], "-k 'a b': "),
        (["-o", "/proc/folder"], "cannot write into /proc/folder: ENOENT"),
        (["-o", __file__], f"cannot write into {__file__}: it is a file: name a folder"),
        (["--vm-cpus", "2"], "--vm-cpus needs --kernel: "),
        (["--vm-append", "quiet"], "--vm-append needs --kernel: "),
        (["--arch", {"x86_64": "arm64"}.get(native(), "x86_64")], "--arch needs --kernel: "),
        (["-k"], "argument -k: expected one argument"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_usage_error(args: list[str], message: str, capfd: pytest.CaptureFixture[str]) -> None:
    """A mistake is explained in one line on stderr; the exit code is 2 and there is no KTAP."""
    try:
        code = command.main(args)
    except SystemExit as error:  # argparse leaves this way
        code = int(str(error.code))
    out, err = capfd.readouterr()
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"uffd-selftests: {message}")


@pytest.mark.parametrize(
    ("variable", "value"), [("UFFD_DEADLINE", "x"), ("UFFD_REQUIRE", "x"), ("UFFD_AREA_MIB", "-1")]
)
def test_usage_error_in_environment(
    variable: str, value: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A bad variable is named."""
    monkeypatch.setenv(variable, value)
    assert command.main([]) == 2
    assert capfd.readouterr().err.startswith(f"uffd-selftests: {variable}: ")


@pytest.mark.parametrize("workers", ["0", "2"])
def test_nothing_matches(cli: Starter, workers: str) -> None:
    """A filter that leaves nothing is a mistake, too: a green run must not be an empty one."""
    run = cli.run("-f", "nonesuch", "-k", "neither", "-n", workers)
    assert (run.code, run.stdout) == (2, "")
    assert run.stderr == "uffd-selftests: nothing matches the given -f nonesuch and -k neither\n"


@pytest.mark.parametrize("workers", ["0", "2"])
def test_name_clash(cli: Starter, suite: SuiteWriter, workers: str) -> None:
    """Two results of one name are refused, with both places."""
    path = suite.write("""
        @uffd_case("twin", mem=(ANON,))
        def test_one(mem):
            pass

        @uffd_case("twin", mem=(ANON, SHMEM))
        def test_two(mem):
            pass
    """)
    run = cli.run("-n", workers, "--", path)
    assert (run.code, run.stdout) == (2, "")
    assert "two results are named twin on anon: test_inner.py::test_one[anon] and test_inner.py::test_two[anon]" in (
        run.stderr
    )


@pytest.mark.parametrize("workers", ["0", "2"])
def test_case_file_that_does_not_load(cli: Starter, suite: SuiteWriter, workers: str) -> None:
    """A broken file of cases fails the run and is named."""
    path = suite.write("raise RuntimeError('half written')")
    run = cli.run("-n", workers, "--", path)
    assert run.code == 1
    assert "uffd-selftests: cannot collect test_inner.py" in run.stderr
    assert run.stdout == "TAP version 13\nBail out! cannot collect test_inner.py: RuntimeError: half written\n"


# ---- what it runs ---------------------------------------------------------------------------------------------------


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    """--version names the version, --help each option."""
    for option in ("--version", "--help"):
        with pytest.raises(SystemExit, match="0"):
            command.main([option])
    shown = capsys.readouterr().out
    assert f"uffd-selftests {uffd_selftests.__version__}" in shown
    for each in settings.OPTIONS:
        assert each.flag in shown
        assert each.variable in shown


def lines(*args: str) -> list[str]:
    """Return what -l lists."""
    done = subprocess.run(
        [sys.executable, "-m", "uffd_selftests", "-l", *args], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return done.stdout.splitlines()


def test_list(suite: SuiteWriter) -> None:
    """-l lists results by name, nothing else, and runs nothing."""
    path = suite.write(ONE_OF_EACH)
    everything = ["passes on anon", "passes on shmem", "varies (with syscall) on anon", "varies (with device) on anon"]
    everything.append("breaks")
    assert lines("--", path) == everything
    assert lines("-f", "pass", "-f", "vari", "--", path) == everything[:4]
    assert lines("-f", "passes on shm", "--", path) == ["passes on shmem"]
    assert lines("-k", "passes and not anon", "--", path) == ["passes on shmem"]
    assert lines("-k", "device", "--", path) == ["varies (with device) on anon"]
    assert lines("--documented-only", "--", path) == everything[2:]


def test_filter_is_about_names(suite: SuiteWriter) -> None:
    """-f looks at the case's name, not at memory types, unless it has " on " in it."""
    path = suite.write(ONE_OF_EACH)
    done = subprocess.run(
        [sys.executable, "-m", "uffd_selftests", "-l", "-f", "anon", "--", path],
        capture_output=True, text=True, check=False, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 2


@needs_userfaultfd
@pytest.mark.parametrize("workers", ["0", "2"])
def test_run_and_reports(cli: Starter, suite: SuiteWriter, workers: str) -> None:
    """A run says the same in KTAP and in its files."""
    run = cli.run("-n", workers, "--", suite.write(ONE_OF_EACH))
    assert run.code == 0
    assert {line.partition(" ")[2].partition(" ")[2] for line in run.stdout.splitlines() if line.startswith("ok")} == {
        "passes on anon",
        "passes on shmem",
        "varies (with syscall) on anon",
        "varies (with device) on anon # SKIP no device",
        "breaks # XFAIL D-ROW-3: sleeps for ever",
    }
    assert run.stdout.endswith("# Totals: pass:3 fail:0 xfail:1 xpass:0 skip:1 error:0\n")
    document = run.document
    assert document["totals"] == {"pass": 3, "skip": 1, "xfail": 1}
    assert (document["interrupted"], document["exitstatus"]) == ("", 0)
    varies = next(each for each in document["results"] if each["name"] == "varies (with syscall) on anon")
    assert (varies["case"], varies["variant"], varies["mem"]) == ("varies", "with syscall", "anon")
    assert (varies["promise"], varies["rows"]) == ("It does so either way.", ["ROW-1", "ROW-2"])
    breaks = next(each for each in document["results"] if each["name"] == "breaks")
    assert breaks["defect"]["advice"] == "wake it"
    environment = json.loads((run.folder / "environment.json").read_text())
    assert environment["facts"]["release"] == os.uname().release
    assert (run.folder / "dmesg.txt").exists()
    junit = ET.parse(run.folder / "junit.xml").getroot()
    assert [len(junit.findall(f".//{tag}")) for tag in ("testcase", "skipped", "failure")] == [5, 2, 0]


@needs_userfaultfd
def test_strict(cli: Starter, suite: SuiteWriter) -> None:
    """--strict makes a failure of a known defect."""
    run = cli.run("--strict", "-f", "breaks", "--", suite.write(ONE_OF_EACH))
    assert run.code == 1
    assert "not ok 1 breaks\n" in run.stdout


@needs_userfaultfd
def test_old_reports_do_not_stay(cli: Starter, suite: SuiteWriter) -> None:
    """A folder does not keep the results of another run."""
    path = suite.write(ONE_OF_EACH)
    first = cli.run("--", path)
    (first.folder / "notes.txt").write_text("mine")
    subprocess.run(
        [sys.executable, "-m", "uffd_selftests", "-o", first.folder, "--", path, "--bogus"],
        capture_output=True, check=False, cwd=ROOT,
    )  # fmt: skip
    assert sorted(path.name for path in first.folder.iterdir()) == ["notes.txt"]


# ---- exit codes -----------------------------------------------------------------------------------------------------


@needs_userfaultfd
@pytest.mark.parametrize("workers", ["0", "2"])
def test_nothing_could_be_tested(cli: Starter, suite: SuiteWriter, workers: str) -> None:
    """A run in which everything is skipped has its own exit code."""
    path = suite.write("""
        @uffd_case("impossible", features=Feature(1 << 60), mem=(ANON, SHMEM))
        def test_impossible(ctx):
            raise RuntimeError("must not run")
    """)
    run = cli.run("-n", workers, "--", path)
    assert run.code == 4
    assert run.outcomes == {"impossible on anon": "skip", "impossible on shmem": "skip"}
    assert run.results["impossible on anon"]["reason"] == "kernel lacks bit 60"
    assert "nothing could be tested" in run.stderr


@needs_userfaultfd
def test_failure_is_not_masked(cli: Starter, suite: SuiteWriter) -> None:
    """One failure among skips fails the run."""
    path = suite.write("""
        @uffd_case("skips")
        def test_skips():
            pytest.skip("why not")

        @uffd_case("fails")
        def test_fails():
            '''The kernel does as it says.'''
            raise AssertionError("pages: expected 3, got 2")
    """)
    run = cli.run("--", path)
    assert run.code == 1
    assert run.stdout.splitlines()[3:] == [
        "ok 1 skips # SKIP why not",
        "# promise: The kernel does as it says.",
        "# AssertionError: pages: expected 3, got 2",
        "# at test_inner.py:15",
        "not ok 2 fails",
        "# Totals: pass:0 fail:1 xfail:0 xpass:0 skip:1 error:0",
    ]


@needs_userfaultfd
@pytest.mark.skipif(Feature.RWP in FACTS.features, reason="the kernel has what this wants to miss")
@pytest.mark.parametrize("workers", ["0", "2"])
def test_required_feature(cli: Starter, suite: SuiteWriter, workers: str) -> None:
    """What is required must not be skipped for lack of it; what is skipped for another reason may be."""
    path = suite.write("""
        @uffd_case("future", features=Feature.RWP | Feature(1 << 60))
        def test_future():
            raise RuntimeError("must not run")

        @uffd_case("distant", features=Feature(1 << 60))
        def test_distant():
            raise RuntimeError("must not run")
    """)
    run = cli.run("-n", workers, "--require", "rwp", "--", path)
    assert run.code == 1
    assert run.outcomes == {"future": "fail", "distant": "skip"}
    why = "Failed: rwp is required: kernel lacks UFFD_FEATURE_RWP (Linux "
    assert run.results["future"]["diagnostics"][0].startswith(why)


# ---- independence ---------------------------------------------------------------------------------------------------


@needs_userfaultfd
def test_strangers_do_not_interfere(cli: Starter, suite: SuiteWriter) -> None:
    """Another project's pytest configuration, in the folder or the environment, is not picked up."""
    (cli.folder / "pytest.ini").write_text("[pytest]\naddopts = --nonexistent\npython_functions = nothing_*\n")
    (cli.folder / "conftest.py").write_text("raise RuntimeError('not mine')\n")
    inner = cli.folder / "cases"
    inner.mkdir()
    suite.path = inner / "test_inner.py"
    run = cli.run("-f", "varies", "-l", env={"PYTEST_ADDOPTS": "--nonexistent", "PYTEST_PLUGINS": "nonexistent"})
    assert (run.code, run.stderr) == (2, "uffd-selftests: nothing matches the given -f varies\n")


@needs_userfaultfd
def test_stdout_is_ktap_only(cli: Starter, suite: SuiteWriter) -> None:
    """Nothing that pytest, a case or a plugin prints comes to stdout; without arguments for pytest stderr is empty."""
    path = suite.write("""
        print("while collecting")
        os.write(1, b"ok 1 forged while collecting\\n")

        @uffd_case("noisy")
        def test_noisy(capfd):
            with capfd.disabled():
                os.write(1, b"ok 1 forged\\n")
            print("noise")
            os.system("echo ok 2 forged")
    """)
    for more in ([], ["-s"]):
        run = cli.run("--", path, *more)
        assert [line for line in run.stdout.splitlines() if not line.startswith("#")] == [
            "TAP version 13",
            "1..1",
            "ok 1 noisy",
        ]


@needs_userfaultfd
@pytest.mark.parametrize("way", ["", "-n 2"])
@pytest.mark.parametrize(
    ("closed", "code", "err"), [("<&-", 0, ""), (">&-", 2, "uffd-selftests: stdout is closed\n"), ("2>&-", 0, "")]
)
def test_closed_streams(closed: str, code: int, err: str, way: str) -> None:
    """Without stdin or stderr a run is as ever, without stdout nobody would hear of it."""
    call = f"exec {sys.executable} -m uffd_selftests -f api-answer {way} {closed}"
    run = subprocess.run(["sh", "-c", call], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stderr) == (code, err)
    assert ("\nok 1 api-answer\n" in run.stdout) == (code == 0)


# ---- interruptions --------------------------------------------------------------------------------------------------

HANGS = """
    @uffd_case("quick")
    def test_quick():
        pass

    @uffd_case("slow", mem=(ANON, SHMEM))
    def test_slow(mem):
        if not os.fork():
            os.setsid()
            open(f"started-{mem}.{os.getpid()}", "w").close()
        time.sleep(1000)
"""


def started(cli: Starter, *args: str) -> Run:
    """Start a run of HANGS, and wait until a case does what it says."""
    run = cli.start(*args)
    until = time.monotonic() + 60
    while not list(cli.folder.glob("started-*")):
        assert time.monotonic() < until
        assert run.process.poll() is None
        time.sleep(0.02)
    return run


WAYS = {"serially": ["--case-file"], "told of pytest": ["--"], "with workers": ["-n", "2", "--"]}
"""What stands before the path of a file, for each way to run it: the first is that of the suite's own cases."""

either_way = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)


@needs_userfaultfd
@either_way
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_interrupt(cli: Starter, suite: SuiteWriter, number: signal.Signals, way: list[str]) -> None:
    """A signal ends the run at once: bail-out, exit code of the signal, nothing left behind, reports written."""
    run = started(cli, "--deadline", "1000", *way, suite.write(HANGS))
    run.process.send_signal(number)
    run.wait()
    assert run.code == 128 + number
    assert run.stdout.splitlines()[-1] == f"Bail out! interrupted by {number.name}"
    assert run.survivors() == []
    assert run.document["interrupted"] == f"interrupted by {number.name}"
    assert "Traceback" not in run.stderr


LOADING = """
import os, runpy, signal, sys
class Interrupted:
    def find_spec(self, name, *_):
        if name == "uffd_selftests.{module}":
            os.kill(os.getpid(), signal.SIGINT)
signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever the tests were started with
sys.meta_path.insert(0, Interrupted())
sys.argv[1:] = {arguments}
runpy.run_module("uffd_selftests", run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize(
    ("module", "arguments"), [("cli", []), ("vm.session", ["--kernel", "none"]), ("soak", ["--soak", "1m"])]
)
def test_interrupt_while_loading(module: str, arguments: list[str]) -> None:
    """Before the run has begun Ctrl-C ends it without a word."""
    call = [sys.executable, "-c", LOADING.format(module=module, arguments=arguments)]
    result = subprocess.run(call, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout, result.stderr) == (-signal.SIGINT, "", "")


@needs_userfaultfd
def test_reader_goes_away(cli: Starter, suite: SuiteWriter) -> None:
    """``run_tests.sh | head -1`` ends the run without a word."""
    path = suite.write("""
        @uffd_case("many", variants=tuple(map(str, range(50))))
        def test_many(variant):
            pass
    """)
    reader, writer = os.pipe()
    os.close(reader)
    run = cli.start("--", path, stdout=writer)
    os.close(writer)
    run.wait()
    assert run.code == 128 + signal.SIGPIPE
    assert len(run.document["results"]) < 50
    assert "Traceback" not in run.stderr


@needs_userfaultfd
@either_way
def test_killed(cli: Starter, suite: SuiteWriter, way: list[str]) -> None:
    """SIGKILL of a run ends its cases, too, and what they have started, with workers and without."""
    run = started(cli, "--deadline", "1000", *way, suite.write(HANGS))
    run.process.kill()
    run.wait()
    until = time.monotonic() + 60
    while run.survivors() and time.monotonic() < until:
        time.sleep(0.01)
    assert run.survivors() == []


@needs_userfaultfd
def test_worker_dies(cli: Starter, suite: SuiteWriter) -> None:
    """A worker that dies takes only the case along that killed it; the plan is kept."""
    path = suite.write("""
        @uffd_case("killer")
        def test_killer():
            os.kill(os.getppid(), signal.SIGKILL)
            time.sleep(1000)

        @uffd_case("bystander", variants=tuple("abcdef"))
        def test_bystander(variant):
            pass
    """)
    run = cli.run("-n", "2", "--", path)
    assert run.code == 1
    outcomes = run.outcomes
    assert outcomes.pop("killer") == "error"
    assert set(outcomes.values()) == {"pass"}
    assert len(outcomes) == 6
    assert run.survivors() == []


@needs_userfaultfd
@pytest.mark.parametrize("way", [["--case-file"], ["--", "--tb=no"], ["--"]], ids=["serial", "hidden", "shown"])
def test_what_a_failure_says(cli: Starter, suite: SuiteWriter, way: list[str]) -> None:
    """A failure tells promise, error, place and output, whether or not pytest's own words are shown as well."""
    path = suite.write("""
        @uffd_case("fails")
        def test_fails():
            '''The kernel keeps its word. And more.'''
            print("said")
            raise AssertionError("expected EEXIST; the call succeeded")
    """)
    run = cli.run(*way, path)
    promise, error, place, *output = run.results["fails"]["diagnostics"]
    assert promise == "promise: The kernel keeps its word."
    assert error == "AssertionError: expected EEXIST; the call succeeded"
    assert re.fullmatch(rf"at (.*/)?{os.path.basename(path)}:[0-9]+", place)
    assert output == ["Captured stdout:", "  said"]


@needs_userfaultfd
@either_way
def test_ways_to_end(cli: Starter, suite: SuiteWriter, way: list[str]) -> None:
    """Each way to run a case tells the same of how it ended; no case hears of another's end or output."""
    path = suite.write("""
        import sys
        from uffd_selftests.common import Skip, Uffd

        @uffd_case("ends", variants=("pass", "print", "assert", "skip", "leak", "signal", "exit", "hang", "pass again"))
        def test_ends(variant):
            global uffd
            if variant == "print":
                print("said")
                sys.stderr.write("complained")
            elif variant == "assert":
                assert len(variant) == 7
            elif variant == "skip":
                raise Skip("nothing: get some")
            elif variant == "leak":
                uffd = Uffd.open()
            elif variant == "signal":
                print("never heard of again")
                os.kill(os.getpid(), signal.SIGSEGV)
            elif variant == "exit":
                os._exit(3)
            elif variant == "hang":
                time.sleep(1000)
    """)
    run = cli.run("--deadline", "1", *way, path)
    told = {name[6:-1]: (result["outcome"], result["reason"]) for name, result in run.results.items()}
    assert told == {
        "pass": ("pass", ""),
        "print": ("pass", ""),
        "assert": ("fail", ""),
        "skip": ("skip", "nothing: get some"),
        "leak": ("fail", ""),
        "signal": ("error", "killed by SIGSEGV"),
        "exit": ("error", "exited with status 3 before its reports"),
        "hang": ("timeout", "1 seconds"),
        "pass again": ("pass", ""),
    }
    lines = {name[6:-1]: "\n".join(result["diagnostics"]) for name, result in run.results.items()}
    assert "AssertionError: assert " in lines["assert"] or "assert 6 == 7" in lines["assert"]
    assert "left behind: userfaultfd" in lines["leak"]
    assert "never heard of again" in lines["signal"]
    assert "said" not in "".join(lines.values())
    assert run.survivors() == []


@needs_userfaultfd
def test_stop_at_first_failure(cli: Starter, suite: SuiteWriter) -> None:
    """With pytest's -x the rest is called off, not failed."""
    path = suite.write("""
        @uffd_case("fails", variants=tuple("abc"))
        def test_fails(variant):
            assert False
    """)
    run = cli.run("--", path, "-x")
    assert run.code == 1
    assert run.stdout.splitlines()[-1] == "Bail out! stopping after 1 failures"


def test_the_suite_is_found_from_anywhere(cli: Starter) -> None:
    """Whatever the current folder is, the cases are those of the package."""
    run = cli.run("-l", "-f", "UFFDIO_API")
    assert run.stdout.splitlines() == ["UFFDIO_API (with syscall)", "UFFDIO_API (with /dev/userfaultfd)"]
