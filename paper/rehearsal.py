"""How settings act on the full run's path, measured in short runs of the miniature (`train.py --preset mini`).

    python -m paper.rehearsal              all arms on five seeds; results.json, and a table on the screen
    python -m paper.rehearsal --only bf16  one arm
    python -m paper.rehearsal --table      run nothing; print the table from results.json

An arm changes some settings of a short run (SHORT). Each of its runs takes one core, or two where it has two ranks. A
run is a plain command line, so its folder (runs/rehearsal/…) can be looked at like that of any other run. Ctrl-C stops
all; the same command resumes them, a run that is half done from its last checkpoint.
"""

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from tqdm import tqdm

from engine.folder import read_log
from engine.presets import MINI, PRESETS
from paper.ablate import read_results, write_results
from paper.claims import SEEDS, miniature_table
from sde import SDE_TYPES

# Enough iterations for a gain that is well above the seeds' spread, in about a minute and a half on one core.
SHORT = ["--iterations", "8", "--eval_every", "8", "--checkpoint_every", "4"]
TWO_RANKS = 2
HALVED = ["--guidance_gradient", "conditional", "--checkpointing", "attention", "--kl_steps", "3"]
FEW_NOISY = ["--sde_steps", "4"]
TWICE = ["--iterations", "16"]
# The release's optimizer, at the best learning rate of 5e-4, 1e-3, 2e-3 and 4e-3 on seed 5
MUON = ["--optimizer", "muon", "--weight_decay", "0.01", "--learning_rate", "2e-3"]
LORA = ["--lora_rank", "16", "--learning_rate", "5e-3"]  # the best of 5e-4, 2e-3, 5e-3 and 1e-2 on seed 0


def arms():
    """{arm: its options}. Those whose names begin with "2 ranks" run under torchrun; see `commands`."""
    _, *samplers = SDE_TYPES  # the first is the default
    return {
        "short run": [],
        "bf16": ["--compute_dtype", "bfloat16"],
        "LoRA 16": LORA,
        "2 ranks": [],
        "2 ranks, LoRA 16, bf16": [*LORA, "--compute_dtype", "bfloat16"],
        "2 ranks, then 1": [],
        "guidance 1": ["--guidance_scale", "1"],
        "guidance 6": ["--guidance_scale", "6"],
        "gradient through the conditional branch alone": ["--guidance_gradient", "conditional"],
        # N = 10, the paper's, is longer than a short run: its anchor stays where it was.
        "anchor refreshed every 2 optimizer steps": ["--anchor_every", "2"],
        "no KL": ["--kl_mode", "none"],
        "equalizer off": ["--no-equalizer"],
        "Muon": MUON,
        "two optimizer steps": ["--optimizer_steps", "2", "--anchor_every", "20"],
        "position KL on 3 of 10 steps": ["--kl_steps", "3"],
        "noise on 4 steps of the first 6": FEW_NOISY,
        "halved passes": HALVED,
        # With twice the iterations, the FLOPs of a short run; of halved passes 10% more.
        "halved passes, twice the iterations": [*HALVED, *TWICE],
        "noise on 4 steps, twice the iterations": [*FEW_NOISY, *TWICE],
        "noise on 4 steps, twice the iterations, equalizer off": [*FEW_NOISY, *TWICE, "--no-equalizer"],
        **extremes(),
        **{sampler: ["--sde_type", sampler] for sampler in samplers},
    }


