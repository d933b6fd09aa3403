"""Candidates are measured only where there are several."""

import pytest

pytest.importorskip("triton")

from triton.runtime.autotuner import Autotuner

from icsd.ops.triton.kernels.combine import combine_kernel


@pytest.mark.parametrize(("candidates", "measurements"), [(1, 0), (3, 3)])
def test_a_candidate_that_fits_alone_is_not_measured(candidates, measurements, monkeypatch):
    # Triton 3.6 and 3.7 would call its kernel many times, whatever a launch adds to its result.
    measured = []

    def measure(*_, config, **__):
        measured.append(config)
        return [1.0, 1.0, 1.0]

    monkeypatch.setattr(Autotuner, "_bench", measure)
    monkeypatch.setattr(combine_kernel, "early_config_prune", lambda configs, *_, **__: configs[:candidates])
    monkeypatch.setattr(combine_kernel, "nargs", {}, raising=False)
    for config in combine_kernel.prune_configs({}):
        combine_kernel._bench(config=config)
    assert len(measured) == measurements
