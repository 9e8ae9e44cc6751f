"""The full run's path on the real classes with tiny random weights: a whole run and its export."""

import pytest
import torch
from diffusers import HunyuanVideo15Transformer3DModel
from test_readme import python_block

import train
from engine import checkpoint
from engine.build import build, make_anchor, make_optimizers
from engine.config import parse
from engine.draws import generator
from engine.folder import read_log
from grpo import OneRank
from video.mp4 import read_video


@pytest.fixture(scope="module")
def run(tmp_path_factory, always_drawn_curves):
    """The tiny preset, with the tiny VideoAlign as its reward."""
    folder = tmp_path_factory.mktemp("tiny")
    train.main(["--preset", "tiny", "--runs", str(folder), "--learning_rate", "3e-3", "--name", "tiny"])
    return folder / "tiny"


def test_the_tiny_run_takes_every_part_of_the_full_one(run):
    lines = read_log(run)
    assert [line["iteration"] for line in lines] == [0, 1, 2, 3] and lines[-1]["optimizer_steps_made"] == 3
    # 4 samples × 4 steps × guidance; in the second iteration as many reference passes
    assert [line["update_passes"] for line in lines[1:]] == [32, 64, 32]
    for line in lines[1:]:
        assert line["ratio_min"] == pytest.approx(1, abs=1e-5) and line["group_std"] > 0
    assert lines[2]["kl_position"] > 0 and lines[2]["grad_norm"] > 0
    assert (run / "curves.png").stat().st_size > 10_000
    assert lines[-1]["eval_VQ"] != lines[0]["eval_VQ"] and "eval_Overall" in lines[0]


def make_videos_as_told(model, exported, folder):
    """[before, after] of the lines in RUNNING.md, with a small model on a CPU in the place of the real one on a GPU."""
    replaced = {
        '"weights/hunyuan"': repr(str(model)),
        '"exported"': repr(str(exported)),
        '"cuda", torch.bfloat16': '"cpu", torch.float32',
        "height=480, width=864, num_frames=81, num_inference_steps=40": (
            "height=64, width=96, num_frames=5, num_inference_steps=2"
        ),
        "before.mp4": str(folder / "before.mp4"),
        "after.mp4": str(folder / "after.mp4"),
    }
    code = python_block("export_to_video")
    for theirs, ours in replaced.items():
        assert theirs in code, theirs
        code = code.replace(theirs, ours)
    exec(code, {})
    return [read_video(folder / f"{name}.mp4")[0] for name in ("before", "after")]


def test_a_run_leaves_videos_contact_sheets_and_an_export_for_diffusers(run, tmp_path, capsys):
    train.main(["--resume", str(run), "--export", str(tmp_path / "out")])
    assert f"exported iteration-000003 to {tmp_path / 'out'}" in capsys.readouterr().out
    for options, message in (
        (["--export", str(run)], f"export must be a new or empty folder: {run} holds files; choose another"),
        (
            ["--export", str(tmp_path / "new"), "--allow", "eta"],
            "--export can only be combined with --resume, --from and --allow model: got",
        ),
    ):
        with pytest.raises(SystemExit):
            train.main(["--resume", str(run), *options])
        assert message in capsys.readouterr().err
    for folder in ("iteration-000000", "iteration-000002", "iteration-000003"):
        video, fps = read_video(run / "eval" / folder / "000.mp4")
        assert video.shape == (5, 3, 64, 96) and fps == 24  # the evaluation's size, not the rollouts'
        assert (run / "eval" / folder / "contact_sheet.png").stat().st_size > 0

    videos = make_videos_as_told(run / "tiny" / "model", tmp_path / "out", tmp_path)
    assert videos[0].shape == (5, 3, 64, 96) and not torch.equal(*videos)

    config, _ = parse(["--resume", str(run)])
    policy, *_, prompts = build(config, run, OneRank(), torch.device("cpu"), None)
    module = policy.module
    optimizers, anchor = make_optimizers(module, config), make_anchor(module, config)
    checkpoint.load(checkpoint.choose(run), module, optimizers, anchor)
    stock = HunyuanVideo15Transformer3DModel.from_pretrained(tmp_path / "out")
    x, sigma = torch.randn(1, *policy.latent_shape, generator=generator("x")), torch.tensor([0.7])
    conditions = policy.encode(prompts[:1])
    with torch.no_grad():
        ours = policy.velocity(x, sigma, conditions)
        policy.module = stock
        theirs = policy.velocity(x, sigma, conditions)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    before = HunyuanVideo15Transformer3DModel.from_pretrained(run / "tiny" / "model", subfolder="transformer")
    assert not torch.equal(stock.proj_out.weight, before.proj_out.weight)
