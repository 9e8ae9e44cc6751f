"""Bad inputs: one message with the rule, what arrived and how to fix it, and exit code 2, before anything is made.

The tables have one row for each fault. Every fault is made for real: a command line, an edited config.json, or a
damaged copy of a folder. Faults of prompt files are in test_prompts.py, those of single settings also in
test_config.py.
"""

import contextlib
import dataclasses
import io
import json
import math
import os
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import ByT5Tokenizer, T5Config, T5EncoderModel

import train
from engine import config as config_module
from engine.config import Config, parse
from engine.presets import PRESETS
from tiny.hunyuan import build_tiny_hunyuan
from tiny.videoalign import build_tiny_clip, build_tiny_template, build_tiny_videoalign
from video import files, hunyuan, videoalign
from video.files import load_network, model_words
from video.prompts import PromptEncoder

ROOT = Path(train.__file__).parent
TOY_SETTINGS = dataclasses.asdict(Config(**PRESETS["toy"]))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The undamaged folders."""
    folder = tmp_path_factory.mktemp("whole")
    build_tiny_hunyuan(folder / "model")
    build_tiny_videoalign(folder / "videoalign")
    build_tiny_template(folder / "repo")
    build_tiny_clip(folder / "clip")
    return folder


@pytest.fixture
def copy(whole, tmp_path):
    """A copy that may be damaged: its files are links, which `put` replaces."""
    return shutil.copytree(whole, tmp_path / "copy", copy_function=os.link)


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    """A function that gives the one message of a command line. Nothing may have been loaded or made."""

    def fail(*arguments, **options):
        raise AssertionError("weights were loaded, or ranks set up")

    for module, name in (
        (hunyuan, "load_shards"), (hunyuan, "load_network"), (videoalign, "load_weights"), (train, "setup_ranks"),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, fail)

    def message(*arguments):
        with pytest.raises(SystemExit) as stop:
            train.main([*arguments])
        shown = capsys.readouterr()
        *usage, last = shown.err.splitlines()
        assert stop.value.code == 2 and shown.out == ""
        assert ": error: " in last and not any("error" in line for line in usage)
        assert not (tmp_path / "runs").exists()
        return last.partition(": error: ")[2]

    return message


def video_run(folder, tmp_path, *more):
    """The command line of a full run on tiny folders."""
    command = ["--preset", "paper", "--batch_size", "4", "--compute_dtype", "float32", "--runs", str(tmp_path / "runs")]
    command += ["--model", str(folder / "model"), "--videoalign", str(folder / "videoalign")]
    return [*command, "--videoalign_repo", str(folder / "repo"), *more]


def test_whole_folders_are_accepted(whole, tmp_path):
    for more in ([], ["--clip_score", str(whole / "clip"), "--pick_score", "org/pick"], ["--name", "a,b c"]):
        parse(video_run(whole, tmp_path, *more))
    assert not (tmp_path / "runs").exists()


# ---------------------------------------------------------------------------------------------- command lines
OUT_OF_BOUNDS = {
    "eta": ("0", "1e-30", "1e30", "nan", "inf"),
    "clip_range": ("inf", "1e-30", "0", "-1", "nan"),
    "learning_rate": ("inf", "2", "nan"),
    "weight_decay": ("inf", "-1", "2"),
    "shift": ("0", "inf", "nan", "1e9"),
    "kl_lambda": ("inf", "-1"),
    "kl_lambda_early": ("1e30",),
    "beta_pos": ("inf", "-1"),
    "beta_vel": ("1e9", "-1"),
    "max_advantage": ("inf", "0"),
    "max_grad_norm": ("inf", "0"),
    "num_steps": ("0", "100000"),
    "seed": ("-1", "9223372036854775808"),
    "iterations": ("0", "-5", "99999999999"),
    "checkpoint_every": ("0",),
    "keep_checkpoints": ("0", "9999"),
    "eval_every": ("0",),
    "eval_steps": ("0", "5000"),
    "eval_noises": ("0",),
    "batch_size": ("1000001", "0"),
    "micro_batch": ("99999999", "0"),
    "kl_switch": ("99999999999", "-1"),
    "kl_steps": ("-1", "100000"),
    "sde_steps": ("-1", "100000"),
    "sde_share": ("0", "1.5", "nan"),
    "group_size": ("1", "0"),
    "optimizer_steps": ("0",),
    "anchor_every": ("0",),
    "max_failed_rewards": ("1", "nan", "-0.1"),
    "reward_timeout": ("0", "inf"),
}
OUT_OF_VIDEO_BOUNDS = {
    "frames": ("1", "0", "-3", "4097"),
    "height": ("16", "8192"),
    "eval_width": ("0",),
    "fps": ("0", "1000"),
    "guidance_scale": ("inf", "nan", "0", "1e6"),
    "lora_rank": ("-1", "1000000"),
}


def rows_of(table):
    return [(name, value) for name, values in table.items() for value in values]


@pytest.mark.parametrize("name, value", rows_of(OUT_OF_BOUNDS))
def test_numbers_out_of_bounds(refused, tmp_path, name, value):
    message = refused("--runs", str(tmp_path / "runs"), f"--{name}={value}")
    assert f"{name} must lie in [" in message and "]: got " in message and "the default is" in message


@pytest.mark.parametrize("name, value", rows_of(OUT_OF_VIDEO_BOUNDS))
def test_numbers_of_a_video_out_of_bounds(refused, whole, tmp_path, name, value):
    message = refused(*video_run(whole, tmp_path, f"--{name}={value}"))
    assert f"{name} must lie in [" in message and "]: got " in message


@pytest.mark.parametrize(
    "option, message",
    [
        ("--eta=high", "invalid float value: 'high'"),
        ("--iterations=1e3", "invalid int value: '1e3'"),
        ("--kl_mode=foo", "invalid choice: 'foo'"),
        ("--kl_schedule=", "invalid choice: ''"),
        ("--stepwise_kl=exact", "invalid choice: 'exact'"),
        ("--reward_weights=C", "reward_weights must be A or B, or a list such as VQ=0.5,MQ=0.5,TA=1: got 'C'"),
        ("--preset=", "invalid choice: ''"),
        ("--equalizer=no", "ignored explicit argument 'no'"),
        ("--name=../x", "name must be a single folder name"),
        ("--name=a/b", "no / or \\"),
        ("--name=/tmp/x", "name must be a single folder name"),
        ("--name=..", "no leading dot"),
        ("--name=.hidden", "no leading dot"),
        ("--name=a\\b", "no / or \\"),
        ("--name=a ", "no space at its ends"),
        ("--name= ", "no space at its ends"),
        ("--name=" + "x" * 300, "at most 200 bytes"),
        ("--name=a\nb", "name must not contain characters that cannot be seen or written: got 'a\\nb'"),
        ("--name=a\x1b[31m", "with the control character '\\x1b'; remove it"),
        ("--name=\udcff", "got '\\udcff', with the lone surrogate (in an argument: a byte outside the locale's"),
        ("--runs=", "runs must be a folder that exists or can be created: got none; give one"),
        ("--runs=README.md", "README.md is not a folder in which it can be created"),
        ("--runs=README.md/runs", "README.md is not a folder in which it can be created"),
        ("--runs=" + "x" * 300, "runs must be a folder that exists or can be created"),
        ("--export=", "--export writes a model for diffusers, so it needs --resume"),
        ("--gpu_memory_gb=0", "add --dry-run"),
        ("--gpus=0", "add --dry-run"),
    ],
)
def test_options_that_cannot_be(refused, tmp_path, monkeypatch, option, message):
    monkeypatch.chdir(ROOT)
    runs = [] if option.startswith("--runs") else ["--runs", str(tmp_path / "runs")]
    assert message in refused(*runs, option)


@pytest.mark.parametrize("option", ["gpus=-8", "gpus=0", "gpu_memory_gb=-1", "gpu_memory_gb=nan", "gpu_memory_gb=inf"])
def test_machines_that_cannot_be_planned_for(refused, option):
    message = refused("--preset", "paper", "--dry-run", f"--{option}")
    assert "must lie in [1, " in message and "give what one machine or GPU has" in message


def test_an_existing_run_is_refused_unless_torchrun_starts_its_ranks_again(refused, tmp_path, monkeypatch):
    (tmp_path / "made" / "old" / "checkpoints").mkdir(parents=True)
    (tmp_path / "made" / "link").symlink_to(tmp_path / "nowhere")
    for name in ("old", "link"):
        message = refused("--runs", str(tmp_path / "made"), "--name", name)
        run = tmp_path / "made" / name
        assert message == f"{run} exists; continue it with --resume {run}, or choose another --name"
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "1")  # its first start may find the folder, too: open_run looks
    parse(["--runs", str(tmp_path / "made"), "--name", "old"])


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("model", "", "the model must be an existing folder or a hub id like"),
        ("model", "/nowhere", "the model must be an existing folder or a hub id like"),
        ("model", "a b/c", "got 'a b/c'"),
        ("videoalign", "", "--videoalign must be the folder of VideoAlign's checkpoint: got ''"),
        ("videoalign", "README.md", "--videoalign must be the folder of VideoAlign's checkpoint: got 'README.md'"),
        ("videoalign_repo", "/nowhere", "--videoalign_repo must be the folder of VideoAlign's clone of its code"),
        ("clip_score", "/nowhere", "the clip_score must be an existing folder or a hub id like openai/clip"),
        ("pick_score", "one word", "the pick_score must be an existing folder or a hub id like openai/clip"),
        ("pick_score", "prompts", "must hold config.json: it is missing"),
        ("clip_score", "{videoalign}", 'must have "model_type": "clip": got \'qwen2_vl\''),
        ("prompt_cache", "README.md", "prompt_cache must be a folder that exists or can be created"),
        ("prompts", "nowhere.txt", "the prompt file must exist: got nowhere.txt"),
        ("prompts", "prompts", "a prompt file must end in .txt, .csv or .jsonl: got prompts"),
        ("eval_prompts", "{repo}", "a prompt file must end in .txt, .csv or .jsonl"),
        ("compute_dtype", "float16", "invalid choice: 'float16'"),
        ("frames", "80", "frames must be 4k + 1"),
        ("height", "100", "height and width must be multiples of 16"),
    ],
)
def test_paths_and_sizes_of_a_video_run(refused, whole, tmp_path, monkeypatch, name, value, message):
    monkeypatch.chdir(ROOT)
    value = value.format(videoalign=whole / "videoalign", repo=whole / "repo")
    assert message in refused(*video_run(whole, tmp_path, f"--{name}={value}"))


@pytest.mark.parametrize(
    "prompt, message",
    [
        ("a cat <|TA_reward|>", "must not contain a control token of the encoders or of VideoAlign: got <|TA_reward|>"),
        ("a <|video_pad|> cat", "got <|video_pad|>; remove it"),
        ("cat " * 5000, "a prompt must have at most 10,000 bytes"),
        ("!?" * 600, "the text encoder reads 1,000 tokens: a prompt, with the few that end it, must have no more"),
        ('a sign "' + "é" * 130 + '"', "ByT5 reads 256 bytes"),
    ],
)
@pytest.mark.parametrize("preset", ["tiny", "paper"])
def test_prompts_are_checked_before_a_run(refused, whole, tmp_path, preset, prompt, message):
    (tmp_path / "p.txt").write_text(prompt + "\n")
    tiny = ["--preset", "tiny", "--runs", str(tmp_path / "runs")]
    command = tiny if preset == "tiny" else video_run(whole, tmp_path)
    assert message in refused(*command, "--eval_prompts", str(tmp_path / "p.txt"))


# ---------------------------------------------------------------------------------------------- config.json
def parse_settings(settings, monkeypatch):
    """(exit code, lines on stderr, config) where --resume finds these settings."""
    monkeypatch.setattr(config_module, "read_settings", lambda *arguments: settings)
    shown = io.StringIO()
    with contextlib.redirect_stderr(shown):
        try:
            return 0, [], parse(["--resume", "run"])[0]
        except SystemExit as stop:
            return stop.code, [line for line in shown.getvalue().splitlines() if "error" in line], None


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("kl_mode", "foo", "kl_mode must be one of none, fixed"),
        ("sde_type", "ddpm", "sde_type must be one of sage_grpo"),
        ("stepwise_kl", "foo", "stepwise_kl must be one of"),
        ("optimizer", "sgd", "optimizer must be one of adamw, muon: got 'sgd'"),
        ("eta", math.nan, "eta must lie in [0.001, 10]: got nan"),
        ("eta", math.inf, "eta must lie in [0.001, 10]: got inf"),
        ("eta", 10**400, "eta must lie in [0.001, 10]: got 1000"),
        ("eta", True, "eta must be of type float: got True"),
        ("eta", None, "eta must be of type float: got None"),
        ("iterations", True, "iterations must be of type int: got True"),
        ("iterations", 3.0, "iterations must be of type int: got 3.0"),
        ("iterations", "3", "iterations must be of type int: got '3'"),
        ("equalizer", 1, "equalizer must be of type bool: got 1"),
        ("model", ["toy"], "model must be of type str: got ['toy']"),
        ("lora_rank", -4, "lora_rank must lie in [0, 4096]: got -4"),
        ("guidance_scale", -math.inf, "guidance_scale must lie in [0.1, 100]: got -inf"),
        ("runs", "a\0b", "runs must not contain characters that cannot be seen or written"),
        ("name", "../../x", "name must be a single folder name"),
    ],
)
def test_edited_settings(monkeypatch, name, value, message):
    code, lines, _ = parse_settings(TOY_SETTINGS | {name: value}, monkeypatch)
    assert code == 2 and len(lines) == 1 and message in lines[0]


anything = st.one_of(
    st.none(), st.booleans(), st.integers(), st.integers(10**18, 10**40), st.floats(), st.text(max_size=9),
    st.lists(st.integers(), max_size=2), st.sampled_from(["toy", "tiny", "a/b", "cps", "/", "..", "README.md"]),
)  # fmt: skip


@given(st.dictionaries(st.sampled_from(sorted(TOY_SETTINGS)), anything, min_size=1, max_size=3))
def test_any_settings_are_accepted_as_they_are_or_refused_in_one_line(edits):
    with pytest.MonkeyPatch.context() as monkeypatch:
        code, lines, config = parse_settings(TOY_SETTINGS | edits, monkeypatch)
    if code == 0:
        assert dataclasses.asdict(config) == TOY_SETTINGS | edits
        assert all(math.isfinite(value) for value in vars(config).values() if isinstance(value, float))
    else:
        assert code == 2 and len(lines) == 1


# ---------------------------------------------------------------------------------------------- damaging folders
def put(path, content):
    """Replace a file of a copy: its content is linked, so it must not be written to."""
    path.unlink(missing_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def edit(file, section=None, **values):
    """A fault: other values in a JSON file; None removes a key."""

    def damage(folder):
        content = json.loads((folder / file).read_text())
        place = content if section is None else content[section]
        place.update(values)
        for key in [key for key, value in place.items() if value is None and key in values]:
            del place[key]
        put(folder / file, json.dumps(content))

    return damage


def replace(file, content):
    return lambda folder: put(folder / file, content)


def cut(file, kept):
    """A fault: the file ends early; kept is a share, or a number of bytes below zero."""

    def damage(folder):
        content = (folder / file).read_bytes()
        put(folder / file, content[: kept if kept < 0 else int(kept * len(content))])

    return damage


def remove(name):
    def damage(folder):
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return damage


def empty(name):
    def damage(folder):
        shutil.rmtree(folder / name)
        (folder / name).mkdir()

    return damage


WEIGHTS = "diffusion_pytorch_model.safetensors"


def tensors(part, change, name=WEIGHTS):
    """A fault: change(state) in a file of weights."""

    def damage(folder):
        path = folder / part / name
        state = load_file(path)
        change(state)
        path.unlink()
        save_file(state, path)

    return damage


def shards(change):
    """A fault of an index: the weights of the transformer in two files, then change(folder, index)."""

    def damage(folder):
        folder = folder / "transformer"
        state = load_file(folder / WEIGHTS)
        (folder / WEIGHTS).unlink()
        names, weight_map = sorted(state), {}
        for file, part in (("a.safetensors", names[:50]), ("b.safetensors", names[50:])):
            save_file({name: state[name] for name in part}, folder / file)
            weight_map |= dict.fromkeys(part, file)
        index = {"metadata": {}, "weight_map": weight_map}
        change(folder, index)
        put(folder / f"{WEIGHTS}.index.json", json.dumps(index))

    return damage


def other_glyph_encoder(folder):
    shutil.rmtree(folder / "text_encoder_2")
    sizes = dict(vocab_size=384, d_model=24, d_kv=8, d_ff=32, num_layers=1, num_heads=2, feed_forward_proj="gated-gelu")
    T5EncoderModel(T5Config(**sizes)).save_pretrained(folder / "text_encoder_2")


def without_merges(folder):
    path = folder / "tokenizer" / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["merges"] = []
    put(path, json.dumps(content))


def qwen_as_byt5(folder):
    shutil.rmtree(folder / "tokenizer_2")
    shutil.copytree(folder / "tokenizer", folder / "tokenizer_2")


def other_ids_of_byt5(folder):
    shutil.rmtree(folder / "tokenizer_2")
    ByT5Tokenizer(extra_ids=100).save_pretrained(folder / "tokenizer_2")


TENSORS = "must hold exactly the tensors of its config.json: "
MODEL_FAULTS = {
    "no transformer": (remove("transformer"), "must hold transformer, vae, tokenizer"),
    "no vae": (remove("vae"), "no vae; write it with"),
    "no tokenizer": (remove("tokenizer"), "no tokenizer; write it with"),
    "no tokenizer_2": (remove("tokenizer_2"), "no tokenizer_2; write it with"),
    "no text_encoder": (remove("text_encoder"), "no text_encoder; write it with"),
    "no config": (remove("transformer/config.json"), "transformer must hold config.json: it is missing"),
    "garbage config": (replace("transformer/config.json", "{"), "config.json must be JSON"),
    "binary config": (replace("vae/config.json", b"\xff\xfe"), "config.json must be JSON"),
    "config list": (replace("vae/config.json", "[]"), "config.json must be a JSON object: got []"),
    "brackets": (replace("vae/config.json", "[" * 100_000), "config.json must be JSON"),
    "other class": (
        edit("transformer/config.json", _class_name="FluxTransformer2DModel"),
        '"_class_name": "HunyuanVideo15Transformer3DModel": got \'FluxTransformer2DModel\'',
    ),
    "other vae": (edit("vae/config.json", _class_name="AutoencoderKL"), '"AutoencoderKLHunyuanVideo15": got'),
    "other encoder": (edit("text_encoder/config.json", model_type="llama"), "\"qwen2_5_vl_text\": got 'llama'"),
    "t5 without type": (edit("text_encoder_2/config.json", model_type=None), '"model_type": "t5": got None'),
    "channels": (edit("transformer/config.json", in_channels=33), "must have {'in_channels': 65"),
    "patches": (edit("transformer/config.json", patch_size=2), "only this text-to-video model is supported"),
    "meanflow": (edit("transformer/config.json", use_meanflow=True), "got {'in_channels': 65"),
    "fewer layers": (edit("transformer/config.json", num_layers=1), "unexpected (transformer_blocks.1"),
    "more layers": (edit("transformer/config.json", num_layers=3), "missing (transformer_blocks.2"),
    "layers in words": (edit("transformer/config.json", num_layers="two"), "must describe a HunyuanVideo15Tr"),
    "width": (edit("transformer/config.json", attention_head_dim=32), "of another shape ("),
    "latents": (edit("vae/config.json", latent_channels=16), "must have {'latent_channels': 32"),
    "space": (edit("vae/config.json", spatial_compression_ratio=8), "'spatial_compression_ratio': 16"),
    "time": (edit("vae/config.json", temporal_compression_ratio=8), "'temporal_compression_ratio': 4"),
    "scale": (edit("vae/config.json", scaling_factor=0.0), "scaling_factor"),
    "scale nan": (edit("vae/config.json", scaling_factor=math.nan), "vae/config.json must be JSON: NaN is not JSON"),
    "scale in words": (edit("vae/config.json", scaling_factor="1"), "scaling_factor"),
    "no weights": (remove(f"transformer/{WEIGHTS}"), f"transformer must hold {WEIGHTS}: it is missing"),
    "weights cut": (cut(f"transformer/{WEIGHTS}", 0.5), "must be a whole safetensors file"),
    "weights cut by a byte": (cut(f"vae/{WEIGHTS}", -1), "must be a whole safetensors file"),
    "no bytes": (replace("text_encoder/model.safetensors", ""), "must be a whole safetensors file"),
    "a web page": (replace("text_encoder/model.safetensors", "<html>404</html>"), "must be a whole safetensors file"),
    "a tensor gone": (tensors("vae", lambda state: state.popitem()), TENSORS + "1 missing"),
    "a tensor more": (
        tensors("text_encoder", lambda state: state.update(x=torch.zeros(1)), "model.safetensors"),
        TENSORS + "1 unexpected (x)",
    ),
    "a tensor's shape": (
        tensors(
            "text_encoder_2", lambda state: state.update({"shared.weight": torch.ones(3, 16)}), "model.safetensors"
        ),
        TENSORS + "1 of another shape (shared.weight (3, 16))",
    ),
    "a tensor's type": (
        tensors("transformer", lambda state: state.update({"proj_out.bias": torch.zeros(32, dtype=torch.int8)})),
        TENSORS + "1 of another type (proj_out.bias I8)",
    ),
    "a shard gone": (shards(lambda folder, index: remove("b.safetensors")(folder)), "must hold b.safetensors: it is"),
    "a shard cut": (shards(lambda folder, index: cut("a.safetensors", 0.9)(folder)), "must be a whole safetensors"),
    "an index without map": (shards(lambda folder, index: index.pop("weight_map")), 'must have a "weight_map"'),
    "an index that points out": (
        shards(lambda folder, index: index["weight_map"].update({"proj_out.bias": "../../x.safetensors"})),
        "transformer must hold x.safetensors",
    ),
    "another width of text": (other_glyph_encoder, "the text encoders must have the widths (16, 16)"),
    "another vocabulary": (edit("text_encoder/config.json", vocab_size=511), "shape (embed_tokens.weight (512, 16))"),
    "empty tokenizer": (empty("tokenizer"), "tokenizer must hold tokenizer_config.json: it is missing"),
    "empty tokenizer_2": (empty("tokenizer_2"), "tokenizer_2 must hold tokenizer_config.json: it is missing"),
    "no vocabulary": (remove("tokenizer/tokenizer.json"), "must give the system message the 108 tokens"),
    "garbage vocabulary": (replace("tokenizer/tokenizer.json", "{}"), "cannot load tokenizer of"),
    "garbage tokenizer_2": (replace("tokenizer_2/tokenizer_config.json", "{"), "tokenizer_config.json must be JSON"),
    "no chat template": (remove("tokenizer/chat_template.jinja"), "must have a chat template"),
    "broken template": (replace("tokenizer/chat_template.jinja", "{% for %}"), "must have a chat template that runs"),
    "template without system": (
        replace("tokenizer/chat_template.jinja", "{{ messages[-1].content }}"),
        "must give the system message the 108 tokens that the pipeline cuts off before a prompt: got 0",
    ),
    "padding on the left": (
        edit("tokenizer/tokenizer_config.json", padding_side="left"),
        'must pad on the right: got \'left\'; set "padding_side": "right" in its tokenizer_config.json',
    ),
    "a finer tokenizer": (without_merges, "must give the system message the 108 tokens"),
    "other ids of ByT5": (other_ids_of_byt5, "tokenizer_2 must have the 384 ids of text_encoder_2: "),
    "the whole VL model": (edit("text_encoder/config.json", model_type="qwen2_5_vl"), "save its language_model there"),
    "a pointer": (
        replace(f"vae/{WEIGHTS}", "version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n"),
        "is a Git LFS pointer to it; run `git lfs pull` in",
    ),
    "a variant": (
        lambda folder: (folder / "vae" / WEIGHTS).rename(folder / "vae" / "diffusion_pytorch_model.fp16.safetensors"),
        "it is missing; diffusion_pytorch_model.fp16.safetensors cannot take its place",
    ),
    "Tencent's layout": (
        lambda folder: shutil.copytree(folder / "transformer", folder / "transformer" / "480p_t2v"),
        "must have the layout of diffusers, not of Tencent's own code; take hunyuanvideo-community/",
    ),
    "no index": (remove("model_index.json"), "must hold model_index.json: it is missing"),
    "no guider": (remove("guider"), "guider must hold guider_config.json: it is missing"),
    "no scheduler": (remove("scheduler"), "scheduler must hold scheduler_config.json: it is missing"),
    "image to video": (
        edit("model_index.json", _class_name="HunyuanVideo15ImageToVideoPipeline"),
        "the model must be text-to-video: ",
    ),
    "another pipeline": (edit("model_index.json", _class_name="WanPipeline"), "must have {'_class_name': 'HunyuanV"),
    "another guider": (edit("guider/guider_config.json", _class_name="SkipLayerGuidance"), "'ClassifierFreeGuidance'"),
    "rescaled guidance": (edit("guider/guider_config.json", guidance_rescale=0.7), "'guidance_rescale': 0.0"),
    "another schedule": (edit("scheduler/scheduler_config.json", use_dynamic_shifting=True), "use_dynamic_shifting"),
    "guidance in words": (edit("guider/guider_config.json", guidance_scale="6"), "must say its guidance_scale as a"),
    "no shift": (edit("scheduler/scheduler_config.json", shift=None), "must say its shift as a number: got None"),
    "a tokenizer that is no ByT5": (qwen_as_byt5, "tokenizer_2 of"),
}


@pytest.mark.parametrize("fault", MODEL_FAULTS)
def test_damaged_model_folders(refused, copy, tmp_path, fault):
    damage, message = MODEL_FAULTS[fault]
    damage(copy / "model")
    assert message in refused(*video_run(copy, tmp_path))


@pytest.mark.parametrize(
    "file, value, message",
    [
        ("guider/guider_config.json", {"guidance_scale": 1.0}, "add --guidance_scale 1, or state the run's own"),
        ("guider/guider_config.json", {"enabled": False}, "add --guidance_scale 1, or state the run's own"),
        ("scheduler/scheduler_config.json", {"shift": 9.0}, "has shift 9 (scheduler/scheduler_config.json) where the "),
    ],
)
def test_a_run_samples_as_its_model_unless_somebody_says_otherwise(refused, copy, tmp_path, file, value, message):
    edit(file, **value)(copy / "model")
    assert message in refused(*video_run(copy, tmp_path))
    assert message in refused(*video_run(copy, tmp_path, "--dry-run"))
    words = model_words(copy / "model")
    parse(video_run(copy, tmp_path, f"--guidance_scale={words['guidance_scale']}", f"--shift={words['shift']}"))
    parse(video_run(copy, tmp_path, "--guidance_scale=6", "--shift=5"))  # the preset's numbers, stated on purpose


def test_a_run_that_goes_on_keeps_what_it_was_started_with(copy, tmp_path):
    edit("guider/guider_config.json", guidance_scale=1.0)(copy / "model")
    config, _ = parse(video_run(copy, tmp_path, "--guidance_scale=6"))
    (tmp_path / "old").mkdir()
    put(tmp_path / "old" / "config.json", json.dumps(vars(config)))
    parse(["--resume", str(tmp_path / "old")])


def test_a_plan_of_a_hub_id_fetches_nothing(monkeypatch, tmp_path):
    monkeypatch.setattr(files, "snapshot_download", lambda *arguments, **options: pytest.fail("fetched"))
    parse(["--preset", "paper", "--model", "org/model", "--runs", str(tmp_path), "--dry-run"])


# ---------------------------------------------------------------------------------------------- VideoAlign
SETTINGS, PTH = "model_config.json", "checkpoint-1/model.pth"


def state_of(change):
    """A fault: another object in model.pth, change(state)."""

    def damage(folder):
        state = torch.load(folder / PTH, weights_only=True)
        changed = change(state)
        (folder / PTH).unlink()
        torch.save(changed, folder / PTH)

    return damage


class Code:
    """Pickled, it would make a folder on being read."""

    def __reduce__(self):
        return os.mkdir, ("/tmp/code-of-a-checkpoint-has-run",)


def without_token(folder):
    for path in (folder / "checkpoint-1" / "tokenizer").iterdir():
        put(path, path.read_text().replace("<|MQ_reward|>", "<|other|>"))


def without_key(lost):
    return state_of(lambda state: {key: state[key] for key in state if key != lost})


HEAD = "base_model.model.rm_head.weight"
Q_PROJ = "base_model.model.model.layers.0.self_attn.q_proj"
VIDEOALIGN_FAULTS = {
    "no settings": (remove(SETTINGS), "must be a download of KwaiVGI/VideoReward: there is no"),
    "garbage settings": (replace(SETTINGS, "{"), "model_config.json must be JSON"),
    "settings list": (replace(SETTINGS, "[]"), "model_config.json must be a JSON object: got []"),
    "no section": (edit(SETTINGS, inference_config=None), "must have an object inference_config: got None"),
    "section list": (edit(SETTINGS, data_config=[]), "must have an object data_config: got []"),
    "no fps": (edit(SETTINGS, "data_config", fps=None), "fps must lie in [0.001, 1000]"),
    "fps 0": (edit(SETTINGS, "data_config", fps=0), "fps must lie in [0.001, 1000]"),
    "fps in words": (edit(SETTINGS, "data_config", fps="2"), "has '2' in data_config"),
    "fps nan": (edit(SETTINGS, "data_config", fps=math.nan), "model_config.json must be JSON: NaN is not JSON"),
    "one pixel": (edit(SETTINGS, "data_config", max_frame_pixels=1), "max_frame_pixels must lie in [784, "),
    "std 0": (edit(SETTINGS, "inference_config", MQ_std=0.0), "MQ_std must lie in"),
    "mean inf": (edit(SETTINGS, "inference_config", TA_mean=1e7), "TA_mean must lie in"),
    "no mean": (edit(SETTINGS, "inference_config", VQ_mean=None), "VQ_mean must lie in"),
    "rank 0": (edit(SETTINGS, "peft_lora_config", lora_r=0), "lora_r must lie in"),
    "half a rank": (edit(SETTINGS, "peft_lora_config", lora_r=4.5), "lora_r must be a whole number"),
    "another rank": (edit(SETTINGS, "peft_lora_config", lora_r=5), "size mismatch for base_model"),
    "alpha": (edit(SETTINGS, "peft_lora_config", lora_alpha=-1), "lora_alpha must lie in"),
    "two outputs": (edit(SETTINGS, "model_config", output_dim=2), "output_dim must be one of [1, 3]"),
    "true outputs": (edit(SETTINGS, "model_config", output_dim=True), "output_dim must be one of [1, 3]"),
    "other outputs": (
        edit(SETTINGS, "model_config", output_dim=3),
        "size mismatch for base_model.model.rm_head",
    ),
    "no checkpoint": (remove("checkpoint-1"), "there is no"),
    "no number": (lambda folder: (folder / "checkpoint-1").rename(folder / "checkpoint-1.bak"), "checkpoint-<N>"),
    "no model.pth": (remove(PTH), "there is no"),
    "no tokenizer": (remove("checkpoint-1/tokenizer"), "there is no"),
    "empty model.pth": (replace(PTH, ""), "must hold nothing but tensors"),
    "garbage model.pth": (replace(PTH, "<html>404</html>"), "damaged or holds more"),
    "a pointer": (replace(PTH, "version https://git-lfs.github.com/spec/v1\noid sha256:1\n"), "is a Git LFS pointer"),
    "cut model.pth": (cut(PTH, 0.5), "damaged or holds more"),
    "model.pth cut by a byte": (cut(PTH, -1), "damaged or holds more"),
    "code": (state_of(lambda state: {**state, "x": Code()}), "damaged or holds more (UnpicklingError)"),
    "a list": (state_of(lambda state: list(state.values())), "must hold a dict of names and floating-point tensors"),
    "a number": (state_of(lambda state: {**state, HEAD: 1}), "must hold a dict of names and floating-point tensors"),
    "whole numbers": (state_of(lambda state: {**state, HEAD: torch.ones(1, 32).int()}), "floating-point tensors"),
    "no head": (without_key(HEAD), f'Missing key(s) in state_dict: "{HEAD}"'),
    "no norm": (without_key("base_model.model.visual.merger.ln_q.weight"), "Missing key(s) in state_dict: "),
    "half of a LoRA pair": (without_key(Q_PROJ + ".lora_A.default.weight"), "Missing key(s) in state_dict: "),
    "a LoRA without base": (without_key(Q_PROJ + ".base_layer.weight"), "Missing key(s) in state_dict: "),
    "a key more": (state_of(lambda state: {**state, "x": torch.zeros(1)}), 'Unexpected key(s) in state_dict: "x"'),
    "empty tokenizer": (empty("checkpoint-1/tokenizer"), "must be a tokenizer that can be loaded"),
    "no vocabulary": (remove("checkpoint-1/tokenizer/tokenizer.json"), "it lacks ['the words of a prompt']"),
    "garbage tokenizer": (replace("checkpoint-1/tokenizer/tokenizer.json", "{"), "a tokenizer that can be loaded"),
    "another tokenizer": (without_token, "it lacks ['<|MQ_reward|>']"),
    "garbage sizes": (replace("config.json", "{"), "config.json must be JSON"),
    "sizes in words": (edit("config.json", hidden_size="wide"), "must describe a Qwen2-VL"),
    "no sizes": (replace("config.json", "{}"), "the keys of model.pth must be exactly those"),
    "fewer layers": (edit("config.json", num_hidden_layers=1), "Unexpected key(s) in state_dict: "),
    "fewer words": (edit("config.json", vocab_size=100), "the tokenizer's ids must be among the 100 of the model"),
}
TEMPLATE = '"<|VQ_reward|><|MQ_reward|><|TA_reward|>{text_prompt}"'
NAME = "DETAILED_PROMPT_WITH_SPECIAL_TOKEN = "
TEMPLATE_FAULTS = {
    "empty": ("", "must contain each of"),
    "syntax": ("DETAILED = (", "must be Python with"),
    "binary": (b"\xff\xfe\x00", "must be Python with"),
    "nulls": (b"x = 1\0", "must be Python with"),
    "brackets": ("x = " + "(" * 5000, "must be Python with"),
    "code": (NAME + 'open("/tmp/x").read()', "must be Python with"),
    "a number": (NAME + "3", "must contain each of"),
    "a token twice": (NAME + TEMPLATE + '"<|VQ_reward|>"', "must contain each of ['<|VQ_reward|>'] once"),
    "a token gone": (NAME + TEMPLATE.replace("<|TA_reward|>", ""), "must contain each of ['<|TA_reward|>'] once"),
    "another field": (NAME + TEMPLATE + '"{fps}"', "must have no field but {text_prompt}: KeyError('fps')"),
    "a lone brace": (NAME + TEMPLATE + '"}"', "must have no field but {text_prompt}"),
}


@pytest.mark.parametrize("fault", VIDEOALIGN_FAULTS)
def test_damaged_videoalign_folders(refused, copy, tmp_path, fault):
    damage, message = VIDEOALIGN_FAULTS[fault]
    damage(copy / "videoalign")
    assert message in refused(*video_run(copy, tmp_path))
    assert not os.path.exists("/tmp/code-of-a-checkpoint-has-run")


@pytest.mark.parametrize("fault", TEMPLATE_FAULTS)
def test_damaged_templates(refused, copy, tmp_path, fault):
    content, message = TEMPLATE_FAULTS[fault]
    put(copy / "repo" / "prompt_template.py", content)
    assert message in refused(*video_run(copy, tmp_path))


def test_stray_folders_beside_a_checkpoint_do_no_harm(copy, tmp_path):
    shutil.copytree(copy / "videoalign" / "checkpoint-1", copy / "videoalign" / "checkpoint-9.bak")
    parse(video_run(copy, tmp_path))


# ---------------------------------------------------------------------------------------------- the prompt cache
def rewrite(change):
    """A fault: change(tensors) in a cache file whose metadata stays."""

    def damage(path, other):
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        state = load_file(path)
        change(state)
        save_file(state, path, metadata)

    return damage


CACHE_FAULTS = {
    "empty": lambda path, other: path.write_bytes(b""),
    "garbage": lambda path, other: path.write_bytes(b"x" * 999),
    "cut": lambda path, other: path.write_bytes(path.read_bytes()[:-1]),
    "a bit": lambda path, other: path.write_bytes(path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 1])),
    "another prompt's": lambda path, other: path.write_bytes(other.read_bytes()),
    "another's": lambda path, other: save_file({"text": torch.ones(3, 16), "glyphs": torch.ones(0, 16)}, path),
    "a pickle": lambda path, other: torch.save({"text": torch.ones(3, 16), "glyphs": torch.ones(0, 16)}, path),
    "shape": rewrite(lambda state: state.update(text=torch.ones(3, 17))),
    "no dimension": rewrite(lambda state: state.update(text=torch.tensor(1.0))),
    "dtype": rewrite(lambda state: state.update(text=state["text"].bfloat16())),
    "nan": rewrite(lambda state: state["text"].fill_(math.nan)),
    "names": rewrite(lambda state: state.update(more=state.pop("text"))),
}


@pytest.fixture(scope="module")
def cache(whole, tmp_path_factory):
    """The folder of two encoded prompts, and their encoder."""
    encoder = PromptEncoder(whole / "model", tmp_path_factory.mktemp("cache"), "cpu", torch.float32)
    return encoder, encoder(["a cat", "a dog"])


@pytest.mark.parametrize("fault", CACHE_FAULTS)
def test_damaged_cache_files_are_encoded_anew(cache, capsys, fault):
    encoder, (cat, _) = cache
    path = encoder.path("a cat")
    CACHE_FAULTS[fault](path, encoder.path("a dog"))
    (again,) = encoder(["a cat"])
    assert torch.equal(again.text, cat.text) and torch.equal(again.glyphs, cat.glyphs)
    assert f"{path} is not what was written there" in capsys.readouterr().err
    encoder(["a cat"])
    assert "anew" not in capsys.readouterr().err


def test_a_cache_that_is_removed_during_a_run_is_made_anew(whole, tmp_path):
    encoder = PromptEncoder(whole / "model", tmp_path / "cache", "cpu", torch.float32)
    (cat,) = encoder(["a cat"])
    shutil.rmtree(tmp_path / "cache")
    (again,) = encoder(["a cat"])
    assert torch.equal(again.text, cat.text) and encoder.path("a cat").is_file()


@pytest.mark.parametrize("name, file", [("vae", WEIGHTS), ("text_encoder", "model.safetensors")])
def test_a_hub_model_that_lacks_a_tensor_is_not_filled_at_random(copy, name, file):
    """The files of a hub id are first seen when they are loaded."""
    tensors(name, lambda state: state.popitem(), file)(copy / "model")
    with pytest.raises(ValueError, match=f"{name} of .* must hold exactly the tensors of its config.json: 1 missing"):
        load_network(copy / "model", name, torch.float32)


def test_a_full_disk_is_named_and_leaves_nothing_behind(cache, monkeypatch):
    def full(source, target):
        raise OSError(28, "No space left on device")

    encoder, _ = cache
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match=r"which has [\d,]+ bytes free: [\d,]+ are needed .*make room"):
        encoder(["a mouse"])
    assert not list(encoder.folder.glob("*.tmp"))


def test_embeddings_that_are_not_finite_are_no_prompt(copy, tmp_path):
    path = copy / "model" / "text_encoder_2" / "model.safetensors"
    state = load_file(path)
    state["shared.weight"].fill_(math.nan)
    path.unlink()
    save_file(state, path, {"format": "pt"})
    encoder = PromptEncoder(copy / "model", tmp_path / "cache", "cpu", torch.float32)
    with pytest.raises(ValueError, match="the text encoders must give finite embeddings: those of 'a \"cat\"' are not"):
        encoder(['a "cat"'])
    assert not (tmp_path / "cache").exists()
