"""Settings, presets, the command line and the plan of a run."""

import dataclasses
import os
import signal
import sys

import pytest
import torch

import train
from engine import config as config_module
from engine.config import GROUPS, SETTINGS, Config, allowed_changes, input_digests, parse
from engine.presets import PRESETS
from engine.ranks import FolderError, launch_on_all_gpus
from prompts import BLOBS


# ---------------------------------------------------------------------------------------------- plans
def test_dry_run_of_the_paper_preset_shows_its_arithmetic_and_refuses_what_cannot_fit(capsys):
    with pytest.raises(SystemExit, match="the estimate must fit the GPU: got .* GiB for 24; use more GPUs"):
        train.main(["--preset", "paper", "--dry-run", "--gpus", "8", "--gpu_memory_gb", "24"])
    shown = capsys.readouterr().out
    assert "tokens per video         18,018 in training, 34,020 in evaluation" in shown
    assert "8,326,608,160" in shown and "activations" in shown
    assert "1 per iteration, of 160 micro-batches each; 100 in all, adamw" in shown
    assert "every 10 optimizer steps = 10 iteration(s)" in shown and "no position control" not in shown
    assert "samples per iteration    64 = 16 prompts × 4" in shown and "132 GB a checkpoint, 3 at most" in shown


def test_a_lora_is_planned_for_one_gpu(capsys):
    train.main(["--preset", "paper", "--dry-run", "--gpus", "1", "--gpu_memory_gb", "80", "--lora_rank", "64"])
    assert "samples per iteration    8 = 2 prompts × 4" in capsys.readouterr().out


def test_a_dry_run_without_gpus_plans_for_eight(capsys):
    train.main(["--preset", "release", "--dry-run"])
    shown = capsys.readouterr().out
    assert "samples per iteration    16 = 4 prompts × 4, on 8 rank(s)" in shown and "100 in all, muon" in shown


def test_the_dry_run_says_when_the_anchor_never_holds_the_policy_back(capsys):
    train.main(["--dry-run", "--optimizer_steps", "9", "--anchor_every", "9"])
    assert "every 9 optimizer steps = 1 iteration(s)" in (shown := capsys.readouterr().out)
    assert "no position control" in shown and "raise anchor_every" in shown
    train.main(["--dry-run", "--optimizer_steps", "9", "--anchor_every", "10"])
    assert "every 10 optimizer steps = 2 iteration(s)" in (shown := capsys.readouterr().out)
    assert "no position control" not in shown


def test_dry_run_touches_nothing(tmp_path, capsys):
    train.main(["--dry-run", "--runs", str(tmp_path / "none")])
    shown = capsys.readouterr().out
    assert "128 = 8 prompts × 16" in shown and "9 of 10" in shown and '"learning_rate": 0.0006' in shown
    assert not (tmp_path / "none").exists()


# ---------------------------------------------------------------------------------------------- presets
def test_the_paper_preset_holds_the_papers_settings():
    config, _ = parse(["--preset", "paper", "--dry-run"])
    expected = dict(
        frames=81, height=352, width=624, eval_height=480, eval_width=864, eval_steps=40, num_steps=20, shift=5.0,
        fps=24, guidance_scale=6.0, eta=0.5, group_size=4, batch_size=8, micro_batch=1, optimizer_steps=1,
        optimizer="adamw",
        learning_rate=1e-5, weight_decay=0.0, max_grad_norm=1.0, compute_dtype="bfloat16", clip_range=1e-4,
        max_advantage=5.0, noisy_last_step=True, kl_mode="dual", stepwise_kl="rollout_phase", anchor_every=10,
        beta_pos=1.0, beta_vel=0.1, kl_lambda=1e-5, kl_lambda_early=1e-7, kl_schedule="two_stage", reward_weights="B",
        sde_type="sage_grpo", equalizer=True, lora_rank=0, vae_dtype="float16",
    )  # fmt: skip
    assert {name: getattr(config, name) for name in expected} == expected
    assert config.trained_steps() == 20


