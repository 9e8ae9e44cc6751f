"""Wiring: what the settings say is what model, rewards, evaluation and mp4 files are given, each under its own name."""

import dataclasses
import inspect
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import train
from engine import build, evaluation, pictures
from engine.config import Config, Hardware, VideoModel
from engine.presets import MINI, TINY
from grpo import OneRank
from tiny import miniature
from video import clip, files, hunyuan, videoalign
from video.mp4 import read_video

DEVICE = torch.device("cpu", 0)  # not equal to torch.device("cpu")
MESH, CONTEXT = object(), object()
OFF = {  # every setting of the video model off its default, and no two sizes alike
    "model": "some/model",
    "frames": 9,
    "height": 64,
    "width": 96,
    "eval_height": 128,
    "eval_width": 32,
    "fps": 7,
    "guidance_scale": 3.5,
    "guidance_gradient": "conditional",
    "prompts": "train.txt",
    "eval_prompts": "eval.txt",
    "prompt_cache": "somewhere/cache",
    "videoalign": "weights",
    "videoalign_repo": "clone",
    "clip_score": "some/clip",
    "pick_score": "some/pick",
    "compute_dtype": "float32",
    "vae_dtype": "bfloat16",
    "lora_rank": 5,
    "checkpointing": "attention",
    "attention": "math",
    "compile": True,
    "replicate": 2,
    "context_parallel": 4,
    "anchor_offload": True,
    "seed": 11,
    "micro_batch": 3,
    "runs": "some/runs",
}
# What each parameter of hunyuan.load must be then; one that load gains must be added here.
LOADED = {name: OFF[name] for name in "guidance_scale seed micro_batch guidance_gradient checkpointing".split()}
LOADED |= {name: OFF[name] for name in "model prompt_cache lora_rank attention compile vae_dtype".split()}
LOADED |= {"shape": (32, 3, 4, 6), "compute_dtype": torch.float32}  # 1 + 8/4 latents of 64/16 × 96/16
LOADED |= {"device": DEVICE, "mesh": MESH, "context": CONTEXT}


def recorder(monkeypatch, module, name):
    """Replace a function or class by one that notes its arguments by name; returns the list of them."""
    signature, calls = inspect.signature(getattr(module, name)), []

    def record(*arguments, **named):
        calls.append(signature.bind(*arguments, **named).arguments)
        return SimpleNamespace(encode=calls.append)

    monkeypatch.setattr(module, name, record)
    return calls


def test_every_setting_here_is_off_its_default():
    fields = {field.name: field.default for field in dataclasses.fields(Config)}
    of_video = {field.name for group in (VideoModel, Hardware) for field in dataclasses.fields(group)}
    assert of_video <= OFF.keys() and all(OFF[name] != fields[name] for name in OFF)
    assert LOADED.keys() == inspect.signature(hunyuan.load).parameters.keys()


def test_model_and_rewards_are_given_what_the_settings_say(tmp_path, monkeypatch):
    files = {name: tmp_path / OFF[name] for name in ("prompts", "eval_prompts")}
    files["prompts"].write_text("a red ball\na blue cube\n", encoding="utf-8")
    files["eval_prompts"].write_text("a green fish\n", encoding="utf-8")
    config = Config(**OFF | {name: str(path) for name, path in files.items()})
    loaded = recorder(monkeypatch, hunyuan, "load")
    made = {name: recorder(monkeypatch, module, name) for module, name in SCORERS}
    ranks = SimpleNamespace(rank=1, context=CONTEXT, exchange=lambda value: [value])
    policy, reward, eval_reward, prompts, eval_prompts = train.build(config, tmp_path, ranks, DEVICE, MESH)
    assert loaded == [LOADED, ["a red ball", "a blue cube", "a green fish"]]  # load, then encode
    assert prompts == ["a red ball", "a blue cube"] and eval_prompts == ["a green fish"]
    assert made["VideoAlign"] == [{"folder": "weights", "repo": "clone", "device": DEVICE, "fps": 7}]
    assert made["CLIPScore"] == [{"folder": "some/clip", "device": DEVICE}]
    assert made["PickScore"] == [{"folder": "some/pick", "device": DEVICE}]
    assert eval_reward.args[0] is reward and len(eval_reward.args[1]) == 2 and eval_reward.args[2] is True


