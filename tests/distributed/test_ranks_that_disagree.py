"""Bad input over several ranks: the same error on every rank, which names ranks and values, and no rank that waits."""

import functools

import pytest
import torch
import torch.distributed as dist
from ranks import RankError

import icsd
from icsd.ops.distributed import force_schedule


def call(group, changes):
    """Make a call that differs on some ranks."""
    options = {"n": 3, "groups": (2,), "dim": 5, "dtype": torch.float32, "grad": True, "teachers": 3, "loss": "mse"}
    options |= {"schedule": None, "weights": None, "center": False, "stages": 2, "bank": None}
    options |= changes.get(dist.get_rank(group), {})
    n, groups, dtype = options["n"], options["groups"], options["dtype"]
    student = torch.ones(*groups, n, options["dim"], dtype=dtype, requires_grad=options["grad"])
    teacher = torch.ones(*groups, options["teachers"], 4)
    with force_schedule(options["schedule"]):
        if options["bank"]:
            banks = [torch.ones(*groups, options["bank"], dim) for dim in (5, 4)]
            return icsd.similarity_distillation_loss(
                student, teacher, options["loss"], student_bank=banks[0], teacher_bank=banks[1], process_group=group
            ).item()
        return icsd.interstage_distillation_loss(
            [student] * (options["stages"] - 1) + [teacher],
            options["loss"],
            weights=options["weights"],
            center=options["center"],
            process_group=group,
        ).item()


def squared(similarity, target):
    return (similarity - target).square().mean((-2, -1))


def powers(similarity, target, exponent):
    return (similarity - target).abs().pow(exponent).mean((-2, -1))


class Unprintable(icsd.losses.MSE):
    """A loss whose error is of an unusual kind."""

    def __repr__(self):
        raise AttributeError("it has no name")


