"""What the paper claims, as differences between rows of the ablation grid, and the verdict of the toy on each; of some
also the verdict of the miniature, whose arms are those of paper.rehearsal.

A difference is paired: both rows of a pair see the same prompts and noise, seed by seed. The interval is Student's at
95% over the seeds. A claim `holds` where the interval lies on the claimed side of 0, `does not hold` where it lies on
the other side, and else `cannot be seen`. There are many claims: where the truth is 0, one in twenty is called wrongly
by chance.
"""

import re
from dataclasses import dataclass

import numpy as np

# Half widths of Student's 95% interval in standard errors, by degrees of freedom; any table of the t distribution.
STUDENT = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
NAMES = {"sage": "SAGE", "flow": "FlowGRPO", "dance": "DanceGRPO", "cps": "CPS", "exact": "exact"}


@dataclass(frozen=True)
class Claim:
    """`text` asserts that the mean over `pairs` (a, b) of sign · (number of a − number of b) is above 0."""

    source: str
    text: str
    pairs: tuple  # of (row, row); of (row, None) for a number that is a difference itself
    number: str = "Overall"  # a key of paper.ablate.summarise
    sign: int = 1
    quick: bool = True  # whether the quick grid runs its rows


def in_both_settings(a, b):
    """The pair of two rows of Table 2 in the reward settings A and B."""
    return ((f"{a},A", f"{b},A"), (f"{a},B", f"{b},B"))


def with_and_without_equalizer(sampler):
    return (f"{sampler},dual,A", f"{sampler},equalizer off")


STEPS = {1: "one optimizer step", 9: "nine optimizer steps"}

TABLE_2 = [
    Claim(
        "Table 2",
        "SAGE ends above DanceGRPO (dual KL, settings A and B, equal η)",
        in_both_settings("sage,dual", "dance,dual"),
    ),
    Claim(
        "Table 2",
        "SAGE ends above FlowGRPO (dual KL, settings A and B, equal η)",
        in_both_settings("sage,dual", "flow,dual"),
    ),
    Claim(
        "Table 2", "SAGE ends above CPS (dual KL, settings A and B, equal η)", in_both_settings("sage,dual", "cps,dual")
    ),
    Claim(
        "Table 2",
        "SAGE ends above DanceGRPO where that injects SAGE's total variance",
        (("sage,dual,A", "dance,equal variance"),),
    ),
    Claim(
        "Table 2",
        "SAGE ends above FlowGRPO where that injects SAGE's total variance",
        (("sage,dual,A", "flow,equal variance"),),
    ),
    Claim(
        "Table 2",
        "SAGE ends above CPS where that injects SAGE's total variance",
        (("sage,dual,A", "cps,equal variance"),),
    ),
    Claim(
        "Table 2",
        "dual KL ends above none (four samplers, settings A and B)",
        tuple(
            (f"{s},dual,{setting}", f"{s},none,{setting}") for s in ("sage", "flow", "dance", "cps") for setting in "AB"
        ),
        quick=False,
    ),
    Claim(
        "Table 2",
        "dual KL ends above fixed (four samplers, settings A and B)",
        tuple(
            (f"{s},dual,{setting}", f"{s},fixed,{setting}")
            for s in ("sage", "flow", "dance", "cps")
            for setting in "AB"
        ),
        quick=False,
    ),
    Claim(
        "Table 2",
        "setting B ends with a higher TA than setting A (four samplers)",
        tuple((f"{s},dual,B", f"{s},dual,A") for s in ("sage", "flow", "dance", "cps")),
        "TA",
        quick=False,
    ),
]
FIGURE_1_3 = [
    Claim(
        "Fig. 1, 3",
        f"SAGE's first rollouts lie nearer to the manifold than {NAMES[rival]}'s ({words} last step)",
        ((f"sage,{row}", f"{rival},{row}"),),
        "rollout_distance",
        -1,
    )
    for rival in ("dance", "flow")
    for words, row in (("deterministic", "dual,A"), ("noisy", "noisy last step"))
]
FIGURE_5 = [
    Claim(
        "Fig. 5",
        f"{NAMES[sampler]} ends higher with the equalizer than without",
        (with_and_without_equalizer(sampler),),
    )
    for sampler in NAMES
] + [
    Claim(
        "Fig. 5",
        "without the equalizer curves level off: they gain less over the last 10 iterations (five samplers)",
        tuple(with_and_without_equalizer(sampler) for sampler in NAMES),
        "late_gain",
        quick=False,
    ),
]
FIGURE_7 = [
    Claim("Fig. 7", "two-stage λ_KL ends above fixed λ_KL", (("schedule,two_stage", "sage,dual,A"),)),
    Claim("Fig. 7", "two-stage λ_KL ends above the milder one", (("schedule,two_stage", "schedule,milder"),)),
    Claim("Fig. 7", "two-stage λ_KL ends above a linear ramp", (("schedule,two_stage", "schedule,ramp"),)),
]


