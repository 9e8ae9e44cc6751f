"""Rewards: Eq. 10 (composite reward) and the advantage A_i of Eq. 4.

Every reward model in this project, toy or real, is one function

    reward(videos uint8 [B, F, C, H, W], prompts: list of B strings) -> {name: float tensor [B]}

in which NaN means "this sample could not be scored". A failed sample is carried as NaN up to `group_advantages`, which
masks it; it is never replaced by a number, since any number would be normalised together with the honest ones.
`broken_rule` checks this contract, and grpo.score calls it on every rank.
"""

import torch

# Weights of Eq. 10 by the paper's names for them. Only the ratios matter: Eq. 4 normalises per group.
REWARD_SETTINGS = {
    "A": {"VQ": 1 / 3, "MQ": 1 / 3, "TA": 1 / 3},  # averaged rewards
    "B": {"VQ": 0.5, "MQ": 0.5, "TA": 1.0},  # alignment-focused, the released code's default
}

MAX_SIZE = 1e6  # of a score. Anything larger is no opinion on a video, and beside it the others of a group look equal
TAKEN_NAMES = {"reward", "group", "ratio", "failed"}  # <name>_mean, <name>_std or eval_<name> is another metric


def broken_rule(scores, count):
    """What is wrong with the answer of a reward to `count` videos, and how to mend it; "" if it keeps the contract."""
    if not isinstance(scores, dict) or not scores:
        return f"it must return a dict of names and tensors: got {type(scores).__name__} {scores!r:.80}"
    for name, values in scores.items():
        if not isinstance(name, str) or not name or name in TAKEN_NAMES:
            return f"a name must be a text, and none of {sorted(TAKEN_NAMES)}: got {name!r}; rename it"
        if not isinstance(values, torch.Tensor) or values.layout != torch.strided or not values.is_floating_point():
            kind = values.dtype if isinstance(values, torch.Tensor) else type(values).__name__
            return f"{name} must be a dense tensor of floats: got {kind}; convert it with torch.as_tensor and .float()"
        if values.shape != (count,):
            return f"{name} must have one score per video, shape [{count}]: got {list(values.shape)}"
        for sample, value in enumerate(values.double().tolist()):
            if abs(value) > MAX_SIZE:  # false for NaN
                return (
                    f"sample {sample}: {name} must be NaN or of size up to {MAX_SIZE:g}: got {value}; "
                    "mend the reward, or let it return NaN for a video that it cannot score"
                )
    return ""


def composite_reward(scores, setting):
    """Eq. 10:  r = w_vq·VQ + w_mq·MQ + w_ta·TA, weights by the name of the paper's setting ("A" or "B").

    scores: {"VQ": [B], "MQ": [B], "TA": [B], …}; further entries are left out of the reward. Returns float64 [B]; NaN where
    any of the three is not finite.
    """
    if setting not in REWARD_SETTINGS:
        raise ValueError(f"reward setting must be one of {sorted(REWARD_SETTINGS)}: got {setting!r}")
    weights = REWARD_SETTINGS[setting]
    missing = sorted(weights.keys() - scores.keys())
    if missing:
        raise ValueError(f"setting {setting} needs the scores {sorted(weights)}: the reward model did not return {missing}")
    reward = sum(weight * scores[name].double() for name, weight in weights.items())
    return torch.where(reward.isfinite(), reward, torch.nan)  # [B]


def group_advantages(rewards, group_size, guard=1e-6, max_advantage=5.0):
    """A_i of Eq. 4:  A_i = (r_i − mean_group r) / (std_group r + guard), clamped to ±max_advantage (released code: 5).

    rewards: [B], the G = group_size samples of one prompt standing next to each other; B must be a multiple of G.
    Returns (advantages [B] float32, valid [B] bool, group_std [B / G] float64).

    - NaN (failed) rewards get A = 0 and valid = False, and take no part in their group's mean and std.
    - A group without spread (all rewards equal, or one valid sample) teaches nothing: A = 0, not 0/0. "Equal" is judged
      at float32 resolution, or rounding noise of two equal scores would be blown up to A = ±1.
    - std is the population's (1/G inside the root): defined for a single sample, too.
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
    resolution = torch.finfo(torch.float32).eps * torch.where(valid, r, 0.0).abs().amax(1, keepdim=True)
    spread = (std > resolution) & valid
    advantages = torch.where(spread, centred / (std + guard), 0.0).clamp(-max_advantage, max_advantage)
    return advantages.float().flatten(), valid.flatten(), std.flatten()