SCORERS = [(videoalign, "VideoAlign"), (clip, "CLIPScore"), (clip, "PickScore")]


def test_the_first_rank_encodes_alone_at_first(monkeypatch, tmp_path):
    """The others encode once it is done, and so find the prompts in the cache."""
    loaded, reward = recorder(monkeypatch, hunyuan, "load"), object()
    monkeypatch.setattr(build, "build_reward", lambda *arguments: loaded.append("reward") or (reward, reward))
    waits = SimpleNamespace(rank=0, context=None, exchange=lambda value: loaded.append("wait"))
    train.build(Config(model="some/model", runs="some/runs"), tmp_path, waits, DEVICE, None)
    arguments, first, wait, again, last = loaded
    assert wait == "wait" and first == again and len(first) == 64 + 16
    assert last == "reward"  # so that a GPU never holds it beside the text encoders
    assert arguments["prompt_cache"] == Path("some/runs/prompt_cache") and arguments["mesh"] is None


@pytest.mark.parametrize("model", [TINY, MINI])
def test_built_in_models_lie_in_the_run_folder(model, tmp_path, monkeypatch):
    loaded, made = recorder(monkeypatch, hunyuan, "load"), recorder(monkeypatch, videoalign, "VideoAlign")
    monkeypatch.setattr(build, "check_written", lambda *arguments: None)
    config = Config(model=model, videoalign="weights", videoalign_repo="clone", fps=7)
    reward, eval_reward = build.build_reward(config, tmp_path, DEVICE)
    build.load_hunyuan(config, tmp_path, DEVICE, None, None)
    assert loaded[0]["model"] == str(tmp_path / model / "model")
    if model == MINI:
        assert reward is eval_reward is miniature.reward and not made
    else:
        folder, repo = tmp_path / TINY / "videoalign", tmp_path / TINY / "videoalign_repo"
        assert made == [{"folder": folder, "repo": repo, "device": DEVICE, "fps": 7}]


def test_an_evaluation_has_the_sum_of_the_scores_the_further_ones_and_the_causes(capsys):
    def reward(videos, prompts):
        return {name: torch.tensor(values) for name, values in scores.items()}

    def further(videos, prompts):
        assert videos == "videos" and prompts == ["one", "two"]
        return {"CLIPScore": torch.tensor([30.0, 31.0])}

    scores = {"VQ": [1.0, 2.0], "MQ": [4.0, float("nan")], "TA": [16.0, 32.0]}
    reward.failures = ["sample 1: its server is gone"]
    found = build.evaluation_reward(reward, [further], True, "videos", ["one", "two"])
    torch.testing.assert_close(found["Overall"], torch.tensor([21.0, float("nan")]), equal_nan=True, rtol=0, atol=0)
    assert list(found) == ["VQ", "MQ", "TA", "Overall", "CLIPScore"]  # a further score is no part of the sum
    assert found["CLIPScore"].tolist() == [30.0, 31.0] and found["VQ"].tolist() == [1.0, 2.0]
    assert capsys.readouterr().err == "evaluation: not scored: sample 1: its server is gone\n"
    own = build.evaluation_reward(reward, [further], False, "videos", ["one", "two"])  # a reward of the user's own
    assert list(own) == ["VQ", "MQ", "TA", "CLIPScore"]


