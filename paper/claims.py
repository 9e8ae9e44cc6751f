"""What the paper claims, as differences between rows of the ablation grid, and the verdict of the toy on each.

A difference is paired: both rows of a pair see the same prompts and noise, seed by seed. The interval is Student's at 95%
over the seeds. A claim `holds` where the interval lies on the claimed side of 0, `does not hold` where it lies on the other
side, and else `cannot be seen`. There are many claims: where the truth is 0, one in twenty is called wrongly by chance.
"""

from dataclasses import dataclass

import numpy as np

# Half widths of Student's 95% interval in standard errors, by degrees of freedom; any table of the t distribution.
STUDENT = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
SAMPLERS = {"SAGE": "", "FlowGRPO": "flow_grpo", "DanceGRPO": "dance_grpo", "CPS": "cps", "exact": "exact"}
HOT = "learning_rate=0.0004,updates=80,kl_schedule=fixed"


def row(sampler="SAGE", *options):
    """The label of a row, as paper.ablate makes it."""
    sde = [f"sde_type={SAMPLERS[sampler]}"] if SAMPLERS[sampler] else []
    return ",".join([*sde, *options]) or "base"


@dataclass(frozen=True)
class Claim:
    """`text` asserts that the mean over `pairs` (a, b) of sign · (number of a − number of b) is above 0."""

    source: str
    text: str
    pairs: tuple  # of (label, label)
    number: str = "Overall"  # a key of paper.ablate.summarise
    sign: int = 1
    quick: bool = True  # whether the quick grid runs its rows


def _claims():
    in_both = [(), ("reward_setting=B",)]
    for rival in ("DanceGRPO", "FlowGRPO", "CPS"):
        pairs = tuple((row("SAGE", *setting), row(rival, *setting)) for setting in in_both)
        yield Claim("Table 2", f"SAGE ends above {rival} (dual KL, settings A and B, equal η)", pairs)
    for rival, eta in (("DanceGRPO", 1.3559), ("FlowGRPO", 0.4993), ("CPS", 0.3016)):
        pairs = ((row(), row(rival, f"eta={eta}")),)
        yield Claim("Table 2", f"SAGE ends above {rival} at η = {eta:.2f}, where that injects SAGE's total variance", pairs)
    for rival in ("DanceGRPO", "FlowGRPO"):
        for option, words in ((), "deterministic"), (("noisy_last_step=True",), "noisy"):
            text = f"SAGE's first rollouts lie nearer to the manifold than {rival}'s ({words} last step)"
            yield Claim("Fig. 1, 3", text, ((row("SAGE", *option), row(rival, *option)),), "rollout_distance", -1)
    for sampler in SAMPLERS:
        text = f"{sampler} ends higher with the equalizer than without"
        yield Claim("Fig. 5", text, ((row(sampler), row(sampler, "equalizer=False")),))
    pairs = tuple((row(sampler, "equalizer=False"), row(sampler)) for sampler in SAMPLERS)
    text = "without the equalizer curves level off: they gain less over the last 10 updates (five samplers)"
    yield Claim("Fig. 5", text, pairs, "late_gain", -1, quick=False)
    yield Claim("Fig. 7", "two-stage λ_KL ends above fixed λ_KL", ((row(), "kl_schedule=fixed"),))
    yield Claim("Fig. 7", "two-stage λ_KL ends above the milder one", ((row(), "kl_schedule=milder"),))
    for mode in ("none", "fixed", "stepwise", "moving"):
        yield Claim("Fig. 8", f"hot: dual KL ends above {mode}", ((HOT, f"kl_mode={mode},{HOT}"),))
    for mode, words in (
        ("none", "without KL"),
        ("stepwise", "with step-wise KL alone"),
        ("moving", "with moving KL alone"),
    ):
        text = f"hot: {words} the reward falls further from its best than with dual KL"
        yield Claim("Fig. 8", text, ((f"kl_mode={mode},{HOT}", HOT),), "fall")
    yield Claim("Fig. 8", "hot: without KL the samples drift further than with dual KL", ((f"kl_mode=none,{HOT}", HOT),), "drift")
    text = "hot: without KL the trained samples lie further from the manifold than with dual KL"
    yield Claim("Fig. 8", text, ((f"kl_mode=none,{HOT}", HOT),), "distance")
    yield Claim("Fig. 8", "hot: fixed KL drifts less than dual KL", ((f"kl_mode=fixed,{HOT}", HOT),), "drift", -1)
    for mode in ("none", "fixed"):
        pairs = tuple((row(s, *b), row(s, f"kl_mode={mode}", *b)) for s in SAMPLERS for b in in_both)
        yield Claim("Table 2", f"dual KL ends above {mode} (five samplers, settings A and B)", pairs, quick=False)
    pairs = tuple((row(sampler, "reward_setting=B"), row(sampler)) for sampler in SAMPLERS)
    yield Claim("Table 2", "setting B ends with a higher TA than setting A (five samplers)", pairs, "TA", quick=False)


