"""VideoAlign and CLIP with random weights and a few thousand parameters, in the folder layout of the released ones.

model.pth has the keys of the real one: those of transformers 4.45 under PEFT, with LoRA unmerged, in bf16. So the code
that renames, merges, tokenises, resizes and scores is that of the full run. The scores mean nothing.
"""

import json
from pathlib import Path

import torch
from tokenizers import pre_tokenizers
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer, Qwen2Tokenizer, Qwen2VLConfig, Qwen2VLModel

CHAT_TOKENS = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|video_pad|>"]
REWARD_TOKENS = ["<|VQ_reward|>", "<|MQ_reward|>", "<|TA_reward|>"]
LORA_RANK, LORA_ALPHA = 4, 8  # the released alpha is twice the rank, too

# Our own words, in the form that the loader asks of VideoAlign's file.
TEMPLATE = '''DETAILED_PROMPT_WITH_SPECIAL_TOKEN = """
Rate this video. How good do its pictures look? <|VQ_reward|>
How well does it move? <|MQ_reward|>
It should show: {text_prompt}
Does it? <|TA_reward|>
"""
'''


def build_tiny_template(folder):
    """Write the prompt_template.py of a folder that stands in for a clone of the VideoAlign repository."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "prompt_template.py").write_text(TEMPLATE, encoding="utf-8")
    return folder


def build_tiny_videoalign(folder, seed=0, output_dim=1):
    """Write a VideoAlign folder (under 1 MB) whose rm_head has 1 or 3 outputs."""
    folder = Path(folder)
    checkpoint = folder / "checkpoint-1"
    checkpoint.mkdir(parents=True, exist_ok=True)
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(checkpoint / "tokenizer")
    config = tiny_config(len(tokenizer))
    write_json(folder / "config.json", config)
    write_json(folder / "model_config.json", tiny_settings(output_dim))
    config_in_fp32 = Qwen2VLConfig(**config | {"torch_dtype": "float32"})
    with torch.random.fork_rng(devices=[]):  # the caller's generator is left as it was
        torch.manual_seed(seed)
        state = original_state(Qwen2VLModel(config_in_fp32), output_dim)
    state_in_bf16 = {key: tensor.bfloat16() for key, tensor in state.items()}
    torch.save(state_in_bf16, checkpoint / "model.pth")
    return folder


def write_json(path, content):
    path.write_text(json.dumps(content, indent=2), encoding="utf-8")


def tiny_tokenizer():
    """One token a byte, no merges: every text can be encoded, and nothing has to be trained."""
    tokens = ["<|endoftext|>", *CHAT_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet()), *REWARD_TOKENS]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    return Qwen2Tokenizer(vocab=vocabulary, merges=[], additional_special_tokens=CHAT_TOKENS + REWARD_TOKENS)


def tiny_config(vocab_size):
    """A config.json in the hub's flat layout of Qwen2-VL, with the torch_dtype that is found there."""
    return {
        "model_type": "qwen2_vl",
        "torch_dtype": "bfloat16",
        "vocab_size": vocab_size,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "initializer_range": 0.3,  # the default 0.02 would make all videos score alike at this width
        "bos_token_id": 0,
        "eos_token_id": 0,
        "rope_theta": 1000000.0,
        "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]},  # sums to half the head dimension
        "vision_config": {
            "depth": 2,
            "embed_dim": 32,
            "hidden_size": 32,
            "num_heads": 2,
            "mlp_ratio": 2,
            "initializer_range": 0.3,
        },
    }


def tiny_settings(output_dim):
    """model_config.json: the keys of the released one that are read, and its values where they are known."""
    return {
        "data_config": {
            "fps": 2.0,
            "num_frames": None,
            "max_frame_pixels": 12_544,  # released: 200,704
            "eval_dim": ["VQ", "MQ", "TA"],
            "prompt_template_type": "detailed_special",
            "sample_type": "uniform",
        },
        "training_args": {},
        "model_config": {
            "model_name_or_path": "Qwen/Qwen2-VL-2B-Instruct",
            "output_dim": output_dim,
            "use_special_tokens": True,
            "reward_token": "special",
        },
        "peft_lora_config": {"lora_enable": True, "lora_r": LORA_RANK, "lora_alpha": LORA_ALPHA, "use_rslora": False},
        "inference_config": {
            "VQ_mean": 3.6757,
            "VQ_std": 2.2476,
            "MQ_mean": 1.1646,
            "MQ_std": 1.3811,
            "TA_mean": 2.8105,
            "TA_std": 2.5121,
        },
    }


def original_state(model, output_dim):
    """The state dict of a Qwen2VLModel as transformers 4.45 and PEFT name it, with LoRA on the text model's layers."""
    state = {}
    for name, weight in model.state_dict().items():
        old_name = "base_model.model." + name.replace("language_model.", "model.")
        stem, _, leaf = old_name.rpartition(".")
        if "norm" in name or "ln_q" in name:
            weight = weight + 0.1 * torch.randn_like(weight)  # all are 1 as initialised: a lost one would go unnoticed
        if stem.endswith("_proj"):
            state[f"{stem}.base_layer.{leaf}"] = weight
        else:
            state[old_name] = weight
        if stem.endswith("_proj") and leaf == "weight":
            state[f"{stem}.lora_A.default.weight"] = 0.1 * torch.randn(LORA_RANK, weight.shape[1])
            state[f"{stem}.lora_B.default.weight"] = 0.1 * torch.randn(weight.shape[0], LORA_RANK)
    width = model.config.text_config.hidden_size
    vocabulary = model.config.text_config.vocab_size
    state["base_model.model.lm_head.weight"] = torch.randn(vocabulary, width)  # no score reads it
    state["base_model.model.rm_head.weight"] = 0.3 * torch.randn(output_dim, width)
    return state


def build_tiny_clip(folder, seed=0):
    """Write a CLIP folder, for CLIPScore and PickScore."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    word_ends = [letter + "</w>" for letter in alphabet]
    tokens = ["<|startoftext|>", "<|endoftext|>", *alphabet, *word_ends]
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1, "vocab_size": len(tokens)}
    image = {"image_size": 32, "patch_size": 8}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = CLIPModel(CLIPConfig(text_config=tower | ids, vision_config=tower | image, projection_dim=16))
    model.save_pretrained(folder)
    vocabulary = {token: index for index, token in enumerate(tokens)}
    CLIPTokenizer(vocab=vocabulary, merges=[]).save_pretrained(folder)
    return Path(folder)
