"""The full run's path on the real classes with tiny random weights: a whole run and its export."""

import pytest
import torch
from diffusers import HunyuanVideo15Transformer3DModel

import checkpoint
import train
from config import parse
from videoalign import read_video


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The tiny preset, with the tiny VideoAlign as its reward."""
    folder = tmp_path_factory.mktemp("tiny")
    train.main(["--preset", "tiny", "--runs", str(folder), "--learning_rate", "3e-3", "--name", "tiny"])
    return folder / "tiny"


def test_the_tiny_run_takes_every_part_of_the_full_one(run):
    lines = checkpoint.read_log(run)
    assert [line["iteration"] for line in lines] == [0, 1, 2, 3] and lines[-1]["optimizer_steps_made"] == 3
    # 4 samples × 4 steps × guidance; in the second iteration as many reference passes
    assert [line["update_passes"] for line in lines[1:]] == [32, 64, 32]
    for line in lines[1:]:
        assert line["ratio_min"] == pytest.approx(1, abs=1e-5) and line["group_std"] > 0
    assert lines[2]["kl_position"] > 0 and lines[2]["grad_norm"] > 0
    assert lines[-1]["eval_VQ"] != lines[0]["eval_VQ"] and "eval_Overall" in lines[0]


def test_a_run_leaves_videos_contact_sheets_and_an_export_for_diffusers(run, tmp_path, capsys):
    train.main(["--resume", str(run), "--export", str(tmp_path / "out")])
    assert f"exported iteration-000003 to {tmp_path / 'out'}" in capsys.readouterr().out
    for options, message in (
        (["--export", str(run)], f"export must be a folder that is new or empty: {run} holds files; name another"),
        (["--export", str(tmp_path / "new"), "--allow", "eta"], "--export takes --resume and --from, nothing else"),
    ):
        with pytest.raises(SystemExit):
            train.main(["--resume", str(run), *options])
        assert message in capsys.readouterr().err
    for folder in ("iteration-000000", "iteration-000002", "iteration-000003"):
        video, fps = read_video(run / "eval" / folder / "000.mp4")
        assert video.shape == (5, 3, 64, 96) and fps == 24  # the evaluation's size, not the rollouts'
        assert (run / "eval" / folder / "contact_sheet.png").stat().st_size > 0

    config, _ = parse(["--resume", str(run)])
    policy, *_, prompts = train.build(config, run, train.OneRank(), torch.device("cpu"), None)
    module = policy.module
    optimizers, anchor = train.make_optimizers(module, config), train.make_anchor(module, config)
    checkpoint.load(checkpoint.choose(run), module, optimizers, anchor)
    stock = HunyuanVideo15Transformer3DModel.from_pretrained(tmp_path / "out")
    x, sigma = torch.randn(1, *policy.latent_shape, generator=train.generator("x")), torch.tensor([0.7])
    conditions = policy.encode(prompts[:1])
    with torch.no_grad():
        ours = policy.velocity(x, sigma, conditions)
        policy.module = stock
        theirs = policy.velocity(x, sigma, conditions)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    before = HunyuanVideo15Transformer3DModel.from_pretrained(run / "tiny" / "model", subfolder="transformer")
    assert not torch.equal(stock.proj_out.weight, before.proj_out.weight)
