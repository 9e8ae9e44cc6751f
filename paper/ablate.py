"""The paper's ablations on the toy: which of its claims hold, which do not, and how sure that is.

    python -m paper.ablate --quick     a small grid in about 10 minutes on two cores: runs/ablation/quick/results.json
    python -m paper.ablate             all of it in an hour or two: results.json, the tables of the pages, figures/
    python -m paper.ablate --tables    write the tables of RESULTS.md and paper/APPENDIX.md from results.json

Every run of the grid is a plain `python train.py` of the toy with some options changed, on one core. So its folder
(runs/ablation/…) can be looked at like that of any other run. Ctrl-C stops the grid; the same command resumes it.

A comparison must not depend on the λ_KL of a KL mode or the learning rate of an optimizer, so these are tuned: each
candidate runs on two seeds, and the best by Overall enters the grid, which has five other seeds.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import shutil
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import train
from engine.config import Config
from engine.folder import read_log
from engine.presets import PRESETS
from paper import claims, plots
from toy import world

# Half the preset's batch: the grid is about differences between settings, which show before the reward levels off.
BASE = dict(batch_size=64, micro_batch=64, iterations=40, eval_every=10)
LONG = dict(iterations=60)  # Fig. 8 is about what happens late
SCHEDULE = dict(kl_lambda_early=1e-3, kl_switch=20)  # a hundredth of the final λ_KL, as in the paper; half the run
# The controller moves between the same two λ_KL. An iteration has 36 backward passes here and 40 in the release. One
# target is the release's, 1e-5; the other is the toy's own mean KL.
CONTROLLER = dict(kl_schedule="controller", micro_batch=16, **SCHEDULE)
KL_TARGETS = {"1e-5": 1e-5, "1e-4": 1e-4}
SEEDS, TUNING_SEEDS = range(5), (5, 6)
SAMPLERS = {"sage": "sage_grpo", "flow": "flow_grpo", "dance": "dance_grpo", "cps": "cps", "exact": "exact"}


def config(settings, seed=0):
    """The toy's preset, then BASE, then a row's own settings."""
    return Config(**PRESETS["toy"] | BASE | {"seed": seed} | settings)


def matched_eta(sampler):
    """The η at which a sampler injects as much variance over the trained steps as SAGE does at its η, by bisection."""

    def injected(settings):
        return config(settings).sde().variance.sum().item()

    target = injected({})
    low, high = 0.0, 1.0 if sampler == "cps" else 4.0
    if injected(dict(sde_type=SAMPLERS[sampler], eta=high)) < target:
        raise ValueError(f"{sampler} cannot inject a variance of {target:.3f} at any η up to {high}")
    for _ in range(50):
        middle = (low + high) / 2
        if injected(dict(sde_type=SAMPLERS[sampler], eta=middle)) < target:
            low = middle
        else:
            high = middle
    return round(high, 4)


# ---------------------------------------------------------------------------------------------- the grid
def recipe(steps):
    """The toy's recipe with another number of optimizer steps per iteration; the anchor moves every ten iterations.

    More steps need a lower learning rate and a lower λ_KL. These values are near the best that `tune` finds.
    """
    rates = {1: 6e-4, 3: 4e-4, 9: 2e-4}
    lambdas = {1: 0.03, 3: 0.03, 9: 0.01}
    return dict(optimizer_steps=steps, anchor_every=10 * steps, learning_rate=rates[steps], kl_lambda=lambdas[steps])


def candidates():
    """{row: list of settings to choose from}: the rows whose settings are tuned."""
    rows = {}
    lambdas = {
        "fixed": (0.001, 0.003, 0.01, 0.03, 0.1),
        "stepwise": (0.01, 0.03, 0.1, 0.3, 1.0),
        "moving": (0.003, 0.01, 0.03, 0.1, 0.3),
        "dual": (0.003, 0.01, 0.03, 0.1, 0.3),
    }
    for steps in (1, 9):
        for mode, values in lambdas.items():
            common = dict(kl_mode=mode, **recipe(steps), **LONG)
            rows[f"kl,{steps},{mode}"] = [common | dict(kl_lambda=value) for value in values]
    rates = {1: (3e-4, 6e-4, 1.2e-3), 3: (2e-4, 4e-4, 8e-4), 9: (1e-4, 2e-4, 4e-4)}
    for steps, values in rates.items():
        rows[f"steps,{steps}"] = [recipe(steps) | dict(learning_rate=rate) for rate in values]
    rows["muon"] = [recipe(1) | dict(optimizer="muon", learning_rate=rate) for rate in (3e-4, 6e-4, 1.2e-3, 2.4e-3)]
    return rows


def candidate_row(name, settings):
    """The row of one candidate: kl,1,dual with λ_KL 0.03 is "kl,1,dual,0.03"."""
    return f"{name},{settings[claims.tuned_setting(name)]:g}"


def grid(best):
    """{row: settings} of all rows. best: {row: settings} of the tuned ones, which are part of it."""
    rows = dict(best)
    # Table 2: sampler × KL × reward setting. A fixed anchor has the λ_KL that suits it best; our exact has one row.
    modes = {
        "none": dict(kl_mode="none"),
        "fixed": dict(kl_mode="fixed", kl_lambda=best["kl,1,fixed"]["kl_lambda"]),
        "dual": {},
    }
    for sampler in SAMPLERS:
        for setting in "AB":
            for mode, settings in modes.items():
                if sampler != "exact" or (mode, setting) == ("dual", "A"):
                    rows[f"{sampler},{mode},{setting}"] = (
                        dict(sde_type=SAMPLERS[sampler], reward_weights=setting) | settings
                    )
    for sampler, sde_type in SAMPLERS.items():
        rows[f"{sampler},equalizer off"] = dict(sde_type=sde_type, equalizer=False)  # Fig. 5
    for sampler in ("flow", "dance", "cps", "exact"):
        rows[f"{sampler},equal variance"] = dict(sde_type=SAMPLERS[sampler], eta=matched_eta(sampler))
    for sampler in ("sage", "flow", "dance"):
        rows[f"{sampler},noisy last step"] = dict(sde_type=SAMPLERS[sampler], noisy_last_step=True)
    for schedule in ("two_stage", "ramp", "milder"):
        rows[f"schedule,{schedule}"] = dict(kl_schedule=schedule, **SCHEDULE)  # Fig. 7
    for text, target in KL_TARGETS.items():
        rows[f"schedule,controller,{text}"] = CONTROLLER | dict(kl_target=target)
    for steps in (1, 9):
        rows[f"kl,{steps},none"] = dict(kl_mode="none", **recipe(steps), **LONG)  # Fig. 8
    for steps in (1, 3, 9):
        rows[f"steps,{steps},moving"] = best[f"steps,{steps}"] | dict(kl_mode="moving")
    for mode in ("stepwise", "dual"):
        rows[f"kl,9,{mode},closed form"] = best[f"kl,9,{mode}"] | dict(stepwise_kl="closed_form")
    return rows


def needed(rows, chosen):
    """The rows that some claims compare."""
    names = {name for claim in chosen for pair in claim.pairs for name in pair}
    return {name: settings for name, settings in rows.items() if name in names}


# ---------------------------------------------------------------------------------------------- runs
def is_done(run, settings):
    """Whether a run folder holds the finished run. Refuses one that was made with other settings."""
    if not (run / "config.json").exists():
        return False
    found = json.loads((run / "config.json").read_text(encoding="utf-8"))
    wanted = asdict(settings)
    places = {"runs", "prompts", "eval_prompts"}  # where things lie; the toy's prompts are not in files
    differing = sorted(name for name in wanted.keys() - places if found.get(name) != wanted[name])
    if differing:
        raise ValueError(f"{run} must have the grid's settings: its {', '.join(differing)} differ; delete the folder")
    if not (run / "metrics.jsonl").exists():
        return False
    last = read_log(run)[-1]
    return last["iteration"] == settings.iterations and "eval_reward" in last


def run_one(job):
    """Train one row on one seed, or continue it. Its output goes to a .txt beside the run folder."""
    run, settings = job
    if any(run.glob("checkpoints/iteration-*")):
        arguments = ["--resume", str(run)]
    else:
        shutil.rmtree(run, ignore_errors=True)  # stopped before its first checkpoint
        arguments = as_options(settings)
    run.parent.mkdir(parents=True, exist_ok=True)
    with (
        open(run.parent / f"{run.name}.txt", "w", encoding="utf-8") as out,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(out),
    ):
        train.main(arguments)


def as_options(settings):
    """The command line of a Config: the options by which it differs from the toy's preset."""
    preset = asdict(Config(**PRESETS["toy"]))
    arguments = []
    for name, value in asdict(settings).items():
        if value == preset[name]:
            continue
        if isinstance(value, bool):
            arguments.append(f"--{name}" if value else f"--no-{name}")
        else:
            arguments.append(f"--{name}={value}")
    return arguments


