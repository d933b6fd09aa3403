import pytest

from icsd.errors import InputError
from icsd.evaluation.paired import Row, format_differences, paired_differences, write_csv


def rows_of(arm, values, protocol="p"):
    return [Row(arm, seed, 16, "kernel_distance", value, protocol) for seed, value in values.items()]


def test_differences_are_paired_by_seed():
    pytest.importorskip("scipy")
    none, both = {0: 1.0, 1: 5.0, 2: 9.0, 3: 2.0}, {0: 0.9, 1: 4.7, 2: 8.8}
    (difference,) = paired_differences(rows_of("none", none) + rows_of("both", both), "none")
    assert difference.pairs == 3
    assert difference.reference == pytest.approx(5.0)
    assert difference.mean == pytest.approx(-0.2)
    half = 4.302652729911275 * 0.1 / 3**0.5  # Student's t with two degrees of freedom, standard deviation 0.1
    assert (difference.low, difference.high) == (pytest.approx(-0.2 - half), pytest.approx(-0.2 + half))
    assert format_differences([difference]).count("*") == 0


def test_a_constant_difference_excludes_zero():
    pytest.importorskip("scipy")
    differences = paired_differences(rows_of("none", {0: 1, 1: 2}) + rows_of("kl", {0: 1.5, 1: 2.5}), "none")
    assert (differences[0].low, differences[0].high) == (0.5, 0.5)
    assert "*" in format_differences(differences)


def test_one_pair_has_no_interval():
    (difference,) = paired_differences(rows_of("none", {0: 1.0}) + rows_of("kl", {0: 2.0, 1: 3.0}), "none")
    assert (difference.mean, difference.low, difference.pairs) == (1.0, None, 1)


def test_different_protocols_are_not_compared():
    with pytest.raises(InputError, match=r"kernel_distance was measured under different protocols \(kl seed 0: q"):
        paired_differences(rows_of("none", {0: 1.0}) + rows_of("kl", {0: 2.0}, "q"), "none")


def test_metrics_that_each_run_measures_with_its_own_network_are_left_out():
    rows = [Row(arm, 0, 16, "r_precision", 0.5, "p", f"heads of {arm}") for arm in ("none", "kl")]
    assert paired_differences(rows, "none") == []
    shared = [Row(arm, 0, 16, "r_precision", 0.5, "p", "DAMSM") for arm in ("none", "kl")]
    assert len(paired_differences(shared, "none")) == 1


def test_a_missing_reference_is_named():
    with pytest.raises(InputError, match="no finished run of the reference 'none'"):
        paired_differences(rows_of("kl", {0: 2.0}), "none")


def test_rows_become_csv(tmp_path):
    write_csv(tmp_path / "rows.csv", Row, rows_of("none", {3: 0.25}))
    assert (tmp_path / "rows.csv").read_text().splitlines() == [
        "arm,seed,stage,metric,value,protocol,measured_by",
        "none,3,16,kernel_distance,0.25,p,",
    ]
