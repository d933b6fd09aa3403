"""The team of one process, its environment and its timeout; teams of several are tested in `distributed`."""

from datetime import timedelta

import pytest
import torch

from icsd import team
from icsd.errors import InputError
from icsd.team import Team, environment_alone, joined


def refuse():
    raise InputError("no such folder")


def test_a_process_alone_is_a_team():
    with joined() as alone:
        assert (alone.rank, alone.size, alone.leads, alone.process_group) == (0, 1, True, None)
        assert alone.own(6) == slice(0, 6)
        assert [alone.take() for _ in range(3)] == [0, 1, 2]
        assert alone.collect(["a", "b"]) == ["a", "b"]
        assert [action(lambda: 5) for action in (alone.first, alone.each, alone.led)] == [5] * 3
        assert not alone.any(False)
        for action in (alone.first, alone.each, alone.led):
            with pytest.raises(InputError, match="no such folder"):
                action(refuse)


def test_an_action_of_a_process_alone_is_taken_once():
    taken = []
    for action in (Team().first, Team().each, Team().led):
        action(lambda: taken.append(None))
    assert len(taken) == 3


def test_programs_that_a_rank_starts_are_no_ranks_and_see_its_gpu(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "ROLE_RANK", "TORCHELASTIC_RESTART_COUNT"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("RANKING", "kept")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    environment = environment_alone()
    assert environment["CUDA_VISIBLE_DEVICES"] == "5"
    assert environment["RANKING"] == "kept"
    assert not [name for name in environment if name in team.LAUNCH or name.startswith(team.LAUNCH_PREFIXES)]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert environment_alone()["CUDA_VISIBLE_DEVICES"] == "1"


@pytest.mark.parametrize("given", ["", "soon", "0", "-5", "nan", "inf"])
def test_a_timeout_is_a_number_of_seconds(monkeypatch, given):
    monkeypatch.setenv("ICSD_TIMEOUT", given)
    with pytest.raises(InputError, match=f"ICSD_TIMEOUT is {given}: set the seconds"), joined():
        pass


def test_the_timeout_is_passed_on(monkeypatch):
    seen = []
    group = team._group

    def seeing(timeout):
        seen.append(timeout)
        return group(timeout)

    monkeypatch.setattr(team, "_group", seeing)
    monkeypatch.setenv("ICSD_TIMEOUT", "90.5")
    with joined(), joined(timedelta(days=1)):
        pass
    assert seen == [timedelta(seconds=90.5), timedelta(days=1)]