def test_an_evaluation_has_its_own_size_steps_and_noises(tmp_path, monkeypatch):
    config = Config(**OFF | {"eval_noises": 2, "eval_steps": 5, "shift": 3.0})
    asked = {}

    def evaluate(policy, reward, prompts, latent_shape, sde, generators, config, ranks, keep):
        seeds = [noise.initial_seed() for noise in generators]
        asked.update(prompts=prompts, latent_shape=latent_shape, sde=sde, seeds=seeds)
        return {"eval_reward": 0.5}, torch.stack([keep(place, VIDEO) for place in range(len(prompts))])

    monkeypatch.setattr(evaluation, "evaluate", evaluate)
    policy, sheets = SimpleNamespace(latent_shape=(32, 3, 4, 6)), []
    monkeypatch.setattr(pictures, "contact_sheet", lambda videos, prompts, path: sheets.append((len(videos), prompts)))
    seeds = []
    for iteration in (0, 4):
        evaluation.run_evaluation(policy, None, ["one", "two"], config, iteration, tmp_path, OneRank())
        seeds.append(asked["seeds"])
    assert asked["prompts"] == ["one", "one", "two", "two"] and asked["latent_shape"] == (32, 3, 8, 2)
    assert len(asked["sde"].sigmas) == 6 and not asked["sde"].stochastic.any()
    torch.testing.assert_close(asked["sde"].sigmas[1].item(), 3 * 0.8 / (1 + 2 * 0.8))  # shift 3 at 1 − 1/5
    assert seeds[0] == seeds[1] and len(set(seeds[0])) == 4  # one noise for each video, at each evaluation the same
    assert sheets == [(4, asked["prompts"])] * 2
    for folder in ("iteration-000000", "iteration-000004"):
        names = sorted(path.name for path in (tmp_path / "eval" / folder).iterdir())
        assert names == ["000.mp4", "001.mp4", "002.mp4", "003.mp4"]
    video, rate = read_video(tmp_path / "eval" / "iteration-000004" / "003.mp4")
    assert rate == 7 and video.shape == VIDEO.shape
    assert (tmp_path / "samples_before.npy").exists() and (tmp_path / "samples_after.npy").exists()


VIDEO = torch.full((9, 3, 128, 32), 100, dtype=torch.uint8)


# ------------------------------------------------------------------------------------------------ a run's own models
def test_a_damaged_model_of_the_runs_own_is_written_again(tmp_path):
    config, fix = Config(model="mini"), f"; delete {tmp_path / 'mini'}: a run that goes on writes it again"

    def written():
        build.write_small_models("mini", tmp_path / "mini", OneRank())
        return tmp_path / "mini" / "model" / "transformer" / "diffusion_pytorch_model.safetensors"

    def load():
        build.load_hunyuan(config, tmp_path, torch.device("cpu"), None, None)

    weights = written()
    whole = weights.read_bytes()
    for damage in (lambda: weights.write_bytes(whole[:-100]), weights.unlink):
        damage()
        with pytest.raises(ValueError) as raised:
            load()
        assert str(raised.value).endswith(fix) and "download" not in str(raised.value)
        assert "transformer" in str(raised.value)
        written()  # a run that goes on leaves what is there
        assert not weights.exists() or weights.read_bytes() != whole


def test_a_damaged_reward_of_the_runs_own_is_written_again(tmp_path):
    from tiny.videoalign import build_tiny_template, build_tiny_videoalign

    folder = tmp_path / "tiny"
    build_tiny_videoalign(folder / "videoalign")
    build_tiny_template(folder / "videoalign_repo")
    (weights,) = folder.glob("videoalign/*/model.pth")
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(ValueError) as raised:
        build.load_videoalign(Config(model="tiny"), tmp_path, torch.device("cpu"))
    assert str(raised.value).endswith(f"; delete {folder}: a run that goes on writes it again")
    assert "download" not in str(raised.value)


def test_a_downloaded_model_keeps_its_advice(tmp_path):
    (tmp_path / "transformer").mkdir()
    with pytest.raises(OSError, match="download the whole release"):
        files.check_model(tmp_path)
