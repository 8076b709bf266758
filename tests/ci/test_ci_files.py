# SPDX-License-Identifier: GPL-2.0-only
"""The jobs in ci/ are what GitHub, GitLab and LAVA take, and their commands do what they promise.

The schemas are those of SchemaStore and GitLab, which check-jsonschema brings along.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT
from tests.report.helpers import Folder, result

GITHUB = ROOT / "ci" / "github" / "uffd.yml"
GITLAB = ROOT / "ci" / "gitlab" / "uffd.yml"
LAVA = ROOT / "ci" / "lava" / "uffd-selftests.yaml"


def read(path: Path) -> dict[str, Any]:
    """Return what a YAML file says."""
    yaml = pytest.importorskip("ruamel.yaml", reason="check-jsonschema is not installed: pip install check-jsonschema")
    document: dict[str, Any] = yaml.YAML(typ="safe").load(path)
    return document


@pytest.mark.parametrize(
    ("path", "schema"),
    [
        (GITHUB, ["vendor.github-workflows"]),
        (GITLAB, ["vendor.gitlab-ci", "--data-transform", "gitlab-ci"]),
    ],
    ids=["github", "gitlab"],
)
def test_schema(path: Path, schema: list[str]) -> None:
    """A file keeps to the schema of its reader."""
    pytest.importorskip("check_jsonschema", reason="check-jsonschema is not installed: pip install check-jsonschema")
    check = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", *schema, str(path)]
    done = subprocess.run(check, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_lava_definition() -> None:
    """LAVA's test definition has what LAVA asks for, and runs what is there."""
    definition = read(LAVA)
    assert definition["metadata"]["format"] == "Lava-Test Test Definition 1.0"
    (step,) = definition["run"]["steps"]
    programs = [part.split()[0] for part in step.split("|")]
    assert [os.access(ROOT / program, os.X_OK) for program in programs] == [True, True]
    assert set(definition["parameters"]) == {"OPTIONS", "RESULTS"}


def github_steps() -> dict[str, str]:
    """Return the commands of GitHub's jobs by the name of their step."""
    jobs = read(GITHUB)["jobs"].values()
    return {step["name"]: step["run"] for job in jobs for step in job["steps"] if "run" in step}


def gitlab_steps() -> dict[str, str]:
    """Return the commands of GitLab's jobs by the name of their part."""
    jobs = {name: job for name, job in read(GITLAB).items() if name != "variables"}
    parts = ("before_script", "script", "after_script")
    return {f"{name} {part}": "\n".join(job[part]) for name, job in jobs.items() for part in parts if part in job}


def test_shellcheck() -> None:
    """The commands are sound."""
    if not shutil.which("shellcheck"):
        pytest.skip("no shellcheck: apt-get install shellcheck")
    for name, commands in (github_steps() | gitlab_steps()).items():
        # Options are several words on purpose.
        call = ["shellcheck", "--shell=bash", "--exclude=SC2086", "-"]
        done = subprocess.run(call, input=commands, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{name}: {done.stdout}"


def run(commands: str, folder: Path, **more: str) -> None:
    """Run commands of a job, where the checkout is the current folder."""
    environment = {**os.environ, "PYTHON": sys.executable, "UFFD_VENV": "none", **more}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", commands], cwd=folder, env=environment, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def lay_out(folder: Path) -> None:
    """Make the results of two kernels, as --kernel leaves them."""
    folder.mkdir(parents=True)
    for kernel, outcome in (("6.1", "pass"), ("7.1", "fail")):
        Folder(folder).document(kernel, result("move on anon", outcome))


def test_github_results(tmp_path: Path) -> None:
    """A job of GitHub shows its results; the last one makes a page of all and shows them, too."""
    steps = github_steps()
    (tmp_path / "run_tests.sh").symlink_to(ROOT / "run_tests.sh")
    shown = tmp_path / "summary.md"
    lay_out(tmp_path / "results")
    run(steps["Show the results"], tmp_path, GITHUB_STEP_SUMMARY=str(shown))
    assert "| 7.1 | 0 | 1 |" in shown.read_text()
    shutil.rmtree(tmp_path / "results")
    lay_out(tmp_path / "results" / "uffd-results-0")
    lay_out(tmp_path / "results" / "uffd-results-1")
    run(steps["Put all results on one page"], tmp_path, GITHUB_STEP_SUMMARY=str(shown))
    assert "2 broken promises" in shown.read_text()
    assert "7.1" in (tmp_path / "report.html").read_text()


def test_gitlab_results(tmp_path: Path) -> None:
    """The last job of GitLab makes a page of all results."""
    (tmp_path / "uffd-selftests").symlink_to(ROOT)
    lay_out(tmp_path / "uffd-results" / "4711")
    lay_out(tmp_path / "uffd-results" / "4712")
    run(gitlab_steps()["uffd-report script"], tmp_path)
    assert "7.1" in (tmp_path / "report.html").read_text()