def figure_8(steps):
    """The claims on KL modes, each mode at its best λ_KL, in one recipe."""
    words = STEPS[steps]
    quick = steps == 1
    dual = f"kl,{steps},dual"
    claims = []
    for mode in ("none", "fixed", "stepwise", "moving"):
        claims.append(
            Claim("Fig. 8", f"{words}: dual KL ends above {mode}", ((dual, f"kl,{steps},{mode}"),), quick=quick)
        )
    for mode in ("none", "stepwise", "moving"):
        text = f"{words}: with KL {mode} the reward falls further from its best than with dual KL"
        claims.append(Claim("Fig. 8", text, ((f"kl,{steps},{mode}", dual),), "fall", quick=quick))
    pair = ((f"kl,{steps},none", dual),)
    claims += [
        Claim("Fig. 8", f"{words}: without KL the samples drift further than with dual KL", pair, "drift", quick=quick),
        Claim(
            "Fig. 8",
            f"{words}: without KL the trained samples lie further from the manifold",
            pair,
            "distance",
            quick=quick,
        ),
        Claim(
            "Fig. 8",
            f"{words}: moving KL alone explores less at the end than dual KL (std within groups)",
            ((f"kl,{steps},moving", dual),),
            "late_std",
            -1,
            quick=quick,
        ),
    ]
    return claims


FIGURE_8 = figure_8(1) + figure_8(9)
PAPER = TABLE_2 + FIGURE_1_3 + FIGURE_5 + FIGURE_7 + FIGURE_8

LAST_STEP = tuple((f"{s},dual,A", f"{s},noisy last step") for s in ("sage", "flow", "dance"))
RECIPE = [
    Claim(
        "steps",
        "one optimizer step per iteration ends above three, at equal rollouts",
        (("steps,1", "steps,3"),),
        quick=False,
    ),
    Claim(
        "steps",
        "one optimizer step per iteration ends above nine, at equal rollouts",
        (("steps,1", "steps,9"),),
        quick=False,
    ),
    Claim(
        "dual",
        "one optimizer step, the same λ_KL: dual KL ends above moving",
        (("steps,1", "steps,1,moving"),),
        quick=False,
    ),
    Claim(
        "dual",
        "three optimizer steps, the same λ_KL: dual KL ends above moving",
        (("steps,3", "steps,3,moving"),),
        quick=False,
    ),
    Claim(
        "dual",
        "nine optimizer steps, the same λ_KL: dual KL ends above moving",
        (("steps,9", "steps,9,moving"),),
        quick=False,
    ),
    Claim("optimizer", "Muon ends above AdamW", (("muon", "steps,1"),), quick=False),
    Claim(
        "KL form",
        "nine steps, dual: the closed form ends above Eq. 15",
        (("kl,9,dual,closed form", "kl,9,dual"),),
        quick=False,
    ),
    Claim(
        "KL form",
        "nine steps, step-wise alone: the closed form ends above Eq. 15",
        (("kl,9,stepwise,closed form", "kl,9,stepwise"),),
        quick=False,
    ),
]
OURS = [
    *RECIPE,
    Claim("RL", "training costs diversity", (("sage,dual,A", None),), "diversity_lost"),
    Claim("exact", "the exact step ends above SAGE (equal η)", (("exact,dual,A", "sage,dual,A"),)),
    Claim(
        "exact",
        "the exact step ends above SAGE where it injects SAGE's total variance",
        (("exact,equal variance", "sage,dual,A"),),
    ),
    Claim(
        "exact",
        "its first rollouts lie nearer to the manifold than SAGE's",
        (("exact,dual,A", "sage,dual,A"),),
        "rollout_distance",
        -1,
    ),
    Claim(
        "exact",
        "its trained samples lie nearer to the manifold than SAGE's",
        (("exact,dual,A", "sage,dual,A"),),
        "distance",
        -1,
    ),
    Claim("last step", "a deterministic last step ends above a noisy one (SAGE, flow, dance)", LAST_STEP),
    Claim("last step", "with it, the trained samples lie nearer to the manifold", LAST_STEP, "distance", -1),
]
CLAIMS = PAPER + OURS

