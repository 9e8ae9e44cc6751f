"""Dual trust region: Eq. 11–15, the moving anchor and the schedules of λ_KL.

Position control keeps the policy θ near an anchor (the pre-trained policy, or a copy of θ refreshed every N optimizer
steps); velocity control keeps it near π_old, the policy that made the rollout. The paper calls that one π_{k−1}.

Velocity control acts only with two or more optimizer steps per iteration: with one, θ is π_old until that step is made
(grpo.py).
"""

import contextlib

import torch

# L_KL = w_pos·KL(θ‖anchor) + w_vel·KL(θ‖π_old). The betas of Eq. 14 belong to `dual` alone.
KL_MODES = ("none", "fixed", "stepwise", "moving", "dual")
STEPWISE_KL = ("rollout_phase", "closed_form")  # Eq. 15, Eq. 12
KL_SCHEDULES = ("fixed", "two_stage", "milder", "ramp", "controller")


def gaussian_kl(mean, mean_ref, std):
    """Eq. 11:  KL(π_θ ‖ π_ref) = ‖mean_θ − mean_ref‖² / (2Σ²D), two Gaussians of the same std Σ.

    Divided by the VARIANCE once (write-ups that print Σ_t² mean Σ_t for the std). Taken as a mean over the D elements,
    like log_prob, so that both have one scale. mean, mean_ref: [B, …]; std: one number for each sample, or one for all.
    Returns [B].
    """
    return (mean - mean_ref).square().flatten(1).mean(1) / (2 * std.flatten() ** 2)


def stepwise_kl_closed_form(mean, mean_old, std):
    """Eq. 12:  KL(π_θ ‖ π_old) by Eq. 11, with the means stored by the rollout. No second forward pass. Returns [B]."""
    return gaussian_kl(mean, mean_old, std)


def stepwise_kl_rollout_phase(log_prob_new, log_prob_old):
    """Eq. 15:  KL ≈ mean(log π_old − log π_θ) on the rollout's own samples. Returns [B], the batch mean is the loss's.

    Unbiased for KL(π_old ‖ π_θ) (equal to Eq. 12 for a shared Σ), but negative on many batches and far noisier than the
    closed form: its gradient contains the term ξ·∂mean/Σ, which only averages out. The paper's choice nonetheless.
    """
    return log_prob_old - log_prob_new


def kl_weights(mode, beta_pos=1.0, beta_vel=0.1):
    """(w_pos, w_vel), the weights of the position and the velocity term in a KL mode:

    none (0, 0) · fixed, moving (1, 0): Eq. 11, 13 · stepwise (0, 1): Eq. 12 · dual (β_pos, β_vel): Eq. 14.
    fixed and moving differ in the anchor alone: see Anchor.
    """
    weights = {"none": (0, 0), "fixed": (1, 0), "stepwise": (0, 1), "moving": (1, 0), "dual": (beta_pos, beta_vel)}
    if mode not in weights:
        raise ValueError(f"kl_mode must be one of {', '.join(KL_MODES)}: got {mode!r}")
    return weights[mode]


def dual_kl(kl_pos, kl_vel, beta_pos=1.0, beta_vel=0.1):
    """Eq. 14:  L_KL = β_pos·KL(θ‖ref_N) + β_vel·KL(θ‖π_old).  Paper: β_pos = 1.0, β_vel = 0.1."""
    return beta_pos * kl_pos + beta_vel * kl_vel


def kl_coefficient(schedule, iteration, final, early, switch):
    """λ_KL at an iteration (counted from 0), Fig. 7. Paper: final 1e-5, early 1e-7; when to switch is not printed.

    fixed      final throughout
    two_stage  early until iteration `switch`, then final: first room to explore, then a tighter region. Paper's best
    milder     early until `switch`, then the geometric mean of early and final (the paper's value is not printed; ours)
    ramp       linear, from early at iteration 0 to final at `switch`
    controller early: what LambdaController begins with. It is the released code's, as far as that is known
    """
    if schedule not in KL_SCHEDULES:
        raise ValueError(f"kl_schedule must be one of {', '.join(KL_SCHEDULES)}: got {schedule!r}")
    if schedule == "fixed":
        return final
    if schedule == "ramp":
        share = min(1.0, iteration / switch) if switch else 1.0
        return early + share * (final - early)
    if schedule == "controller" or iteration < switch:
        return early
    return final if schedule == "two_stage" else (early * final) ** 0.5


