"""Tables of what `tools.first_hour` found on a GPU, in Markdown for docs/cuda.md: failures first."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from benchmarks.records import Record


def latest(found: Sequence[Record]) -> list[Record]:
    """Return the records of the latest run."""
    starts = [number for number, record in enumerate(found) if record["kind"] == "start"]
    return list(found[starts[-1] if starts else 0 :])


def failures(run: Iterable[Record]) -> list[tuple[str, str]]:
    """Return the names of what failed in a run, and details."""
    found = []
    for record in run:
        if record["kind"] == "failure":
            found.append((record["name"], record["detail"]))
        elif record["kind"] == "step" and record["status"] != "passed":
            last = record["output"].strip().rpartition("\n")[2]
            found.append((record["name"], f"{record['status']}: {last}"))
    return found


def tables(run: Sequence[Record]) -> str:
    """Return the tables of a run."""
    by_kind: dict[str, list[Record]] = {}
    for record in run:
        by_kind.setdefault(record["kind"], []).append(record)
    failed = failures(run)
    parts = [_machine(by_kind), _table(("failure", "detail"), failed) if failed else "Nothing failed.", _steps(by_kind)]
    if times := by_kind.get("time"):
        parts += [_times(times, by_kind), _kernels(times)]
    return "\n\n".join(parts)


def _machine(by_kind: dict[str, list[Record]]) -> str:
    parts = [
        f"{key} {value}" for record in by_kind.get("machine", []) for key, value in record.items() if key != "kind"
    ]
    parts += [f"copies {record['bytes_per_second'] / 1e9:,.0f} GB/s" for record in by_kind.get("copy", [])]
    return ", ".join(parts) or "The machine is not known."


def _steps(by_kind: dict[str, list[Record]]) -> str:
    rows = [(step["name"], step["status"], f"{step['seconds']:.0f} s") for step in by_kind.get("step", [])]
    for tests in by_kind.get("tests", []):
        counts = [f"{tests[name]} {name}" for name in ("passed", "failed", "skipped") if name in tests]
        rows.append((tests["files"], ", ".join([*counts, f"of {tests['collected']}"]), ""))
    return _table(("step", "", "time"), rows)


def _times(times: Sequence[Record], by_kind: dict[str, list[Record]]) -> str:
    bandwidth = max((record["bytes_per_second"] for record in by_kind.get("copy", [])), default=None)
    compiled = {_case(record): record["seconds"] for record in by_kind.get("compiled", [])}
    rows = []
    for time in times:
        floor = f"{time['graph'] * bandwidth / time['moved_bytes']:.2f}" if bandwidth else ""
        peers = (time["composite"], compiled.get(_case(time)), time["cublas"])
        ratios = ["" if peer is None else f"{peer / time['graph']:.2f}x" for peer in peers]
        rows.append((*_case(time), _micros(time["eager"]), _micros(time["graph"]), floor, *ratios))
    heading = ("N x D", "dtype", "loss", "eager", "graph", "/ floor", "composite", "compiled", "cuBLAS")
    return "Forward + backward with cold caches in µs; the others as multiples of the graph's time.\n\n" + _table(
        heading, rows
    )


def _kernels(times: Sequence[Record]) -> str:
    rows = [(*_case(time), name, _micros(seconds)) for time in times for name, seconds in time["kernels"].items()]
    return _table(("N x D", "dtype", "loss", "kernel", "µs"), rows)


def _case(time: Record) -> tuple[str, str, str]:
    return f"{time['samples']:,} x {time['dim']:,}", time["dtype"], time["loss"]


def _micros(seconds: float) -> str:
    return f"{1e6 * seconds:,.1f}"


def _table(heading: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    cells = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in [heading, ["---"] * len(heading), *cells])
