"""Eq. 10 and the advantage of Eq. 4, with masks, groups and the cases that break a naive normalisation."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rewards import composite_reward, group_advantages

scores = st.lists(st.floats(-100, 100), min_size=2, max_size=8)


def test_composite_by_setting():
    parts = {
        "VQ": torch.tensor([1.0, 2.0]),
        "MQ": torch.tensor([3.0, math.nan]),
        "TA": torch.tensor([5.0, 1.0]),
        "x": None,
    }
    assert composite_reward(parts, "A")[0].item() == pytest.approx(3.0)
    assert composite_reward(parts, "B")[0].item() == pytest.approx(7.0)
    assert composite_reward(parts, "B")[1].isnan()
    with pytest.raises(ValueError, match=r"must be one of \['A', 'B'\]: got 'C'"):
        composite_reward(parts, "C")
    with pytest.raises(ValueError, match=r"did not return \['TA'\]"):
        composite_reward({"VQ": parts["VQ"], "MQ": parts["MQ"]}, "A")


@given(scores, st.floats(0.1, 10), st.floats(-50, 50))
def test_advantages_are_standardised_whatever_the_scale(values, scale, shift):
    r = torch.tensor(values, dtype=torch.float64)
    advantages, valid, std = group_advantages(r, len(values), max_advantage=100)
    assert valid.all()
    if r.std(correction=0) > 1e-2:
        assert advantages.mean().item() == pytest.approx(0, abs=1e-5)
        assert advantages.std(correction=0).item() == pytest.approx(1, abs=1e-3)
        assert std.item() == pytest.approx(r.std(correction=0).item())
        again, _, _ = group_advantages(scale * r + shift, len(values), max_advantage=100)
        torch.testing.assert_close(again, advantages, atol=2e-3, rtol=1e-3)


@given(st.floats(-1e4, 1e4), st.integers(1, 9))
def test_a_group_without_spread_gets_zero(value, size):
    r = torch.full((size,), value, dtype=torch.float32)
    r[0] += 1e-9 * abs(value)  # rounding noise is not a preference
    assert torch.equal(group_advantages(r, size)[0], torch.zeros(size))


def test_groups_do_not_mix():
    advantages, _, std = group_advantages(torch.tensor([0.0, 1.0, 100.0, 300.0]), 2)
    torch.testing.assert_close(advantages, torch.tensor([-1.0, 1.0, -1.0, 1.0]))
    torch.testing.assert_close(std, torch.tensor([0.5, 100.0]).double())


@given(scores, st.integers(0, 7))
def test_a_failed_reward_is_masked_and_leaves_the_others_alone(values, place):
    place = min(place, len(values))
    with_failure = torch.tensor(values[:place] + [math.nan] + values[place:], dtype=torch.float64)
    advantages, valid, _ = group_advantages(with_failure, len(values) + 1)
    assert not valid[place] and valid.sum() == len(values) and advantages[place] == 0
    alone, _, _ = group_advantages(torch.tensor(values, dtype=torch.float64), len(values))
    torch.testing.assert_close(advantages[valid], alone)


def test_all_failed_gives_zero_not_nan():
    advantages, valid, std = group_advantages(torch.full((3,), math.nan), 3)
    assert not valid.any() and torch.equal(advantages, torch.zeros(3)) and std.item() == 0


def test_clamp_and_bad_groups():
    assert group_advantages(torch.tensor([0.0] * 63 + [1.0]), 64)[0].max() == 5.0
    with pytest.raises(ValueError, match="group_size must divide the number of rewards: got group_size 3"):
        group_advantages(torch.zeros(4), 3)
