"""One training iteration of the paper's released loop in numbers, beside ours on the same rollouts: golden/README.md.

As ours is, three documented details differ: the first Σ² (both ends of Eq. 5's integral are clamped here), 1e-6 that
the release adds to the variance in a KL's denominator, and 1e-6 that we add to a group's std, where the release clamps
it. With these three made equal, nothing else differs: neither a factor of T, B, G or D, nor a sign.
"""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

import grpo
import sde as sde_module
from engine.config import Config
from grpo import collect, update
from rewards import composite_reward, reward_weights
from sde import SDE, log_prob, sigma_schedule
from trust_region import Anchor

GOLDEN = dict(np.load(Path(__file__).parent / "golden" / "golden_iteration.npz"))
SHAPE = tuple(GOLDEN["shape"].tolist())
D, HIDDEN, WIDTH = math.prod(SHAPE), 32, int(GOLDEN["C"])  # WIDTH: of a condition
B = int(GOLDEN["B"])
CASES = [(name, float(lam), float(anchor), float(moved)) for name, lam, anchor, moved in GOLDEN["cases"]]


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class Network(torch.nn.Module):
    def __init__(self):
        super().__init__()
        g = torch.Generator().manual_seed(int(GOLDEN["seed_net"]))
        self.w1 = torch.nn.Parameter(torch.randn(HIDDEN, D + 1 + WIDTH, generator=g) / D**0.5)
        self.b1 = torch.nn.Parameter(0.1 * torch.randn(HIDDEN, generator=g))
        self.w2 = torch.nn.Parameter(torch.randn(D, HIDDEN, generator=g) / HIDDEN**0.5)
        self.b2 = torch.nn.Parameter(0.1 * torch.randn(D, generator=g))

    def forward(self, x, sigma, cond):
        read = torch.cat([x.flatten(1), sigma[:, None], cond], 1)
        return (torch.tanh(read @ self.w1.T + self.b1) @ self.w2.T + self.b2).view_as(x) + 0.3 * x


