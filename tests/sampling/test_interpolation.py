import itertools

import pytest
import torch

from icsd.errors import InputError
from icsd.sampling import Sampler
from icsd.sampling.interpolation import interpolate


def difference(a, b):
    return (a.images[-1] - b.images[-1]).abs().mean().item()


@pytest.mark.parametrize("sentences", [("a woman", "a woman"), ("a red flower with dark skin", "a woman")], ids=str)
@pytest.mark.parametrize("seeds", [(3, 3), (3, 9)], ids=str)
def test_both_ends_are_the_sampled_images_and_the_frames_change(path, sentences, seeds):
    sampler = Sampler.load(path)
    frames = interpolate(sampler, sentences, seeds, 5)
    for frame, sentence, seed in ((frames[0], sentences[0], seeds[0]), (frames[-1], sentences[1], seeds[1])):
        torch.testing.assert_close(frame.images[-1], sampler.sample([sentence], seed)[0].images[-1])
    if sentences[0] == sentences[1] and seeds[0] == seeds[1]:
        assert all(difference(frame, frames[0]) < 1e-6 for frame in frames)
    else:
        assert all(difference(a, b) > 0 for a, b in itertools.pairwise(frames))


def test_interpolated_noise_keeps_its_norm(path, monkeypatch):
    sampler = Sampler.load(path)
    norms = []
    plain = sampler.model.generator.forward

    def record(z, text, condition):
        norms.append(z.norm().item())
        return plain(z, text, condition)

    monkeypatch.setattr(sampler.model.generator, "forward", record)
    interpolate(sampler, ("a woman", "a woman"), (0, 1), 9)
    assert min(norms) > 0.9 * min(norms[0], norms[-1])


def test_fewer_than_two_frames_are_refused(path):
    with pytest.raises(InputError, match="frames is 1"):
        interpolate(Sampler.load(path), ("a woman", "a woman"), (0, 1), 1)
