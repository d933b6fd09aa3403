import pytest

from icsd.errors import InputError
from icsd.sampling import Plan, Request


def test_images_of_a_sentence_follow_each_other_and_sentences_share_seeds():
    plan = Plan(["one", "two"], seed=7, per_sentence=2)
    assert list(plan) == [("one", 7), ("one", 8), ("two", 7), ("two", 8)]
    assert len(plan) == 4


def test_one_image_of_each_sentence_by_default():
    assert list(Plan(["one", "two"], seed=3)) == [("one", 3), ("two", 3)]


@pytest.mark.parametrize("count", [1, 2, 5])
def test_a_count_goes_round_the_sentences_with_a_seed_each(count):
    plan = Plan(["one", "two"], seed=7, count=count)
    assert list(plan) == [("one", 7), ("two", 8), ("one", 9), ("two", 10), ("one", 11)][:count]
    with pytest.raises(IndexError):
        plan[count]


def test_a_large_plan_is_not_stored():
    assert Plan(["one", "two"], count=10**7)[10**7 - 1] == Request("two", 10**7 - 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sentences": []}, "no sentence"),
        ({"sentences": ["one", " "]}, "no sentence"),
        ({"sentences": "one"}, "give a list"),
        ({"sentences": ["one"], "count": 0}, "count is 0"),
        ({"sentences": ["one"], "count": 10**15}, "1000000000000000 images are more than 10000000"),
        ({"sentences": ["one"], "count": 10**30}, "images are more than"),
        ({"sentences": ["one", "two"], "per_sentence": 10**7}, "20000000 images are more than"),
        ({"sentences": ["one"], "per_sentence": -1}, "per_sentence is -1"),
        ({"sentences": ["one"], "per_sentence": 1, "count": 1}, "give one of them"),
    ],
)
def test_bad_plans_are_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        Plan(**arguments)