class LambdaController:
    """λ_KL by the KL that was seen, as a fork of the released code (TVRL) sets it at every backward pass.

    `value` rises linearly from early towards final over the first `ramp` − 1 passes. After that it is multiplied by 0.9
    after a pass where the mean of the last ten KLs is above 1.5·target, and by 1.1 where it is below 0.5·target, within
    [early, final]. So a LARGE KL makes λ_KL small, the opposite of PPO's controller: the trust region loosens when the
    policy leaves it. With a moving anchor the KL is 0 after each refresh, so λ_KL rises there and falls again as the
    policy moves. The release's own class could not be read; its fork's numbers are early 1e-7, final 1e-5, target 1e-5,
    ramp 100.
    """

    def __init__(self, early, final, target, ramp=100, window=10):
        if early > final:
            rule = "with kl_schedule controller, kl_lambda_early must be at most kl_lambda: it keeps λ_KL between them"
            raise ValueError(f"{rule}: got {early:g} and {final:g}")
        self.early, self.final, self.target, self.ramp, self.window = early, final, target, ramp, window
        self.value, self.passes, self.recent = early, 0, []

    def observe(self, kl):
        """After each backward pass, with the mean of its L_KL."""
        self.passes += 1
        self.recent = [*self.recent, kl][-self.window :]
        mean = sum(self.recent) / len(self.recent)
        if self.passes < self.ramp:
            self.value = self.early + self.passes / self.ramp * (self.final - self.early)
        elif mean > 1.5 * self.target:
            self.value = max(0.9 * self.value, self.early)
        elif mean < 0.5 * self.target:
            self.value = min(1.1 * self.value, self.final)

    def state_dict(self):
        return {"value": self.value, "passes": self.passes, "recent": list(self.recent)}

    def load_state_dict(self, state):
        self.value, self.passes, self.recent = state["value"], state["passes"], list(state["recent"])


class Anchor:
    """A second set of the trainable weights, kept beside the module and swapped into it when its means are needed.

    Eq. 13:  ref ← θ every N optimizer steps (paper: N = 10), with every = N, the setting anchor_every. They are counted
    at the end of an iteration.
    Fixed KL: every = None, the anchor stays what it was at construction, the pre-trained policy.

    Frozen parameters are shared, not copied: under LoRA the anchor is one more adapter (and the fixed one, the initial
    adapter with its zero output, is the base model), not a second 8.3B transformer. All copies are made shard by shard
    in place, so a sharded FSDP2 module needs no special case. offload keeps the copy in host memory.

    refreshed_at: the number of optimizer steps at which anchor and policy were last the same weights. Where a rollout
    was collected at that same number, the anchor IS the policy that made the rollout, whose means are stored: no
    reference pass is needed then.
    """

    def __init__(self, module, every=None, offload=False):
        if every is not None and every < 1:
            raise ValueError(f"the anchor's refresh interval must be at least 1 optimizer step: got {every}")
        self.every, self.refreshed_at, self.offload = every, 0, offload
        trained = [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]
        self._names = [name for name, _ in trained]
        self._parameters = [parameter for _, parameter in trained]
        self._copies = [self._keep(_local(p)) for p in self._parameters]

    def _keep(self, shard):
        return shard.detach().to("cpu", copy=True) if self.offload else shard.detach().clone()

    @torch.no_grad()
    def maybe_refresh(self, steps_made):
        """Call at the end of every iteration with the optimizer steps made so far. Returns whether ref ← θ happened."""
        if self.every is None or steps_made - self.refreshed_at < self.every:
            return False
        for copy, p in zip(self._copies, self._parameters, strict=True):
            copy.copy_(_local(p))
        self.refreshed_at = steps_made
        return True

    @contextlib.contextmanager
    def swapped_in(self):
        """Within this block the module computes with the anchor's weights; afterwards its own are back, bit for bit.

        The weights are written in place: evaluate the reference means first and the policy's graph after the block
        (the other order is refused by autograd, which sees that saved weights were modified).
        """
        backups = [self._keep(_local(p)) for p in self._parameters]
        try:
            self._write(self._copies)
            yield
        finally:
            self._write(backups)

    @torch.no_grad()
    def _write(self, values):
        for p, value in zip(self._parameters, values, strict=True):
            _local(p).copy_(value)

    def state_dict(self):
        """The anchor's weights by parameter name, sharded like the module's (refreshed_at is the caller's to save)."""
        state = {}
        for name, parameter, copy in zip(self._names, self._parameters, self._copies, strict=True):
            state[name] = _shard_like(parameter, copy)
        return state

    @torch.no_grad()
    def load_state_dict(self, state, refreshed_at):
        for name, copy in zip(self._names, self._copies, strict=True):
            copy.copy_(_local(state[name]))
        self.refreshed_at = refreshed_at


def _local(parameter):
    """This rank's shard of a parameter, sharing its memory; the whole of it where nothing is sharded."""
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter


def _shard_like(parameter, shard):
    """The inverse of _local: a shard as a part of the whole, which a checkpoint can give to any number of ranks."""
    if not hasattr(parameter, "to_local"):
        return shard
    from torch.distributed.tensor import DTensor

    mesh, placements = parameter.device_mesh, parameter.placements
    shard = shard.to(parameter.to_local().device)
    return DTensor.from_local(
        shard, mesh, placements, run_check=False, shape=parameter.shape, stride=parameter.stride()
    )
