"""The toy: its world's rewards on videos whose scores are known, its network, and that GRPO teaches it something."""

import json
import math

import numpy as np
import pytest
import torch

import train
from engine.config import parse
from grpo import OneRank
from sde import SDE, rollout, sigma_schedule
from toy import world
from toy.model import FlowTransformer, ToyPolicy


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def scores(clips, prompts=world.PROMPTS):
    return {name: values.mean().item() for name, values in world.rewards(world.to_uint8(clips), prompts).items()}


def test_the_manifold_scores_full_marks():
    clean = scores(world.clean_clips(world.PROMPTS, rng()))
    assert min(clean["VQ"], clean["MQ"], clean["TA"]) > 0.95 and clean["distance"] < 0.01


def test_each_flaw_costs_the_score_that_watches_it():
    clips, clean = world.clean_clips(world.PROMPTS, rng()), scores(world.clean_clips(world.PROMPTS, rng()))
    noisy = scores(clips + 0.2 * torch.randn(clips.shape, generator=rng(1)))
    assert noisy["VQ"] < 0.4 and noisy["distance"] > 0.15 and noisy["TA"] > 0.9
    still = scores(clips[:, :, :1].expand_as(clips))
    assert still["MQ"] < 0.02 and still["VQ"] > 0.95
    shaken = clips[:, :, torch.randperm(world.FRAMES, generator=rng(2))]
    assert scores(shaken)["MQ"] < 0.5 * clean["MQ"]
    wrong = [p.replace("red", "blue") if "red" in p else p.replace("up", "down") for p in world.PROMPTS]
    assert scores(clips, wrong)["TA"] < clean["TA"] - 0.1
    for empty in (torch.zeros_like(clips), torch.randn(clips.shape, generator=rng(3))):
        assert max(scores(empty)[name] for name in ("VQ", "MQ", "TA")) < 0.3


def clip(colour=(1.0, 0.0, 0.0), size=1.0, speed=0.4, brightness=1.0, shake=0.0):
    """A blob moving left, [1, 3, F, H, W], of any colour, size, speed and brightness, shaken up and down."""
    place = torch.tensor([[5.5, 5.5]])[:, None] + speed * torch.tensor([-1.0, 0.0]) * world.TIME[None, :, None]
    place[..., 1] += shake * torch.tensor([1, -1, -1, 1, 1, -1, -1, 1])  # in which no line has a slope
    shape = world.blob(place, torch.tensor([size]).log())  # [1, F, H·W]
    pixels = brightness * world.PEAK * torch.tensor(colour)[None, :, None, None] * shape[:, None]
    return pixels.unflatten(-1, (world.SIDE, world.SIDE))


@pytest.mark.parametrize(
    "flaw, score, expected",
    [
        ({}, "TA", 1.0),
        ({}, "MQ", 1 - math.exp(-4)),  # of a speed of 0.4
        ({"shake": 0.4}, "MQ", math.exp(-1) * (1 - math.exp(-4))),
        ({"brightness": 0.5}, "MQ", 0.5 * (1 - math.exp(-4))),  # half there
        ({"brightness": 0.5}, "TA", 0.5 * (3 + math.exp(-1)) / 4),  # half there, and its colour 1 away
        ({"size": 1.7}, "TA", (3 + math.exp(-((math.log(1.7) / 0.3) ** 2))) / 4),
        ({"speed": 0.7}, "TA", (3 + math.exp(-1)) / 4),
        ({"speed": 0.1}, "TA", (2 + math.exp(-1) + 1 - math.exp(-1 / 4)) / 4),  # so slow that its direction says little
        ({"speed": -0.4}, "TA", 3 / 4),  # the other way
        ({"colour": (0.0, 0.0, 1.0)}, "TA", 3 / 4),
    ],
)
def test_each_factor_of_a_score_counts(flaw, score, expected):
    """One clip for each factor, in which that factor alone is wrong."""
    video = world.to_uint8(clip(**flaw))
    value = world.rewards(video, ["a small red blob moves left slowly"])[score].item()
    assert value == pytest.approx(expected, abs=0.02)


