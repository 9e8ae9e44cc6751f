"""The full run's path on the real classes with tiny random weights: one process, two ranks, killed saves, export."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from diffusers import HunyuanVideo15Transformer3DModel

import checkpoint
import train
from videoalign import read_video

ROOT = Path(train.__file__).parent
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # matrices this small lose time to a second thread
    yield
    torch.set_num_threads(before)


def lines_of(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def options(folder, name, ranks, *extra):
    per_rank = str(4 // ranks)  # the same global batch: one group of 4, which spans both ranks
    sizes = ["--batch_size", per_rank, "--micro_batch", per_rank, "--accumulation", "1"]
    rare = ["--updates", "5", "--eval_every", "100", "--checkpoint_every", "5", "--eval_steps", "1", "--num_steps", "2"]
    return ["--preset", "tiny", "--runs", str(folder), "--name", name, *sizes, *rare, *extra]


LORA = ["--lora_rank", "4", "--learning_rate", "1e-3"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """full and lora, by one rank and by two; two ranks then resume their own full run for one more update.

    And both in bf16, the paper's compute_dtype, with three evaluation prompts: one rank makes a video again.
    """
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "three.txt").write_text("a cat\na dog\na boat\n")
    bf16 = ["--compute_dtype", "bfloat16", "--updates", "1", "--eval_prompts", str(folder / "three.txt")]
    two = [
        *options(folder, "full-2", 2), "/", *options(folder, "lora-2", 2, *LORA), "/",
        *options(folder, "more-2", 2, "--updates", "4"), "/", "--resume", str(folder / "more-2"), "--updates", "5", "/",
        *options(folder, "full-bf16", 2, *bf16), "/", *options(folder, "lora-bf16", 2, *LORA, *bf16),
    ]  # fmt: skip
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "tests/two_ranks.py"]
    with open(folder / "output", "w") as output:
        process = subprocess.Popen([*launch, *two], cwd=ROOT, env=ENVIRONMENT, stdout=output, stderr=subprocess.STDOUT)
        train.main(options(folder, "full-1", 1))
        train.main(options(folder, "lora-1", 1, *LORA))
        assert process.wait(timeout=200) == 0, (folder / "output").read_text()[-3000:]
    return folder


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_two_ranks_equal_one(runs, kind):
    one, two = lines_of(runs / f"{kind}-1"), lines_of(runs / f"{kind}-2")
    assert len(one) == len(two) == 6
    for a, b in zip(one[1:], two[1:], strict=True):
        for name in ("policy_loss", "kl_velocity", "kl_position", "ratio_mean", "grad_norm"):
            assert b[name] == pytest.approx(a[name], abs=1e-5), name
        assert b["reward_mean"] == pytest.approx(a["reward_mean"], abs=0.02)  # uint8 videos round differently
    assert two[-1]["ratio_min"] < 1 and two[-1]["kl_position"] > 0  # it did move
    assert {line["rollout_passes"] for line in one[1:]} == {4 * 2 * 2} and two[-1]["rollout_passes"] == 2 * 2 * 2


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_two_ranks_in_bf16(runs, kind):
    exact, rounded = lines_of(runs / f"{kind}-2")[1], lines_of(runs / f"{kind}-bf16")[1]
    assert rounded["optimizer_updates"] == exact["optimizer_updates"] == 2 and rounded["reward_failed"] == 0
    for name, error in {"policy_loss": 1e-3, "ratio_mean": 1e-3, "VQ_mean": 0.05, "grad_norm": exact["grad_norm"] / 2}.items():
        assert rounded[name] == pytest.approx(exact[name], abs=error), name
    assert rounded["grad_norm"] != exact["grad_norm"]  # it was computed in bf16
    videos = sorted(path.name for path in (runs / f"{kind}-bf16" / "eval" / "update-000001").iterdir())
    assert videos == ["000.mp4", "001.mp4", "002.mp4", "contact_sheet.png"]


def test_two_ranks_resume_bit_for_bit(runs):
    whole, parts = lines_of(runs / "full-2"), lines_of(runs / "more-2")

    def training(line):
        return {k: v for k, v in line.items() if not k.endswith("_seconds") and not k.startswith("eval_")}

    assert [training(line) for line in whole] == [training(line) for line in parts]


def test_one_rank_resumes_the_checkpoint_of_two(runs):
    """batch_size counts samples per rank, so a run on fewer ranks needs the setting that keeps its groups whole."""
    settings = json.loads((runs / "full-2" / "config.json").read_text())
    (runs / "full-2" / "config.json").write_text(json.dumps(settings | {"batch_size": 4, "micro_batch": 4}))
    train.main(["--resume", str(runs / "full-2"), "--updates", "6"])
    train.main(["--resume", str(runs / "full-1"), "--updates", "6"])
    two, one = lines_of(runs / "full-2")[-1], lines_of(runs / "full-1")[-1]
    assert two["update"] == one["update"] == 6
    for name in ("policy_loss", "kl_velocity", "kl_position", "ratio_mean", "grad_norm"):
        assert two[name] == pytest.approx(one[name], abs=1e-5), name


def test_a_run_leaves_videos_contact_sheets_and_an_export_for_diffusers(runs, tmp_path, capsys):
    run = runs / "full-1"
    train.main(["--resume", str(run), "--export", str(tmp_path / "out")])
    assert f"exported to {tmp_path / 'out'}" in capsys.readouterr().out
    for folder in ("update-000000", "update-000005"):
        video, fps = read_video(run / "eval" / folder / "000.mp4")
        assert video.shape == (5, 3, 64, 64) and fps == 24
        assert (run / "eval" / folder / "contact_sheet.png").stat().st_size > 0
    assert "eval_Overall" in lines_of(run)[0]

    config, _ = train.parse(["--resume", str(run)])
    policy, *_, prompts = train.build(config, run, train.OneProcess(), torch.device("cpu"), None)
    module = policy.module
    checkpoint.load(checkpoint.latest(run), module, torch.optim.AdamW(
        [p for p in module.parameters() if p.requires_grad]), train.Anchor(module, 3))  # fmt: skip
    stock = HunyuanVideo15Transformer3DModel.from_pretrained(tmp_path / "out")
    x, sigma = torch.randn(1, *policy.latent_shape, generator=train.generator("x")), torch.tensor([0.7])
    conditions = policy.encode(prompts[:1])
    with torch.no_grad():
        ours = policy.velocity(x, sigma, conditions)
        policy.module = stock
        theirs = policy.velocity(x, sigma, conditions)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    assert not torch.equal(stock.proj_out.weight, HunyuanVideo15Transformer3DModel.from_pretrained(
        run / "tiny" / "model", subfolder="transformer").proj_out.weight)  # fmt: skip


SAVE_FOR_EVER = """
import sys, torch, checkpoint
from trust_region import Anchor
module = torch.nn.Linear(600, 600)
optimizer, anchor = torch.optim.AdamW(module.parameters()), Anchor(module, 2)
module(torch.ones(1, 600)).sum().backward()
optimizer.step()
for update in range(1, 10**6):
    with torch.no_grad():
        module.weight.fill_(update)
    checkpoint.save(sys.argv[1] + "/checkpoints", module, optimizer, anchor, {"update": update})
    print(update, flush=True)
