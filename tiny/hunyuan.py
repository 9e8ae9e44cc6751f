"""HunyuanVideo-1.5 with random weights and a few thousand parameters, built on the spot.

The released weights cannot be part of a test or of a first run. Every class here is the released one, in the released
folder layout, so the code which loads, encodes, denoises, decodes and exports is the code of the full run. It proves
that path; it cannot produce a video that shows anything.
"""

import inspect
import json
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLHunyuanVideo15,
    ClassifierFreeGuidance,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideo15Pipeline,
    HunyuanVideo15Transformer3DModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    ByT5Tokenizer,
    Qwen2_5_VLTextConfig,
    Qwen2_5_VLTextModel,
    Qwen2Tokenizer,
    T5Config,
    T5EncoderModel,
)

TEXT_DIM, GLYPH_DIM = 16, 16
END, OPEN, CLOSE = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
# The turns of a chat in the markup of Qwen2: the part before a user's text is what encode_prompt cuts off.
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '" + OPEN + "' + m.role + '\n' + m.content + '" + CLOSE + "\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '" + OPEN + "assistant\n' }}{% endif %}"
)


def build_tiny_hunyuan(folder, seed=0):
    """Write a HunyuanVideo15Pipeline folder: about 20 MB, mostly a projection whose width of 2048 is hard-coded."""
    with torch.random.fork_rng(devices=[]):  # random weights only: the caller's generator is left as it was
        torch.manual_seed(seed)
        pipeline = tiny_pipeline(tiny_text_encoder(), tiny_tokenizer(), tiny_transformer(), tiny_vae())
    pipeline.save_pretrained(folder)
    return Path(folder)


def tiny_pipeline(text_encoder, tokenizer, transformer, vae):
    return HunyuanVideo15Pipeline(
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        transformer=transformer,
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
        text_encoder_2=tiny_glyph_encoder(),
        tokenizer_2=ByT5Tokenizer(),  # bytes: needs no vocabulary file
        guider=ClassifierFreeGuidance(guidance_scale=6.0),
    )


def tiny_transformer():
    transformer = HunyuanVideo15Transformer3DModel(
        in_channels=65,  # 32 latent + 32 conditioning latent + 1 mask, as released
        out_channels=32,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        num_refiner_layers=1,
        mlp_ratio=2.0,
        text_embed_dim=TEXT_DIM,
        text_embed_2_dim=GLYPH_DIM,
        image_embed_dim=16,
        rope_axes_dim=(4, 6, 6),  # sums to the head dimension
        target_size=64,
    )
    # The type embedding tells text, glyphs and images apart and starts at N(0, 1), 50 times the other parameters' size.
    # With it, text would hardly matter at this width and tests of guidance would compare almost equal velocities.
    torch.nn.init.normal_(transformer.cond_type_embed.weight, std=0.02)
    return transformer


def tiny_vae():
    return AutoencoderKLHunyuanVideo15(
        latent_channels=32,
        block_out_channels=(8, 8, 16, 32, 64),
        layers_per_block=1,
        spatial_compression_ratio=16,
        temporal_compression_ratio=4,
    )


def tiny_text_encoder(vocab_size=512):
    """Four layers, since the pipeline reads the third hidden state from the end."""
    return Qwen2_5_VLTextModel(
        Qwen2_5_VLTextConfig(
            vocab_size=vocab_size,
            hidden_size=TEXT_DIM,
            intermediate_size=32,
            num_hidden_layers=4,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=2048,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]},
            initializer_range=0.3,  # the default 0.02 would make all prompts look alike at this width
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=0,
        )
    )


def tiny_glyph_encoder():
    return T5EncoderModel(
        T5Config(
            vocab_size=384,  # ByT5: 3 special tokens, 256 bytes, 125 extra ids
            d_model=GLYPH_DIM,
            d_kv=8,
            d_ff=32,
            num_layers=1,
            num_heads=2,
            feed_forward_proj="gated-gelu",
        )
    )


def tiny_tokenizer(texts=()):
    """A byte-level BPE under which the text before the user's has as many tokens as under the released one: 108.

    Each word of `texts` becomes one token, too.
    The pipeline cuts that many tokens off without looking. A tokenizer that splits the system message more finely would
    leave a part of it in every prompt, a coarser one would cut into the prompt. With one token for each of its words,
    as in the released tokenizer, the count comes out; these are all the merges that the message itself can give.
    """
    stock = inspect.signature(HunyuanVideo15Pipeline._get_mllm_prompt_embeds).parameters
    message, crop = stock["system_message"].default, stock["crop_start"].default
    tokenizer = qwen_tokenizer(train_merges([f"system\n{message}\nuser\n", *texts]))
    chat = [{"role": "system", "content": message}, {"role": "user", "content": ""}]
    text = tokenizer.apply_chat_template(chat, tokenize=False)
    length = len(tokenizer(text[: text.rindex(CLOSE)]).input_ids)
    if length != crop:
        raise RuntimeError(
            f"the text before the user's must have the {crop} tokens that the pipeline cuts: got {length}"
        )
    return tokenizer


def train_merges(texts):
    """Byte-pair merges of texts, split into words as Qwen2 splits it, in the order in which they were found."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = qwen_tokenizer(merges=[]).backend_tokenizer.pre_tokenizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=10_000, min_frequency=1, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(texts, trainer)
    return [tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]]


def qwen_tokenizer(merges):
    tokens = [END, OPEN, CLOSE, *sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(pair) for pair in merges)]
    return Qwen2Tokenizer(
        vocab={token: index for index, token in enumerate(dict.fromkeys(tokens))},
        merges=merges,
        additional_special_tokens=[OPEN, CLOSE],
        chat_template=CHAT_TEMPLATE,
    )