def test_pixels_are_rounded_not_cut():
    value = (
        world.from_uint8(torch.full((1, world.FRAMES, 3, world.SIDE, world.SIDE), 100, dtype=torch.uint8))
    ).flatten()[0]
    step = (
        world.from_uint8(torch.full((1, world.FRAMES, 3, world.SIDE, world.SIDE), 101, dtype=torch.uint8))
    ).flatten()[0] - value
    clips = torch.full((1, 3, world.FRAMES, world.SIDE, world.SIDE), (value + 0.6 * step).item())
    assert (world.to_uint8(clips) == 101).all()


def test_the_fit_recovers_position_size_and_colour():
    clips, words = world.clean_clips(world.PROMPTS, rng()), [world.parse(p) for p in world.PROMPTS]
    seen = world.measure(world.to_uint8(clips))
    size = torch.tensor([world.SIZES[w[0]] for w in words])
    velocity = torch.tensor([world.DIRECTIONS[w[2]] for w in words]) * torch.tensor(
        [[world.SPEEDS[w[3]]] for w in words]
    )
    torch.testing.assert_close(seen["log_size"].exp(), size[:, None].expand(-1, 8), atol=0.03, rtol=0)
    torch.testing.assert_close(seen["velocity"], velocity, atol=0.02, rtol=0)
    assert (seen["jitter"] < 0.03).all() and (seen["presence"] > 0.97).all()


def test_prompts_outside_the_grammar_are_refused():
    assert len(set(world.PROMPTS)) == 64
    with pytest.raises(ValueError, match="exactly one word of each"):
        world.parse("a small red blob")


def test_pretrained_weights_fit_and_are_imperfect(tmp_path):
    policy, (config, _) = ToyPolicy(), parse([])
    assert sum(p.numel() for p in policy.module.parameters()) < 200_000
    metrics = train.run_evaluation(policy, world.rewards, world.PROMPTS, config, 0, tmp_path, OneRank())
    videos = np.load(tmp_path / "samples_before.npy")
    assert 0.4 < metrics["eval_reward"] < 0.6 and videos.shape == (64 * config.eval_noises, 8, 3, 12, 12)
    with pytest.raises(FileNotFoundError, match="python -m toy.model"):
        ToyPolicy("nowhere.pt")


def test_the_untrained_network_is_silent_and_differentiable():
    network = FlowTransformer()
    x, words = torch.randn(2, 3, 8, 12, 12), torch.zeros(2, 4, dtype=torch.long)
    assert (network(x, torch.rand(2), words) == 0).all()
    network.write.weight.data.normal_()
    network(x, torch.rand(2), words).square().sum().backward()
    assert network.read.weight.grad is not None


def test_noise_of_the_last_step_is_seen_by_the_reward():
    """Why the toy's last step is deterministic: with it noisy, samples lie farther off the manifold."""
    policy, sigmas = ToyPolicy(), sigma_schedule(10)
    conditions, noise = policy.encode(world.PROMPTS), torch.randn(64, *policy.latent_shape, generator=rng())
    distance = {}
    for noisy in (False, True):
        sde = SDE("dance_grpo", 0.5, sigmas, noisy_last_step=noisy)
        end = rollout(lambda x, s: policy.velocity(x, s, conditions), noise, sde, rng(1)).states[:, -1]
        distance[noisy] = world.rewards(policy.decode(end), world.PROMPTS)["distance"].mean().item()
    assert distance[True] > 1.5 * distance[False]


def test_grpo_raises_the_reward(tmp_path):
    """Measured: .485 → .556. Wrong on purpose, it ends at .500 (advantages shifted by one sample), .374 (negated)."""
    train.main(["--runs", str(tmp_path), "--name", "learns", "--iterations", "6", "--eval_every", "6"])
    lines = [json.loads(line) for line in (tmp_path / "learns" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["eval_reward"] > lines[0]["eval_reward"] + 0.04
