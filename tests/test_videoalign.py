"""VideoAlign on random weights in the released file's layout, against a reference that merges and renames nothing.

The reference is Qwen2-VL under PEFT, as VideoAlign itself runs it. LoRA stays beside its weight, the model is cast to
bf16 and back before the weights are loaded, and the positions are 0, 1, 2, … . The reference shares only the tokens and
the patches with the code under test.
"""

import json
import math
import shutil

import numpy
import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from transformers import (
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTokenizer,
    Qwen2VLConfig,
    Qwen2VLImageProcessorPil,
    Qwen2VLModel,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from tiny.videoalign import LORA_ALPHA, LORA_RANK, build_tiny_clip, build_tiny_template, build_tiny_videoalign
from video import videoalign
from video.clip import CLIPScore, PickScore
from video.videoalign import VideoAlign

PROMPTS = ["a cat", "a dog that runs over a {green} hill", "東京 by night"]
HEAD = "base_model.model.rm_head.weight"
Q_PROJ = "base_model.model.model.layers.0.self_attn.q_proj"
BASE = Q_PROJ + ".base_layer.weight"
LORA_A = Q_PROJ + ".lora_A.default.weight"
LORA_B = Q_PROJ + ".lora_B.default.weight"
SIZES = {"output_dim": 1, "lora_r": LORA_RANK, "lora_alpha": LORA_ALPHA}  # the settings that shape the module


@pytest.fixture(scope="module")
def repo(tmp_path_factory):
    return build_tiny_template(tmp_path_factory.mktemp("repo"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{output_dim: checkpoint folder}"""
    one = build_tiny_videoalign(tmp_path_factory.mktemp("videoalign1"), output_dim=1)
    three = build_tiny_videoalign(tmp_path_factory.mktemp("videoalign3"), output_dim=3)
    return {1: one, 3: three}


@pytest.fixture(scope="module")
def scorer(folders, repo):
    return VideoAlign(folders[1], repo)


@pytest.fixture
def copy(folders, tmp_path):
    return shutil.copytree(folders[1], tmp_path / "copy")


def random_videos(*shape):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


VIDEOS = random_videos(3, 9, 3, 112, 168)


def reference_model(folder, video_id, rounded):
    """Qwen2-VL with PEFT's own LoRA layers. rounded: cast to bf16 and back, which rounds the rotary frequencies."""
    settings = json.loads((folder / "config.json").read_text()) | {"torch_dtype": "float32"}
    config = Qwen2VLConfig(**settings)
    config.video_token_id = video_id
    model = Qwen2VLModel(config)
    if rounded:
        model = model.to(torch.bfloat16).to(torch.float32)
    lora = LoraConfig(r=LORA_RANK, lora_alpha=LORA_ALPHA, target_modules=".*_proj")
    return get_peft_model(model, lora).eval()


def reference_logits(folder, scorer, video, prompt, rounded=True, mrope=False):
    """[output_dim at each reward token]: [3, output_dim]"""
    model = reference_model(folder, scorer.video_id, rounded)
    state = torch.load(folder / "checkpoint-1" / "model.pth", weights_only=True)
    head = state.pop(HEAD).float()
    del state["base_model.model.lm_head.weight"]
    renamed = {key.replace("model.model.model.", "model.model.language_model."): state[key] for key in state}
    model.load_state_dict(renamed)
    ids, patches, grid = scorer.prepare(video, prompt, 24)
    if mrope:
        kinds = 2 * (ids == scorer.video_id).int()
        positions, _ = model.base_model.model.get_rope_index(ids[None], kinds[None], video_grid_thw=grid[None])
    else:
        positions = torch.arange(len(ids)).expand(3, 1, -1)
    with torch.no_grad():
        output = model(
            input_ids=ids[None],
            position_ids=positions,
            pixel_values_videos=patches,
            video_grid_thw=grid[None],
        )
    is_reward = torch.isin(ids, torch.tensor(scorer.reward_ids))
    return output.last_hidden_state[0][is_reward] @ head.T


def assert_same_scores(actual, expected):
    """Equal up to float32 rounding, which grows with the scores: 5e-5 of the largest one.

    Rounding alone gives up to 6e-6, over 6 seeds and 3 instruction sets. The smallest fault that these tests are about,
    LoRA merged in bf16, gives 1e-2. A cos that is off by 1.5e-4 in one thread gives 2e-4.
    """
    torch.testing.assert_close(actual, expected, atol=5e-5 * expected.abs().max().item(), rtol=0)


def logits_one_by_one(scorer):
    rows = [scorer.logits([scorer.prepare(video, prompt, 24)]) for video, prompt in zip(VIDEOS, PROMPTS)]
    return torch.cat(rows)  # [3, 3]


def first_logits(scorer):
    return scorer.logits([scorer.prepare(VIDEOS[0], PROMPTS[0], 24)])[0]


@pytest.mark.parametrize("output_dim", [1, 3])
def test_padded_batch_equals_reference_one_by_one(folders, repo, output_dim):
    scorer = VideoAlign(folders[output_dim], repo, batch_size=3)
    together = scorer.logits([scorer.prepare(video, prompt, 24) for video, prompt in zip(VIDEOS, PROMPTS)])
    for video, prompt, row in zip(VIDEOS, PROMPTS, together):
        expected = reference_logits(folders[output_dim], scorer, video, prompt)  # [3, output_dim]
        expected = expected[:, 0] if output_dim == 1 else expected.diagonal()
        assert_same_scores(row, expected)
    assert (together[0] - together[1]).abs().min() > 1e-3  # the scores do depend on the video


def test_scores_are_normalised_logits_in_any_batch(folders, repo, scorer):
    scores = VideoAlign(folders[1], repo, batch_size=2)(VIDEOS, PROMPTS)
    raw = logits_one_by_one(scorer)
    published = {"VQ": (3.6757, 2.2476), "MQ": (1.1646, 1.3811), "TA": (2.8105, 2.5121)}
    assert list(scores) == list(published)
    for dimension, (name, (mean, std)) in enumerate(published.items()):
        assert scores[name].dtype == torch.float32
        assert_same_scores(scores[name], (raw[:, dimension] - mean) / std)


def test_prompt_reaches_the_model_in_the_template(scorer):
    ids, patches, grid = scorer.prepare(VIDEOS[0], PROMPTS[1], 24)
    pads = "<|video_pad|>" * (grid.prod().item() // 4)
    assert scorer.tokenizer.decode(ids) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        f"<|im_start|>user\n<|vision_start|>{pads}<|vision_end|>\n"
        "Rate this video. How good do its pictures look? <|VQ_reward|>\nHow well does it move? <|MQ_reward|>\n"
        f"It should show: {PROMPTS[1]}\nDoes it? <|TA_reward|>\n<|im_end|>\n<|im_start|>assistant\n"
    )


def test_trap_1_positions_are_one_dimensional(folders, scorer):
    ours = first_logits(scorer)
    mrope = reference_logits(folders[1], scorer, VIDEOS[0], PROMPTS[0], mrope=True)[:, 0]
    assert_same_scores(ours, reference_logits(folders[1], scorer, VIDEOS[0], PROMPTS[0])[:, 0])
    assert (ours - mrope).abs().max() > 0.1


def test_trap_2_rotary_frequencies_are_rounded_to_bf16(folders, scorer):
    ours = first_logits(scorer)
    exact = reference_logits(folders[1], scorer, VIDEOS[0], PROMPTS[0], rounded=False)[:, 0]
    assert (ours - exact).abs().max() > 1e-3
    model = scorer.module["model"]
    exponents = torch.arange(0, 8, 2).double() / 8  # both embeddings have width 8
    for rope, theta in ((model.language_model.rotary_emb, 1e6), (model.visual.rotary_pos_emb, 1e4)):
        rounded = (theta**-exponents).bfloat16().float()
        assert rope.inv_freq.dtype == torch.float32
        assert rope.inv_freq.equal(rounded)


def test_trap_3_a_bf16_config_builds_an_fp32_model(folders, scorer):
    assert json.loads((folders[1] / "config.json").read_text())["torch_dtype"] == "bfloat16"  # the trap is set
    for parameter in scorer.module.parameters():
        assert parameter.dtype == torch.float32
        assert not parameter.requires_grad
    config = scorer.module["model"].config
    assert config.dtype == config.text_config.dtype == config.vision_config.dtype == torch.float32


def test_trap_4_lora_is_merged_and_scored_in_fp32(folders, scorer):
    state = torch.load(folders[1] / "checkpoint-1" / "model.pth", weights_only=True)
    merged = scorer.module["model"].language_model.layers[0].self_attn.q_proj.weight.double()
    expected = state[BASE].double() + LORA_ALPHA / LORA_RANK * state[LORA_B].double() @ state[LORA_A].double()
    largest = expected.abs().max().item()
    torch.testing.assert_close(merged, expected, atol=1e-6 * largest, rtol=0)
    merged_in_bf16 = expected.bfloat16().double()
    assert (merged - merged_in_bf16).abs().max() > 1e-3 * largest
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = first_logits(scorer)
    assert_same_scores(under_autocast, first_logits(scorer))


def test_weights_that_are_not_finite(folders):
    state = torch.load(folders[1] / "checkpoint-1" / "model.pth", weights_only=True)
    state[HEAD][0, 3] = math.nan
    module = videoalign.build_module(folders[1], SIZES, video_id=5).to_empty(device="cpu")
    with pytest.raises(ValueError, match="the weights of model.pth must be finite: rm_head.weight is not"):
        videoalign.load_weights(module, state)


def test_a_buffer_that_would_stay_undefined(folders, monkeypatch):
    build = Qwen2VLModel.__init__

    def build_with_a_buffer(self, config):
        build(self, config)
        self.register_buffer("scale", torch.ones(1), persistent=False)

    monkeypatch.setattr(Qwen2VLModel, "__init__", build_with_a_buffer)
    with pytest.raises(RuntimeError, match=r"transformers adds \['model.scale'\]"):
        videoalign.build_module(folders[1], SIZES, video_id=5)


def test_settings_that_are_not_implemented(copy, repo):
    path = copy / "model_config.json"
    stock = path.read_text()
    wrong = [
        ("data_config", "sample_type", "multi_pts"),
        ("data_config", "num_frames", 8),
        ("data_config", "prompt_template_type", "simple"),
        ("model_config", "output_dim", 2),
        ("model_config", "reward_token", "last"),
        ("model_config", "use_special_tokens", False),
        ("peft_lora_config", "use_rslora", True),
    ]
    for section, key, value in wrong:
        settings = json.loads(stock)
        settings[section][key] = value
        path.write_text(json.dumps(settings))
        with pytest.raises(ValueError, match=f"{key} must be one of .*{value}"):
            VideoAlign(copy, repo)


def test_newest_checkpoint_is_taken(copy, repo, scorer):
    old = shutil.copytree(copy / "checkpoint-1", copy / "checkpoint-9")
    (old / "model.pth").write_text("not a checkpoint")
    shutil.move(copy / "checkpoint-1", copy / "checkpoint-10")
    assert_same_scores(first_logits(VideoAlign(copy, repo)), first_logits(scorer))


def test_template_must_come_from_a_clone(folders, tmp_path):
    with pytest.raises(FileNotFoundError, match="git clone https://github.com/KwaiVGI/VideoAlign"):
        VideoAlign(folders[1], tmp_path)


def test_sizes_of_the_released_model(tmp_path):
    """Qwen2-VL-2B has 2,208,985,600 parameters, with tied embeddings and a vocabulary of 151,936.
    The released bf16 file, with a head of its own for 151,660 tokens and LoRA of rank 64, has 5.03 GB."""
    module = videoalign.build_module(tmp_path, {"output_dim": 1, "lora_r": 64, "lora_alpha": 128}, video_id=151656)
    sizes = {name: weight.numel() for name, weight in module.named_parameters()}
    lora = sum(size for name, size in sizes.items() if "lora_" in name)
    width = 1536
    backbone = sum(sizes.values()) - lora - width  # rm_head has one output
    assert backbone + (151_936 - 151_660) * width == 2_208_985_600
    gigabytes = 2 * (backbone + lora + 151_660 * width + width) / 1e9
    assert gigabytes == pytest.approx(5.03, abs=0.005)


@pytest.mark.parametrize(
    "total, fps, count", [(81, 24, 6), (90, 24, 8), (9, 24, 4), (3, 24, 2), (5, 1, 4), (900, 1, 768)]
)
def test_frame_counts(total, fps, count):
    indices = videoalign.frame_indices(total, fps, 2.0)
    assert len(indices) == count and indices[0] == 0 and indices[-1] == total - 1
    assert (indices - torch.arange(count) * (total - 1) / (count - 1)).abs().max() <= 0.5


@pytest.mark.parametrize(
    "height, width", [(480, 848), (480, 832), (64, 96), (32, 32), (720, 1280), (280, 392), (30, 3000)]
)
def test_frames_are_resized_as_qwen_resizes(height, width):
    frames = videoalign.resize_frames(random_videos(2, 3, height, width), 200_704)
    assert tuple(frames.shape[-2:]) == smart_resize(height, width, min_pixels=100_352, max_pixels=200_704)
    assert frames.equal(frames.round()) and 0 <= frames.min() and frames.max() <= 255


@pytest.mark.parametrize("height, width", [(480, 848), (64, 96)])  # smaller, and larger
def test_frames_are_resized_as_pillow_resizes(height, width):
    (frame,) = random_videos(1, 3, height, width) // 2 + 64  # Pillow also clamps between its two passes
    (resized,) = videoalign.resize_frames(frame[None], 200_704)
    image = Image.fromarray(frame.permute(1, 2, 0).numpy())
    expected = image.resize((resized.shape[2], resized.shape[1]), Image.Resampling.BICUBIC)
    assert (resized.permute(1, 2, 0) - torch.tensor(numpy.asarray(expected))).abs().max() <= 1  # of 255 levels


def test_frames_are_taken_at_the_rates_of_the_call_and_of_the_checkpoint(copy, repo, monkeypatch):
    path = copy / "model_config.json"
    video = random_videos(1, 48, 3, 28, 28)
    taken = []

    def count(scorer, samples):
        _, _, grid = samples[0]
        taken.append(2 * grid[0].item())
        return torch.zeros(1, 3)

    monkeypatch.setattr(VideoAlign, "logits", count)
    for sample_fps in (2.0, 4.0):
        settings = json.loads(path.read_text())
        settings["data_config"]["fps"] = sample_fps
        path.write_text(json.dumps(settings))
        scorer = VideoAlign(copy, repo, fps=24)
        scorer(video, PROMPTS[:1])  # two seconds
        scorer(video, PROMPTS[:1], fps=8)  # six seconds
    assert taken == [4, 12, 8, 24]


def test_patches_of_a_still_equal_the_stock_processor():
    image = random_videos(3, 280, 392)
    stock = Qwen2VLImageProcessorPil(do_resize=False)(image.numpy(), return_tensors="pt")
    patches, grid = videoalign.patchify(image.float().expand(2, -1, -1, -1))
    assert grid.tolist() == stock["image_grid_thw"][0].tolist()
    one_level = 1 / 255 / max(videoalign.PIXEL_STD)
    torch.testing.assert_close(patches, stock["pixel_values"], atol=1e-3 * one_level, rtol=0)


def test_patches_of_a_video_keep_the_order_of_frames(scorer):
    """The patch embedding of our patches is the same kernel slid over the video, its outputs in blocks of 2 × 2."""
    frames = random_videos(4, 3, 56, 84).float()
    embed = scorer.module["model"].visual.patch_embed
    patches, grid = videoalign.patchify(frames)
    mean = torch.tensor(videoalign.PIXEL_MEAN).view(3, 1, 1)
    std = torch.tensor(videoalign.PIXEL_STD).view(3, 1, 1)
    video = ((frames / 255 - mean) / std).transpose(0, 1)  # [C, F, H, W]
    slid = embed.proj(video[None])[0]  # [D, 2, 4, 6]
    blocks = slid.unflatten(2, (2, 2)).unflatten(4, (3, 2))  # [D, t, h, 2, w, 2]
    expected = blocks.permute(1, 2, 4, 3, 5, 0).reshape(48, -1)  # [t · h · w · 2 · 2, D]
    assert grid.tolist() == [2, 4, 6]
    torch.testing.assert_close(embed(patches), expected, atol=1e-5 * expected.abs().max().item(), rtol=0)


def test_a_failed_sample_is_nan_with_its_cause(scorer):
    scores = scorer(VIDEOS, ["<|TA_reward|>", "a <|video_pad|> b", PROMPTS[2]])
    assert len(scorer.failures) == 2
    assert scorer.failures[0].startswith("sample 0: a prompt must not contain")
    assert scorer.failures[1].startswith("sample 1: a prompt must not contain")
    alone = scorer(VIDEOS[2:], PROMPTS[2:])
    assert scorer.failures == []
    for name, values in scores.items():
        assert values.isnan().tolist() == [True, True, False]
        assert_same_scores(values[2:], alone[name])


def test_scores_that_are_not_finite_and_single_frames_fail(scorer, monkeypatch):
    monkeypatch.setattr(scorer, "logits", lambda samples: torch.tensor([[1.0, math.inf, 1.0], [1.0, 2.0, 3.0]]))
    scores = scorer(VIDEOS[:2], PROMPTS[:2])
    for values in scores.values():
        assert values.isnan().tolist() == [True, False]
    assert scorer.failures == ["sample 0: its score is not finite"]
    assert scorer(VIDEOS[:1, :1], PROMPTS[:1])["VQ"].isnan().all()
    assert scorer.failures == ["sample 0: a video must have at least 2 frames: got 1"]


@pytest.mark.parametrize("videos, prompts", [(VIDEOS.float(), PROMPTS), (VIDEOS, PROMPTS[:2]), (VIDEOS[0], PROMPTS)])
def test_wrong_videos_are_an_error(scorer, videos, prompts):
    with pytest.raises(ValueError, match=r"prompts need uint8 videos \[B,F,3,H,W\]: got"):
        scorer(videos, prompts)


def test_clip_scores_equal_the_stock_forward(tmp_path):
    folder = build_tiny_clip(tmp_path)
    model = CLIPModel.from_pretrained(folder)
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    image_processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    clip = CLIPScore(folder)(VIDEOS, PROMPTS)["CLIPScore"]
    pick = PickScore(folder)(VIDEOS, PROMPTS)["PickScore"]
    for i, (video, prompt) in enumerate(zip(VIDEOS, PROMPTS)):
        frames = video[[0, 1, 2, 3, 5, 6, 7, 8]]  # 8 of the 9, evenly spaced
        arrays = [frame.permute(1, 2, 0).numpy() for frame in frames]
        images = image_processor(arrays, return_tensors="pt").pixel_values
        logits = model(**tokenizer(prompt, return_tensors="pt"), pixel_values=images).logits_per_image[:, 0]
        cosine = logits / model.logit_scale.exp()  # within ±1: the tolerances are absolute
        assert pick[i].item() == pytest.approx(logits.mean().item() / 26, abs=1e-5)
        assert clip[i].item() == pytest.approx(2.5 * cosine.clamp(min=0).mean().item(), abs=1e-5)