def test_the_release_preset_differs_where_the_released_script_does():
    paper, _ = parse(["--preset", "paper", "--dry-run"])
    release, _ = parse(["--preset", "release", "--dry-run"])
    different = {name for name in vars(paper) if getattr(paper, name) != getattr(release, name)}
    assert different == {
        *("batch_size", "optimizer", "weight_decay", "adam_beta1", "adam_beta2"),
        *("kl_schedule", "anchor_offload"),
    }
    assert (release.batch_size, release.optimizer, release.weight_decay, release.kl_schedule) == (
        2,
        "muon",
        0.01,
        "controller",
    )


def test_the_presets_that_are_measured_hold_what_was_measured():
    """RESULTS.md has the numbers of these recipes."""
    recipe = dict(group_size=16, reward_weights="A", num_steps=10, kl_schedule="fixed", eval_steps=10)
    toy = recipe | dict(model="toy", batch_size=128, micro_batch=128, iterations=70, noisy_last_step=False,
                        learning_rate=6e-4, kl_lambda=0.1, eval_noises=2)  # fmt: skip
    mini = recipe | dict(model="mini", batch_size=64, micro_batch=32, iterations=48, learning_rate=5e-4, kl_lambda=0.03,
                         guidance_scale=3.0, frames=9, height=48, width=48, fps=8, eval_height=48, eval_width=48,
                         prompts=BLOBS, eval_prompts=BLOBS, compute_dtype="float32", vae_dtype="float32",
                         eval_every=12)  # fmt: skip
    assert PRESETS["toy"] == toy and PRESETS["mini"] == mini


def test_every_preset_can_run():
    for preset in PRESETS:
        parse(["--preset", preset, "--dry-run"])


# ---------------------------------------------------------------------------------------------- refusals
@pytest.mark.parametrize(
    "options, message",
    [
        (["--etaa", "0.5"], "unrecognized arguments: --etaa"),
        (["--kl_schedule", "controller", "--kl_lambda", "1e-8"], "it keeps λ_KL between them: got 1e-07 and 1e-08"),
        (["--sde", "cps"], "unrecognized arguments"),  # no abbreviations either
        (["--eta", "1.5", "--sde_type", "cps"], "eta must lie in [0, 1] for cps"),
        (["--num_steps", "1"], "a rollout needs at least one noisy step: got none in 1"),
        (
            ["--gpus", "8"],
            "--gpus, --gpu_memory_gb, --gpu_tflops, --gpu_price only apply to a plan: add --dry-run",
        ),
        (["--group_size", "6"], "group_size must divide batch_size × ranks: got 6 and 128 × 1"),
        (["--optimizer_steps", "2"], "optimizer_steps must divide the micro-batches of an iteration"),
        (
            ["--sde_steps", "7"],
            "sde_steps are drawn from the 6 noisy steps in the first sde_share of the schedule: got 7",
        ),
        (["--sde_steps", "4", "--kl_steps", "5"], "kl_steps must be at most the 4 trained steps: got 5"),
        (["--resume", ""], "--resume must name a run folder: got ''; a shell variable in the command is probably"),
        (["--resume", "nowhere"], "--resume must name a run folder with a config.json: got nowhere"),
        (["--resume", "nowhere", "--eta", "1"], "only --iterations may change: got eta"),
        (["--allow", "eta"], "--from and --allow only apply to a resumed run"),
        (["--resume", "nowhere", "--allow", "etaa"], "--allow takes names of settings, or "),
        (["--preset", "toy", "--gpus", "2", "--dry-run"], "the toy runs in one process"),
        (["--export", "somewhere"], "so it needs --resume with a run of HunyuanVideo"),
        (
            ["--resume", "a", "--export", "b", "--iterations", "3"],
            "--export can only be combined with --resume, --from and --allow model: got",
        ),
        (["--model", "weights/hunyuan"], "the toy preset does not read model; use --preset paper"),
        (["--lora_rank", "4", "--height", "64"], "the toy preset does not read height, lora_rank"),
        (["--preset", "paper", "--dry-run", "--gpus", "3", "--batch_size", "2"], "group_size must divide batch_size ×"),
        (
            ["--preset", "paper", "--dry-run", "--gpus", "16", "--replicate", "3"],
            "replicate must divide the number of ranks",
        ),
        (
            ["--preset", "tiny", "--dry-run", "--gpus", "6", "--group_size", "2"]
            + ["--optimizer", "muon", "--replicate", "2", "--lora_rank", "2"],
            "with muon, lora_rank must be at least the number of ranks that share a model, so that each has a row of "
            "every matrix: got 2 and 3; raise lora_rank or replicate, or use adamw",
        ),
        (
            ["--preset", "paper", "--dry-run", "--gpus", "8", "--context_parallel", "3"],
            "must divide the number of ranks",
        ),
        (
            ["--preset", "paper", "--dry-run", "--gpus", "8", "--context_parallel", "4"],
            "got 4 and 18,018 for 81 frames of 352 × 624; use 352 × 608",
        ),
    ],
)
def test_options_that_do_not_go_together(options, message, capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(options)
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_missing_files_of_the_full_run_are_named_before_a_run_folder_is_made(tmp_path, capsys):
    common = ["--preset", "paper", "--batch_size", "4", "--runs", str(tmp_path / "runs")]
    (tmp_path / "empty").mkdir()
    for extra, message in (
        (["--model", str(tmp_path / "empty")], "must hold transformer, vae"),
        (["--model", "nowhere"], "must be an existing folder or a hub id"),
        (["--videoalign", "nowhere"], "--videoalign must be the folder of VideoAlign's checkpoint: got 'nowhere'"),
        (
            ["--videoalign", str(tmp_path)],
            "--videoalign_repo must be the folder of VideoAlign's clone of its code: got ''",
        ),
    ):
        with pytest.raises(SystemExit):
            train.main([*common, *extra])
        assert message in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "extra", [["--optimizer", "muon", "--lora_rank", "2"], ["--optimizer", "muon"], ["--lora_rank", "1"]]
)
def test_muon_takes_a_lora_with_a_row_for_each_rank_and_a_full_model(extra):
    parse(["--preset", "tiny", "--dry-run", "--gpus", "2", *extra])
    parse(["--preset", "tiny", "--dry-run", "--gpus", "4", "--replicate", "2", *extra])