def run_all(folder, rows, seeds, shorten):
    """Run what is missing, one seed after another: a grid that is stopped early then has some seeds in full."""
    jobs = []
    for seed in seeds:
        for name, settings in rows.items():
            run = folder / f"seed-{seed}" / name
            settings = shorten(config(settings | {"name": name, "runs": str(run.parent)}, seed))
            settings.check(ranks=1)
            if not is_done(run, settings):
                jobs.append((run, settings))
    total = len(rows) * len(list(seeds))
    print(f"{len(rows)} rows × {len(list(seeds))} seeds in {folder}: {total - len(jobs)} done, {len(jobs)} to run")
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count(), spawn, torch.set_num_threads, (1,)) as pool:
        futures = [pool.submit(run_one, job) for job in jobs]
        try:
            for future in tqdm(as_completed(futures), total=len(jobs), unit="run"):
                future.result()  # raises what the run raised
        except BaseException:
            for process in multiprocessing.active_children():
                process.kill()  # a run that is killed can be resumed from its last checkpoint
            raise


def whole(settings):
    return settings


def shortened(settings):
    """A run of the quick grid: 3/8 of the iterations."""
    settings.iterations = settings.iterations * 3 // 8
    settings.kl_switch = settings.kl_switch * 3 // 8
    settings.eval_every = 5
    return settings


