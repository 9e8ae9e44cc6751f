"""The miniature: its code and VAE, its folder, what a run of it says, and that the full run's path learns on it."""

import json

import pytest
import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKLHunyuanVideo15,
    ClassifierFreeGuidance,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideo15Pipeline,
    HunyuanVideo15Transformer3DModel,
)
from safetensors.torch import load_file

import train
from engine import checkpoint
from engine.config import Config, departures, parse
from engine.draws import generator
from engine.presets import MINI, PRESETS
from paper.flops import run_tflop
from paper.rehearsal import HALVED
from prompts import BLOBS, read_prompts
from sde import SDE, rollout, sigma_schedule
from tiny import codec, miniature
from toy import world
from video import hunyuan
from video.files import check_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return miniature.build_miniature(tmp_path_factory.mktemp("miniature") / "model")


@pytest.fixture(scope="module")
def policy(folder):
    shape = hunyuan.latent_shape(codec.FRAMES, codec.SIDE, codec.SIDE)
    return hunyuan.load(str(folder), shape, folder.parent / "cache", guidance_scale=3.0, micro_batch=16)


@pytest.fixture(scope="module")
def code():
    return miniature.part(load_file(miniature.WEIGHTS), "code.")


def clean(scale, count=16):
    return world.clean_clips(miniature.PROMPTS[:: 64 // count], generator("clean"), scale)


# ---------------------------------------------------------------------------------------------- world and code
def test_the_mean_over_the_pixels_of_a_larger_clip_is_the_toys():
    means = F.avg_pool3d(clean(codec.SCALE), (1, codec.SCALE, codec.SCALE))
    torch.testing.assert_close(means, clean(1), rtol=0, atol=0.005 * world.PEAK)
    prompts, random = miniature.PROMPTS[:8], generator("imperfect")
    larger = world.training_clips(prompts, random, codec.SCALE)
    same = world.training_clips(prompts, generator("imperfect"))
    torch.testing.assert_close(F.avg_pool3d(larger, (1, 4, 4)), same, rtol=0, atol=0.01 * world.PEAK)


@pytest.mark.parametrize("widths, lost", [((8, 8, 16, 32, 64), 0.1), ((8, 16, 64, 256, 64), 0.01)])
def test_the_released_decoder_is_the_linear_code(code, widths, lost):
    """Against the code's own matrices, on latents that no clip has. Wider levels lose less of a block's details."""
    vae = AutoencoderKLHunyuanVideo15(latent_channels=32, block_out_channels=widths, layers_per_block=0)
    codec.write_decoder(vae, code)
    latents = torch.randn(1, 32, 3, 3, 3, generator=generator("latents"))
    latents[:, :, 0] = 0
    coefficients = codec.convolve(latents[0, :, 1:].transpose(0, 1), code["decode"])  # [2, 64, 3, 3]
    blocks = torch.einsum("fkhw,kp->fphw", coefficients, code["components"])
    wanted = blocks.reshape(2, 4, 16, 16, 3, 3, 3).permute(4, 0, 1, 5, 2, 6, 3).reshape(3, 8, 48, 48)
    with torch.no_grad():
        (decoded,) = vae.decode(latents / codec.SCALING_FACTOR, return_dict=False)
    seen = (decoded[0, :, 1:] - codec.BLACK) * codec.CONTRAST
    assert (seen - wanted).norm() < lost * wanted.norm()
    torch.testing.assert_close(decoded[:, :, 0], torch.full_like(decoded[:, :, 0], codec.BLACK), rtol=0, atol=1e-5)


def test_clean_clips_survive_the_code(policy, code):
    prompts = miniature.PROMPTS[::4]
    clips = clean(codec.SCALE)
    videos = policy.decode(codec.encode(clips, code))
    assert videos.shape == (16, 9, 3, 48, 48)
    error = (videos[:, 1:].float() - world.to_uint8(clips).float()).square().mean()
    assert 10 * (255**2 / error).log10() > 35  # dB
    scores = miniature.reward(videos, prompts)
    shuffled = miniature.reward(videos, prompts[1:] + prompts[:1])
    for name in ("VQ", "MQ", "TA"):
        assert scores[name].mean() > 0.75
    assert shuffled["TA"].mean() < scores["TA"].mean() - 0.2
    torch.testing.assert_close(shuffled["VQ"], scores["VQ"])
    moved = videos.clone()
    moved[:, 0] = 255
    torch.testing.assert_close(miniature.reward(moved, prompts)["VQ"], scores["VQ"])  # the first frame is not seen


# ---------------------------------------------------------------------------------------------- the folder
def test_the_folder_is_a_released_models_and_the_same_each_time(folder, tmp_path):
    assert all(check_model(folder))
    again = miniature.build_miniature(tmp_path / "again")
    files = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(again) for path in again.rglob("*") if path.is_file())
    for file in files:
        assert (folder / file).read_bytes() == (again / file).read_bytes(), file


def test_the_weights_are_small_and_stand_beside_the_code():
    assert miniature.WEIGHTS.stat().st_size < 12e6
    assert read_prompts(BLOBS) == world.PROMPTS
    with pytest.raises(FileNotFoundError, match="make them with python -m tiny.pretrain"):
        miniature.build_miniature("nowhere", weights="none.safetensors")


def test_all_prompts_have_equally_many_tokens_and_differ(policy):
    encoded = policy.encode(miniature.PROMPTS)
    texts = torch.stack([prompt.text for prompt in encoded])
    assert texts.shape[1] == 12 and all(len(prompt.glyphs) == 0 for prompt in encoded)
    assert torch.cdist(texts.flatten(1), texts.flatten(1)).fill_diagonal_(1).min() > 0.1


# ---------------------------------------------------------------------------------------------- preset and verdict
def test_the_ranks_share_the_samples_of_the_preset(capsys):
    for ranks, batch_size, micro_batch in ((1, 64, 32), (8, 8, 8), (64, 1, 1)):
        config, _ = parse(["--preset", "mini", "--dry-run", "--gpus", str(ranks)])
        assert (config.batch_size, config.micro_batch) == (batch_size, micro_batch)
        assert departures(config, ranks) == []
    with pytest.raises(SystemExit):
        parse(["--preset", "mini", "--dry-run", "--gpus", "6"])
    assert "the number of ranks must divide the 64 samples of the mini preset: got 6" in capsys.readouterr().err
    for unread in (["--frames", "5"], ["--videoalign", "x"], ["--model", "x"]):
        with pytest.raises(SystemExit):
            parse(["--preset", "mini", "--dry-run", *unread])
        assert f"the mini preset does not read {unread[0][2:]}" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parse(["--preset", "mini", "--dry-run", "--eval_prompts", "prompts/eval.txt"])
    assert "a prompt of the miniature must be one of those in prompts/blobs.txt" in capsys.readouterr().err


def test_the_verdict_compares_like_with_like():
    start, _ = miniature.BEFORE

    def said(before, after, departures=(), lora=False):
        return miniature.verdict([{"eval_reward": before}, {"loss": 1}, {"eval_reward": after}], departures, lora)

    for lora, (low, high, _) in ((False, miniature.AFTER["full"]), (True, miniature.AFTER["LoRA"])):
        assert said(start, low, lora=lora).endswith(": as expected")
        assert "NOT as expected, though it starts where it must" in said(start, low - 0.01, lora=lora)
        assert "NOT as expected, though it starts where it must" in said(start, high + 0.01, lora=lora)
        assert "NOT as expected: it must start within" in said(start - 0.01, low, lora=lora)
    assert said(start, 0.1, ["eta"]).endswith("no reference, since eta differ from the mini preset's")
    config = Config(**PRESETS[MINI])
    assert departures(config, 1) == [] and departures(config, 2) == ["batch_size"]
    config.compute_dtype, config.seed, config.lora_rank = "bfloat16", 7, 16
    assert departures(config, 1) == ["learning_rate"]  # a LoRA is compared with the LoRAs, at their learning rate
    config.learning_rate = 5e-3
    assert departures(config, 1) == []
    config.eta, config.lora_rank = 0.4, 8
    assert sorted(departures(config, 1)) == ["eta", "lora_rank"]


# ---------------------------------------------------------------------------------------------- learning
SAVINGS = [*HALVED, "--train_samples", "8"]  # those of the preset `fast`
BRIEF = [*SAVINGS, "--iterations", "4", "--eval_every", "4"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    runs = tmp_path_factory.mktemp("runs")
    (runs / "prompts.txt").write_text("\n".join(miniature.PROMPTS[::8]))  # 8 of 64: each costs two mp4 files
    few = ["--eval_prompts", str(runs / "prompts.txt")]
    train.main(["--preset", "mini", "--runs", str(runs), "--name", "short", *BRIEF, *few])
    return runs / "short"


def test_the_full_runs_path_learns(run):
    """Where it starts tells of sampling, where it ends of training.

    Measured: .537 → .562. Wrong on purpose, it ends at .536 (advantages shifted by one sample) and .514 (S_t inverted).
    In 8 iterations, with all 64 prompts and without the savings, .508 → .550; there it starts at .22 (the sign of
    guidance), .24 (its branches swapped), .09 (the timestep not × 1000) and .40 (latents scaled twice before the VAE),
    or stops (the anchor never swapped back). One noise for all iterations is not seen here (.545), but in
    tests/test_train.py.
    """
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    before, after = lines[0], lines[-1]
    assert before["eval_reward"] == pytest.approx(0.537, abs=0.03)
    assert after["eval_reward"] > before["eval_reward"] + 0.012


def test_a_run_has_the_flops_that_its_settings_multiply_to(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][1:]
    logged = sum(line["tflops"] * (line["rollout_seconds"] + line["update_seconds"]) for line in lines)
    assert run_tflop(tuple(BRIEF)) == pytest.approx(logged, rel=1e-3)


def test_the_stock_pipeline_makes_the_same_video_from_the_export(run, tmp_path):
    train.main(["--resume", str(run), "--export", str(tmp_path)])
    pipeline = HunyuanVideo15Pipeline.from_pretrained(
        run / MINI / "model",
        transformer=HunyuanVideo15Transformer3DModel.from_pretrained(tmp_path),
        scheduler=FlowMatchEulerDiscreteScheduler.from_pretrained(tmp_path, subfolder="scheduler"),
        guider=ClassifierFreeGuidance.from_pretrained(tmp_path, subfolder="guider"),
    )
    pipeline.set_progress_bar_config(disable=True)

    config, _ = parse(["--resume", str(run)])
    policy = train.load_hunyuan(config, run, torch.device("cpu"), mesh=None, context=None)
    checkpoint.load_weights(checkpoint.choose(run), policy.module)
    prompt = "a large red blob moves left fast"
    noise = torch.randn(1, *policy.latent_shape, generator=generator("noise"))
    (condition,) = policy.encode([prompt])
    ode = SDE("sage_grpo", 0.0, sigma_schedule(4, 5.0))
    with torch.no_grad():
        trajectory = rollout(lambda x, sigma: policy.velocity(x, sigma, [condition]), noise, ode, torch.Generator())
    ours = policy.decode(trajectory.states[:, -1])
    sizes = {"height": codec.SIDE, "width": codec.SIDE, "num_frames": codec.FRAMES, "num_inference_steps": 4}
    theirs = pipeline(prompt=prompt, latents=noise, output_type="pt", **sizes).frames  # [1, F, 3, H, W], 0 … 1
    assert ours.float().std() > 10
    assert (theirs.float() * 255 - ours).abs().max() < 1.5  # half a level of rounding, and float32's
