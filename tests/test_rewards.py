"""Eq. 10 and the advantage of Eq. 4, with masks, groups and the cases that break a naive normalisation."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rewards import composite_reward, group_advantages, reward_weights

scores = st.lists(st.floats(-100, 100), min_size=2, max_size=8)


def test_composite_by_setting():
    parts = {
        "VQ": torch.tensor([1.0, 2.0]),
        "MQ": torch.tensor([3.0, math.nan]),
        "TA": torch.tensor([5.0, 1.0]),
        "x": None,
    }
    assert composite_reward(parts, reward_weights("A"))[0].item() == pytest.approx(3.0)
    assert composite_reward(parts, reward_weights("B"))[0].item() == pytest.approx(7.0)
    assert composite_reward(parts, reward_weights("B"))[1].isnan()
    assert torch.equal(composite_reward(parts, reward_weights("VQ=0.5, MQ=0.5,TA=1"))[:1], torch.tensor([7.0]).double())
    assert composite_reward(parts, reward_weights("TA=-2"))[0].item() == -2 * parts["TA"][0].item()
    with pytest.raises(ValueError, match=r"every score that has a weight: got \['MQ', 'VQ'\] without \['TA'\]"):
        composite_reward({"VQ": parts["VQ"], "MQ": parts["MQ"]}, reward_weights("A"))


@pytest.mark.parametrize("text", ["C", "", "VQ", "VQ=", "VQ=x", "VQ=nan", "VQ=inf", "=1", "VQ=0,MQ=0", "VQ=1,,MQ=1"])
def test_weights_that_are_none(text):
    with pytest.raises(ValueError, match="reward_weights must be A or B, or a list such as VQ=0.5,MQ=0.5,TA=1: got"):
        reward_weights(text)


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


@given(st.floats(-1e4, 1e4), st.integers(1, 9), st.sampled_from([0.0, 1e-9, 1e-7, 1e-6]))
def test_a_group_without_spread_gets_zero(value, size, noise):
    """Rounding noise is not a preference, of a float64 reward either."""
    r = torch.full((size,), value, dtype=torch.float64)
    r[0] += noise * abs(value)
    assert torch.equal(group_advantages(r, size)[0], torch.zeros(size))


def test_rounding_of_a_float32_sum_is_not_a_preference_but_a_small_difference_is():
    """The same 4,096 numbers summed in another order: what a reward model in float32 does from batch to batch."""
    numbers = torch.rand(4096, generator=torch.Generator().manual_seed(0))
    orders = [torch.randperm(4096, generator=torch.Generator().manual_seed(seed)) for seed in range(16)]
    sums = torch.stack([numbers[order].cumsum(0)[-1] for order in orders])
    assert sums.std() > 0 and not group_advantages(sums, 16)[0].any()
    assert group_advantages(sums + 1e-5 * torch.arange(16) * sums.mean(), 16)[0].abs().max() > 1


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
    assert group_advantages(torch.tensor([0.0] * 63 + [-1.0]), 64)[0].min() == -5.0
    for size in (2, 4, 16):  # √(G − 1), reached by one outlier: the clamp acts from G = 27 on
        outlier = torch.tensor([0.0] * (size - 1) + [1.0])
        assert group_advantages(outlier, size)[0].max().item() == pytest.approx((size - 1) ** 0.5, rel=1e-4)
    with pytest.raises(ValueError, match="group_size must divide the number of rewards: got group_size 3"):
        group_advantages(torch.zeros(4), 3)