# {text of a claim: the pair of arms of paper.rehearsal that it compares}. They end after 8 iterations, in setting A,
# with a noisy last step and one λ_KL for all.
ON_MINIATURE = {
    TABLE_2[0].text: ("short run", "dance_grpo"),
    TABLE_2[1].text: ("short run", "flow_grpo"),
    TABLE_2[2].text: ("short run", "cps"),
    "dual KL ends above none (four samplers, settings A and B)": ("short run", "no KL"),
    "SAGE ends higher with the equalizer than without": ("short run", "equalizer off"),
    "one optimizer step: without KL the trained samples lie further from the manifold": ("no KL", "short run"),
    "the exact step ends above SAGE (equal η)": ("exact", "short run"),
    "its trained samples lie nearer to the manifold than SAGE's": ("exact", "short run"),
}

# The paper's Table 2 (HunyuanVideo-1.5, VideoAlign): Overall, VQ, MQ, TA, CLIPScore, PickScore. The review that it was
# taken from shifts the heads of these columns by one.
PAPER_TABLE_2 = {
    "before training": (0.0654, -0.7539, -0.5870, 1.4063, 0.5409, 0.7397),
    "dance,none,A": (0.2768, -0.7589, -0.3852, 1.4209, 0.5386, 0.7378),
    "dance,fixed,A": (0.0979, -0.8077, -0.5091, 1.4147, 0.5403, 0.7355),
    "flow,none,A": (0.2733, -0.7151, -0.5286, 1.5170, 0.5443, 0.7394),
    "flow,fixed,A": (0.1880, -0.6771, -0.5912, 1.4563, 0.5431, 0.7407),
    "cps,none,A": (0.6343, -0.4855, -0.4021, 1.5219, 0.5479, 0.7412),
    "cps,fixed,A": (0.0928, -0.7156, -0.5825, 1.3908, 0.5479, 0.7369),
    "sage,none,A": (0.4859, -0.6104, -0.4141, 1.5104, 0.5423, 0.7360),
    "sage,fixed,A": (0.2244, -0.7438, -0.5320, 1.5001, 0.5446, 0.7382),
    "sage,dual,A": (0.2173, -0.7881, -0.4249, 1.4303, 0.5430, 0.7452),
    "dance,none,B": (-0.2172, -0.8854, -0.6218, 1.2901, 0.5439, 0.7352),
    "dance,fixed,B": (0.1290, -0.7739, -0.5083, 1.4112, 0.5452, 0.7276),
    "flow,none,B": (0.4773, -0.5671, -0.4731, 1.5175, 0.5403, 0.7349),
    "flow,fixed,B": (0.2103, -0.6654, -0.5506, 1.4263, 0.5427, 0.7408),
    "cps,none,B": (0.3694, -0.6650, -0.5325, 1.5669, 0.5479, 0.7311),
    "cps,fixed,B": (0.3705, -0.6121, -0.4787, 1.4613, 0.5458, 0.7364),
    "sage,none,B": (-0.1222, -0.8720, -0.6046, 1.3544, 0.5404, 0.7357),
    "sage,fixed,B": (0.2857, -0.7062, -0.4425, 1.4344, 0.5414, 0.7377),
    "sage,dual,B": (0.8066, -0.4765, -0.2384, 1.5216, 0.5484, 0.7420),
}


def rank_correlation(results, setting):
    """Spearman's ρ between the paper's Overall and the toy's, over the rows that both have in a reward setting."""
    names = [name for name in PAPER_TABLE_2 if name.endswith(f",{setting}")]
    paper = np.array([PAPER_TABLE_2[name][0] for name in names])
    toy = np.array([np.mean(results["rows"][name]["Overall"]) for name in names])
    return np.corrcoef(paper.argsort().argsort(), toy.argsort().argsort())[0, 1]


