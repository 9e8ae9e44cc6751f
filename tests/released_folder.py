"""Folders like the released ones, of full size, in a few megabytes: real configs, real names and shapes, no weights.

    python -m tests.released_folder OUT [--kind 480p_t2v] [--dtype F32] [--vocabulary qwen.tiktoken]

It builds them and has them checked as a run does before it loads weights; test_released_folder.py does so in the suite.

OUT/hunyuan      as hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-<kind>
OUT/videoalign   as KwaiVGI/VideoReward (today KlingTeam/VideoReward)

A file of weights has its whole header and its whole length; in place of the data it has a hole, which takes no disk and
reads as zeros. The tokenizers are stand-ins, unless a file with Qwen's vocabulary is named: dashscope/resources/
qwen.tiktoken in the wheel of the PyPI package dashscope 1.25.0. With it, VideoAlign's tokenizer.json comes out with the
SHA-256 that its repository lists, which proves vocabulary and merges.

Public sources, read in 2026-11: diffusers' classes and its scripts/convert_hunyuan_video1_5_to_diffusers.py (the names
of the tensors, the scheduler's and the guider's numbers), its tests (the configs), transformers 4.57 (the text
encoders' configs, the tokenizers' files), google/byt5-small and Glyph-SDXL-v2 (the 1,510 ids of ByT5), transformers
4.45 and PEFT 0.10 (the names in model.pth).
"""

import argparse
import base64
import hashlib
import json
import math
from pathlib import Path

import torch
from diffusers import AutoencoderKLHunyuanVideo15, HunyuanVideo15Transformer3DModel
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import Qwen2_5_VLTextConfig, Qwen2_5_VLTextModel, T5Config, T5EncoderModel
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from tiny import hunyuan as tiny_hunyuan
from tiny import videoalign as tiny_videoalign
from video import files, videoalign

