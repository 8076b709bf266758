# SPDX-License-Identifier: GPL-2.0-only
"""Where the cases of a process run: a launcher, and another one when that is gone or its machine is not as it was."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from uffd_selftests.harness.jobs import Setting

if TYPE_CHECKING:
    from collections.abc import Callable

    from uffd_selftests.harness.isolation import Ending
    from uffd_selftests.harness.launcher import Launcher, Order
    from uffd_selftests.harness.settings import Settings
    from uffd_selftests.machine.facts import Facts

STARTS = 2
"""How often a launcher may be gone before it is ready."""
REMOTE_LOG = "/run/stress.log"
"""Where stress cases on another machine write what they do."""
FAREWELL_SECONDS = 10.0
"""How long a machine that is given up may take to say what it has to say."""
PACKAGE = Path(__file__).resolve().parent.parent


class Lost(Exception):
    """No launcher can be had any more; the text says why."""


class Spent(Exception):
    """Nothing more is to be run here; the text says why."""


class Site:
    """A launcher that is replaced, and what each is told first."""

    def __init__(self, source: Callable[[], Launcher], *, remote: bool = False) -> None:
        self.remote = remote
        """It is another machine, of which nothing but the package is known there."""
        self._source = source
        self._launcher: Launcher | None = None
        self._setting: Setting | None = None
        self._done: dict[str, Any] | None = None
        """What the present launcher has answered to it."""
        self._supplied: dict[str, dict[str, str]] = {}
        """Files that do not come with the package, by their folder."""
        self._found: dict[str, Any] = {}
        """What the launchers before had to say at their ends."""

    @property
    def launcher(self) -> Launcher:
        """The present launcher, ready; raises Lost."""
        why = ""
        for _ in range(STARTS):
            if self._launcher:
                break
            try:
                self._launcher = self._source()
                self._tell()
                for folder, files in self._supplied.items():
                    self._launcher.ask("supply", folder, files)
            except EOFError as error:
                self.close()
                why = why or str(error)
        if not self._launcher:
            raise Lost(why)
        return self._launcher

    def _tell(self) -> None:
        """Tell the present launcher what holds for all tasks, if that is known; raises EOFError."""
        if self._launcher and self._setting:
            self._done = self._launcher.ask("set_up", {**self._setting, **self._launcher.own_setting()})

    def set_up(self, setting: Setting) -> dict[str, Any]:
        """Have this hold for all tasks, whatever launcher runs them; return what was done for it.  Raises Lost."""
        self._setting, self._done = setting, None
        self.launcher  # noqa: B018  # one that is new is told at once
        if self._done is None:  # it was there before
            try:
                self._tell()
            except EOFError:
                self.close()
                self.launcher  # noqa: B018  # another one, if it can be had
        return dict(self._done or {})

    @property
    def is_set_up(self) -> bool:
        """Whether tasks can be run."""
        return self._setting is not None

    def ask(self, name: str, *arguments: object) -> Any:
        """Return the answer of the present launcher; raises OSError, EOFError, Lost."""
        return self.launcher.ask(name, *arguments)

    def run(self, order: Order, then: Order | None) -> Ending:
        """Run an order; raises Lost when there is nobody to do it, Spent when nobody is to do it."""
        launcher = self.launcher
        ending = launcher.run(order, then)
        if not launcher.alive:
            self.replace()
        return ending

    def finish(self) -> dict[str, Any]:
        """Have the machine put back, and return what the launchers have to say of all that they ran."""
        self.replace()
        return self._found

    def dismiss(self) -> None:
        """Let what runs next have a process of its own."""
        if self._launcher:
            self._launcher.dismiss()

    def supply(self, path: Path, module: str) -> None:
        """Have a case file there that does not come with the package, with those beside it."""
        if not self.remote or PACKAGE in path.parents:
            return
        depth = module.count(".")
        folder = path.parents[depth]
        known = self._supplied.setdefault(str(folder), {})
        if str(path.relative_to(folder)) in known:
            return
        packages = [parent / "__init__.py" for parent in list(path.parents)[:depth]]
        sources = [each for each in (*packages, *sorted(path.parent.glob("*.py"))) if each.exists()]
        files = {str(each.relative_to(folder)): each.read_text("utf-8", "surrogateescape") for each in sources}
        self.ask("supply", str(folder), files)
        known.update(files)

    def replace(self) -> None:
        """Have another launcher do what comes next."""
        launcher, self._launcher = self._launcher, None
        if not launcher:
            return
        try:
            if launcher.alive and self._setting:
                merge(self._found, launcher.finish(FAREWELL_SECONDS if self.remote else None))
        except (OSError, EOFError, AttributeError, TypeError):  # what it says may be anything
            pass
        finally:
            launcher.close()

    def close(self) -> None:
        """End the launcher."""
        launcher, self._launcher = self._launcher, None
        if launcher:
            launcher.close()


def merge(found: dict[str, Any], more: dict[str, Any]) -> None:
    """Add what a launcher has to say to what others had: texts and lists become longer."""
    for name, value in more.items():
        found[name] = found[name] + value if name in found else value
    if "tainted" in found:
        found["tainted"] = "".join(sorted(set(found["tainted"])))


def setting(settings: Settings, facts: Facts, *, sole: bool, remote: bool = False) -> Setting:
    """Return what a launcher is to know, but for the huge pages."""
    result = Setting(environ=dict(os.environ), hugepage_size=facts.hugepage_size, sole=sole, kmsg=settings.kmsg)
    if remote:  # the rest is none of its business
        result["environ"] = {name: value for name, value in os.environ.items() if name.startswith("UFFD_")}
        result["environ"]["UFFD_STRESS_LOG"] = REMOTE_LOG if settings.folder else ""
    else:
        result["path"] = list(sys.path)
    return result
