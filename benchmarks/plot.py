# SPDX-License-Identifier: GPL-2.0-only
"""Draw what faults.py has measured: how the cost grows with the size of the area, and the rate with the threads."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import matplotlib as mpl

mpl.use("agg")
from matplotlib import pyplot as plt

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from matplotlib.axes import Axes

Result = dict[str, Any]
FORMATS = ("png", "svg", "pdf")
"""Endings that a picture's name can have."""


def draw(document: dict[str, Any], path: Path) -> None:
    """Write the picture of a report; the ending of its name says in which format.

    Each kind of fault has a row: on the left the latency of a fault by the size of the area, with the fewest threads
    that were measured; on the right the rate by the number of threads, in the smallest area. The last row has what
    PAGEMAP_SCAN costs by the size of the area, where it was measured.
    """
    results: list[Result] = document["results"]
    kinds = list(dict.fromkeys(result["kind"] for result in results))
    scanned = [result for result in results if result["scan_ns_per_page"]]
    count = len(kinds) + bool(scanned)
    labels = list(dict.fromkeys(map(_label, results)))
    colours = {label: f"C{number}" for number, label in enumerate(labels)}
    figure, rows = plt.subplots(count, 2, figsize=(11, 1 + 2.6 * count), squeeze=False, layout="constrained")
    for kind, (left, right) in zip(kinds, rows, strict=False):
        own = [result for result in results if result["kind"] == kind]
        _latency_by_size(left, own, colours)
        _rate_by_threads(right, own, colours)
        left.set_title(kind, loc="left", fontweight="bold")
    if scanned:
        left, right = rows[-1]
        _scan_by_size(left, scanned, colours)
        left.set_title("PAGEMAP_SCAN", loc="left", fontweight="bold")
        right.axis("off")
    handles = {line.get_label(): line for axes in rows.flat for line in axes.get_lines() if line.get_label() in labels}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3, frameon=False)
    figure.suptitle(
        f"userfaults, Linux {document['kernel']} {document['machine']}, CPUs: {document['cpus']}, "
        f"handlers: {document['handlers']}"
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _label(result: Result) -> str:
    size = result["page_size"] >> 10
    return f"{result['memory']}, {f'{size >> 10} MB' if size % 1024 == 0 else f'{size} kB'} pages"


def _lines(results: list[Result], x: Callable[[Result], float]) -> dict[str, list[tuple[float, Result]]]:
    """Return the points of each line, from left to right, by its label."""
    lines: dict[str, list[tuple[float, Result]]] = {}
    for result in sorted(results, key=x):
        lines.setdefault(_label(result), []).append((x(result), result))
    return lines


def _latency_by_size(axes: Axes, results: list[Result], colours: dict[str, str]) -> None:
    _by_size(axes, results, colours, *(partial(_latency, name) for name in ("p50", "p99")))
    axes.set_ylabel("µs a fault")
    _note(axes, "solid p50, dotted p99")


def _scan_by_size(axes: Axes, results: list[Result], colours: dict[str, str]) -> None:
    _by_size(axes, results, colours, *(partial(_scan, name) for name in ("written", "clean")))
    axes.set_ylabel("ns a page")
    _note(axes, "solid: all written, protected again; dotted: none")


def _by_size(
    axes: Axes,
    results: list[Result],
    colours: dict[str, str],
    solid: Callable[[Result], float],
    dotted: Callable[[Result], float],
) -> None:
    threads = min(result["threads"] for result in results)
    shown = [result for result in results if result["threads"] == threads]
    for label, points in _lines(shown, _mib).items():
        sizes = [size for size, _ in points]
        axes.plot(sizes, [solid(result) for _, result in points], "o-", color=colours[label], label=label)
        axes.plot(sizes, [dotted(result) for _, result in points], ".:", color=colours[label])
    axes.set(xscale="log", yscale="log", xlabel=f"MiB of area; {threads} thread{'s' if threads > 1 else ''}")
    _ticks(axes, {_mib(result) for result in shown})


def _latency(name: str, result: Result) -> float:
    """Microseconds."""
    nanoseconds: int = result["latency_ns"][name]
    return nanoseconds / 1000


def _scan(name: str, result: Result) -> float:
    nanoseconds: float = result["scan_ns_per_page"][name]
    return nanoseconds


def _mib(result: Result) -> float:
    size: int = result["area_size"]
    return size / (1 << 20)


def _rate_by_threads(axes: Axes, results: list[Result], colours: dict[str, str]) -> None:
    smallest: dict[str, int] = {}
    for result in results:
        label = _label(result)
        smallest[label] = min(smallest.get(label, result["area_size"]), result["area_size"])
    shown = [result for result in results if result["area_size"] == smallest[_label(result)]]
    for label, points in _lines(shown, lambda result: result["threads"]).items():
        rates = [result["faults_per_second"] for _, result in points]
        middle = [rate["median"] for rate in rates]
        spread = [
            [rate["median"] - rate["min"] for rate in rates],
            [rate["max"] - rate["median"] for rate in rates],
        ]
        threads = [threads for threads, _ in points]
        axes.errorbar(threads, middle, spread, fmt="o-", color=colours[label], elinewidth=0.8, capsize=2)
    areas = sorted({size >> 20 for size in smallest.values()})
    axes.set(xscale="log", yscale="log", ylabel="faults/s")
    axes.set(xlabel=f"threads; area of {' or '.join(map(str, areas))} MiB")
    _ticks(axes, {result["threads"] for result in shown})
    _note(axes, "bars: slowest and fastest round")


def _note(axes: Axes, text: str) -> None:
    axes.annotate(text, (0.98, 1.03), xycoords="axes fraction", ha="right", fontsize="small")


def _ticks(axes: Axes, places: set[float]) -> None:
    """Mark exactly these places of the logarithmic x axis."""
    axes.set_xticks(sorted(places), [f"{place:g}" for place in sorted(places)])
    axes.minorticks_off()
    axes.grid(visible=True, alpha=0.3)
