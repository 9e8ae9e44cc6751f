"""The paper's ablations on the toy: which of its claims hold here, which do not, and how sure we are.

    python -m paper.ablate --quick     a small grid, in about 10 minutes on two cores   -> runs/ablation/quick/results.json
    python -m paper.ablate             all of it, in about 2 hours on two cores         -> results.json, figures/

Every run of the grid is one plain `python train.py` of the toy with some options changed, on one core, so each of its
folders (runs/ablation/…) can be looked at like any other run. Ctrl-C stops; the same command goes on where it stopped.
"""

import argparse
import contextlib
import itertools
import json
import multiprocessing
import os
import shutil
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import train
from sde import SDE_TYPES
from paper import claims, plots
from toy import world
from trust_region import KL_MODES

# Half the preset's batch: the grid is about differences between settings, which show before the reward levels off.
BASE = dict(batch_size=64, micro_batch=64, updates=40, kl_switch=20, eval_every=10)
# Fig. 8: hot enough that a policy without a trust region leaves the manifold within the run.
HOT = dict(learning_rate=4e-4, updates=80, kl_schedule="fixed")
RIVALS = [sde_type for sde_type in SDE_TYPES if sde_type != "sage_grpo"]


def config(settings, seed=0):
    """The toy's preset, then BASE, then a row's own settings."""
    return train.Config(**train.PRESETS["toy"] | BASE | {"seed": seed} | settings)


def matched_eta(sde_type):
    """The η at which a sampler injects as much variance over the trained steps as SAGE does at its η, by bisection."""

    def injected(eta, sde_type=sde_type):
        return config(dict(sde_type=sde_type, eta=eta)).sde().variance.sum().item()

    target, low, high = injected(config({}).eta, "sage_grpo"), 0.0, 1.0 if sde_type == "cps" else 4.0
    if injected(high) < target:
        raise ValueError(f"{sde_type} cannot inject a variance of {target:.3f} at any η up to {high}: got {injected(high):.3f}")
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if injected(middle) < target else (low, middle)
    return round(high, 4)


def grid():
    """{label: settings} of all rows. A row that two figures share is run once."""
    rows = [
        # Table 2: sampler × KL × reward setting. The dual rows of setting A are Fig. 5's with the equalizer.
        dict(sde_type=sde_type, kl_mode=mode, reward_setting=setting)
        for setting in "AB"
        for mode in ("dual", "none", "fixed")
        for sde_type in SDE_TYPES
    ]
    rows += [dict(sde_type=sde_type, equalizer=False) for sde_type in SDE_TYPES]  # Fig. 5
    rows += [dict(kl_schedule=schedule) for schedule in ("fixed", "milder")]  # Fig. 7; two_stage is the base row
    rows += [dict(kl_mode=mode, **HOT) for mode in KL_MODES]  # Fig. 8
    rows += [dict(sde_type=sde_type, eta=matched_eta(sde_type)) for sde_type in RIVALS]  # the same injected variance
    rows += [dict(sde_type=sde_type, noisy_last_step=True) for sde_type in ("sage_grpo", "flow_grpo", "dance_grpo")]
    rows += [dict(kl_velocity="rollout_phase")]
    # Again where it has more to do: a step-wise term that weighs as much as the policy's.
    rows += [dict(kl_mode="stepwise", kl_lambda=0.3, kl_velocity=form, **HOT) for form in ("closed_form", "rollout_phase")]
    return {label(row): row for row in rows}


def label(settings):
    """The options by which a row differs from the base row; also the name of its run folder."""
    base = asdict(config({}))
    return ",".join(f"{name}={value}" for name, value in settings.items() if base[name] != value) or "base"


def needed(chosen):
    """The rows of the grid that some claims compare."""
    labels = {label for claim in chosen for pair in claim.pairs for label in pair}
    return {name: settings for name, settings in grid().items() if name in labels}


# ---------------------------------------------------------------------------------------------- runs
def is_done(run, settings):
    """Whether a run folder holds the finished run. Refuses one that was made with other settings."""
    if not (run / "config.json").exists():
        return False
    found = json.loads((run / "config.json").read_text())
    wanted = asdict(settings)
    places = {"runs", "prompts", "eval_prompts"}  # where things lie; the toy's prompts are not in files
    if differing := sorted(name for name in wanted.keys() - places if found.get(name) != wanted[name]):
        raise ValueError(f"{run} must have the grid's settings: its {', '.join(differing)} differ; delete the folder")
    return (run / "samples_after.npy").exists() and read_log(run)[-1]["update"] == settings.updates


