"""The paper's claims as differences between rows of the ablation grid, and the toy's verdict on each. Some claims have
the miniature's verdict, too, from two arms of paper.rehearsal.

A difference is paired: both rows of a pair see the same prompts and noise, seed by seed. The interval is Student's at
95% over the seeds. A claim `holds` where the interval lies on the claimed side of 0, `does not hold` where it lies on
the other side, and otherwise `cannot be seen`. No correction is made for the number of claims: where the true
difference is 0, one verdict in twenty is wrong by chance.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from paper.flops import run_tflop

# The pages that take their numbers from results.json.
PAGES = (Path("RESULTS.md"), Path("paper/APPENDIX.md"))

# Half widths of Student's 95% interval in standard errors, by degrees of freedom; any table of the t distribution.
STUDENT = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
SEEDS = 5  # of an arm of paper.rehearsal, unless its table says otherwise
UNDECIDED = "cannot be seen"  # the verdict where an interval has 0 in it
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
    Claim(
        "Fig. 7",
        "two-stage λ_KL ends above the controller with the release's KL target, 1e-5",
        (("schedule,two_stage", "schedule,controller,1e-5"),),
    ),
    Claim(
        "Fig. 7",
        "two-stage λ_KL ends above the controller with a KL target of 1e-4",
        (("schedule,two_stage", "schedule,controller,1e-4"),),
        quick=False,
    ),
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

# {text of a claim: the pair of arms of paper.rehearsal that it compares}. The arms run for 8 iterations in setting A,
# with a noisy last step and the same λ_KL.
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
    if mean > half:
        return "holds"
    return "does not hold" if mean < -half else UNDECIDED


def paired(arms, a, b, number):
    """A number of arm a minus that of arm b, for every seed that both have. arms: results.json's "rehearsal"."""
    differences = []
    for seed in sorted(arms[a]["seeds"].keys() & arms[b]["seeds"].keys()):
        first, second = (overall(arms[arm]["seeds"][seed]) for arm in (a, b))
        differences.append(first[number] - second[number])
    return np.array(differences)


def overall(run):
    return run | {"Overall": run["VQ"] + run["MQ"] + run["TA"]}


def on_miniature(entry, arms):
    """One cell: what the miniature says of a claim. A number alone is not decided."""
    if entry["text"] not in ON_MINIATURE:
        return "–"
    (claim,) = [claim for claim in CLAIMS if claim.text == entry["text"]]
    mean, half = interval(paired(arms, *ON_MINIATURE[claim.text], claim.number))
    verdict = verdict_of(claim.sign * mean, half)
    number = f"{mean:+.3f} ± {half:.3f}"
    return number if verdict == UNDECIDED else f"{number}: {verdict}"


def miniature_table(arms):
    """What every arm of the rehearsal gains, and what a TFLOP of it gains; the best comes first."""
    return markdown_table(
        ("arm", "gain", "minus the short run's ± 95%", "TFLOP of a run", "gain per TFLOP"),
        [
            (row.title, f"{row.gain:+.3f}", row.against, f"{row.tflop:.3f}", f"{row.efficiency:.3f}")
            for row in ranked_arms(arms)
        ],
    )


def full_miniature_table(arms):
    """The same arms with their rewards, the three scores behind a reward, and the distance to the manifold."""
    numbers = ("VQ", "MQ", "TA", "distance")
    rows = []
    for row in ranked_arms(arms):
        means = [f"{np.mean([run[name] for run in row.runs]):.3f}" for name in numbers]
        rows.append((row.title, f"{row.before:.3f} → {row.before + row.gain:.3f}", *means, f"{row.efficiency:.3f}"))
    return markdown_table(("arm", "reward", *numbers, "gain per TFLOP"), rows)


@dataclass(frozen=True)
class ArmRow:
    """One arm of the rehearsal, on the mean of its seeds."""

    arm: str
    runs: list  # one for each seed, of results.json
    before: float
    gain: float
    against: str  # its gain minus the short run's
    tflop: float  # of one run
    elsewhere: bool  # it starts from another reward than the short run

    @property
    def title(self):
        """Its name, with the number of seeds where that is not the usual one."""
        return self.arm if len(self.runs) == SEEDS else f"{self.arm} ({len(self.runs)} seeds)"

    @property
    def efficiency(self):
        return self.gain / self.tflop


