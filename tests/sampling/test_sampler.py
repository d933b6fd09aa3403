import pytest
import torch

from icsd.errors import InputError
from icsd.sampling import Sampler
from icsd.sampling.sampler import stages_of
from icsd.sampling.similarity import similarities
from icsd.training import checkpoint


def test_one_seed_gives_one_image_whatever_else_is_generated(path):
    sampler = Sampler.load(path)
    assert sampler.attribution == "by someone"
    alone = stages_of(sampler.sample(["a red flower"], seed=7))
    assert [tuple(stage.shape) for stage in alone] == [(1, 3, 8, 8), (1, 3, 16, 16)]
    torch.rand(1)
    among = stages_of(Sampler.load(path).sample(["a woman", "a red flower"], seed=5, per_sentence=3))
    for one, several in zip(alone, among, strict=True):
        assert len(several) == 6
        assert torch.equal(one[0], several[5])
        assert not torch.equal(several[4], several[5])


def test_sampling_leaves_the_global_random_state(path):
    sampler = Sampler.load(path)
    before = torch.get_rng_state()
    sampler.sample(["a red flower"])
    assert torch.equal(before, torch.get_rng_state())


def test_the_sentence_matters(path):
    sampler = Sampler.load(path)
    woman, flower = sampler.sample(["a woman", "a red flower"])
    assert not torch.equal(woman.images[-1], flower.images[-1])


def test_unknown_words_are_named(path):
    assert Sampler.load(path).unknown("A green woman with zebra skin") == ["green", "zebra"]


def test_words_beyond_the_longest_sentence_are_named(path):
    sampler = Sampler.load(path)
    assert sampler.beyond("a red flower " * 6 + "with dark zebra skin") == ["with", "dark", "skin"]
    assert sampler.beyond("a red flower") == []


def test_a_checkpoint_of_encoders_is_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    checkpoint.save(path, {"config": {}, "text": {}, "damsm": {}})
    with pytest.raises(InputError, match="holds DAMSM encoders, written by `icsd pretrain`"):
        Sampler.load(path)


def test_a_run_folder_stands_for_its_newest_checkpoint(path):
    assert Sampler.load(path.parent.parent).sample(["a woman"])[0].images[-1].shape == (1, 3, 16, 16)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sentences": []}, "no sentence"),
        ({"sentences": ["a woman", "  "]}, "no sentence"),
        ({"sentences": ["a woman"], "seed": -1}, "seed is -1"),
        ({"sentences": ["a woman"], "seed": 2**64}, "seed is"),
        ({"sentences": ["a woman"], "per_sentence": 0}, "per_sentence is 0"),
        ({"sentences": ["a woman"], "truncation": 0.0}, "truncation is 0"),
        ({"sentences": ["a woman"], "truncation": 1e-30}, "truncation is 1e-30"),
        ({"sentences": ["a woman"], "truncation": float("nan")}, "truncation is nan"),
        ({"sentences": "a woman"}, "give a list of sentences"),
        ({"sentences": ["a woman", "\N{DOG}"]}, "sentence '\N{DOG}' has no word that this model knows"),
        ({"sentences": ["a woman \udce9"]}, "is not valid Unicode"),
        ({"sentences": ["zebra"]}, "sentence 'zebra' has no word"),
    ],
)
def test_bad_requests_are_refused(path, arguments, message):
    with pytest.raises(InputError, match=message):
        Sampler.load(path).sample(**arguments)


def test_truncated_noise_stays_within_and_keeps_the_rest(path):
    sampler = Sampler.load(path)
    free, near = sampler.noise(range(200)), sampler.noise(range(200), truncation=0.5)
    for a, b in zip(free, near, strict=True):
        assert a.abs().max() > 2
        assert b.abs().max() <= 0.5
        inside = a.abs() <= 0.5
        assert torch.equal(a[inside], b[inside])


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        (["config"], None),
        (["config"], []),
        (["config", "text"], None),
        (["config", "text"], {"dim": "wide"}),
        (["config", "text", "more"], 1),
        (["config", "text", "encoder"], "abacus"),
        (["config", "text", "dim"], 16),
        (["config", "text", "embedding_dim"], 2.5),
        (["config", "text", "max_words"], "18"),
        (["config", "generator", "resolutions"], [8]),
        (["config", "generator", "resolutions"], "8, 16"),
        (["config", "generator", "resolutions"], [[8], 16]),
        (["config", "generator", "width"], None),
        (["config", "generator", "width"], 8),
        (["config", "generator", "noise_dim"], "4"),
        (["attribution"], 3),
        (["text"], None),
        (["text"], {}),
        (["text", "vocabulary"], [1, 2]),
        (["text", "vocabulary"], ["a", "a"]),
        (["text", "vocabulary"], None),
        (["text", "vocabulary"], ["one", "word", "more"]),
        (["ema"], []),
        (["ema", "generator.heads.0.weight"], 3),
        (["ema", "more"], torch.ones(2)),
    ],
    ids=str,
)
def test_a_crafted_checkpoint_is_one_line(path, keys, value):
    state = checkpoint.load(path)
    place = state
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    checkpoint.save(path, state)
    with pytest.raises(InputError) as caught:
        Sampler.load(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.complex64, torch.float64, torch.bfloat16])
def test_weights_of_another_type_are_refused(path, dtype):
    state = checkpoint.load(path)
    state["ema"]["generator.heads.0.weight"] = state["ema"]["generator.heads.0.weight"].to(dtype)
    checkpoint.save(path, state)
    with pytest.raises(InputError, match=r"ema\.generator\.heads\.0\.weight is torch\."):
        Sampler.load(path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("distillation", {}),
        ("distillation", {"generator": {"source": 3}}),
        ("discriminator", {"width": "4"}),
        ("discriminator", {"width": 8}),
    ],
)
def test_similarities_of_a_crafted_checkpoint_are_one_line(path, key, value):
    state = checkpoint.load(path)
    state["config"][key] = value
    checkpoint.save(path, state)
    sampler = Sampler.load(path)
    with pytest.raises(InputError, match="is damaged or was made by other code"):
        similarities(sampler, sampler.sample(["a woman", "a red flower"]))
