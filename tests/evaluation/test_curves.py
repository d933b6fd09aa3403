import json

import pytest

from icsd.errors import InputError
from icsd.evaluation.curves import Curve, late_training, read_curves, whole_cost


def curve_of(metric, values):
    steps = [100.0 * (number + 1) for number in range(len(values))]
    return Curve(32, metric, values, {"steps": steps, "seconds": [step / 10 for step in steps]})


def test_the_cost_of_a_target_is_where_the_curve_first_crosses_it():
    curve = curve_of("tone_accuracy", [0.2, 0.6, 0.5, 0.9])
    assert curve.cost_of(0.4, "steps") == pytest.approx(150)
    assert curve.cost_of(0.55, "seconds") == pytest.approx(18.75)
    assert curve.cost_of(0.1, "steps") == 100
    assert curve.cost_of(0.95, "steps") is None


def test_a_distance_reaches_a_target_from_above():
    curve = curve_of("kernel_distance", [1.5, 0.5, 0.7])
    assert curve.cost_of(1.0, "steps") == pytest.approx(150)
    assert curve.cost_of(0.4, "steps") is None


def test_the_value_at_a_cost_is_between_the_evaluations_beside_it():
    curve = curve_of("tone_accuracy", [0.2, 0.6, 0.5])
    assert curve.value_at(12.5, "seconds") == pytest.approx(0.3)
    assert curve.value_at(30, "seconds") == pytest.approx(0.5)
    assert curve.value_at(9, "seconds") is None
    assert curve.value_at(31, "seconds") is None


def test_curves_are_read_from_metrics(tmp_path):
    lines = [
        {"step": 5, "seconds": 1.0, "cpu_seconds": 0.5, "generator/adversarial/16": 2.0},
        {"step": 9, "seconds": 2.0, "cpu_seconds": 1.0, "score": 0.3, "evaluation/16/kernel_distance": 0.7},
        {"step": 9, "diversity": 0.5},
        {"step": 11, "seconds": 3.0, "cpu_seconds": 1.5},
    ]
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (curve,) = read_curves(path)
    assert (curve.stage, curve.metric, curve.values) == (16, "kernel_distance", [0.7])
    assert curve.costs == {"steps": [9], "seconds": [2.0], "cpu_seconds": [1.0]}
    assert whole_cost(path) == {"steps": 11, "seconds": 3.0, "cpu_seconds": 1.5}
    assert read_curves(tmp_path / "missing.jsonl") == []
    path.write_text('{"step": 5')
    with pytest.raises(InputError, match="cannot be read"):
        read_curves(path)


def test_numbers_of_training_are_means_over_the_last_fifth_of_the_run(tmp_path):
    lines = [
        {
            "step": step,
            "inconsistency/generator": step / 8,
            "share/generator/distillation": 0.1,
            "share/generator/kl": 1,
        }
        for step in range(10, 101, 10)
    ]
    lines.insert(9, {"step": 95, "score": 0.5})
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert late_training(tmp_path / "metrics.jsonl") == {
        "inconsistency/generator": (90 + 100) / 2 / 8,
        "share/generator/distillation": pytest.approx(0.1),
    }


def test_numbers_that_a_line_lacks_are_means_over_the_other_lines(tmp_path):
    lines = [{"step": 90, "inconsistency/generator": 2.0, "share/generator/distillation": 0.1}]
    lines += [{"step": 95, "share/generator/distillation": 0.3}, {"step": 100, "inconsistency/generator": 4.0}]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert late_training(tmp_path / "metrics.jsonl") == {
        "inconsistency/generator": 3.0,
        "share/generator/distillation": pytest.approx(0.2),
    }


def test_a_run_without_numbers_of_training_has_no_means(tmp_path):
    assert late_training(tmp_path / "metrics.jsonl") == {}


def test_metrics_that_cannot_be_read_are_not_taken_for_missing_ones(tmp_path):
    with pytest.raises(OSError, match="directory"):
        whole_cost(tmp_path)