BYTES = {"F32": 4, "F16": 2, "BF16": 2}
# guidance, shift and size of each kind; those with an image are not text-to-video
KINDS = {
    "480p_t2v": (6.0, 5.0, 640),
    "480p_t2v_distilled": (1.0, 5.0, 640),
    "720p_t2v": (6.0, 9.0, 960),
    "480p_i2v": (6.0, 5.0, 640),
    "480p_i2v_step_distilled": (1.0, 7.0, 640),
}
VERSION = {"_diffusers_version": "0.36.0.dev0"}
PARTS = {
    "guider": ["diffusers", "ClassifierFreeGuidance"],
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "Qwen2_5_VLTextModel"],
    "text_encoder_2": ["transformers", "T5EncoderModel"],
    "tokenizer": ["transformers", "Qwen2TokenizerFast"],
    "tokenizer_2": ["transformers", "ByT5Tokenizer"],
    "transformer": ["diffusers", "HunyuanVideo15Transformer3DModel"],
    "vae": ["diffusers", "AutoencoderKLHunyuanVideo15"],
}
TEXT_ENCODER = {  # the language model of Qwen2.5-VL-7B-Instruct
    "architectures": ["Qwen2_5_VLTextModel"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "dtype": "bfloat16",
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "hidden_size": 3584,
    "initializer_range": 0.02,
    "intermediate_size": 18944,
    "layer_types": ["full_attention"] * 28,
    "max_position_embeddings": 128000,
    "max_window_layers": 28,
    "model_type": "qwen2_5_vl_text",
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {"mrope_section": [16, 24, 24], "rope_type": "default", "type": "default"},
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "transformers_version": "4.57.1",
    "use_cache": True,
    "use_sliding_window": False,
    "vision_token_id": 151654,
    "vocab_size": 152064,
}
GLYPH_ENCODER = {  # the encoder of google/byt5-small with more ids
    "architectures": ["T5EncoderModel"],
    "classifier_dropout": 0.0,
    "d_ff": 3584,
    "d_kv": 64,
    "d_model": 1472,
    "decoder_start_token_id": 0,
    "dense_act_fn": "gelu_new",
    "dropout_rate": 0.1,
    "dtype": "float32",
    "eos_token_id": 1,
    "feed_forward_proj": "gated-gelu",
    "is_encoder_decoder": False,
    "is_gated_act": True,
    "layer_norm_epsilon": 1e-06,
    "model_type": "t5",
    "num_decoder_layers": 4,
    "num_heads": 6,
    "num_layers": 12,
    "pad_token_id": 0,
    "relative_attention_max_distance": 128,
    "relative_attention_num_buckets": 32,
    "tie_word_embeddings": False,
    "tokenizer_class": "ByT5Tokenizer",
    "transformers_version": "4.57.1",
    "use_cache": False,
    "vocab_size": 1510,
}
VAE = {
    "_class_name": "AutoencoderKLHunyuanVideo15",
    **VERSION,
    "block_out_channels": [128, 256, 512, 1024, 1024],
    "downsample_match_channel": True,
    "in_channels": 3,
    "latent_channels": 32,
    "layers_per_block": 2,
    "out_channels": 3,
    "scaling_factor": 1.03682,
    "spatial_compression_ratio": 16,
    "temporal_compression_ratio": 4,
    "upsample_match_channel": True,
}


def transformer_config(kind):
    return {
        "_class_name": "HunyuanVideo15Transformer3DModel",
        **VERSION,
        "attention_head_dim": 128,
        "image_embed_dim": 1152,
        "in_channels": 65,
        "mlp_ratio": 4.0,
        "num_attention_heads": 16,
        "num_layers": 54,
        "num_refiner_layers": 2,
        "out_channels": 32,
        "patch_size": 1,
        "patch_size_t": 1,
        "qk_norm": "rms_norm",
        "rope_axes_dim": [16, 56, 56],
        "rope_theta": 256.0,
        "target_size": KINDS[kind][2],
        "task_type": "t2v" if kind in ("480p_t2v_distilled", "720p_t2v") else "i2v",
        "text_embed_2_dim": 1472,
        "text_embed_dim": 3584,
        "use_meanflow": "step_distilled" in kind,
    }


# ------------------------------------------------------------------------------------------------ files with holes
def write_json(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def size_of(shape, dtype):
    return math.prod(shape) * BYTES[dtype]


def write_holes(path, tensors):
    """A safetensors file of {name: (shape, dtype)}: 8 bytes with the header's length, the header, and a hole."""
    header = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (shape, dtype) in tensors.items():
        start, end = end, end + size_of(shape, dtype)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        file.truncate(8 + len(text) + end)


def write_network(folder, stem, network, dtype, most_bytes, variant=""):
    """One file, or several and their index, under the names that save_pretrained gives them."""
    folder.mkdir(parents=True, exist_ok=True)
    shards, taken = [{}], 0
    for name, tensor in network.state_dict().items():
        if name == "encoder.embed_tokens.weight":  # T5's second name for shared.weight, which is not stored
            continue
        size = size_of(tensor.shape, dtype)
        if shards[-1] and taken + size > most_bytes:
            shards.append({})
            taken = 0
        shards[-1][name] = tuple(tensor.shape), dtype
        taken += size
    mark = f".{variant}" if variant else ""
    if len(shards) == 1:
        write_holes(folder / f"{stem}{mark}.safetensors", shards[0])
        return
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = f"{stem}{mark}-{number:05d}-of-{len(shards):05d}.safetensors"
        write_holes(folder / file, shard)
        weight_map.update(dict.fromkeys(shard, file))
    write_json(folder / f"{stem}.safetensors.index{mark}.json", {"metadata": {}, "weight_map": weight_map})


# ------------------------------------------------------------------------------------------------ tokenizers
CHAT_TOKENS = (
    "<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|> <|box_end|> "
    "<|quad_start|> <|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|> <|image_pad|> <|video_pad|>"
).split()
TOOL_TOKENS = (
    "<tool_call> </tool_call> <|fim_prefix|> <|fim_middle|> <|fim_suffix|> <|fim_pad|> <|repo_name|> <|file_sep|>"
).split()
REWARD_TOKENS = ["<|VQ_reward|>", "<|MQ_reward|>", "<|TA_reward|>"]
REWARD_TOKENIZER_SHA256 = "a05e80818b958b49531b8e1f758c4ae65f090fdec80e6d8408963f70ae3f737d"
# For messages of text alone it writes what Qwen2.5-VL's own template writes.
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content %}{{ part.text }}{% endfor %}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def read_vocabulary(path):
    """(vocab, merges) of Qwen2 from a file of `base64-token rank` lines.

    A token's merge follows from the ranks: byte-pair encoding with the lower ranks alone leaves two parts of it.
    """
    ranks = {}
    for line in path.read_bytes().splitlines():
        token, rank = line.split()
        ranks[base64.b64decode(token)] = int(rank)
    letters = byte_letters()
    vocab, merges = {}, []
    for token, rank in sorted(ranks.items(), key=lambda pair: pair[1]):
        vocab["".join(letters[byte] for byte in token)] = rank
        if len(token) > 1:
            merges.append(["".join(letters[byte] for byte in part) for part in last_merge(token, rank, ranks)])
    return vocab, merges


def byte_letters():
    """The visible character that byte-level BPE writes for each byte."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {byte: chr(byte) for byte in shown}
    for byte in range(256):
        if byte not in letters:
            letters[byte] = chr(256 + len(letters) - len(shown))
    return letters


def last_merge(token, rank, ranks):
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        pairs = [ranks.get(left + right, rank) for left, right in zip(parts, parts[1:])]
        place = pairs.index(min(pairs))
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
    return parts


def token_flags(content, special, normalized=False):
    flags = {"content": content, "lstrip": False, "normalized": normalized, "rstrip": False, "single_word": False}
    return {**flags, "special": special}


def write_qwen(folder, vocabulary, more_tokens, template):
    """The two files of a Qwen2 tokenizer that transformers reads, as transformers 4 writes them."""
    vocab, merges = vocabulary
    special = {*CHAT_TOKENS, *REWARD_TOKENS}
    added = {}
    for number, token in enumerate(CHAT_TOKENS + more_tokens, len(vocab)):
        added[number] = token_flags(token, token in special)
    order = ("id", "content", "single_word", "lstrip", "rstrip", "normalized", "special")
    bytewise = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": PRETOKENIZE_REGEX}, "behavior": "Isolated", "invert": False}
    write = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{key: {"id": number, **token}[key] for key in order} for number, token in added.items()],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, bytewise]},
        "post_processor": bytewise,
        "decoder": bytewise,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": merges,
        },
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(write, indent=2, ensure_ascii=False), encoding="utf-8")
    write_json(
        folder / "tokenizer_config.json",
        {
            "added_tokens_decoder": {str(number): token for number, token in added.items()},
            "additional_special_tokens": CHAT_TOKENS[1:],
            "chat_template": template,
            "eos_token": "<|im_end|>",
            "model_max_length": 131072,
            "pad_token": "<|endoftext|>",
            "padding_side": "right",
            "tokenizer_class": "Qwen2Tokenizer",
        },
    )


def write_byt5(folder):
    """google/byt5-small's tokenizer with the 138 colours and 988 fonts of Glyph-SDXL-v2: 1,510 ids."""
    tokens = [f"<extra_id_{number}>" for number in range(125)]
    tokens += [f"<color-{number}>" for number in range(138)]
    for language, fonts in {"en": 512, "cn": 143, "jp": 211, "kr": 122}.items():
        tokens += [f"<{language}-font-{number}>" for number in range(fonts)]
    added = {}
    for number, token in enumerate(("<pad>", "</s>", "<unk>")):
        added[number] = token_flags(token, True, normalized=True)
    for number, token in enumerate(tokens, 3 + 256):
        added[number] = token_flags(token, True)
    write_json(
        folder / "tokenizer_config.json",
        {
            "added_tokens_decoder": {str(number): token for number, token in added.items()},
            "additional_special_tokens": tokens,
            "eos_token": "</s>",
            "extra_ids": 0,
            "model_max_length": 1000000000000000019884624838656,
            "pad_token": "<pad>",
            "tokenizer_class": "ByT5Tokenizer",
            "unk_token": "<unk>",
        },
    )


# ------------------------------------------------------------------------------------------------ HunyuanVideo-1.5
def networks(kind):
    """{part: (network on meta, its config, its file, dtype, bytes of the largest shard)}."""
    glyphs = T5Config.from_dict(GLYPH_ENCODER)
    transformer = transformer_config(kind)
    with torch.device("meta"):
        built = {
            "transformer": HunyuanVideo15Transformer3DModel.from_config(transformer),
            "vae": AutoencoderKLHunyuanVideo15.from_config(VAE),
            "text_encoder": Qwen2_5_VLTextModel(Qwen2_5_VLTextConfig.from_dict(TEXT_ENCODER)),
            "text_encoder_2": T5EncoderModel(glyphs),
        }
    return {
        "transformer": (built["transformer"], transformer, "diffusion_pytorch_model", "F32", 10e9),
        "vae": (built["vae"], VAE, "diffusion_pytorch_model", "F32", 10e9),
        "text_encoder": (built["text_encoder"], TEXT_ENCODER, "model", "BF16", 5e9),
        "text_encoder_2": (built["text_encoder_2"], GLYPH_ENCODER, "model", "F32", 5e9),
    }


def write_words(folder, kind):
    """What the folder says of itself: model_index.json, guider and scheduler."""
    guidance, shift, _ = KINDS[kind]
    cls = "HunyuanVideo15ImageToVideoPipeline" if "i2v" in kind else "HunyuanVideo15Pipeline"
    write_json(folder / "model_index.json", {"_class_name": cls, **VERSION, **PARTS})
    write_json(
        folder / "guider" / "guider_config.json",
        {
            "_class_name": "ClassifierFreeGuidance",
            **VERSION,
            "enabled": True,
            "guidance_rescale": 0.0,
            "guidance_scale": guidance,
            "start": 0.0,
            "stop": 1.0,
            "use_original_formulation": False,
        },
    )
    write_json(
        folder / "scheduler" / "scheduler_config.json",
        {
            "_class_name": "FlowMatchEulerDiscreteScheduler",
            **VERSION,
            "num_train_timesteps": 1000,
            "shift": shift,
            "shift_terminal": None,
            "stochastic_sampling": False,
            "time_shift_type": "exponential",
            "use_dynamic_shifting": False,
        },
    )


def build_hunyuan(folder, kind="480p_t2v", dtype="F32", vocabulary=None):
    """dtype: of the transformer. vocabulary: (vocab, merges) of Qwen2; None for a stand-in."""
    write_words(folder, kind)
    for name, (network, config, stem, stored, most_bytes) in networks(kind).items():
        write_json(folder / name / "config.json", config)
        write_network(folder / name, stem, network, dtype if name == "transformer" else stored, most_bytes)
    if vocabulary is None:
        tiny_hunyuan.tiny_tokenizer().save_pretrained(folder / "tokenizer")
    else:
        write_qwen(folder / "tokenizer", vocabulary, TOOL_TOKENS, CHAT_TEMPLATE)
    write_byt5(folder / "tokenizer_2")
    return folder


# ------------------------------------------------------------------------------------------------ VideoAlign
def reward_shapes(rank=64):
    """{name: shape} of model.pth."""
    width, wide, vision = 1536, 8960, 1280
    shapes = {"visual.patch_embed.proj.weight": (vision, 3, 2, 14, 14)}
    maps = {"attn.qkv": (3 * vision, vision), "attn.proj": (vision, vision)}
    maps |= {"mlp.fc1": (4 * vision, vision), "mlp.fc2": (vision, 4 * vision)}
    for number in range(32):
        block = f"visual.blocks.{number}"
        for norm in ("norm1", "norm2"):
            shapes |= {f"{block}.{norm}.weight": (vision,), f"{block}.{norm}.bias": (vision,)}
        for name, shape in maps.items():
            shapes |= {f"{block}.{name}.weight": shape, f"{block}.{name}.bias": shape[:1]}
    merged = 4 * vision
    shapes |= {"visual.merger.ln_q.weight": (vision,), "visual.merger.ln_q.bias": (vision,)}
    for name, out in (("mlp.0", merged), ("mlp.2", width)):
        shapes |= {f"visual.merger.{name}.weight": (out, merged), f"visual.merger.{name}.bias": (out,)}
    shapes |= {"model.embed_tokens.weight": (151660, width), "lm_head.weight": (151660, width)}
    attention = {"q_proj": (width, width), "k_proj": (256, width), "v_proj": (256, width), "o_proj": (width, width)}
    mlp = {"gate_proj": (wide, width), "up_proj": (wide, width), "down_proj": (width, wide)}
    adapted = {f"self_attn.{name}": shape for name, shape in attention.items()}
    adapted |= {f"mlp.{name}": shape for name, shape in mlp.items()}
    for number in range(28):
        layer = f"model.layers.{number}"
        for name, (out, into) in adapted.items():
            shapes[f"{layer}.{name}.base_layer.weight"] = out, into
            if name[-6:] in ("q_proj", "k_proj", "v_proj"):
                shapes[f"{layer}.{name}.base_layer.bias"] = (out,)
            shapes[f"{layer}.{name}.lora_A.default.weight"] = rank, into
            shapes[f"{layer}.{name}.lora_B.default.weight"] = out, rank
        shapes |= {f"{layer}.input_layernorm.weight": (width,), f"{layer}.post_attention_layernorm.weight": (width,)}
    return shapes | {"model.norm.weight": (width,), "rm_head.weight": (1, width)}


def build_videoalign(folder, vocabulary=None):
    checkpoint = folder / "checkpoint-11352"
    settings = tiny_videoalign.tiny_settings(output_dim=1)
    settings["data_config"]["max_frame_pixels"] = 200704
    settings["peft_lora_config"] |= {"lora_r": 64, "lora_alpha": 128}
    write_json(folder / "model_config.json", settings)
    if vocabulary is None:
        tiny_videoalign.tiny_tokenizer().save_pretrained(checkpoint / "tokenizer")
    else:
        write_qwen(checkpoint / "tokenizer", vocabulary, REWARD_TOKENS, CHAT_TEMPLATE)
        found = hashlib.sha256((checkpoint / "tokenizer" / "tokenizer.json").read_bytes()).hexdigest()
        if found != REWARD_TOKENIZER_SHA256:
            raise ValueError(f"tokenizer.json must have the released SHA-256 {REWARD_TOKENIZER_SHA256}: got {found}")
    with FakeTensorMode(), torch.serialization.skip_data(materialize_fake_tensors=True):  # a zip with holes
        state = {}
        for name, shape in reward_shapes().items():
            state[f"base_model.model.{name}"] = torch.empty(shape, dtype=torch.bfloat16)
        torch.save(state, checkpoint / "model.pth")
    return folder


# ------------------------------------------------------------------------------------------------ what a hub leaves
def add_local_dir(folder):
    """What `hf download --local-dir` adds to a folder."""
    (folder / ".gitattributes").write_text("*.safetensors filter=lfs diff=lfs merge=lfs -text\n")
    (folder / "README.md").write_text("---\nlibrary_name: diffusers\n---\n")
    for file in [path for path in folder.rglob("*") if path.is_file()]:
        note = folder / ".cache" / "huggingface" / "download" / file.relative_to(folder)
        note.parent.mkdir(parents=True, exist_ok=True)
        Path(f"{note}.metadata").write_text(f"{'0' * 40}\n{'1' * 40}\n1764000000.0\n")


def make_hub_cache(folder, cache, model):
    """A hub cache that holds these files under a hub id: links of a snapshot to blobs. Returns the snapshot."""
    root = cache / f"models--{model.replace('/', '--')}"
    commit = "a" * 40
    snapshot = root / "snapshots" / commit
    (root / "blobs").mkdir(parents=True)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text(commit)
    for number, file in enumerate(sorted(path for path in folder.rglob("*") if path.is_file())):
        blob = root / "blobs" / f"{number:064d}"
        blob.hardlink_to(file)
        link = snapshot / file.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(blob)
    return snapshot


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--kind", default="480p_t2v", choices=KINDS)
    parser.add_argument("--dtype", default="F32", choices=BYTES, help="of the transformer")
    parser.add_argument("--vocabulary", type=Path, help="qwen.tiktoken")
    options = parser.parse_args()
    vocabulary = read_vocabulary(options.vocabulary) if options.vocabulary else None
    model = build_hunyuan(options.out / "hunyuan", options.kind, options.dtype, vocabulary)
    reward = build_videoalign(options.out / "videoalign", vocabulary)
    for folder in (model, reward):
        add_local_dir(folder)
    files.check_model(model)
    print(f"{model} is accepted; it says {files.model_words(model)}")
    videoalign.check_folder(reward, tiny_videoalign.build_tiny_template(options.out / "videoalign_repo"))
    print(f"{reward} is accepted")


if __name__ == "__main__":
    main()