def tune(folder):
    """Run all candidates. Returns ({row: settings of the best}, {row: one {settings, Overall} for each candidate})."""
    rows = {}
    for name, choice in candidates().items():
        for settings in choice:
            rows[candidate_row(name, settings)] = settings
    run_all(folder, rows, TUNING_SEEDS, whole)
    best, tried = {}, {}
    for name, choice in candidates().items():
        tried[name] = []
        for settings in choice:
            runs = [folder / f"seed-{seed}" / candidate_row(name, settings) for seed in TUNING_SEEDS]
            tried[name].append(
                {"settings": settings, "Overall": [round(overall(read_log(run)[-1]), 6) for run in runs]}
            )
        best[name] = max(tried[name], key=lambda entry: np.mean(entry["Overall"]))["settings"]
    return best, tried


# ---------------------------------------------------------------------------------------------- results
def overall(line):
    """VQ + MQ + TA of an evaluation."""
    return line["eval_VQ"] + line["eval_MQ"] + line["eval_TA"]


def summarise(run, noises):
    """The numbers of one finished run. Those of its end come from ODE sampling on fixed prompts and noise."""
    log = read_log(run)
    evaluations = [line for line in log if "eval_reward" in line]
    last, first_rollout = evaluations[-1], log[1]
    numbers = {name: last[f"eval_{name}"] for name in ("reward", "VQ", "MQ", "TA", "distance")}
    scores = [overall(line) for line in evaluations]
    numbers["Overall"] = scores[-1]
    numbers["fall"] = max(scores) - scores[-1]  # from the best evaluation to the last
    numbers["late_gain"] = scores[-1] - scores[-2]  # over the last ten iterations
    numbers["late_std"] = float(np.mean([line["group_std"] for line in log[1:][-10:]]))  # exploration at the end
    numbers["rollout_distance"] = first_rollout["distance_mean"]  # of the first rollouts: the sampler alone
    before, after = (torch.from_numpy(np.load(run / f"samples_{when}.npy")) for when in ("before", "after"))
    numbers["drift"] = (world.from_uint8(after) - world.from_uint8(before)).square().mean().sqrt().item()
    numbers["diversity"] = diversity(after, noises)
    numbers["diversity_lost"] = diversity(before, noises) - numbers["diversity"]
    return {name: round(value, 6) for name, value in numbers.items()}


