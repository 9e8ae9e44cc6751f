"""Settings, presets, the command line and the plan of a run."""

import re
import time

import pytest
import torch

import config as config_module
import train
from config import PRESETS, Config, parse


# ---------------------------------------------------------------------------------------------- plans
@pytest.mark.parametrize(
    "plan",
    [
        ["--gpus", "8", "--gpu_memory_gb", "80"],
        ["--gpus", "1", "--gpu_memory_gb", "141", "--lora_rank", "64"],
    ],
)
def test_dry_run_of_the_paper_preset_shows_its_arithmetic(plan, capsys):
    started = time.perf_counter()
    train.main(["--preset", "paper", "--dry-run", *plan])
    assert time.perf_counter() - started < 60
    shown = capsys.readouterr().out
    assert "tokens per video         18,018 in training, 34,020 in evaluation" in shown
    assert "8,326,608,160" in shown and "activations" in shown
    assert "1 per iteration, of 160 micro-batches each; 100 in all, adamw" in shown
    assert "every 10 optimizer steps = 10 iteration(s)" in shown and "no position control" not in shown
    samples = "64 = 16 prompts × 4" if "8" in plan else "8 = 2 prompts × 4"
    assert f"samples per iteration    {samples}" in shown


def test_dry_run_refuses_what_cannot_fit():
    with pytest.raises(SystemExit, match="the estimate must fit the GPU: got .* GiB for 24; use more GPUs"):
        train.main(["--preset", "paper", "--dry-run", "--gpus", "8", "--gpu_memory_gb", "24"])


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
        beta_pos=1.0, beta_vel=0.1, kl_lambda=1e-5, kl_lambda_early=1e-7, kl_schedule="two_stage", reward_setting="B",
        sde_type="sage_grpo", equalizer=True, lora_rank=0,
    )  # fmt: skip
    assert {name: getattr(config, name) for name in expected} == expected
    assert config.trained_steps() == 20


def test_the_release_preset_differs_where_the_released_script_does():
    paper, _ = parse(["--preset", "paper", "--dry-run"])
    release, _ = parse(["--preset", "release", "--dry-run"])
    different = {name for name in vars(paper) if getattr(paper, name) != getattr(release, name)}
    assert different == {"batch_size", "optimizer", "weight_decay", "kl_schedule", "kl_switch", "anchor_offload"}
    assert (release.batch_size, release.optimizer, release.weight_decay, release.kl_schedule) == (
        2,
        "muon",
        0.01,
        "ramp",
    )


def test_every_preset_can_run():
    for preset in PRESETS:
        parse(["--preset", preset, "--dry-run"])


