"""How fast one GPU runs the real architecture, with random weights. Nothing is downloaded or learned.

    python -m paper.gpu                  some minutes on a GPU with 48 GiB or more; prints a table
    python -m paper.gpu --tiny           the same with a tiny model, also on a CPU
    python -m paper.gpu --out FILE       also writes the numbers as JSON, each as soon as it is measured

Most rows train a LoRA of rank 64 over a bf16 base, because that fits one GPU. Every attention kernel that runs is
measured at the smaller of the paper's sizes, FlashAttention-3 and 4 among them where their packages are installed, and
the fastest one at both, also with the attention's output kept for backward. Then come a third of the blocks, trained in
full with float32 masters, as FSDP trains them, and the VAE's decoding in each format. Compiled blocks come last, since
a compiler is most likely to fail. A row has:

    seconds    of a forward pass, and of one with backward, after a first call that warms up
    TFLOP/s    of all FLOPs of the pass with backward, those of checkpointing's second forward among them: what
               --gpu_tflops of the dry run takes
    share      of the rate that the card reaches in a product of two large bf16 matrices; here the second forward does
               not count (model-FLOP utilisation)
    peak       of GPU memory in the pass with backward, beside what plan.memory computes for the same parts

Without a GPU there are no peaks.
"""

import argparse
import json
import statistics
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import torch
from diffusers import AutoencoderKLHunyuanVideo15

from engine.config import VAE_DTYPES, Config
from engine.plan import decode_bytes, decode_flops, flops_with_backward, memory, pass_flops
from engine.scoring import clock
from engine.trace import GLYPH_TOKENS, TEXT_TOKENS
from paper.claims import gpu_table
from video import hunyuan, kernels
from video.prompts import Prompt

LORA_RANK = 64
SIZES = {"352 × 624 × 81": (81, 352, 624), "480 × 832 × 81": (81, 480, 832)}
TINY_SIZES = {"64 × 64 × 5": (5, 64, 64)}
ROUNDS = 2
PART = 3  # full training is measured on one block in so many


def measured(function, device):
    """(median seconds, peak GiB or None) of a call, after one that warms up."""
    function()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    taken = []
    for _ in range(ROUNDS):
        started = clock(device)
        function()
        taken.append(clock(device) - started)
    peak = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None
    return statistics.median(taken), peak


def matrix_rate(device, side):
    """FLOP/s of a product of two bf16 matrices."""
    a, b = torch.randn(2, side, side, device=device, dtype=torch.bfloat16)
    seconds, _ = measured(lambda: a @ b, device)
    return 2 * side**3 / seconds


def random_policy(device, architecture, lora_rank, checkpointing="full"):
    """The released transformer, its weights drawn at random, as a policy without guidance."""
    transformer = hunyuan.build_transformer(architecture, torch.bfloat16, lora_rank, checkpointing)
    transformer.to_empty(device=device)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in transformer.parameters():
            parameter.normal_(std=0.02)
    no_vae = SimpleNamespace(enable_slicing=lambda: None, enable_tiling=lambda: None)
    return hunyuan.HunyuanPolicy(transformer, no_vae, None, None, 1.0, torch.bfloat16)


def usable_kernels(device, head_dim):
    names = []
    for name in kernels.KERNELS:
        if name == "math" and device.type == "cuda":
            continue  # it holds all scores at once, 20 GiB a block at the smaller size
        problem = kernels.problem_of(name, device, torch.bfloat16, head_dim)
        if problem is None:
            names.append(name)
        else:
            print(f"left out: {name}: {problem}")
    return names


def measure_pass(policy, size, rate, device, lora_rank=LORA_RANK, checkpointing="full"):
    """The numbers of one row of the table."""
    sizes = policy.module.config
    x = torch.randn(1, *hunyuan.latent_shape(*size), device=device)
    sigma = torch.full((1,), 0.5, device=device)
    text = torch.randn(TEXT_TOKENS, sizes.text_embed_dim), torch.randn(GLYPH_TOKENS, sizes.text_embed_2_dim)
    prompt = Prompt(*text)

    def forward():
        with torch.no_grad():
            policy.velocity(x, sigma, [prompt])

    def with_backward():
        policy.velocity(x, sigma, [prompt]).square().mean().backward()

    forward_seconds, _ = measured(forward, device)
    seconds, peak = measured(with_backward, device)
    tokens = hunyuan.token_count(*size)
    config = settings(size, lora_rank, checkpointing)
    parts = memory(config, 1, sizes)
    per_pass = pass_flops(tokens, sizes)
    return {
        "forward seconds": forward_seconds,
        "with backward": seconds,
        "TFLOP/s": flops_with_backward(config, per_pass) / seconds / 1e12,
        "share forward": sum(per_pass) / forward_seconds / rate,
        "share with backward": flops_with_backward(replace(config, checkpointing="none"), per_pass) / seconds / rate,
        "peak GiB": peak,
        "computed GiB": sum(parts[name] for name in ("weights", "gathered", "gradients", "activations")),
    }


