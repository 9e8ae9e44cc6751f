"""Make the miniature's weights: fit its code, then train its transformer by flow matching on imperfect clips.

    python -m tiny.pretrain        4 to 5 minutes of one core; writes tiny/miniature.safetensors

Seven prompts in eight are kept, the eighth is the empty one, so that classifier-free guidance has its second branch.
"""

import argparse
import hashlib
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from tqdm import tqdm

from sde import interpolate
from tiny import codec, miniature
from toy import world
from video import hunyuan

CODE_CLIPS, CODE_STEPS = 640, 600
PROMPTED, UNPROMPTED = 56, 8  # clips of a training step


def generator(*key):
    """A generator for each purpose, seeded by a hash of the key: other seeds would make other weights of the file."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def fit_code(seed):
    prompts = miniature.PROMPTS * (CODE_CLIPS // len(miniature.PROMPTS))
    clips = world.clean_clips(prompts, generator(seed, "clips of the code"), codec.SCALE)
    return codec.fit(clips, CODE_STEPS, generator(seed, "code"))


def first_policy(folder, code, seed):
    """The miniature before training, loaded from its folder as any model is."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        start = miniature.transformer()
        torch.nn.init.normal_(start.cond_type_embed.weight, std=0.02)  # the default of 1 drowns the text at this width
    torch.nn.init.zeros_(start.proj_out.weight)
    torch.nn.init.zeros_(start.proj_out.bias)
    miniature.write_pipeline(folder, trained_part(start.state_dict()), code, seed)
    shape = hunyuan.latent_shape(codec.FRAMES, codec.SIDE, codec.SIDE)
    policy = hunyuan.load(str(folder), shape, Path(folder) / "prompts")
    policy.module.disable_gradient_checkpointing()
    for name, parameter in policy.module.named_parameters():
        if name.startswith(miniature.UNUSED):
            parameter.requires_grad_(False)  # nearly all of its parameters, which would only cost time here
    return policy


def trained_part(state):
    return {name: value for name, value in state.items() if not name.startswith(miniature.UNUSED)}


def velocity(module, x, sigma, text):
    """One pass for clips whose prompts have equally many tokens: x [B, …], sigma [B], text [B, L, ·]."""
    no_glyphs = text.new_zeros(len(x), 0, module.config.text_embed_2_dim)
    return hunyuan.transformer_velocity(module, x, sigma, text, no_glyphs)


def flow_matching_loss(module, code, texts, empty, random):
    """E‖v_θ(x_sigma) − (z − x0)‖² over random prompts, clips, noises and sigmas; texts [64, L, ·], empty [L', ·]."""
    count = PROMPTED + UNPROMPTED
    chosen = torch.randint(len(texts), (count,), generator=random)
    clips = world.training_clips([miniature.PROMPTS[i] for i in chosen], random, codec.SCALE)
    x0 = codec.encode(clips, code)
    z = torch.randn(x0.shape, generator=random)
    u = torch.rand(count, generator=random)
    sigma = 3 * u / (1 + 2 * u)  # shift 3: more of the high noise
    x = interpolate(x0, z, sigma.view(-1, 1, 1, 1, 1))
    prompted = velocity(module, x[:PROMPTED], sigma[:PROMPTED], texts[chosen[:PROMPTED]])
    unprompted = velocity(module, x[PROMPTED:], sigma[PROMPTED:], empty.expand(UNPROMPTED, -1, -1))
    return (torch.cat([prompted, unprompted]) - (z - x0)).square().mean()


def train(policy, code, steps, seed, learning_rate=2e-3):
    """Flow matching. Returns a moving average of the transformer's weights."""
    module = policy.module
    texts = torch.stack([prompt.text for prompt in policy.encode(miniature.PROMPTS)])
    random = generator(seed, "flow matching")
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=learning_rate)
    average = {name: value.clone() for name, value in trained_part(module.state_dict()).items()}
    bar = tqdm(range(steps), desc="flow matching")
    for step in bar:
        optimizer.param_groups[0]["lr"] = learning_rate * min(1, step / 50) * (1 - step / steps) ** 0.5
        loss = flow_matching_loss(module, code, texts, policy.unconditional.text, random)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        decay = min(0.99, step / (step + 10))  # short at first, so that the initial weights are soon forgotten
        for name, value in trained_part(module.state_dict()).items():
            average[name].lerp_(value, 1 - decay)
        bar.set_postfix(loss=f"{loss.item():.3f}")
    return average


def main():
    parser = argparse.ArgumentParser(description="Make the miniature's weights.")
    parser.add_argument("--steps", type=int, default=1500, help="training steps of 64 clips")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=miniature.WEIGHTS)
    arguments = parser.parse_args()
    code = fit_code(arguments.seed)
    with tempfile.TemporaryDirectory() as folder:
        policy = first_policy(Path(folder) / "model", code, arguments.seed)
        trained = train(policy, code, arguments.steps, arguments.seed)
    named = {f"code.{name}": value for name, value in code.items()}
    named |= {f"transformer.{name}": value for name, value in trained.items()}
    save_file({name: value.contiguous() for name, value in named.items()}, arguments.out)


if __name__ == "__main__":
    main()