def ranked_arms(arms):
    """Every arm that has a run, the highest gain per TFLOP first.

    Arms with another guidance come last. They start from another reward than the short run, so their gains cannot be
    compared with its gain.
    """
    gains = {arm: {"seeds": {}} for arm in arms}
    for arm, entry in arms.items():
        for seed, run in entry["seeds"].items():
            gains[arm]["seeds"][seed] = run | {"gain": run["after"] - run["before"]}
    rows = []
    for arm, entry in gains.items():
        runs = list(entry["seeds"].values())
        if not runs:
            continue
        against = "–"
        differences = paired(gains, arm, "short run", "gain")
        if arm != "short run" and len(differences) > 1:
            mean, half = interval(differences)
            against = f"{mean:+.3f} ± {half:.3f}"
        before, gain = (float(np.mean([run[name] for run in runs])) for name in ("before", "gain"))
        elsewhere = bool(np.abs(paired(arms, arm, "short run", "before")).mean() > 0.01)
        tflop = run_tflop(tuple(arms[arm]["options"]))
        rows.append(ArmRow(arm, runs, before, gain, against, tflop, elsewhere))
    return sorted(rows, key=lambda row: (row.elsewhere, -row.efficiency))


def markdown_table(heads, rows):
    """A table in Markdown."""
    lines = ["| " + " | ".join(heads) + " |", "| --- " * len(heads) + "|"]
    for cells in rows:
        lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    return "\n".join(lines)


def agreement(deciding, other):
    """The claims that `deciding` decides and both grids have: (texts with the same sign in both, the other texts)."""
    means = {entry["text"]: entry["mean"] for entry in other}
    same, different = [], []
    for entry in deciding:
        text = entry["text"]
        if entry["verdict"] != UNDECIDED and text in means:
            (same if entry["mean"] * means[text] > 0 else different).append(text)
    return same, different


def claims_table(verdicts, arms=None):
    """A table of verdicts. The difference is the number's own: first row − second.

    arms: results.json's "rehearsal", for a column of the miniature.
    """
    heads = ["of", "claim", "number", "difference ± 95%", "on the toy"]
    if arms:
        heads.append("on the miniature")
    rows = []
    for entry in verdicts:
        difference = f"{entry['mean']:+.3f} ± {entry['half']:.3f}"
        cells = [entry["source"], entry["text"], entry["number"], difference, entry["verdict"]]
        if arms:
            cells.append(on_miniature(entry, arms))
        rows.append(cells)
    return markdown_table(heads, rows)


def select(verdicts, claims, decided):
    """The verdicts on some claims: those that are decided, or those that are not."""
    texts = {claim.text for claim in claims}
    return [entry for entry in verdicts if entry["text"] in texts and (entry["verdict"] != UNDECIDED) == decided]


def counts(results):
    """One sentence on how many intervals there are, and how many of them chance alone would call."""
    toy, miniature = len(results["claims"]), len(ON_MINIATURE)
    undecided = sum(entry["verdict"] == UNDECIDED for entry in results["claims"])
    return (
        f"The toy has {toy} such intervals, the miniature {miniature}. Each is a 95% interval, and nothing corrects "
        f"for their number: if no difference were real, chance alone would give about {round(0.05 * toy)} of the toy's "
        f"{toy} a verdict. {undecided} of them cannot be seen."
    )


def equal_variance(results):
    """One sentence on the η at which each sampler injects as much variance as SAGE."""
    etas = []
    for sampler, title in NAMES.items():
        row = results["rows"].get(f"{sampler},equal variance")
        if row:
            etas.append(f"{row['settings']['eta']:.4g} for {title}")
    return f"Where SAGE has η = 0.5, equal variance is η = {', '.join(etas)}."


def table_2(results):
    """Table 2 on the toy beside the paper's Overall. Final ODE samples, mean over seeds."""
    numbers = ("Overall", "VQ", "MQ", "TA", "distance", "diversity")
    rows = []
    for setting in "AB":
        for sampler, title in NAMES.items():
            for mode in ("none", "fixed", "dual"):
                name = f"{sampler},{mode},{setting}"
                if name not in results["rows"]:
                    continue
                means = [f"{np.mean(results['rows'][name][number]):.3f}" for number in numbers]
                printed = f"{PAPER_TABLE_2[name][0]:.3f}" if name in PAPER_TABLE_2 else "–"
                rows.append((setting, title, mode, *means, printed))
    return markdown_table(("setting", "sampler", "KL", *numbers, "the paper's Overall"), rows)


def paper_table_2():
    """The paper's Table 2 in full."""
    rows = []
    for name, values in PAPER_TABLE_2.items():
        sampler, mode, setting = name.split(",") if "," in name else ("before training", "–", "–")
        rows.append((setting, NAMES.get(sampler, sampler), mode, *(f"{value:.4f}" for value in values)))
    heads = ("setting", "sampler", "KL", "Overall", "VQ", "MQ", "TA", "CLIPScore", "PickScore")
    return markdown_table(heads, rows)


