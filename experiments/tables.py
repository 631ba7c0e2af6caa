"""Rows of results as Markdown: the tables and findings that stand between markers in README.md and here."""

import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from .common import RESULTS, read_rows

Row = dict[str, Any]


def rows_of(name: str, **wanted: Any) -> list[Row]:
    """An experiment's rows with these values; none if it has not been run."""
    path = RESULTS / f"{name}.jsonl"
    rows = read_rows(path) if path.exists() else []
    return [row for row in rows if all(row.get(key) == value for key, value in wanted.items())]


def cards(rows: Iterable[Row]) -> list[str]:
    """The devices of rows, first the one with the most."""
    return [device for device, _ in Counter(row["device"] for row in rows).most_common()]


def beside(rows: Sequence[Row], key: str) -> list[Row]:
    """Rows with `key` as a ratio to its median with pages of 16 on the same device, for two cards do not compare;
    without those that have nothing beside them."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        same = (row.get(name) for name in ("device", "part", "shape", "workload", "kernel"))
        groups.setdefault(tuple(same), []).append(row)
    found = []
    for group in groups.values():
        if reference := [row for row in group if row["page_size"] == 16]:
            found += [row | {key: row[key] / median(reference, key)} for row in group]
    return found


def rate_at(rows: Sequence[Row], seconds: float) -> float:
    """Requests a second whose mean latency over output length is so many seconds: between the rates that were run,
    along the latencies' logarithms; the least or the highest of them where that lies outside."""
    rates = sorted({row["rate"] for row in rows})
    means = [
        statistics.fmean(row["normalized_latency_s"]["mean"] for row in rows if row["rate"] == rate) for rate in rates
    ]
    return float(np.interp(np.log(seconds), np.log(means), rates))


def spread(values: Iterable[float]) -> tuple[float, float, float]:
    """Median, least and most."""
    found = list(values)
    return statistics.median(found), min(found), max(found)


def median(rows: Iterable[Row], value: str | Callable[[Row], float]) -> float:
    get = value if callable(value) else lambda row: row[value]
    return statistics.median(get(row) for row in rows)


def shown(value: float, digits: int = 3) -> str:
    """To so many significant digits, thousands with a gap."""
    if value == 0 or abs(value) >= 10 ** (digits - 1):
        return f"{value:,.0f}".replace(",", " ")
    return f"{float(f'{value:.{digits}g}'):g}"


def percent(value: float) -> str:
    return f"{shown(100 * value)} %"


def table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *lines))


def where(rows: Sequence[Row]) -> str:
    """The hardware, and the commits that the rows are from."""
    devices, commits = (sorted({str(row[key]) for row in rows if key in row}) for key in ("device", "commit"))
    return f"{', '.join(devices)}; commit {', '.join(commits)}"


def counted(rows: Sequence[Row]) -> tuple[float, float, float, float]:
    """Percentages as the paper counts: what a run of pages is longer than was asked for stands with what is free."""
    of = {kind: 100 * median(rows, kind) for kind in ("used", "reserved", "internal", "external", "free", "rounding")}
    lost = of["external"] + of["free"] + of["rounding"]
    return of["used"], of["reserved"], of["internal"] - of["rounding"], lost
