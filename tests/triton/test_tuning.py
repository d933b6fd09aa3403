"""Candidates are measured only where there are several."""

import pytest
import torch

pytest.importorskip("triton")

from triton.runtime.autotuner import Autotuner

from icsd.ops.triton.kernels.combine import combine_kernel


@pytest.mark.parametrize(("candidates", "capturing", "measurements"), [(1, False, 0), (3, False, 3), (3, True, 0)])
def test_only_several_candidates_are_measured_and_none_in_a_capture(candidates, capturing, measurements, monkeypatch):
    # Triton 3.6 and 3.7 would call a kernel many times, whatever a launch adds to its result.
    measured = []

    def measure(*_, config, **__):
        measured.append(config)
        return [1.0, 1.0, 1.0]

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    monkeypatch.setattr(Autotuner, "_bench", measure)
    monkeypatch.setattr(combine_kernel, "early_config_prune", lambda configs, *_, **__: configs[:candidates])
    monkeypatch.setattr(combine_kernel, "nargs", {}, raising=False)
    for config in combine_kernel.prune_configs({}):
        combine_kernel._bench(config=config)
    assert len(measured) == measurements