# ---------------------------------------------------------------------------------------------- help, launch
def test_help_explains_every_setting_in_groups(capsys):
    with pytest.raises(SystemExit):
        train.main(["--help"])
    printed = capsys.readouterr().out
    titles = [line[:-1] for line in printed.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert titles[-6:] == list(GROUPS)
    shown = " ".join(printed.split())
    assert (
        "η, exploration scale; at most 1 for cps [release: 0.5] (default 0.5)" in shown and "[release: 1e-4]" in shown
    )
    presets = "default 1e-05; toy 0.0006; tiny 0.0001; mini 0.0005; small 0.0001"
    assert f"learning rate, constant [paper: 1e-5] ({presets})" in shown
    assert "toy, tiny, mini, or hub id" in shown  # of --model
    assert len(shown.split("Train a video flow model")[0]) < 200  # the usage is short


def test_several_gpus_are_all_taken_and_given_time_to_save(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.delenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", raising=False)
    started = []
    monkeypatch.setattr(os, "execv", lambda program, command: started.append(command))
    monkeypatch.setattr(sys, "argv", ["train.py", "--preset", "paper"])
    monkeypatch.setattr(signal, "getsignal", {signal.SIGHUP: signal.SIG_IGN}.get)  # as under nohup
    launch_on_all_gpus(Config(model="toy"))
    assert not started
    launch_on_all_gpus(Config(model="a/b"))
    handed_on = started[0][started[0].index("--signals-to-handle") + 1].split(",")
    assert {*handed_on} == {"SIGINT", "SIGQUIT", "SIGTERM", "SIGUSR1", "SIGUSR2", "SIGXCPU"}
    assert "--nproc-per-node=4" in started[0] and started[0][-3:] == ["train.py", "--preset", "paper"]
    assert int(os.environ["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) >= 3600


def test_ranks_are_those_of_the_launch_or_of_the_plan(monkeypatch):
    paper = Config(model="a/b")
    started, _ = parse(["--dry-run"]), None
    options = started[1]
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert config_module.planned_ranks(paper, options) == 8
    options.dry_run = False
    assert config_module.planned_ranks(paper, options) == 1
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert (
        config_module.planned_ranks(paper, options) == 4
        and config_module.planned_ranks(Config(model="toy"), options) == 1
    )
    monkeypatch.setenv("WORLD_SIZE", "16")
    assert config_module.planned_ranks(paper, options) == 16
    options.gpus = 2
    assert config_module.planned_ranks(paper, options) == 2


def test_noisy_steps_are_drawn_anew_from_the_first_part_of_the_schedule():
    config = Config(**PRESETS["toy"], sde_steps=3, sde_share=0.6)
    assert config.trained_steps() == 3
    drawn = [config.sde(iteration).stochastic for iteration in range(60)]
    assert all(stochastic.sum() == 3 for stochastic in drawn)
    share = torch.stack(drawn).double().mean(0)
    assert (share[:6] - 0.5).abs().max() < 0.27 and not share[6:].any()  # four standard deviations
    assert torch.equal(config.sde(7).std, config.sde(7).std)  # every rank and a resumed run draw the same
    whole, (place, *_) = Config(**PRESETS["toy"]).sde(), drawn[0].nonzero().flatten()
    assert config.sde(0).std[place] == whole.std[place]


def test_the_noisy_steps_depend_on_the_seed():
    drawn = [Config(**PRESETS["toy"], sde_steps=3, seed=seed).sde(0).stochastic for seed in range(6)]
    assert not all(torch.equal(stochastic, drawn[0]) for stochastic in drawn)


@pytest.mark.parametrize(
    "options, anchored",
    [([], True), (["--beta_pos", "0"], False), (["--kl_mode", "stepwise"], False), (["--kl_mode", "fixed"], True)],
)
def test_plan_and_run_agree_on_whether_there_is_an_anchor(options, anchored, capsys):
    train.main(["--preset", "paper", "--dry-run", *options])
    shown = capsys.readouterr().out
    config, _ = parse(["--preset", "paper", "--dry-run", *options])
    assert (train.make_anchor(torch.nn.Linear(2, 2), config) is not None) == config.has_anchor == anchored
    assert ("reference passes" in shown) == anchored
    assert ("anchor refresh" in shown) == (anchored and "fixed" not in options)
    assert ("anchor 0.0" in shown) == ("reference 0.0" in shown) == (not anchored)


# ---------------------------------------------------------------------------------------------- a run that goes on
MAY_CHANGE = {  # what does not change the result, written here once more
    "name", "runs", "iterations", "checkpoint_every", "keep_checkpoints", "eval_every", "reward_timeout", "micro_batch",
    "checkpointing", "attention", "compile", "replicate", "context_parallel", "anchor_offload", "prompt_cache",
}  # fmt: skip


def another(field):
    """A value of a setting that is not its default."""
    if field.metadata["choices"]:
        return next(choice for choice in field.metadata["choices"] if choice != field.default)
    if field.type is bool:
        return not field.default
    return field.default + ("x" if field.type is str else 1)


def progress_of(config, **changes):
    settings = dataclasses.asdict(config)
    return {"iteration": 1, "ranks": 1, "settings": settings, **input_digests(config), **changes}


@pytest.mark.parametrize("name", SETTINGS)
def test_every_setting_that_changes_the_result_is_refused_on_resume(name, tmp_path):
    saved = Config(model="a/b")
    fields = {field.name: field for field in dataclasses.fields(Config)}
    value = another(fields[name])
    if name in ("prompts", "eval_prompts"):
        value = str(tmp_path / "others.txt")
        (tmp_path / "others.txt").write_text("another prompt\n")
    if name == "reward":
        value = f"{tmp_path}/own.py:f"
        (tmp_path / "own.py").write_text("def f(videos, prompts): ...\n")
    config = dataclasses.replace(saved, **{name: value})
    if name in MAY_CHANGE:
        assert allowed_changes(config, 1, progress_of(saved), []) == {}
        return
    if name in ("lora_rank", "optimizer", "kl_mode"):  # the tensors of a checkpoint depend on them
        with pytest.raises(FolderError, match=f"so --allow cannot change these: got {name} "):
            allowed_changes(config, 1, progress_of(saved), [name])
        return
    with pytest.raises(FolderError, match=f"got {name} .*--allow {name};"):
        allowed_changes(config, 1, progress_of(saved), [])
    assert list(allowed_changes(config, 1, progress_of(saved), [name])) == [name]