def _ours():
    last = tuple((row(s), row(s, "noisy_last_step=True")) for s in ("SAGE", "FlowGRPO", "DanceGRPO"))
    yield Claim("RL", "training costs diversity", ((row(), None),), "diversity_lost")
    yield Claim("exact", "the exact step ends above SAGE (equal η)", ((row("exact"), row()),))
    yield Claim("exact", "the exact step ends above SAGE at η = 0.30, where it injects SAGE's total variance", ((row("exact", "eta=0.3019"), row()),))
    yield Claim("exact", "its first rollouts lie nearer to the manifold than SAGE's", ((row("exact"), row()),), "rollout_distance", -1)
    yield Claim("exact", "its trained samples lie nearer to the manifold than SAGE's", ((row("exact"), row()),), "distance", -1)
    yield Claim("last step", "a deterministic last step ends above a noisy one (SAGE, flow, dance)", last)
    yield Claim("last step", "with it, the trained samples lie nearer to the manifold", last, "distance", -1)
    strong = f"kl_mode=stepwise,kl_lambda=0.3,{HOT}", f"kl_mode=stepwise,kl_lambda=0.3,kl_velocity=rollout_phase,{HOT}"
    yield Claim("KL form", "the closed form ends above the rollout-phase estimate", ((row(), "kl_velocity=rollout_phase"),))
    yield Claim("KL form", "hot, step-wise KL alone, λ_KL = 0.3: the closed form ends above", (strong,), quick=False)
    yield Claim("KL form", "with it, the samples lie nearer to the manifold", (strong,), "distance", -1, quick=False)


PAPER, OURS = list(_claims()), list(_ours())
CLAIMS = PAPER + OURS


def difference(claim, table):
    """The claimed difference for every seed, positive where the claim is right."""
    per_pair = [
        np.array(table[a][claim.number]) - (np.array(table[b][claim.number]) if b is not None else 0) for a, b in claim.pairs
    ]
    return claim.sign * np.mean(per_pair, axis=0)  # [seeds]


def interval(values):
    """(mean, half width of the 95% interval) over seeds, along the first axis."""
    values = np.asarray(values, dtype=float)
    if len(values) - 1 not in STUDENT:
        raise ValueError(f"an interval needs 2 to 10 seeds: got {len(values)}; choose --seeds accordingly")
    return values.mean(0), STUDENT[len(values) - 1] * values.std(0, ddof=1) / len(values) ** 0.5


def judge(table, claims):
    """A verdict for each of the claims, whose rows the table must have."""
    verdicts = []
    for claim in claims:
        mean, half = interval(difference(claim, table))
        verdict = "holds" if mean > half else "does not hold" if mean < -half else "cannot be seen"
        entry = dict(source=claim.source, text=claim.text, number=claim.number)
        verdicts.append(entry | dict(mean=round(claim.sign * mean, 4), half=round(half, 4), verdict=verdict))
    return verdicts


def agreement(deciding, other):
    """Of the claims that one grid decides and the other has: those with the same sign in both, and those without."""
    means = {c["text"]: c["mean"] for c in other}
    decided = [c for c in deciding if c["verdict"] != "cannot be seen" and c["text"] in means]
    signs = {c["text"]: c["mean"] * means[c["text"]] > 0 for c in decided}
    return [text for text, same in signs.items() if same], [text for text, same in signs.items() if not same]


def markdown(verdicts, claims=None):
    """The README's table of verdicts, on some claims or on all. The difference is the number's own: first row − second."""
    texts = {claim.text for claim in claims} if claims else {c["text"] for c in verdicts}
    lines = ["| of | claim | number | difference ± 95% | on the toy |", "| --- | --- | --- | --- | --- |"]
    for c in verdicts:
        if c["text"] in texts:
            lines.append(f"| {c['source']} | {c['text']} | {c['number']} | {c['mean']:+.3f} ± {c['half']:.3f} | {c['verdict']} |")
    return "\n".join(lines)


def table_2(results):
    """Table 2 on the toy: final ODE samples, mean over seeds, setting A / setting B."""
    numbers = ("VQ", "MQ", "TA", "Overall", "distance", "diversity")
    lines = ["| sampler | KL | " + " | ".join(numbers) + " |", "| --- " * (2 + len(numbers)) + "|"]
    for sampler in SAMPLERS:
        for mode in ("none", "fixed", "dual"):
            kl = [] if mode == "dual" else [f"kl_mode={mode}"]
            rows = [results["rows"][row(sampler, *kl, *setting)] for setting in ((), ("reward_setting=B",))]
            cells = [" / ".join(f"{np.mean(r[number]):.3f}" for r in rows) for number in numbers]
            lines.append(f"| {sampler} | {mode} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
