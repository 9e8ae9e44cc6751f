"""Rewards: Eq. 10 (composite reward) and the advantage A_i of Eq. 4.

Every reward model in this project, toy or real, is one function

    reward(videos uint8 [B, F, C, H, W], prompts: list of B strings) -> {name: float tensor [B]}

in which NaN means "this sample could not be scored". A failed sample is carried as NaN up to `group_advantages`, which
masks it; it is never replaced by a number, since any number would be normalised together with the honest ones. A
reward may keep the causes of its last call in a list of texts, its attribute `failures`; the first one is shown.
engine/scoring.py checks this contract on every rank.
"""

import math

import torch

# Weights of Eq. 10 by the paper's names for them. Only the ratios matter: Eq. 4 normalises per group.
REWARD_SETTINGS = {
    "A": {"VQ": 1 / 3, "MQ": 1 / 3, "TA": 1 / 3},  # averaged rewards
    "B": {"VQ": 0.5, "MQ": 0.5, "TA": 1.0},  # alignment-focused, the released code's default
}
ROUNDING = 16 * torch.finfo(torch.float32).eps  # about 2e-6: see group_advantages


def reward_weights(text):
    """{name: weight} of Eq. 10, from the name of a setting or from a list such as "VQ=0.5,MQ=0.5,TA=1"."""
    if text in REWARD_SETTINGS:
        return REWARD_SETTINGS[text]
    weights = {}
    for part in text.split(","):
        name, _, number = part.partition("=")
        if name.strip() in weights:
            raise ValueError(f"reward_weights must name each score once: got {name.strip()} twice in {text!r}")
        try:
            weights[name.strip()] = float(number)
        except ValueError:
            weights[name.strip()] = math.nan
    if "" in weights or not all(map(math.isfinite, weights.values())) or not any(weights.values()):
        rule = f"reward_weights must be {' or '.join(REWARD_SETTINGS)}, or a list such as VQ=0.5,MQ=0.5,TA=1"
        raise ValueError(f"{rule}: got {text!r}")
    return weights


def composite_reward(scores, weights):
    """Eq. 10:  r = w_vq·VQ + w_mq·MQ + w_ta·TA, or any other sum of weights {name: number}: see reward_weights.

    scores: {"VQ": [B], "MQ": [B], "TA": [B], …}; entries without a weight are left out of the reward. Returns float64
    [B]; NaN where one that has a weight is not finite.
    """
    missing = sorted(weights.keys() - scores.keys())
    if missing:
        rule = "the reward must return every score that has a weight"
        raise ValueError(f"{rule}: got {sorted(scores)} without {missing}")
    reward = sum(weight * scores[name].double() for name, weight in weights.items())
    return torch.where(reward.isfinite(), reward, torch.nan)  # [B]


def group_advantages(rewards, group_size, guard=1e-6, max_advantage=5.0):
    """A_i of Eq. 4:  A_i = (r_i − mean_group r) / (std_group r + guard), clamped to ±max_advantage (released code: 5).

    rewards: [B], the G = group_size samples of one prompt adjacent; B must be a multiple of G.
    Returns (advantages [B] float32, valid [B] bool, group_std [B / G] float64).

    - NaN (failed) rewards get A = 0 and valid = False, and take no part in their group's mean and std.
    - A group without spread (all rewards equal, or one valid sample) teaches nothing: A = 0, not 0/0. "Equal" is judged
      by the rounding of a reward's own path, or the noise of equal scores would be blown up to A = ±1: a reward model
      sums in float32, which moves a score by a few units in its last place, so a std of at most ROUNDING times the
      largest |r| of the group counts as 0.
    - std is the population's (1/G inside the root): defined for a single sample, too. So |A| ≤ √(G − 1).
    """
    if group_size < 1 or rewards.ndim != 1 or rewards.numel() % group_size:
        raise ValueError(
            f"group_size must divide the number of rewards: got group_size {group_size} and rewards of shape "
            f"{tuple(rewards.shape)}; collect whole groups before normalising"
        )
    r = rewards.double().view(-1, group_size)  # [P, G]
    valid = r.isfinite()
    count = valid.sum(1, keepdim=True).clamp(min=1)
    mean = torch.where(valid, r, 0.0).sum(1, keepdim=True) / count
    centred = torch.where(valid, r - mean, 0.0)
    std = (centred.square().sum(1, keepdim=True) / count).sqrt()  # [P, 1]
    resolution = ROUNDING * torch.where(valid, r, 0.0).abs().amax(1, keepdim=True)
    spread = (std > resolution) & valid
    advantages = torch.where(spread, centred / (std + guard), 0.0).clamp(-max_advantage, max_advantage)
    return advantages.float().flatten(), valid.flatten(), std.flatten()
