"""A small text-to-video flow transformer, and the policy around it that grpo.py trains.

Its pre-trained weights, toy/pretrained.pt (0.7 MB), ship with the code. To train them again, in about a minute:

    python -m toy.model
"""

import argparse
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from sde import interpolate
from toy import world

PRETRAINED = Path(__file__).with_name("pretrained.pt")
PATCH = dict(pf=4, ph=4, pw=4)  # frames × height × width of one token: a clip is 2 × 3 × 3 = 18 tokens
GRID = dict(f=world.FRAMES // 4, h=world.SIDE // 4, w=world.SIDE // 4)


class Block(nn.Module):
    """Transformer block whose norms are shifted, scaled and gated by the condition (adaLN)."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.modulation = nn.Linear(width, 6 * width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 3 * width), nn.GELU(), nn.Linear(3 * width, width))
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, h, condition):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(condition)[:, None].chunk(6, -1)
        q, k, v = rearrange(self.qkv(_modulate(h, shift1, scale1)), "b n (s a d) -> s b a n d", s=3, a=self.heads)
        attended = F.scaled_dot_product_attention(q, k, v)
        h = h + gate1 * self.out(rearrange(attended, "b a n d -> b n (a d)"))
        return h + gate2 * self.mlp(_modulate(h, shift2, scale2))


class FlowTransformer(nn.Module):
    """v(x, sigma, words): x [B, 3, 8, 12, 12], sigma [B], words LongTensor [B, 4] -> v like x. 0.17 M parameters."""

    def __init__(self, width=64, depth=2, heads=4):
        super().__init__()
        tokens = math.prod(GRID.values())
        size = 3 * math.prod(PATCH.values())  # numbers in a token
        self.width = width
        self.read = nn.Linear(size, width)
        self.position = nn.Parameter(0.02 * torch.randn(tokens, width))
        self.words = nn.Embedding(len(world.VOCABULARY), width)
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.modulation = nn.Linear(width, 2 * width)
        self.write = nn.Linear(width, size)
        self.skip = nn.Linear(width, 1)  # v = z − x0 is mostly a multiple of x, whose factor depends on sigma
        for layer in (self.modulation, self.write, self.skip):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x, sigma, words):
        frequencies = 1000 ** -torch.linspace(0, 1, self.width // 2)
        angles = 1000 * sigma[:, None] * frequencies  # [B, width / 2]
        clock = self.time(torch.cat([angles.sin(), angles.cos()], 1))
        condition = F.silu(clock + self.words(words).sum(1))  # the order of the words plays no part
        patches = rearrange(x, "b c (f pf) (h ph) (w pw) -> b (f h w) (c pf ph pw)", **PATCH)
        h = self.read(patches) + self.position
        for block in self.blocks:
            h = block(h, condition)
        shift, scale = self.modulation(condition)[:, None].chunk(2, -1)
        patches = self.write(_modulate(h, shift, scale))
        v = rearrange(patches, "b (f h w) (c pf ph pw) -> b c (f pf) (h ph) (w pw)", **PATCH, **GRID)
        return v + self.skip(condition)[:, :, None, None, None] * x


def _modulate(h, shift, scale):
    return F.layer_norm(h, h.shape[-1:]) * (1 + scale) + shift


def word_numbers(prompt):
    """The places of a prompt's four attribute words in the vocabulary, LongTensor [4]."""
    return torch.tensor([world.VOCABULARY.index(word) for word in world.parse(prompt)])


class ToyPolicy:
    """The small flow transformer as a policy: what grpo.py asks of one."""

    latent_shape = (3, world.FRAMES, world.SIDE, world.SIDE)

    def __init__(self, weights=PRETRAINED):
        if not Path(weights).is_file():
            raise FileNotFoundError(
                f"the toy's pre-trained weights must exist: no {weights}; make them with python -m toy.model"
            )
        self.module = FlowTransformer()
        self.module.load_state_dict(torch.load(weights, weights_only=True))
        self.passes = 0

    def encode(self, prompts):
        return [word_numbers(prompt) for prompt in prompts]

    def velocity(self, x, sigma, cond):
        self.passes += 1
        words = torch.stack(cond).repeat_interleave(len(x) // len(cond), 0)
        return self.module(x, sigma, words)

    def decode(self, latents):
        return world.to_uint8(latents)


def pretrain(steps, seed=0, batch_size=64, learning_rate=2e-3):
    """Flow matching on the imperfect clips. Returns a moving average of the weights."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)  # the network's initial weights
    network = FlowTransformer()
    average = {name: value.clone() for name, value in network.state_dict().items()}
    optimizer = torch.optim.AdamW(network.parameters(), lr=learning_rate)
    for step in range(steps):
        loss = flow_matching_loss(network, batch_size, generator)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * math.sqrt(1 - step / steps)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        decay = min(0.99, step / (step + 10))  # short at first, so that the initial weights are soon forgotten
        for name, value in network.state_dict().items():
            average[name].lerp_(value, 1 - decay)
        if step % 200 == 0:
            print(f"step {step} of {steps}  loss {loss.item():.4f}", flush=True)
    return average


def flow_matching_loss(network, batch_size, generator):
    """E‖v_θ(x_sigma) − (z − x0)‖² over random prompts, clips, noises and sigmas."""
    chosen = torch.randint(len(world.PROMPTS), (batch_size,), generator=generator)
    prompts = [world.PROMPTS[i] for i in chosen]
    x0 = world.training_clips(prompts, generator)
    z = torch.randn(x0.shape, generator=generator)
    u = torch.rand(batch_size, generator=generator)
    sigma = 2 * u / (1 + u)  # shift 2: somewhat more of the high noise
    x = interpolate(x0, z, sigma.view(-1, 1, 1, 1, 1))
    words = torch.stack([word_numbers(prompt) for prompt in prompts])
    v = network(x, sigma, words)
    return (v - (z - x0)).square().mean()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Pre-train the toy's flow transformer.")
    parser.add_argument("--steps", type=int, default=3500, help="training steps of 64 clips")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=PRETRAINED)
    arguments = parser.parse_args()
    torch.save(pretrain(arguments.steps, arguments.seed), arguments.out)