# ---------------------------------------------------------------------------------------------- refusals
@pytest.mark.parametrize(
    "options, message",
    [
        (["--etaa", "0.5"], "unrecognized arguments: --etaa"),
        (["--sde", "cps"], "unrecognized arguments"),  # no abbreviations either
        (["--sde_type", "ddpm"], "invalid choice: 'ddpm'"),
        (["--eta", "1.5", "--sde_type", "cps"], "eta must lie in [0, 1] for cps"),
        (["--eta", "0"], "eta must lie in [0.001, 10]: got 0.0; the default is 0.5"),
        (["--num_steps", "0"], "num_steps must lie in [1, 1000]: got 0"),
        (["--num_steps", "1"], "a rollout needs a stochastic step: got none of 1"),
        (["--group_size", "1"], "group_size must be at least 2, for samples to be compared with: got 1"),
        (["--gpus", "8"], "--gpus, --gpu_memory_gb, --gpu_tflops plan a run that is not started: add --dry-run"),
        (["--group_size", "6"], "group_size must divide batch_size × ranks: got 6 and 128 × 1"),
        (["--optimizer_steps", "2"], "optimizer_steps must divide the micro-batches of an iteration"),
        (["--optimizer", "adam"], "invalid choice: 'adam'"),
        (["--learning_rate", "-1"], "learning_rate must lie in [1e-10, 1]: got -1.0"),
        (["--weight_decay", "-1"], "weight_decay must lie in [0, 1]: got -1.0"),
        (["--iterations", "0"], "iterations must lie in [1, 1e+07]: got 0"),
        (["--max_failed_rewards", "1"], "max_failed_rewards is a share in [0, 1)"),
        (["--resume", ""], "--resume must name a run folder: got ''; a shell variable in the command is probably"),
        (["--resume", "nowhere"], "--resume must name a run folder with a config.json: got nowhere"),
        (["--preset", "toy", "--gpus", "2", "--dry-run"], "the toy runs on one process"),
        (
            ["--export", "somewhere"],
            "--export writes what diffusers loads, so it needs --resume with a run of HunyuanVideo",
        ),
        (["--model", "weights/hunyuan"], "the toy preset does not read model; use --preset paper"),
        (["--lora_rank", "4", "--height", "64"], "the toy preset does not read height, lora_rank"),
        (
            ["--preset", "paper", "--dry-run", "--gpus", "3", "--batch_size", "2"],
            "group_size must divide batch_size × ranks",
        ),
        (["--preset", "paper", "--dry-run", "--gpus", "16", "--replicate", "3"], "replicate must divide the ranks"),
        (["--preset", "paper", "--dry-run", "--gpus", "8", "--context_parallel", "3"], "must divide the ranks"),
        (
            ["--preset", "paper", "--dry-run", "--gpus", "8", "--context_parallel", "4"],
            "got 4 and 18,018 for 81 frames of 352 × 624; use 352 × 608",
        ),
        (["--preset", "paper", "--dry-run", "--frames", "80"], "frames must be 4k + 1"),
        (["--preset", "paper", "--dry-run", "--eval_width", "850"], "height and width must be multiples of 16"),
        (["--preset", "paper", "--dry-run", "--lora_rank", "-1"], "lora_rank must lie in [0, 4096]: got -1"),
        (["--preset", "paper", "--dry-run", "--prompts", "nowhere.txt"], "the prompt file must exist: got nowhere.txt"),
    ],
)
def test_settings_are_refused_before_any_work(options, message, capsys):
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


# ---------------------------------------------------------------------------------------------- help, launch
def test_help_explains_every_setting_in_groups(capsys):
    with pytest.raises(SystemExit):
        train.main(["--help"])
    printed = capsys.readouterr().out
    titles = [line[:-1] for line in printed.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert titles[-5:] == ["method", "optimization", "run", "video model", "evaluation"]
    shown = " ".join(printed.split())
    assert (
        "η, exploration scale; at most 1 for cps [release: 0.5] (default 0.5)" in shown and "[release: 1e-4]" in shown
    )
    assert "learning rate, constant [paper: 1e-5] (default 1e-05; toy 0.0006; tiny 0.0001; mini 0.0005)" in shown
    assert len(shown.split("Train a video flow model")[0]) < 200  # the usage is short


def test_several_gpus_are_all_taken_and_given_time_to_save(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.delenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", raising=False)
    started = []
    monkeypatch.setattr(train.os, "execv", lambda program, command: started.append(command))
    monkeypatch.setattr(train.sys, "argv", ["train.py", "--preset", "paper"])
    train.launch_on_all_gpus(Config(model="toy"))
    assert not started
    train.launch_on_all_gpus(Config(model="a/b"))
    assert "--nproc-per-node=4" in started[0] and started[0][-3:] == ["train.py", "--preset", "paper"]
    assert int(train.os.environ["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) >= 3600


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


@pytest.mark.parametrize(
    "options, rule",
    [
        (["--sde_steps", "7"], "sde_steps are drawn from the 6 noisy steps .*: got 7; lower it"),
        (["--sde_steps", "4", "--kl_steps", "5"], "kl_steps are among the 4 trained steps: got 5"),
    ],
)
def test_steps_that_cannot_be_drawn(options, rule, capsys):
    with pytest.raises(SystemExit):
        parse(options)
    assert re.search(rule, capsys.readouterr().err)