def difference(claim, table):
    """The claimed difference for every seed, positive where the claim is right."""
    per_pair = []
    for a, b in claim.pairs:
        baseline = 0.0 if b is None else np.array(table[b][claim.number])
        per_pair.append(np.array(table[a][claim.number]) - baseline)
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
        verdict = verdict_of(mean, half)
        entry = dict(source=claim.source, text=claim.text, number=claim.number)
        verdicts.append(entry | dict(mean=round(claim.sign * mean, 4), half=round(half, 4), verdict=verdict))
    return verdicts


def verdict_of(mean, half):
    """Of an interval mean ± half, where a claim says that it lies above 0."""
    return "holds" if mean > half else "does not hold" if mean < -half else "cannot be seen"


def paired(arms, a, b, number):
    """Number of arm a − number of arm b, for every seed that both have. `arms`: results.json's "rehearsal"."""
    differences = []
    for seed in sorted(arms[a]["seeds"].keys() & arms[b]["seeds"].keys()):
        first, second = (overall(arms[arm]["seeds"][seed]) for arm in (a, b))
        differences.append(first[number] - second[number])
    return np.array(differences)


def overall(run):
    return run | {"Overall": run["VQ"] + run["MQ"] + run["TA"]}


def on_miniature(entry, arms):
    """One cell: what the miniature says of a claim of the toy's table."""
    if entry["text"] not in ON_MINIATURE:
        return "–"
    (claim,) = [claim for claim in CLAIMS if claim.text == entry["text"]]
    mean, half = interval(paired(arms, *ON_MINIATURE[claim.text], claim.number))
    return f"{mean:+.3f} ± {half:.3f}: {verdict_of(claim.sign * mean, half)}"


def miniature_table(arms):
    """Every arm of the rehearsal: its last evaluation, mean over seeds, and what it gains beyond the short run's gain.

    Arms with another guidance start from another reward, so gains are compared, not ends.
    """
    names = ("reward", "gain", "gain − the short run's ± 95%", "VQ", "MQ", "TA", "distance", "seeds")
    lines = ["| arm | " + " | ".join(names) + " |", "| --- " * (1 + len(names)) + "|"]
    gains = {arm: {"seeds": {}} for arm in arms}
    for arm, entry in arms.items():
        for seed, run in entry["seeds"].items():
            gains[arm]["seeds"][seed] = run | {"gain": run["after"] - run["before"]}
    for arm, entry in gains.items():
        runs = list(entry["seeds"].values())
        if not runs:
            continue
        before, after, gain = (np.mean([run[name] for run in runs]) for name in ("before", "after", "gain"))
        against = "–"
        if arm != "short run" and len(runs) > 1:
            mean, half = interval(paired(gains, arm, "short run", "gain"))
            against = f"{mean:+.3f} ± {half:.3f}"
        means = [f"{np.mean([run[name] for run in runs]):.3f}" for name in ("VQ", "MQ", "TA", "distance")]
        cells = [arm, f"{before:.3f} → {after:.3f}", f"{gain:+.3f}", against, *means, str(len(runs))]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def agreement(deciding, other):
    """Of the claims that one grid decides and the other has: those with the same sign in both, and those without."""
    means = {entry["text"]: entry["mean"] for entry in other}
    same, different = [], []
    for entry in deciding:
        text = entry["text"]
        if entry["verdict"] != "cannot be seen" and text in means:
            (same if entry["mean"] * means[text] > 0 else different).append(text)
    return same, different