def extremes():
    """Training the extremes of each group alone, at fewer FLOPs, and with twice the rollouts at about those of halved
    passes.
    """
    found = {"8 of 16 trained": ["--train_samples", "8"]}
    for trained in (8, 4, 2):
        for rollouts, prompts in (("", 4), (", twice the rollouts", 8)):
            batch = ["--batch_size", str(16 * prompts), "--micro_batch", str(min(32, trained * prompts))]
            options = [*HALVED, "--train_samples", str(trained), *batch]
            found[f"halved passes, {trained} of 16 trained{rollouts}"] = options
    for group in (8, 4):
        options = [*HALVED, "--group_size", str(group)]
        found[f"halved passes, groups of {group}"] = options
        found[f"halved passes, groups of {group}, {group // 2} trained"] = [
            *options,
            "--train_samples",
            str(group // 2),
        ]
    half, quarter = found["halved passes, 8 of 16 trained"], found["halved passes, 4 of 16 trained, twice the rollouts"]
    found["halved passes, 8 of 16 trained, λ_KL .045"] = [*half, "--kl_lambda", "0.045"]
    found["halved passes, 4 of 16 trained, twice the rollouts, λ_KL .06"] = [*quarter, "--kl_lambda", "0.06"]
    found["LoRA 16, halved passes"] = [*LORA, *HALVED]
    found["LoRA 16, halved passes, 8 of 16 trained"] = [*LORA, *half]
    return found


# ---------------------------------------------------------------------------------------------- runs
def commands(arm, options, run, seed):
    """The command lines, one after another, that make a run of an arm, or finish one."""
    whole = ["--preset", MINI, "--runs", str(run.parent), "--name", run.name, "--seed", str(seed), *SHORT, *options]
    started = any(run.glob("checkpoints/iteration-*"))
    begin = ["--resume", str(run)] if started else whole
    if arm == "2 ranks, then 1":
        middle = str(int(SHORT[1]) // 2)
        finish = [sys.executable, "train.py", "--resume", str(run), "--iterations", SHORT[1]]
        if started:
            return [finish]
        return [[*torchrun(), *whole, "--iterations", middle], finish]
    if arm.startswith("2 ranks"):
        return [[*torchrun(), *begin]]
    return [[sys.executable, "train.py", *begin]]


def torchrun():
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={TWO_RANKS}", "train.py"]


def run_one(arm, options, run, seed):
    """Make a run and return its numbers. Its output goes to a .txt beside its folder."""
    run.parent.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with open(run.parent / f"{run.name}.txt", "a", encoding="utf-8") as out:
        for command in commands(arm, options, run, seed):
            if arm == "2 ranks, then 1" and "--resume" in command:
                join_ranks(run)
            subprocess.run(command, env=environment, stdout=out, stderr=out, check=True)
    return summarise(run)


def join_ranks(run):
    """Let one rank continue what two ranks began: it takes the samples of both."""
    path = run / "config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings["batch_size"] = PRESETS[MINI]["batch_size"]
    path.write_text(json.dumps(settings, indent=1, ensure_ascii=False), encoding="utf-8")


def summarise(run):
    """The rewards of the first and the last evaluation, and the scores of the last."""
    evaluations = [line for line in read_log(run) if "eval_reward" in line]
    numbers = {"before": evaluations[0]["eval_reward"], "after": evaluations[-1]["eval_reward"]}
    for name in ("VQ", "MQ", "TA", "distance"):
        numbers[name] = evaluations[-1][f"eval_{name}"]
    return {name: round(value, 6) for name, value in numbers.items()}


def run_all(folder, chosen, seeds, workers):
    """Run what results.json lacks, seed by seed, and write each result into it as soon as its run has ended."""
    results = read_results()
    table = results.setdefault("rehearsal", {})
    jobs = []
    for seed in seeds:
        for arm, options in chosen.items():
            entry = table.setdefault(arm, {"options": [*SHORT, *options], "seeds": {}})
            if entry["options"] != [*SHORT, *options]:
                raise SystemExit(f"results.json must have this grid's settings: {arm} differs; delete its entry")
            if str(seed) not in entry["seeds"]:
                jobs.append((arm, options, folder / f"seed-{seed}" / arm, seed))
    with ThreadPoolExecutor(workers) as pool:  # each job is a process of its own
        futures = {pool.submit(run_one, *job): job for job in jobs}
        for future in tqdm(as_completed(futures), total=len(jobs), unit="run"):
            arm, _, _, seed = futures[future]
            table[arm]["seeds"][str(seed)] = future.result()
            write_results(Path("results.json"), results)
    return table


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=arms(), help="the arms to run [default: all]")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="how many seeds, from 0 on [default: 5]")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="runs at a time [default: one a core]")
    parser.add_argument("--runs", default="runs/rehearsal", help="folder of the runs [default: runs/rehearsal]")
    parser.add_argument("--table", action="store_true", help="run nothing; print the table from results.json")
    options = parser.parse_args()
    table = read_results().get("rehearsal", {})
    if not options.table:
        chosen = {arm: settings for arm, settings in arms().items() if not options.only or arm in options.only}
        table = run_all(Path(options.runs), chosen, range(options.seeds), options.workers)
    print(miniature_table(table))


if __name__ == "__main__":
    main()
