"""Print results as tables of ratios."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import geometric_mean

import torch

from benchmarks.results import Change, Row
from benchmarks.workloads import GRID

DISTURBED = "busy"
PEERS = ("plain", "compile", "composite", "metric-learning", "torchdistill")

Cases = list[dict[str, Row]]  # for each case, its rows by implementation


def tables(rows: Sequence[Row]) -> str:
    """Return the tables of one run: icsd beside its peers."""
    parts = [_heading(rows)]
    for name, table in (
        ("operator", _operator),
        ("groups", _groups),
        ("banks", _banks),
        ("banks-memory", _banks_memory),
        ("regimes", _operator),
        ("family", _operator),
        ("overhead", _overhead),
        ("memory", _memory),
        ("training", _training),
        ("field", _field),
    ):
        if cases := _cases(row for row in rows if row.benchmark == name):
            parts.append(table(cases))
    disturbed = sum(row.disturbed for row in rows)
    if disturbed:
        parts.append(
            f"{DISTURBED}: the machine was busy with other programs during {disturbed} of {len(rows)} measurements; "
            "they are left out of means and figures"
        )
    return "\n\n".join(parts)


def changes(found: Sequence[Change], drift: float) -> str:
    """Return the table of the changes that `benchmarks.results.compare` found."""
    lines = [f"The peers take {drift:.2f} times as long as before; the times of icsd are divided by that.", ""]
    table = [
        (*_name(change.after), change.after.benchmark, change.after.work, f"{change.ratio:.2f}x", change.verdict)
        for change in found
        if change.verdict != "same"
    ]
    if table:
        lines += [_table(("N x D", "dtype", "loss", "isa", "benchmark", "work", "after / before", ""), table), ""]
    return "\n".join([*lines, f"{len(table)} of {len(found)} measurements changed beyond noise"])


def _cases(rows: Iterable[Row]) -> Cases:
    """Return the cases that icsd has a row of, ordered by dtype, loss and shape."""
    cases: dict[tuple, dict[str, Row]] = {}
    for row in rows:
        cases.setdefault(row.case, {})[row.implementation] = row
    ours = [case for case in cases.values() if "icsd" in case]
    return sorted(ours, key=lambda case: _order(case["icsd"]))


def _order(row: Row) -> tuple[bool, str, int, int, int, str]:
    return row.dtype != "float32", row.loss, row.samples, row.dim, row.groups, row.work


def _heading(rows: Sequence[Row]) -> str:
    first = rows[0]
    rates = [
        f"{_span([row.gemm_gflop_s for row in rows if row.dtype == dtype])} GFLOP/s in {dtype}"
        for dtype in dict.fromkeys(row.dtype for row in rows)
    ]
    return (
        f"{first.cpu}, threads: {first.threads}, native code: {first.isa}, torch {first.torch}, icsd {first.icsd}\n"
        f"measured beside each case: copy {_span([row.copy_gb_s for row in rows])} GB/s, "
        f"matrix product {', '.join(rates)}"
    )


def _span(values: Sequence[float]) -> str:
    least, most = f"{min(values):,.0f}", f"{max(values):,.0f}"
    return least if least == most else f"{least} to {most}"


def _operator(cases: Cases) -> str:
    peers = _peers(cases)
    table = []
    for dtype, loss in dict.fromkeys((case["icsd"].dtype, case["icsd"].loss) for case in cases):
        chosen = [case for case in cases if (case["icsd"].dtype, case["icsd"].loss) == (dtype, loss)]
        for case in chosen:
            row = case["icsd"]
            table.append((*_name(row), *_speedups([case], peers), _over_floor([row]), _seconds(row.median)))
        grid = [case for case in chosen if (case["icsd"].samples, case["icsd"].dim) in GRID]
        for name, some in (("geometric mean", chosen), ("of the grid", grid if len(grid) == len(GRID) else [])):
            if len(some) > 1:
                floor = _over_floor([case["icsd"] for case in some])
                table.append((name, dtype, loss, some[0]["icsd"].isa, *_speedups(some, peers), floor, ""))
    title = "forward + backward: times of the peers / time of icsd; time of icsd / floor; time of icsd"
    return f"{title}\n\n{_table(('N x D', 'dtype', 'loss', 'isa', *peers, '/ floor', 'icsd'), table)}"


def _groups(cases: Cases) -> str:
    peers = _peers(cases)
    table = []
    for dtype, loss in dict.fromkeys((case["icsd"].dtype, case["icsd"].loss) for case in cases):
        chosen = [case for case in cases if (case["icsd"].dtype, case["icsd"].loss) == (dtype, loss)]
        for some in [*([case] for case in chosen), chosen]:
            row = some[0]["icsd"]
            name = f"{row.groups} x {row.samples:,} x {row.dim:,}" if len(some) == 1 else "geometric mean"
            seconds = _seconds(row.median) if len(some) == 1 else ""
            floor = _over_floor([case["icsd"] for case in some])
            table.append((name, dtype, loss, row.isa, *_speedups(some, peers), floor, seconds))
    title = "patch tokens, forward + backward: times of the peers / time of icsd; time of icsd / floor; time of icsd"
    return f"{title}\n\n{_table(('B x N x D', 'dtype', 'loss', 'isa', *peers, '/ floor', 'icsd'), table)}"


def _banks(cases: Cases) -> str:
    peers = _peers(cases)
    rows = [(case, case["icsd"]) for case in cases]
    table = [
        (*_name(row), row.work, *_speedups([case], peers), _over_floor([row]), _seconds(row.median))
        for case, row in rows
    ]
    title = "banks, forward + backward: times of the peers / time of icsd; time of icsd / floor; time of icsd"
    return f"{title}\n\n{_table(('N x D', 'dtype', 'loss', 'isa', 'banks', *peers, '/ floor', 'icsd'), table)}"


def _banks_memory(cases: Cases) -> str:
    names = ["icsd", *_peers(cases)]
    table = [
        (
            *_name(case["icsd"]),
            case["icsd"].work,
            *(f"{case[name].median / 2**20:.1f} MiB" if name in case else "" for name in names),
        )
        for case in cases
    ]
    title = "banks, peak memory of forward + backward beyond the inputs"
    return f"{title}\n\n{_table(('N x D', 'dtype', 'loss', 'isa', 'banks', *names), table)}"


def _overhead(cases: Cases) -> str:
    peers = _peers(cases)
    table = [
        (*_name(case["icsd"]), case["icsd"].work, *_speedups([case], peers), _seconds(case["icsd"].median))
        for case in cases
    ]
    title = "call overhead, on tiny features: times of the peers / time of icsd; time of icsd"
    return f"{title}\n\n{_table(('N x D', 'dtype', 'loss', 'isa', 'work', *peers, 'icsd'), table)}"


def _memory(cases: Cases) -> str:
    implementations = ["icsd", *_peers(cases)]
    table = []
    for case in cases:
        row = case["icsd"]
        gradient = row.groups * row.samples * row.dim * getattr(torch, row.dtype).itemsize
        peaks = [case[name].median if name in case else None for name in implementations]
        cells = ("" if peak is None else f"{peak / gradient:.2f} ({peak / 2**20:.1f} MiB)" for peak in peaks)
        table.append((*_name(row), *cells))
    title = "peak memory of forward + backward beyond the inputs, as a multiple of the size of the gradient"
    return f"{title}\n\n{_table(('N x D', 'dtype', 'loss', 'isa', *implementations), table)}"


def _training(cases: Cases) -> str:
    works = {case["icsd"].work: case for case in cases}
    table = []
    if "step" in works and "distillation" in works:
        for name, step in works["step"].items():
            loss = works["distillation"][name]
            table.append((name, f"{loss.median / step.median:.2%}", _seconds(loss.median), _seconds(step.median)))
    title = "training step of the emoji demo: the part of the time that the distillation takes"
    return f"{title}\n\n{_table(('backend', 'part', 'distillation', 'step'), table)}"


def _field(cases: Cases) -> str:
    (case,) = cases
    ours = case["icsd"]
    table = [
        (name, _mean_ratio([(row, ours)]), f"{row.samples / row.median:.3g}", _seconds(row.median))
        for name, row in case.items()
    ]
    title = "training step at 64, 128 and 256 pixels, batch 4: time / time of icsd in bfloat16"
    return f"{title}\n\n{_table(('implementation', 'time / icsd', 'images/s', 'step'), table)}"


def _name(row: Row) -> tuple[str, str, str, str]:
    groups = f"{row.groups} x " if row.groups > 1 else ""
    return f"{groups}{row.samples:,} x {row.dim:,}", row.dtype, row.loss, row.isa


def _peers(cases: Cases) -> list[str]:
    return [peer for peer in PEERS if any(peer in case for case in cases)]


def _speedups(cases: Cases, peers: Sequence[str]) -> list[str]:
    """Return the geometric means of peer's time / time of icsd, one for each peer."""
    return [_mean_ratio([(case[peer], case["icsd"]) for case in cases if peer in case]) for peer in peers]


def _mean_ratio(pairs: Sequence[tuple[Row, Row]]) -> str:
    quiet = [(peer, ours) for peer, ours in pairs if not (peer.disturbed or ours.disturbed)]
    if quiet:
        return f"{geometric_mean(peer.median / ours.median for peer, ours in quiet):.1f}x"
    return DISTURBED if pairs else ""


def _over_floor(rows: Sequence[Row]) -> str:
    ratios = [row.ratio_to_floor for row in rows if not row.disturbed]
    return f"{geometric_mean(ratios):.2f}" if ratios else DISTURBED


def _seconds(value: float) -> str:
    return f"{value * 1e6:,.1f} µs" if value < 1e-3 else f"{value * 1e3:,.2f} ms"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join("  ".join(f"{cell:>{width}}" for cell, width in zip(line, widths, strict=True)) for line in lines)