def read_log(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def run_one(job):
    """Train one row on one seed, or go on with it; what it prints goes to a .txt beside the run folder."""
    run, settings = job
    if (run / "checkpoints").exists() and any((run / "checkpoints").glob("update-*")):
        arguments = ["--resume", str(run)]
    else:
        shutil.rmtree(run, ignore_errors=True)  # stopped before its first checkpoint
        preset = asdict(train.Config(**train.PRESETS["toy"]))
        changed = {name: value for name, value in asdict(settings).items() if value != preset[name]}
        flags = {True: "--{}", False: "--no-{}"}
        arguments = [flags[v].format(k) if type(v) is bool else f"--{k}={v}" for k, v in changed.items()]
    run.parent.mkdir(parents=True, exist_ok=True)
    with open(run.parent / f"{run.name}.txt", "w") as out, contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        train.main(arguments)
    if not is_done(run, settings):  # Ctrl-C reached this process, too: train.py has saved a checkpoint
        raise KeyboardInterrupt


def run_all(folder, rows, seeds, shorten):
    """Run what is missing, seed by seed, so that a grid that is stopped early has whole seeds."""
    jobs = []
    for seed in seeds:
        for name, settings in rows.items():
            run = folder / f"seed-{seed}" / name
            settings = config(settings | {"name": name, "runs": str(run.parent)}, seed)
            shorten(settings)
            settings.check(ranks=1)
            if not is_done(run, settings):
                jobs.append((run, settings))
    missing, total = len(jobs), len(rows) * len(seeds)
    print(f"{len(rows)} rows × {len(seeds)} seeds in {folder}: {total - missing} done, {missing} to run")
    jobs, running, spawn = iter(jobs), set(), multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count(), spawn, torch.set_num_threads, (1,)) as pool, tqdm(total=missing, unit="run") as bar:
        while True:  # one job a process at a time, so that none waits in a queue when the grid is stopped
            running |= {pool.submit(run_one, job) for job in itertools.islice(jobs, os.cpu_count() - len(running))}
            if not running:
                break
            finished, running = wait(running, return_when=FIRST_COMPLETED)
            for future in finished:
                future.result()  # raises what the run raised
                bar.update()


# ---------------------------------------------------------------------------------------------- results
def summarise(run, noises):
    """The numbers of one finished run. Final ones are of ODE sampling on fixed prompts and noise."""
    log = read_log(run)
    evaluations = [line for line in log if "eval_reward" in line]
    last, first_rollout = evaluations[-1], log[1]
    numbers = {name: last[f"eval_{name}"] for name in ("reward", "VQ", "MQ", "TA", "distance")}
    overall = [line["eval_VQ"] + line["eval_MQ"] + line["eval_TA"] for line in evaluations]
    numbers["Overall"] = overall[-1]
    numbers["fall"] = max(overall) - overall[-1]  # from the best evaluation to the last
    numbers["late_gain"] = overall[-1] - overall[-2]  # over the last ten updates
    numbers["rollout_distance"] = first_rollout["distance_mean"]  # of the first rollouts: the sampler alone
    before, after = (torch.from_numpy(np.load(run / f"samples_{when}.npy")) for when in ("before", "after"))
    numbers["drift"] = (world.from_uint8(after) - world.from_uint8(before)).square().mean().sqrt().item()
    for when, videos in (("_before", before), ("", after)):
        middle = world.measure(videos)["middle"].unflatten(0, (-1, noises))  # [prompts, noises, 2] pixels
        numbers["diversity" + when] = middle.var(1).mean().sqrt().item()
    numbers["diversity_lost"] = numbers.pop("diversity_before") - numbers["diversity"]
    return {name: round(value, 6) for name, value in numbers.items()}


def collect_results(folder, rows, seeds, chosen):
    """{rows: {label: {settings, {number: [one per seed]}}}, claims: […]}, all that README and pictures quote."""
    table = {}
    for name, settings in rows.items():
        runs = [summarise(folder / f"seed-{seed}" / name, config(settings).eval_noises) for seed in seeds]
        table[name] = {"settings": settings, **{number: [run[number] for run in runs] for number in runs[0]}}
    return {"seeds": list(seeds), "rows": table, "claims": claims.judge(table, chosen)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rows, seeds and updates")
    parser.add_argument("--runs", default="runs/ablation", help="folder of the runs (default runs/ablation)")
    parser.add_argument("--seeds", type=int, default=0, help="number of seeds (default 5; quick: 2)")
    options = parser.parse_args()
    if options.seeds and options.seeds - 1 not in claims.STUDENT:
        parser.error(f"an interval needs 2 to 10 seeds: got --seeds {options.seeds}")
    folder = Path(options.runs) / ("quick" if options.quick else "full")
    chosen = [claim for claim in claims.CLAIMS if claim.quick or not options.quick]
    rows, seeds = (needed(chosen), range(options.seeds or 2)) if options.quick else (grid(), range(options.seeds or 5))

    def shorten(settings):
        if options.quick:
            settings.updates, settings.kl_switch = settings.updates * 3 // 8, settings.kl_switch * 3 // 8

    try:
        run_all(folder, rows, seeds, shorten)
    except KeyboardInterrupt:
        raise SystemExit("stopped; the same command goes on from the last checkpoints") from None
    results = collect_results(folder, rows, seeds, chosen)
    path = folder / "results.json" if options.quick else Path("results.json")
    if path.exists() and "removed" in (before := json.loads(path.read_text())):
        results["removed"] = before["removed"]  # measured with a version that still had those options
    path.write_text(json.dumps(results, indent=1, ensure_ascii=False))
    for kind in (claims.PAPER, claims.OURS):
        print("\n" + claims.markdown(results["claims"], kind))
    if options.quick and Path("results.json").exists():
        full = json.loads(Path("results.json").read_text())["claims"]
        for words, grids in ("quick", (results["claims"], full)), ("full", (full, results["claims"])):
            same, differ = claims.agreement(*grids)
            print(f"\nof the claims that the {words} grid decides, {len(same)} have one sign in both grids, not: {differ}")
    if not options.quick:
        print("\n" + claims.table_2(results))
        plots.ablation_pictures(partial(log_of, folder, seeds), results, Path("figures"))
    print(f"wrote {path}" + ("" if options.quick else " and figures/"))


def log_of(folder, seeds, row):
    """The logs of a row, one per seed, for the pictures."""
    return [read_log(folder / f"seed-{seed}" / row) for seed in seeds]


if __name__ == "__main__":
    main()
