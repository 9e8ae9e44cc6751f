"""The toy: its world's rewards on videos whose scores are known, its network, and that GRPO teaches it something."""

import json

import numpy as np
import pytest
import torch

import train
from config import parse
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
    metrics = train.run_evaluation(policy, world.rewards, world.PROMPTS, config, 0, tmp_path, train.OneRank())
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


@pytest.mark.parametrize("seed", [0, 1])
def test_grpo_raises_the_reward(seed, tmp_path):
    train.main(
        ["--runs", str(tmp_path), "--name", "learns", "--seed", str(seed), "--iterations", "15", "--eval_every", "15"]
    )
    lines = [json.loads(line) for line in (tmp_path / "learns" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["eval_reward"] > lines[0]["eval_reward"] + 0.08
