"""The miniature: HunyuanVideo-1.5 with half a million trained parameters, on which the full run's path learns.

Every class, file and call is the released model's, as in tiny/hunyuan.py. But its transformer has learnt the toy's
world: moving blobs, drawn four times as large, which its VAE decodes from a linear code (tiny/codec.py). So the toy's
analytic rewards can score its videos.

What is trained stands in tiny/miniature.safetensors and is made anew by `python -m tiny.pretrain`. What is
random (the text encoders, the parts that text-to-video never uses) is drawn from a seed instead.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLHunyuanVideo15, HunyuanVideo15Transformer3DModel
from safetensors.torch import load_file
from transformers import ByT5Tokenizer

from tiny import codec
from tiny.hunyuan import GLYPH_DIM, TEXT_DIM, tiny_pipeline, tiny_text_encoder, tiny_tokenizer
from toy import world

WEIGHTS = Path(__file__).with_name("miniature.safetensors")
PROMPTS = world.PROMPTS
# The rewards of ODE samples before and after `train.py --preset mini`, mean ± 3 standard deviations over the seeds.
# Measured: .508, .496, .496, .499, .489 before; .625, .630, .608, .610 after full training; .590, .589, .579, .566 and
# .566 after that of presets.MINI_LORA.
BEFORE = (0.48, 0.52)
AFTER = {"full": (0.58, 0.65, "4 seeds"), "LoRA": (0.54, 0.61, "5 seeds of a LoRA")}
UNUSED = ("context_embedder_2.", "image_embedder.")  # no prompt has quotes or an image: they stay as they were drawn


def build_miniature(folder, weights=WEIGHTS, seed=0):
    """Write the miniature as a HunyuanVideo15Pipeline folder."""
    if not Path(weights).is_file():
        raise FileNotFoundError(
            f"the miniature's weights must exist: no {weights}; make them with python -m tiny.pretrain"
        )
    stored = load_file(weights)
    write_pipeline(folder, part(stored, "transformer."), part(stored, "code."), seed)
    return Path(folder)


def part(stored, prefix):
    """The tensors whose names begin with a prefix, under their names without it."""
    return {name.removeprefix(prefix): value for name, value in stored.items() if name.startswith(prefix)}


def write_pipeline(folder, trained, code, seed):
    """trained: the transformer's weights but for those of UNUSED; code: of codec.fit."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline = tiny_pipeline(tiny_text_encoder(), miniature_tokenizer(), transformer(), vae())
    left = pipeline.transformer.load_state_dict(trained, strict=False)
    missing = [name for name in left.missing_keys if not name.startswith(UNUSED)]
    if missing or left.unexpected_keys:
        got = f"missing {missing[:3]}, unexpected {left.unexpected_keys[:3]}"
        raise ValueError(f"the weights must be those of the miniature's transformer: {got}; run tiny.pretrain again")
    codec.write_decoder(pipeline.vae, code)
    pipeline.save_pretrained(folder)


def transformer():
    return HunyuanVideo15Transformer3DModel(
        in_channels=65,
        out_channels=codec.CHANNELS,
        num_attention_heads=4,
        attention_head_dim=16,
        num_layers=3,
        num_refiner_layers=1,
        mlp_ratio=3.0,
        text_embed_dim=TEXT_DIM,
        text_embed_2_dim=GLYPH_DIM,
        image_embed_dim=16,
        rope_axes_dim=(4, 6, 6),
        target_size=codec.SIDE,
    )


def vae():
    """Its encoder stays random: text-to-video never calls it, and pre-training encodes with the codec itself."""
    return AutoencoderKLHunyuanVideo15(
        latent_channels=codec.CHANNELS,
        block_out_channels=(8, 8, 16, 32, 64),  # just enough for the code: see codec.write_decoder
        layers_per_block=0,
        spatial_compression_ratio=codec.BLOCK["x"],
        temporal_compression_ratio=codec.BLOCK["t"],
        scaling_factor=codec.SCALING_FACTOR,
    )


def miniature_tokenizer():
    """One token for each word of a prompt, so that all prompts have equally many."""
    return tiny_tokenizer([*PROMPTS, "assistant\n"])


def check(prompts):
    """Raise on a prompt that is not of the toy's grammar. Returns the tokenizers, for hunyuan.check_prompts."""
    for prompt in prompts:
        if prompt not in PROMPTS:
            raise ValueError(f"a prompt of the miniature must be one of those in prompts/blobs.txt: got {prompt!r:.80}")
    return miniature_tokenizer(), ByT5Tokenizer()


def reward(videos, prompts):
    """The toy's rewards of uint8 videos [B, 9, 3, 48, 48]: without the black first frame, as large as the toy's."""
    small = F.avg_pool3d(videos[:, 1:].float(), (1, codec.SCALE, codec.SCALE))  # [B, 8, 3, 12, 12]
    return world.rewards(small.cpu(), prompts)


def verdict(log, departures, lora=False):
    """The line that ends a run: its reward before and after beside the reference. log: lines of metrics.jsonl.

    departures: the settings that differ from those of the reference, which then says nothing. lora: whether the run
    trained one.
    """
    rewards = [line["eval_reward"] for line in log if "eval_reward" in line]
    before, after = rewards[0], rewards[-1]
    result = f"reward {before:.3f} → {after:.3f}"
    kind = "LoRA" if lora else "full"
    if departures:
        run = "LoRA run" if lora else "preset"
        return f"{result}; no reference, since {', '.join(departures)} differ from the mini {run}'s"
    (before_low, before_high), (low, high, seeds) = BEFORE, AFTER[kind]
    told = f"{result}; reference {low:.2f}–{high:.2f} over {seeds}"
    if not before_low <= before <= before_high:
        return f"{told}: NOT as expected: it must start within {before_low:.2f}–{before_high:.2f}, look at sampling"
    if not low <= after <= high:
        return f"{told}: NOT as expected, though it starts where it must: look at training"
    return f"{told}: as expected"
