"""The tables and figures of results."""

import dataclasses

import pytest
import torch

pytest.importorskip("matplotlib")

from benchmarks import __main__ as command
from benchmarks import plots, report, results
from benchmarks.ceilings import Ceilings, floor_seconds
from benchmarks.results import Row

CEILINGS = Ceilings(20e9, {torch.float32: 300e9, torch.bfloat16: 900e9})
SLOWDOWN = {"icsd": 1.3, "plain": 9.0, "compile": 5.0, "composite": 2.5}


def row(benchmark="operator", work="forward+backward", n=16, d=1024, dtype="float32", loss="mse", **changes):
    floor = floor_seconds(n, d, d, getattr(torch, dtype), loss, CEILINGS)
    implementation = changes.get("implementation", "icsd")
    median = floor * SLOWDOWN.get(implementation, 1)
    values = {"median": median, "lower_quartile": median, "upper_quartile": median, "floor": floor}
    values |= {"ratio_to_floor": median / floor, "ratio_to_plain": None, "copy_gb_s": 20.0, "gemm_gflop_s": 300.0}
    values["contention"] = 0.5
    labels = {"benchmark": benchmark, "work": work, "groups": 1, "samples": n, "dim": d, "dtype": dtype, "loss": loss}
    fixed = {
        "date": "2026-01-01",
        "cpu": "A Processor",
        "threads": 2,
        "torch": "2.13.0",
        "icsd": "0.1.0",
        "commit": "",
    }
    return Row(**fixed | {"isa": "avx2", "implementation": implementation, "unit": "s"} | labels | values | changes)


def operator_rows():
    return [
        row(n=n, d=d, dtype=dtype, loss=loss, implementation=name)
        for n in (16, 64, 256)
        for d in (1024, 8192, 65536)
        for dtype in ("float32", "bfloat16")
        for loss in ("mse", "kl")
        for name in SLOWDOWN
    ]


def test_ratios_of_the_operator():
    text = report.tables(operator_rows())
    (line,) = (line for line in text.splitlines() if line.split()[:6] == ["64", "x", "8,192", "float32", "kl", "avx2"])
    assert line.split()[6:10] == ["6.9x", "3.8x", "1.9x", "1.30"]
    means = [line for line in text.splitlines() if line.startswith("geometric mean")]
    assert len(means) == 4
    assert all("6.9x" in mean and "1.30" in mean for mean in means)


def test_the_step_at_field_scale_is_compared_with_attngan():
    times = {"icsd": 3.0, "icsd fp32": 6.0, "attngan": 9.0}
    text = report.tables([row("field", "step", n=4, implementation=name, median=time) for name, time in times.items()])
    for name, ratio, rate in (("icsd", "1.0x", "1.33"), ("icsd fp32", "2.0x", "0.667"), ("attngan", "3.0x", "0.444")):
        (line,) = (line for line in text.splitlines() if line.strip().startswith(f"{name}  "))
        assert line.split()[-4:-2] == [ratio, rate]


def test_tables_of_overhead_memory_and_training():
    rows = [row("overhead", "forward", implementation=name) for name in ("icsd", "plain")]
    rows += [row("overhead", implementation=name) for name in SLOWDOWN]
    for name, gradients in (("icsd", 1.0), ("plain", 5.0)):
        rows.append(row("memory", n=16, d=65536, implementation=name, unit="B", median=gradients * 16 * 65536 * 4))
    rows.append(row("memory", n=2**20, d=128, unit="B", median=2**29))  # ours alone
    for name, seconds in (("icsd", 0.001), ("reference", 0.004)):
        rows.append(row("training", "distillation", implementation=name, median=seconds))
        rows.append(row("training", "step", implementation=name, median=0.1))
    text = report.tables(rows)
    assert "1.00 (4.0 MiB)  5.00 (20.0 MiB)" in text
    (line,) = (line for line in text.splitlines() if line.strip().startswith("1,048,576 x 128"))
    assert line.split()[6:] == ["1.00", "(512.0", "MiB)"]
    assert "1.00%       1.00 ms  100.00 ms" in text
    assert "4.00%       4.00 ms  100.00 ms" in text


@pytest.mark.parametrize("part", ["memory", "distillation", "peers", "icsd"])
def test_parts_of_a_run_are_shown_too(part, tmp_path):
    rows = {
        "memory": [row("memory", unit="B")],
        "distillation": [row("training", "distillation")],
        "peers": [row(implementation="plain"), row(implementation="compile")],
        "icsd": [row()],
    }[part]
    assert "A Processor" in report.tables(rows)
    assert plots.draw(rows, tmp_path) == []


def test_disturbed_rows_have_no_ratios(tmp_path):
    rows = operator_rows()
    rows[1] = dataclasses.replace(rows[1], median=9.0, contention=400.0)  # plain at 16 x 1,024, float32, mse
    text = report.tables(rows)
    (line,) = (line for line in text.splitlines() if line.split()[:6] == ["16", "x", "1,024", "float32", "mse", "avx2"])
    assert line.split()[6:10] == ["busy", "3.8x", "1.9x", "1.30"]
    assert "1 of 144 measurements" in text
    assert all("6.9x" in line for line in text.splitlines() if line.startswith("geometric mean"))
    rows = [dataclasses.replace(row, contention=400.0) for row in rows]
    assert "busy" in report.tables(rows)
    assert plots.draw(rows, tmp_path) == []


def test_figures(tmp_path):
    paths = plots.draw(operator_rows(), tmp_path)
    assert sorted(path.name for path in paths) == [
        "speed-ups.png",
        "time-against-dim.png",
        "time-against-samples.png",
    ]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)


def test_compare_reports_what_got_slower(tmp_path, capsys):
    before, after = tmp_path / "before.csv", tmp_path / "after.csv"
    rows = operator_rows()
    results.append(before, rows)
    rows[0] = dataclasses.replace(rows[0], **dict.fromkeys(("median", "lower_quartile", "upper_quartile"), 1.0))
    results.append(after, rows)
    assert command.main(["compare", str(before), str(after)]) == 1
    assert "1 of 36 measurements changed beyond noise" in capsys.readouterr().out
    assert command.main(["compare", str(before), str(before)]) == 0


def test_bad_input_is_one_line_and_exit_code_2(tmp_path, capsys):
    path = tmp_path / "results.csv"
    results.append(path, [row()])
    for arguments in (
        ["compare", str(path), str(tmp_path / "missing.csv")],
        ["--threads", "0"],
        ["--seconds", "-1"],
    ):
        assert command.main(arguments) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert error.count("\n") == 1
