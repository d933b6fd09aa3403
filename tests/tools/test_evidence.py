"""The tables of docs/evidence.md are up to date, and say what the rows of the sweeps say."""

import pytest

pytest.importorskip("scipy")

from icsd.evaluation.paired import Row, write_csv
from tools import evidence


def rows_of(arm, values, metric="kernel_distance", stage=16):
    return [Row(arm, seed, stage, metric, value, "p") for seed, value in enumerate(values)]


def test_the_page_holds_the_tables():
    assert evidence.MARKS[0] + evidence.page() + evidence.MARKS[1] in evidence.PAGE.read_text(), (
        "run: python -m tools.evidence --write docs/evidence.md"
    )


def test_differences_are_paired_by_seed_and_bold_if_the_interval_excludes_0():
    rows = rows_of("none", [1.0, 2.0, 3.0]) + rows_of("better", [0.5, 1.4, 2.6]) + rows_of("equal", [2.0, 1.0, 3.0])
    *_, line, _ = evidence.table(evidence.endpoints(rows))
    assert line == "| kernel_distance | 16 px | 2 | **-0.5 [-0.75, -0.25]** | +0 [-2.5, +2.5] |"


def test_numbers_have_two_digits_or_are_whole():
    assert [evidence._number(value, "+") for value in (0.0512, -2e-17, 99.4, 99.7, -1234.5)] == [
        "+0.051",
        "+0",
        "+99",
        "+100",
        "-1,234",
    ]


def test_the_cost_of_a_target_that_a_run_missed_is_left_out():
    target = "tone_accuracy 0.75"
    rows = [
        *rows_of("none", [1200.0, 1800.0], f"steps to {target}", 32),
        *rows_of("both", [1000.0, 2000.0], f"steps to {target}", 32),
        *rows_of("none", [2500.0, 2500.0], f"steps to {target}", 16),
        *rows_of("both", [2500.0, 2000.0], f"steps to {target}", 16),
        *rows_of("both", [0.0, 1.0], f"reaches {target}", 16),
        *rows_of("both", [1.0, 1.0], f"reaches {target}", 32),
    ]
    lines = list(evidence.table(evidence.endpoints(rows)))
    assert lines[2:] == [f"| steps to {target} | 32 px | 1,500 | +0 |", ""]


def test_many_arms_stand_in_several_tables():
    rows = [row for number in range(7) for row in rows_of(f"arm-{number}" if number else "none", [1.0, 1.5])]
    heads = [line for line in evidence.table(evidence.endpoints(rows)) if line.startswith("| endpoint")]
    assert [head.count("minus none") for head in heads] == [4, 2]


def test_rows_are_read_as_they_were_written(tmp_path):
    rows = rows_of("none", [0.1, 2e-17])
    write_csv(tmp_path / "rows.csv", Row, rows)
    assert evidence.read_rows(tmp_path / "rows.csv") == rows


def test_rows_with_other_columns_are_refused_in_one_line(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("arm,seed,stage,figure,value,protocol,measured_by\nnone,0,16,kernel_distance,0.5,p,\n")
    with pytest.raises(SystemExit, match=r"rows\.csv has other columns than the rows of `icsd ablate`"):
        evidence.read_rows(path)