CASES = {
    "groups": ({1: {"groups": (3,)}}, ValueError, ["the groups of stages[0] is (2,) on ranks 0, 2, (3,) on rank 1"]),
    "dim": ({0: {"dim": 6}}, ValueError, ["the dim of stages[0] is 6 on rank 0, 5 on ranks 1, 2"]),
    "dtype": ({2: {"dtype": torch.bfloat16}}, ValueError, ["torch.float32 on ranks 0, 1, torch.bfloat16 on rank 2"]),
    "requires_grad": ({1: {"grad": False}}, ValueError, ["requires_grad of stages[0] is True on ranks 0, 2, False on"]),
    "loss": (
        {1: {"loss": icsd.losses.KL(0.2)}, 2: {"loss": squared}},
        ValueError,
        ["loss is MSE(", ") on rank 0, KL(student_temperature=0.2", "on rank 1, squared on rank 2"],
    ),
    "an object as a loss": (
        {1: {"loss": functools.partial(powers, exponent=3)}},
        ValueError,
        [") on ranks 0, 2, partial on rank 1"],
    ),
    "error of another kind": (
        {1: {"loss": Unprintable()}},
        RuntimeError,
        ["process_group: AttributeError: it has no name on rank 1"],
    ),
    "weights": ({1: {"weights": [2]}}, ValueError, ["weights is [1.0] on ranks 0, 2, [2.0] on rank 1"]),
    "center": ({1: {"center": True}}, ValueError, ["center is False on ranks 0, 2, True on rank 1"]),
    "stages": ({1: {"stages": 3}}, ValueError, ["the dim of stages[2] is missing on ranks 0, 2, 4 on rank 1"]),
    "schedule": ({0: {"schedule": "ring"}}, ValueError, ["the forced schedule is ring on rank 0, None on ranks 1, 2"]),
    "bank": (
        {0: {"bank": 6}, 1: {"bank": 6}, 2: {"bank": 7}},
        ValueError,
        ["the number of samples of student_bank is 6 on ranks 0, 1, 7 on rank 2"],
    ),
    "invalid on one rank": (
        {1: {"n": 4}},
        ValueError,
        ["stages[0] and stages[1] must agree in all but the last dimension, got (2, 4, 5) and (2, 3, 4)", "on rank 1"],
    ),
    "invalid type on one rank": ({2: {"dtype": torch.int64, "grad": False}}, TypeError, ["torch.int64", "on rank 2"]),
    "invalid in two ways": (
        {0: {"stages": 1}, 2: {"weights": [1, 2]}},
        ValueError,
        ["got 1 on rank 0, weights must hold one number for each of the 1 students, got 2 on rank 2"],
    ),
    "unknown loss everywhere": (
        {rank: {"loss": "mes"} for rank in range(3)},
        ValueError,
        ["got 'mes' on ranks 0, 1, 2"],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_every_rank_raises_the_error_that_names_ranks_and_values(case, ranks):
    changes, kind, texts = CASES[case]
    outcomes = ranks.outcomes(3, call, changes)
    message, *others = {str(outcome).partition("\nTraceback")[0] for outcome in outcomes}
    assert [type(outcome) for outcome in outcomes] == [RankError] * 3
    assert [outcome.kind for outcome in outcomes] == [kind] * 3
    assert not others
    for text in texts:
        assert text in message


def test_ranks_go_on_after_an_error(ranks):
    assert ranks.run(3, call, {0: {"n": 2, "teachers": 2}}) == ranks.run(3, call, {2: {"n": 2, "teachers": 2}})


def similarities(group, eps):
    return icsd.cross_sample_similarity(torch.eye(2), eps=eps[dist.get_rank(group)], process_group=group)


def test_similarities_with_another_eps(ranks):
    for outcome in ranks.outcomes(2, similarities, [1e-8, 0.5]):
        assert "eps is 1e-08 on rank 0, 0.5 on rank 1" in str(outcome)


def outside(group, members):
    """Make a group of some ranks and call with it everywhere."""
    smaller = dist.new_group(members)
    return icsd.cross_sample_similarity(torch.eye(2), process_group=smaller).shape


def test_a_rank_outside_the_group_is_refused(ranks):
    inside, also_inside, refused, _ = ranks.outcomes(4, outside, [0, 1, 3])
    assert inside == also_inside == (6, 6)
    assert refused.kind is ValueError
    assert "does not contain this process, which is rank 2 of 4" in str(refused)


def test_no_process_group():
    criterion = icsd.SimilarityDistillationLoss(process_group="world")
    with pytest.raises(ValueError, match=r"process_group is 'world', but this process has not joined any"):
        criterion(torch.eye(2), torch.eye(2))


def misused(group, what):
    x = torch.ones(2, 3)
    if what == "another type":
        return icsd.cross_sample_similarity(x, process_group=3)
    if what == "other":
        return icsd.cross_sample_similarity(x, x, process_group=group)
    return torch.func.grad(lambda x: icsd.similarity_distillation_loss(x, x, process_group=group))(x)


@pytest.mark.parametrize(
    ("what", "kind", "text"),
    [
        ("another type", TypeError, "got 3"),
        ("other", ValueError, "process_group must be None with other"),
        ("transform", RuntimeError, "process_group must be None within the transforms of torch.func"),
    ],
)
def test_misuse(what, kind, text, ranks):
    for outcome in ranks.outcomes(2, misused, what):
        assert (outcome.kind, text in str(outcome)) == (kind, True)


def without_all_to_all(group):
    def refuse(*_, **__):
        raise RuntimeError("Backend old does not support alltoall_base")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_to_all_single", refuse)
        return icsd.similarity_distillation_loss(torch.ones(2, 900), torch.ones(2, 900), process_group=group)


def test_a_backend_without_all_to_all_is_named(ranks):
    for outcome in ranks.outcomes(2, without_all_to_all):
        assert outcome.kind is RuntimeError
        assert "backend 'gloo' of ranks 0 to 1 has no all-to-all" in str(outcome)
        assert "force_schedule('gather')" in str(outcome)
