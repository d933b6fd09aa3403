import csv
import dataclasses
import json
import platform

import pytest

from benchmarks import results
from benchmarks.results import Row
from icsd.errors import InputError

ROW = Row(
    date="2026-01-01T00:00:00+00:00",
    cpu="A Processor, at 3 GHz",
    isa="avx2",
    threads=2,
    torch="2.13.0",
    icsd="0.1.0",
    commit="0123abc",
    benchmark="operator",
    work="forward+backward",
    groups=1,
    samples=16,
    dim=1024,
    dtype="float32",
    loss="mse",
    implementation="icsd",
    unit="s",
    median=1.0,
    lower_quartile=0.98,
    upper_quartile=1.02,
    floor=0.5,
    ratio_to_floor=2.0,
    ratio_to_plain=None,
    copy_gb_s=20.0,
    gemm_gflop_s=300.0,
    contention=0.5,
)


def row(median=1.0, spread=0.02, **changes):
    quartiles = {"lower_quartile": median * (1 - spread), "upper_quartile": median * (1 + spread)}
    return dataclasses.replace(ROW, median=median, **quartiles, **changes)


def peers(scale=1.0, **changes):
    return [row(scale * n, implementation="plain", samples=n, **changes) for n in (16, 32, 64)]


def entry(data, **labels):
    measured = {"floor": 0.5, "copy_gb_s": 20.0, "gemm_gflop_s": 300.0, "contention": 0.5}
    case = {column: getattr(ROW, column) for column in results.LABELS}
    return {"extra_info": case | measured | labels, "stats": {"data": data}}


def verdicts(before, after):
    return [change.verdict for change in results.compare(before, after)]


def test_appended_rows_are_read_back(tmp_path):
    path = tmp_path / "new folder" / "results.csv"
    results.append(path, [ROW])
    results.append(path, [row(2.0, implementation="plain", floor=None, ratio_to_floor=None)])
    assert results.read(path) == [ROW, row(2.0, implementation="plain", floor=None, ratio_to_floor=None)]
    assert len(path.read_text().splitlines()) == 3
    with path.open(newline="") as file:
        assert next(csv.reader(file)) == results.COLUMNS


def test_a_file_of_something_else_is_refused_and_not_changed(tmp_path):
    path = tmp_path / "letter.txt"
    path.write_text("Dear reader,\n")
    with pytest.raises(InputError, match="another file"):
        results.append(path, [ROW])
    with pytest.raises(InputError, match="another file"):
        results.read(path)
    assert path.read_text() == "Dear reader,\n"


def test_a_missing_file_and_a_damaged_row_are_named(tmp_path):
    with pytest.raises(InputError, match=r"nothing\.csv cannot be read"):
        results.read(tmp_path / "nothing.csv")
    path = tmp_path / "results.csv"
    results.append(path, [ROW])
    path.write_text(path.read_text().replace(",16,1024,", ",sixteen,1024,"))
    with pytest.raises(InputError, match="row that cannot be read"):
        results.read(path)


def test_all_turns_make_one_row(tmp_path):
    path = tmp_path / "report.json"
    entries = [
        entry([1.0, 2.0, 3.0], floor=0.8, gemm_gflop_s=150.0),
        entry([8.0, 8.0], implementation="plain"),
        entry([4.0, 5.0], floor=0.5, gemm_gflop_s=240.0),
        entry([9.0], benchmark="memory", unit="B", floor=None, values=[100]),
    ]
    path.write_text(json.dumps({"benchmarks": entries}))
    ours, plain, memory = results.rows_from_report(path)
    assert (ours.lower_quartile, ours.median, ours.upper_quartile) == (2.0, 3.0, 4.0)
    assert (ours.ratio_to_floor, ours.gemm_gflop_s, ours.ratio_to_plain) == (6.0, 240.0, 3 / 8)
    assert plain.ratio_to_plain == 1
    assert (memory.median, memory.unit, memory.ratio_to_floor, memory.ratio_to_plain) == (100, "B", None, None)


def test_only_the_fastest_composite_is_shown():
    rows = [row(3.0, implementation="composite"), row(2.0, implementation="composite-onednn"), row(1.0)]
    assert [(r.implementation, r.median) for r in results.best_composite(rows)] == [("composite", 2.0), ("icsd", 1.0)]


def test_environment_names_no_host():
    assert platform.node() not in map(str, results.environment().values())


@pytest.mark.parametrize(
    ("after", "verdict"),
    [(row(1.2), "slower"), (row(0.8), "faster"), (row(1.03), "same"), (row(1.2, spread=0.3), "same")],
)
def test_a_change_counts_beyond_noise(after, verdict):
    assert verdicts([ROW, *peers()], [after, *peers()]) == [verdict]


def test_the_drift_of_the_machine_is_taken_out():
    assert results.drift(peers(), peers(1.5)) == pytest.approx((1.5, 1.5, 1.5))
    assert verdicts([ROW, *peers()], [row(1.5), *peers(1.5)]) == ["same"]
    assert verdicts([ROW, *peers()], [row(1.0), *peers(1.5)]) == ["faster"]
    assert results.drift([ROW], [ROW]) == (1, 1, 1)


def test_memory_is_not_divided_by_the_drift():
    memory = row(100.0, benchmark="memory", unit="B")
    larger = dataclasses.replace(memory, median=150.0, lower_quartile=150.0, upper_quartile=150.0)
    assert verdicts([memory, *peers()], [larger, *peers(1.5)]) == ["larger"]
    assert verdicts([larger, *peers()], [memory, *peers()]) == ["smaller"]


def test_measurements_of_a_busy_machine_are_not_compared():
    assert verdicts([ROW], [row(9.0, contention=400.0), row(1.0, samples=32)]) == []


def test_the_latest_run_of_a_file_is_compared():
    older = row(5.0, date="2025-01-01T00:00:00+00:00")
    assert verdicts([ROW, older], [ROW]) == ["same"]


def test_the_largest_change_comes_first_and_cases_of_one_file_are_left_out():
    before = [row(samples=n) for n in (1, 2, 3)]
    after = [row(1.2, samples=1), row(2.0, samples=2), row(9.0, samples=4)]
    assert [change.after.samples for change in results.compare(before, after)] == [2, 1]