def diversity(videos, noises):
    """Spread in pixels of the middle of a blob's path over the noises of one prompt, root mean square over prompts."""
    middle = world.measure(videos)["middle"].unflatten(0, (-1, noises))  # [prompts, noises, 2]
    return middle.var(1).mean().sqrt().item()


def collect_results(folder, rows, seeds, chosen):
    """What the pages and the pictures quote of the grid: seeds; rows, with each number once per seed; claims."""
    table = {}
    for name, settings in rows.items():
        runs = [summarise(folder / f"seed-{seed}" / name, config(settings).eval_noises) for seed in seeds]
        table[name] = {"settings": settings, **{number: [run[number] for run in runs] for number in runs[0]}}
    return {"seeds": list(seeds), "rows": table, "claims": claims.judge(table, chosen)}


def write_results(path, results):
    """Write JSON with one line for each row, claim and candidate, so that a diff shows what has changed."""
    parts = []
    for name, value in results.items():
        if isinstance(value, dict):
            lines = [f"  {json.dumps(key)}: {json.dumps(entry, ensure_ascii=False)}" for key, entry in value.items()]
            parts.append(f"{json.dumps(name)}: {{\n" + ",\n".join(lines) + "\n }")
        elif value and isinstance(value[0], dict):
            lines = [f"  {json.dumps(entry, ensure_ascii=False)}" for entry in value]
            parts.append(f"{json.dumps(name)}: [\n" + ",\n".join(lines) + "\n ]")
        else:
            parts.append(f"{json.dumps(name)}: {json.dumps(value)}")
    path.write_text("{\n " + ",\n ".join(parts) + "\n}\n", encoding="utf-8")


def read_results():
    """The shipped results of the full grid."""
    path = Path("results.json")
    if not path.is_file():
        raise SystemExit("results.json must be there: run the full grid first, python -m paper.ablate")
    return json.loads(path.read_text(encoding="utf-8"))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quick", action="store_true", help="fewer rows, two seeds, fewer iterations; the shipped tuned settings"
    )
    parser.add_argument(
        "--tables", action="store_true", help="run nothing; write the tables of the pages from results.json"
    )
    parser.add_argument("--runs", default="runs/ablation", help="folder of the runs [default: runs/ablation]")
    options = parser.parse_args()
    try:
        if options.tables:
            claims.write_tables(read_results(), claims.PAGES)
        elif options.quick:
            quick_grid(Path(options.runs) / "quick")
        else:
            full_grid(Path(options.runs))
    except KeyboardInterrupt:
        raise SystemExit("stopped; the same command resumes from the last checkpoints") from None


def full_grid(runs):
    best, tried = tune(runs / "tuning")
    rows = grid(best)
    run_all(runs / "full", rows, SEEDS, whole)
    results = collect_results(runs / "full", rows, SEEDS, claims.CLAIMS)
    results["tuning"] = tried
    if Path("results.json").exists():
        results = read_results() | results  # the rest is of other modules, and of options that were removed
    write_results(Path("results.json"), results)
    claims.write_tables(results, claims.PAGES)
    plots.ablation_pictures(partial(log_of, runs / "full", SEEDS), results, Path("figures"))
    print("wrote results.json, the tables of RESULTS.md and paper/APPENDIX.md, and figures/")


def quick_grid(folder):
    shipped = read_results()
    chosen = [claim for claim in claims.CLAIMS if claim.quick]
    rows = needed({name: row["settings"] for name, row in shipped["rows"].items()}, chosen)
    run_all(folder, rows, range(2), shortened)
    results = collect_results(folder, rows, range(2), chosen)
    write_results(folder / "results.json", results)
    print(claims.claims_table(results["claims"]))
    for words, deciding, other in (("quick", results, shipped), ("full", shipped, results)):
        same, differ = claims.agreement(deciding["claims"], other["claims"])
        print(f"\nof the claims that the {words} grid decides, {len(same)} have one sign in both grids, not: {differ}")


def log_of(folder, seeds, row):
    """The logs of a row, one per seed, for the pictures."""
    return [read_log(folder / f"seed-{seed}" / row) for seed in seeds]


if __name__ == "__main__":
    main()