class Policy:
    latent_shape = SHAPE

    def __init__(self):
        self.module, self.passes = Network(), 0
        (self.unconditional,) = self.encode([""])

    def encode(self, prompts):
        seeds = [sum(map(ord, prompt)) + 7 for prompt in prompts]
        return [torch.randn(WIDTH, generator=torch.Generator().manual_seed(seed)) for seed in seeds]

    def velocity(self, x, sigma, cond):
        self.passes += 1
        conditional = self.module(x, sigma, torch.stack(cond).repeat_interleave(len(x) // len(cond), 0))
        unconditional = self.module(x, sigma, self.unconditional.expand(len(x), -1))
        return unconditional + float(GOLDEN["guidance"]) * (conditional - unconditional)

    def decode(self, x):
        return x


def reward(x, prompts):
    x = x.flatten(1)
    return {"VQ": -x.square().mean(1), "MQ": x[:, :16].mean(1), "TA": x[:, 16:48].sin().mean(1)}


class Recorder:
    """In the place of an optimizer: keeps the gradient of its one step."""

    def __init__(self, module):
        self.parameters = list(module.parameters())

    def step(self):
        self.gradients = [parameter.grad.clone() for parameter in self.parameters]

    def zero_grad(self):
        pass


def draws(seed):
    return [torch.Generator().manual_seed(seed + place) for place in range(B)]


def moved(tensors, size, seed):
    g = torch.Generator().manual_seed(seed)
    for tensor in tensors:
        tensor.add_(size * torch.randn(tensor.shape, generator=g))


def config(lambda_kl, micro_batch=1):
    return Config(
        group_size=int(GOLDEN["G"]), batch_size=B, micro_batch=micro_batch, clip_range=float(GOLDEN["clip_range"]),
        max_grad_norm=1e9, kl_mode="dual", stepwise_kl="rollout_phase", kl_schedule="fixed", kl_lambda=lambda_kl,
        beta_pos=float(GOLDEN["beta_pos"]), beta_vel=float(GOLDEN["beta_vel"]), reward_weights="B",
    )  # fmt: skip


def sampler():
    return SDE("sage_grpo", float(GOLDEN["eta"]), sigma_schedule(int(GOLDEN["T"]), float(GOLDEN["shift"])))


def rolled_out(settings):
    policy, prompts = Policy(), ["a cat"] * 4 + ["two dogs"] * 4
    return policy, collect(policy, reward, prompts, sampler(), draws(int(GOLDEN["seed_noise"])), settings)


@torch.no_grad()
def iteration(policy, batch, settings, anchor_size, moved_size):
    """({what the file holds of a case: ours}) of one update."""
    anchor = Anchor(policy.module)
    if anchor_size:
        moved(anchor._copies, anchor_size, int(GOLDEN["seed_anchor"]))
        batch.collected_at = 1  # the anchor is not the rollout's policy
    moved(policy.module.parameters(), moved_size, int(GOLDEN["seed_moved"]))
    recorder = Recorder(policy.module)
    with torch.enable_grad():
        metrics, _ = update(policy, batch, settings, [recorder], anchor, draws(100), 0, batch.collected_at)
    gradient = torch.cat([part.flatten() for part in recorder.gradients])
    g = torch.Generator().manual_seed(int(GOLDEN["seed_probes"]))
    probes = torch.stack([torch.randn(len(gradient), generator=g) @ gradient for _ in range(8)])
    return {
        "grad_norm": gradient.norm(),
        "grad_sum": gradient.sum(),
        "grad_probes": probes,
        "grad_head": gradient[:16],
        "grad_param_norms": torch.stack([part.norm() for part in recorder.gradients]),
        **{name: torch.tensor(metrics[name]) for name in ("kl_position", "kl_velocity", "clip_low", "clip_high")},
    }


def deviations(case, ours):
    """{name: largest difference, relative to the largest value of its kind}."""
    found = {}
    for name, values in ours.items():
        theirs = torch.as_tensor(GOLDEN[f"{case}/{name}"])
        size = theirs.abs().max().clamp(min=1e-12) if name not in ("kl_velocity", "clip_low", "clip_high") else 1.0
        found[name] = ((values - theirs).abs().max() / size).item()
    return found


@pytest.mark.parametrize("name, lambda_kl, anchor_size, moved_size", CASES)
def test_an_iteration_is_that_of_the_released_loop(name, lambda_kl, anchor_size, moved_size, monkeypatch):
    """As ours is."""
    if moved_size:
        monkeypatch.setattr(grpo, "RATIO_TOLERANCE", math.inf)
    settings = config(lambda_kl)
    policy, batch = rolled_out(settings)
    assert batch.trajectory.states.square().sum().item() == pytest.approx(float(GOLDEN["states_square"]), rel=1e-12)
    found = deviations(name, iteration(policy, batch, settings, anchor_size, moved_size))
    assert found.pop("grad_norm") < 5e-4 and found.pop("kl_velocity") < 1e-6
    assert found.pop("clip_low") == found.pop("clip_high") == 0
    assert max(found.values()) < 2e-3, found


def released_variances(sde_type, eta, sigmas):
    """Eq. 5 with the release's clamp: of the 1 − σ in the logarithm alone."""
    sigma, sigma_next = sigmas[:-1], sigmas[1:]
    return eta**2 * (-(sigma - sigma_next) + ((1 - sigma_next) / (1 - sigma).clamp(min=0.003)).log())


def judged_by(sde, policy, batch):
    """The same states under another sampler: its means and log-probabilities."""
    paths = batch.trajectory
    for k in range(sde.num_steps):
        x, sigma = paths.states[:, k], sde.sigmas[k].expand(B)
        mean, std = sde.transition(x, policy.velocity(x, sigma, batch.conditions), k)
        paths.means[:, k], paths.log_probs[:, k] = mean, log_prob(paths.states[:, k + 1], mean, std)
    batch.sde = sde


def released_kl(mean, mean_ref, std):
    return (mean - mean_ref).square().flatten(1).mean(1) / (2 * (std.flatten() ** 2 + 1e-6))


def released_advantages(videos):
    r = composite_reward(reward(videos, None), reward_weights("B")).view(-1, int(GOLDEN["G"]))
    centred = r - r.mean(1, keepdim=True)
    return (centred / r.std(1, correction=0, keepdim=True).clamp(min=1e-6)).flatten()


@pytest.mark.parametrize("micro_batch", [1, 4])  # the release's, and samples of a group as one batch
@pytest.mark.parametrize("name, lambda_kl, anchor_size, moved_size", CASES)
def test_with_three_details_made_equal_nothing_differs(
    name, lambda_kl, anchor_size, moved_size, micro_batch, monkeypatch
):
    settings = config(lambda_kl, micro_batch)
    policy, batch = rolled_out(settings)
    monkeypatch.setattr(sde_module, "step_variances", released_variances)
    monkeypatch.setattr(grpo, "gaussian_kl", released_kl)
    monkeypatch.setattr(grpo, "RATIO_TOLERANCE", math.inf)
    with torch.no_grad():
        judged_by(sampler(), policy, batch)
    batch.advantages = released_advantages(batch.trajectory.states[:, -1])
    np.testing.assert_allclose(batch.trajectory.states[:, -1].flatten()[:4], GOLDEN["last_state_head"], rtol=1e-12)
    np.testing.assert_allclose(batch.trajectory.log_probs, GOLDEN["log_probs_old"], rtol=1e-10)
    np.testing.assert_allclose(batch.sde.std, GOLDEN["stds"], rtol=1e-12)
    np.testing.assert_allclose(batch.advantages, GOLDEN["advantages"], rtol=1e-9)
    found = deviations(name, iteration(policy, batch, settings, anchor_size, moved_size))
    np.testing.assert_allclose(grpo.equalizer_scales(batch.sde), GOLDEN["scales"], rtol=1e-9)
    assert max(found.values()) < 1e-9, found