def tuned_setting(name):
    """The setting in which the candidates of a row differ."""
    return "kl_lambda" if name.startswith("kl,") else "learning_rate"


def tuning_table(results):
    """Overall of every candidate on the two tuning seeds; the chosen one in bold."""
    rows = []
    for name, entries in results["tuning"].items():
        tuned = tuned_setting(name)
        means = [np.mean(entry["Overall"]) for entry in entries]
        cells = []
        for entry, mean in zip(entries, means, strict=True):
            cell = f"{entry['settings'][tuned]:g}: {mean:.3f}"
            cells.append(f"**{cell}**" if mean == max(means) else cell)
        rows.append((name, tuned, " · ".join(cells)))
    return markdown_table(("row", "tuned", "candidates: mean Overall"), rows)


def extremes_table(runs):
    """Training the extremes of each group on the toy. runs: results.json's "extremes".

    A row is compared with the one that trains all samples of groups of its size.
    """
    rows = []
    for name, seeds in runs.items():
        means = {number: np.mean([run[number] for run in seeds.values()]) for number in ("after", "VQ", "distance")}
        whole = name.split(",")[0] if name.startswith("G ") else "all 16"
        against = "–"
        if name != whole:
            both = seeds.keys() & runs[whole].keys()
            differences = [seeds[seed]["after"] - runs[whole][seed]["after"] for seed in both]
            mean, half = interval(differences)
            against = f"{mean:+.3f} ± {half:.3f}"
        rows.append((name, f"{means['after']:.3f}", against, f"{means['VQ']:.3f}", f"{means['distance']:.3f}"))
    return markdown_table(("trained", "reward", "minus all of the group ± 95%", "VQ", "distance"), rows)


def correlations(results):
    """One sentence on how the rows' order agrees with the paper's."""
    values = {setting: rank_correlation(results, setting) for setting in "AB"}
    numbers = f"setting A {values['A']:+.2f}, setting B {values['B']:+.2f}"
    return f"Spearman's rank correlation with the paper, nine rows each: {numbers}."


def bench_table(parts):
    """The ratios of paper.bench, without the numbers behind its picture."""
    rows = []
    for name, ratios in parts.items():
        if name != "reward":
            rows += [(what, f"{ratio:.3g}") for what, ratio in ratios.items()]
    return markdown_table(("what", "ratio"), rows)


def gpu_table(rows):
    """What paper.gpu has measured."""
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    lines = [
        [title, *("–" if row.get(name) is None else f"{row[name]:.3g}" for name in names)]
        for title, row in rows.items()
    ]
    return markdown_table(["", *names], lines)


def tables(results):
    """{name: text} of everything that the pages take from results.json."""
    verdicts, arms = results["claims"], results["rehearsal"]
    return {
        "counts": counts(results),
        "equal variance": equal_variance(results),
        "claims of the paper": claims_table(select(verdicts, PAPER, decided=True), arms),
        "claims of the paper, undecided": claims_table(select(verdicts, PAPER, decided=False), arms),
        "our own options": claims_table(select(verdicts, OURS, decided=True), arms),
        "our own options, undecided": claims_table(select(verdicts, OURS, decided=False), arms),
        "the miniature": miniature_table(arms),
        "the miniature in full": full_miniature_table(arms),
        "tuning": tuning_table(results),
        "table 2 on the toy": table_2(results),
        "correlations": correlations(results),
        "table 2 of the paper": paper_table_2(),
        "extremes on the toy": extremes_table(results["extremes"]),
        "benchmarks": bench_table(results["bench"]),
        "gpu": gpu_table(results["gpu"]),
        "removed": claims_table(results["removed"]["claims"]),
    }


def write_tables(results, paths):
    """Put each table between its two comment lines, in the one of the pages that has a place for it."""
    pages = {path: path.read_text(encoding="utf-8") for path in paths}
    for name, text in tables(results).items():
        block = f"<!-- table: {name} -->\n{text}\n<!-- end -->"
        places = 0
        for path, page in pages.items():
            pages[path], count = re.subn(
                f"<!-- table: {re.escape(name)} -->\n.*?<!-- end -->", lambda _, b=block: b, page, flags=re.DOTALL
            )
            places += count
        if places != 1:
            names = " and ".join(str(path) for path in paths)
            raise ValueError(f"{names} must have one place for each table: got {places} for {name!r}")
    for path, page in pages.items():
        path.write_text(page, encoding="utf-8")