"""


@pytest.mark.parametrize("moment", range(6))
def test_a_killed_save_leaves_a_resumable_run(tmp_path, moment):
    """kill -9 at six moments of a loop that does nothing but save: the newest complete checkpoint is whole and current."""
    command = [sys.executable, "-c", SAVE_FOR_EVER, str(tmp_path)]
    process = subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True)
    announced = [int(process.stdout.readline()) for _ in range(2)][-1]
    time.sleep(0.007 * moment)
    process.send_signal(signal.SIGKILL)
    announced = max([announced, *map(int, process.communicate()[0].split())])
    module = torch.nn.Linear(600, 600)
    optimizer, anchor = torch.optim.AdamW(module.parameters()), train.Anchor(module, 2)
    progress = checkpoint.load(checkpoint.latest(tmp_path), module, optimizer, anchor)
    assert progress["update"] in (announced, announced + 1)  # killed between the rename and the announcement: one more
    assert (module.weight == progress["update"]).all()
    folder = tmp_path / "checkpoints"
    checkpoint.save(folder, module, optimizer, anchor, {"update": progress["update"] + 1})
    assert not list(folder.glob("tmp-*")) and len(checkpoint.complete(folder)) == 2


# ---------------------------------------------------------------------------------------------- configuration
@pytest.mark.parametrize(
    "plan",
    [
        ["--gpus", "8", "--gpu_memory_gb", "80"],
        ["--gpus", "1", "--gpu_memory_gb", "141", "--lora_rank", "64", "--batch_size", "4"],
    ],
)
def test_dry_run_of_the_paper_preset_shows_its_arithmetic(plan, capsys):
    started = time.perf_counter()
    train.main(["--preset", "paper", "--dry-run", *plan])
    assert time.perf_counter() - started < 20
    shown = capsys.readouterr().out
    assert "tokens per video         32760" in shown and "8,326,608,160" in shown and "activations" in shown


def test_dry_run_refuses_what_cannot_fit():
    with pytest.raises(SystemExit, match="the estimate must fit the GPU: got .* GiB for 24; use more GPUs"):
        train.main(["--preset", "paper", "--dry-run", "--gpus", "8", "--gpu_memory_gb", "24"])


def test_the_paper_preset_holds_the_settings_table():
    config, _ = train.parse(["--preset", "paper", "--gpus", "8", "--dry-run"])
    expected = dict(
        frames=81, height=480, num_steps=20, shift=5.0, guidance_scale=6.0, eta=0.5, group_size=4, batch_size=2, fps=24,
        learning_rate=1e-5, max_grad_norm=1.0, compute_dtype="bfloat16", clip_range=1e-4, max_advantage=5.0,
        noisy_last_step=True, kl_mode="dual", anchor_every=10, beta_pos=1.0, beta_vel=0.1, kl_lambda=1e-5,
        kl_lambda_early=1e-7, kl_schedule="two_stage", reward_setting="B", sde_type="sage_grpo", equalizer=True,
        eval_steps=40, kl_velocity="rollout_phase", lora_rank=0,
    )  # fmt: skip
    assert {name: getattr(config, name) for name in expected} == expected
    assert config.micro_batch * config.accumulation == 8 and config.trained_steps() == 20


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--preset", "paper", "--gpus", "3"], "group_size must divide batch_size × ranks: got 4 and 2 × 3"),
        (["--preset", "toy", "--gpus", "2"], "the toy runs on one process"),
        (["--export", "somewhere"], "--export writes what diffusers loads, so it needs --resume with a run of HunyuanVideo"),
        (["--model", "weights/hunyuan"], "the toy preset does not read model; use --preset paper"),
        (["--lora_rank", "4", "--height", "64"], "the toy preset does not read height, lora_rank"),
        (["--preset", "paper", "--gpus", "8", "--frames", "80"], "frames must be 4k + 1"),
        (["--preset", "paper", "--gpus", "8", "--lora_rank", "-1"], "lora_rank must be 0 (full fine-tuning) or positive: got -1"),
        (["--preset", "paper", "--gpus", "8", "--prompts", "nowhere.txt"], "the prompt file must exist: got nowhere.txt"),
    ],
)
def test_plans_that_cannot_run_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit):
        train.main([*arguments, "--dry-run"])
    assert message in capsys.readouterr().err


def test_missing_files_of_the_full_run_are_named_before_a_run_folder_is_made(tmp_path, capsys):
    common = ["--preset", "paper", "--batch_size", "4", "--runs", str(tmp_path / "runs")]
    (tmp_path / "empty").mkdir()
    for extra, message in (
        (["--model", str(tmp_path / "empty")], "must hold transformer, vae"),
        (["--model", "nowhere"], "must be an existing folder or a hub id"),
        (["--videoalign", "nowhere"], "--videoalign must be the folder of VideoAlign's checkpoint: got 'nowhere'"),
        (["--videoalign", str(tmp_path)], "--videoalign_repo must be the folder of VideoAlign's clone of its code: got ''"),
    ):
        with pytest.raises(SystemExit):
            train.main([*common, *extra])
        assert message in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_the_dry_run_says_when_the_anchor_never_holds_the_policy_back(capsys):
    train.main(["--preset", "paper", "--dry-run", "--gpus", "8", "--anchor_every", "4"])
    assert "= 0.8 updates\n" in (shown := capsys.readouterr().out) and "hardly any position control" in shown
    train.main(["--preset", "paper", "--dry-run", "--gpus", "1", "--batch_size", "4", "--lora_rank", "64"])
    assert "no position control; raise anchor_every" in capsys.readouterr().out
    train.main(["--preset", "paper", "--dry-run", "--gpus", "8"])
    assert "every 10 optimizer updates = 2 updates\n" in (shown := capsys.readouterr().out) and "no position control" not in shown


def test_another_number_of_ranks_can_export(runs, tmp_path):
    """lora-2 holds two samples per rank, of a group of 4: as a run it needs two ranks, as an export any number."""
    settings = json.loads((runs / "lora-2" / "config.json").read_text())
    assert settings["batch_size"] == 2
    train.main(["--resume", str(runs / "lora-2"), "--export", str(tmp_path)])
    assert (tmp_path / "pytorch_lora_weights.safetensors").stat().st_size > 0
    assert json.loads((runs / "lora-2" / "config.json").read_text()) == settings