def markdown(verdicts, claims=None, arms=None):
    """A table of verdicts, of some claims or of all. The difference is the number's own: first row − second.

    arms: results.json's "rehearsal", for a column of the miniature.
    """
    texts = {claim.text for claim in claims} if claims else {entry["text"] for entry in verdicts}
    heads = ["of", "claim", "number", "difference ± 95%", "on the toy", *(["on the miniature"] if arms else [])]
    lines = ["| " + " | ".join(heads) + " |", "| --- " * len(heads) + "|"]
    for entry in verdicts:
        if entry["text"] in texts:
            difference = f"{entry['mean']:+.3f} ± {entry['half']:.3f}"
            cells = [entry["source"], entry["text"], entry["number"], difference, entry["verdict"]]
            if arms:
                cells.append(on_miniature(entry, arms))
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def table_2(results):
    """Table 2 on the toy beside the paper's Overall. Final ODE samples, mean over seeds."""
    numbers = ("Overall", "VQ", "MQ", "TA", "distance", "diversity")
    lines = ["| setting | sampler | KL | " + " | ".join(numbers) + " | the paper's Overall |"]
    lines.append("| --- " * (4 + len(numbers)) + "|")
    for setting in "AB":
        for sampler, title in NAMES.items():
            for mode in ("none", "fixed", "dual"):
                name = f"{sampler},{mode},{setting}"
                if name not in results["rows"]:
                    continue
                means = [f"{np.mean(results['rows'][name][number]):.3f}" for number in numbers]
                printed = f"{PAPER_TABLE_2[name][0]:.3f}" if name in PAPER_TABLE_2 else "–"
                lines.append(f"| {setting} | {title} | {mode} | " + " | ".join(means) + f" | {printed} |")
    return "\n".join(lines)


def paper_table_2():
    """The paper's Table 2 in full."""
    lines = ["| setting | sampler | KL | Overall | VQ | MQ | TA | CLIPScore | PickScore |", "| --- " * 9 + "|"]
    for name, values in PAPER_TABLE_2.items():
        sampler, mode, setting = name.split(",") if "," in name else ("before training", "–", "–")
        cells = [setting, NAMES.get(sampler, sampler), mode, *[f"{value:.4f}" for value in values]]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def tuning_table(results):
    """Overall of every candidate on the two tuning seeds; the chosen one in bold."""
    lines = ["| row | tuned | candidates: mean Overall |", "| --- | --- | --- |"]
    for name, entries in results["tuning"].items():
        tuned = "kl_lambda" if name.startswith("kl,") else "learning_rate"
        means = [np.mean(entry["Overall"]) for entry in entries]
        cells = []
        for entry, mean in zip(entries, means, strict=True):
            cell = f"{entry['settings'][tuned]:g}: {mean:.3f}"
            cells.append(f"**{cell}**" if mean == max(means) else cell)
        lines.append(f"| {name} | {tuned} | " + " · ".join(cells) + " |")
    return "\n".join(lines)


def correlations(results):
    """One sentence on how the rows' order agrees with the paper's."""
    values = {setting: rank_correlation(results, setting) for setting in "AB"}
    numbers = f"setting A {values['A']:+.2f}, setting B {values['B']:+.2f}"
    return f"Spearman's rank correlation with the paper, nine rows each: {numbers}."


def bench_table(parts):
    """The ratios of paper.bench, without those that its picture shows."""
    lines = ["| what | ratio |", "| --- | --- |"]
    for name, ratios in parts.items():
        if name != "reward":
            lines += [f"| {what} | {ratio:.3g} |" for what, ratio in ratios.items()]
    return "\n".join(lines)


def tables(results):
    """{name: text} of everything that RESULTS.md takes from results.json."""
    return {
        "claims of the paper": markdown(results["claims"], PAPER, results["rehearsal"]),
        "our own options": markdown(results["claims"], OURS, results["rehearsal"]),
        "the miniature": miniature_table(results["rehearsal"]),
        "tuning": tuning_table(results),
        "table 2 on the toy": table_2(results),
        "correlations": correlations(results),
        "table 2 of the paper": paper_table_2(),
        "benchmarks": bench_table(results["bench"]),
        "removed": markdown(results["removed"]["claims"]),
    }


def write_tables(results, path):
    """Put each table between its two comment lines in RESULTS.md."""
    text = path.read_text(encoding="utf-8")
    for name, table in tables(results).items():
        block = f"<!-- table: {name} -->\n{table}\n<!-- end -->"
        text, count = re.subn(
            f"<!-- table: {re.escape(name)} -->\n.*?<!-- end -->", lambda _: block, text, flags=re.DOTALL
        )
        if count != 1:
            raise ValueError(f"{path} must have one place for each table: got {count} for {name!r}")
    path.write_text(text, encoding="utf-8")