def settings(size, lora_rank, checkpointing):
    """Those of a run whose update has this pass."""
    frames, height, width = size
    video = {"frames": frames, "height": height, "width": width, "guidance_scale": 1.0}
    return Config(lora_rank=lora_rank, checkpointing=checkpointing, **video)


def measure_decode(vae, size, vae_dtype, device):
    vae.to(hunyuan.decoder_dtype(vae_dtype))
    policy = SimpleNamespace(vae=vae, vae_tf32=vae_dtype == "tf32")
    latents = torch.randn(1, *hunyuan.latent_shape(*size), device=device)
    seconds, peak = measured(lambda: hunyuan.HunyuanPolicy.decode(policy, latents), device)
    weights = sum(parameter.nbytes for parameter in vae.parameters())
    computed = (weights + decode_bytes(size[0], vae_dtype)) / 2**30
    rate = decode_flops(*size) / seconds / 1e12
    return {"decode seconds": seconds, "TFLOP/s": rate, "peak GiB": peak, "computed GiB": computed}


def measure_all(device, sizes, architecture, vae_config, side):
    """Yield (row, {number: value})."""
    rate = matrix_rate(device, side)
    card = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    yield f"{card}, bf16 matrices of {side} × {side}", {"TFLOP/s": rate / 1e12}
    small, *larger = sizes
    policy = random_policy(device, architecture, LORA_RANK)
    seconds = {}
    for kernel in usable_kernels(device, policy.module.config.attention_head_dim):
        use_kernel(policy.module, kernel)
        row = measure_pass(policy, sizes[small], rate, device)
        seconds[kernel] = row["with backward"]
        yield f"{small}, {kernel}", row
    fastest = min(seconds, key=seconds.get)
    use_kernel(policy.module, fastest)
    for name in larger:
        yield f"{name}, {fastest}", measure_pass(policy, sizes[name], rate, device)
    blocks = policy.module.config.num_layers
    del policy

    for title, layers, lora_rank, checkpointing in (
        ("attention's output kept", blocks, LORA_RANK, "attention"),
        (f"full training of {blocks // PART or 1} blocks", blocks // PART or 1, 0, "full"),
    ):
        policy = random_policy(device, {**(architecture or {}), "num_layers": layers}, lora_rank, checkpointing)
        use_kernel(policy.module, fastest)
        for name, size in sizes.items():
            yield f"{name}, {title}", measure_pass(policy, size, rate, device, lora_rank, checkpointing)
        del policy

    torch.manual_seed(0)
    with device:
        vae = AutoencoderKLHunyuanVideo15.from_config(vae_config).requires_grad_(False)
    vae.enable_slicing()
    vae.enable_tiling()
    for name in larger:
        yield f"{name}, VAE in float16", measure_decode(vae, sizes[name], "float16", device)
    for vae_dtype in VAE_DTYPES:
        yield f"{small}, VAE in {vae_dtype}", measure_decode(vae, sizes[small], vae_dtype, device)
    del vae

    policy = random_policy(device, architecture, LORA_RANK)
    use_kernel(policy.module, fastest)
    hunyuan.compile_blocks(policy.module)
    for name, size in sizes.items():
        yield f"{name}, compiled", measure_pass(policy, size, rate, device)


def use_kernel(transformer, kernel):
    kernels.use(kernel)
    for block in transformer.transformer_blocks:
        block.attn.set_processor(hunyuan.UnmaskedAttention([kernel]))


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="measure a tiny model and video")
    parser.add_argument("--out", type=Path, help="write the numbers to this file")
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not options.tiny:
        raise SystemExit("the released architecture must have a GPU: PyTorch sees none; use --tiny")
    started = time.perf_counter()
    if options.tiny:
        from tiny.hunyuan import tiny_transformer, tiny_vae

        measurements = measure_all(device, TINY_SIZES, dict(tiny_transformer().config), dict(tiny_vae().config), 256)
    else:
        measurements = measure_all(device, SIZES, None, {}, 8192)
    rows = {}
    for title, row in measurements:
        rows[title] = row
        numbers = ", ".join(f"{name} {value:.3g}" for name, value in row.items() if value is not None)
        print(f"{title}: {numbers} ({time.perf_counter() - started:.0f} s)", flush=True)
        if options.out:
            options.out.write_text(json.dumps(rows, indent=1, ensure_ascii=False), encoding="utf-8")
    print(gpu_table(rows))


if __name__ == "__main__":
    main()
