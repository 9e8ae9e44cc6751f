"""The low-resolution text-to-video world: prompts, a known manifold of clips, and analytic VQ, MQ and TA.

A clip is 8 frames of 12 × 12 RGB pixels in which one soft Gaussian blob of peak 2 moves in a straight line on black:
five numbers (start, velocity, size) and a colour, so the distance of any video to this manifold can be computed.
A policy's samples are latents [B, 3, 8, 12, 12] in these units; rewards see only the uint8 video.
"""

import itertools

import torch
from einops import rearrange

FRAMES, SIDE, PEAK = 8, 12, 2.0
SIZES = {"small": 1.0, "large": 1.7}  # standard deviation, pixels
COLOURS = {"red": (1, 0, 0), "green": (0, 1, 0), "blue": (0, 0, 1), "yellow": (1, 1, 0)}
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}  # (x, y), y downwards
SPEEDS = {"slowly": 0.4, "fast": 0.9}  # pixels a frame
GRAMMAR = (SIZES, COLOURS, DIRECTIONS, SPEEDS)
VOCABULARY = [word for words in GRAMMAR for word in words]
PROMPTS = ["a {} {} blob moves {} {}".format(*words) for words in itertools.product(*GRAMMAR)]  # 64

TIME = torch.arange(FRAMES) - (FRAMES - 1) / 2  # frames, centred
PIXELS = torch.stack(torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="xy")).flatten(1).float()  # [2, 144]
PALETTE = PEAK * torch.tensor(list(COLOURS.values())).float()  # [4, 3]
BLACK, RANGE = 0.5, 3.0  # uint8 0 … 255 is −0.5 … 2.5, so that noise below black stays visible


def parse(prompt):
    """The four attribute words of a prompt, in the order of GRAMMAR. Raises on a prompt outside the grammar."""
    words = prompt.split()
    found = [[word for word in group if word in words] for group in GRAMMAR]
    if any(len(group) != 1 for group in found):
        expected = "; ".join(" | ".join(group) for group in GRAMMAR)
        raise ValueError(f"a toy prompt has exactly one word of each of {expected}: got {prompt!r}")
    return [group[0] for group in found]


def to_uint8(latents):
    """[B, 3, F, H, W] in world units -> uint8 video [B, F, 3, H, W]."""
    return ((latents + BLACK) / RANGE * 255).round().clamp(0, 255).to(torch.uint8).transpose(1, 2)


def from_uint8(videos):
    """uint8 video [B, F, 3, H, W] -> float [B, F, 3, H·W] in world units."""
    return (videos.float() / 255 * RANGE - BLACK).flatten(3)


# ---------------------------------------------------------------------------------------------- clips
def blob(centre, log_size):
    """Soft blob of peak 1. centre [N, F, 2] and log_size [N] in pixels -> [N, F, H·W]."""
    square = (PIXELS - centre[..., None]).square().sum(2)  # [N, F, H·W]
    return (-square / (2 * (2 * log_size).exp()[:, None, None])).exp()


def clean_clips(prompts, generator):
    """One point of the manifold for each prompt, its path's centre drawn at 5.5 ± 1.5 pixels. [B, 3, F, H, W]"""
    words = [parse(prompt) for prompt in prompts]
    return _render(words, torch.zeros(len(words), FRAMES, 2), generator)


def training_clips(prompts, generator):
    """What the flow model is pre-trained on: the manifold, badly filmed, so that RL has something to mend.

    Each attribute word is replaced by a random one with p = 0.2; the position jitters by up to 0.6 px; 1 clip in 10
    flickers, 1 in 10 stands still; pixel noise of std up to 0.2.
    """

    def uniform(*shape):
        return torch.rand(shape, generator=generator)

    words = [parse(prompt) for prompt in prompts]
    for group, choices in enumerate(GRAMMAR):
        redrawn, pick = uniform(len(words)) < 0.2, torch.randint(len(choices), (len(words),), generator=generator)
        for i in redrawn.nonzero().flatten().tolist():
            words[i][group] = list(choices)[pick[i]]
    n = len(words)
    jitter = 0.6 * uniform(n, 1, 1) * torch.randn(n, FRAMES, 2, generator=generator)
    still = uniform(n, 1, 1) < 0.1
    flicker = 1 + 0.3 * (uniform(n, 1) < 0.1) * torch.randn(n, FRAMES, generator=generator)
    clips = _render(words, jitter, generator, moving=~still, gain=flicker)
    return clips + 0.2 * uniform(n, 1, 1, 1, 1) * torch.randn(clips.shape, generator=generator)


def _render(words, jitter, generator, moving=1.0, gain=None):
    size, colour, direction, speed = (
        torch.tensor([group[w[i]] for w in words]).float() for i, group in enumerate(GRAMMAR)
    )
    middle = 5.5 + 3.0 * (torch.rand(len(words), 1, 2, generator=generator) - 0.5)
    centre = middle + moving * (direction * speed[:, None])[:, None] * TIME[:, None] + jitter  # [B, F, 2]
    frames = blob(centre, size.log()) * (1.0 if gain is None else gain[..., None])
    return PEAK * torch.einsum("bc,bfp->bcfp", colour, frames).unflatten(-1, (SIDE, SIDE))


# ---------------------------------------------------------------------------------------------- measuring a video
def fit_blob(frames, parameters, steps=6):
    """Least-squares fit of one moving blob: Levenberg–Marquardt on (x, y, log size[, vx, vy]), colour eliminated.

    frames [N, F, 3, H·W]; parameters [N, 3] for still blobs, [N, 5] for moving ones: the starting point.
    The best colour for a given shape g is linear, c = <frames, g>/<g, g>, so it is projected out (variable projection)
    and only the shape is searched. Returns parameters of the same shape.
    """
    moving = parameters.shape[1] == 5
    damping = torch.full((len(frames), 1, 1), 1e-2)
    best, g = torch.full((len(frames),), torch.inf), None
    candidate = parameters
    for _ in range(steps + 1):
        shape = blob(centres(candidate, frames.shape[1]), candidate[:, 2])  # [N, F, H·W]
        colour, energy = _project(frames, shape)
        better = energy < best
        keep = better[:, None]
        parameters, best = torch.where(keep, candidate, parameters), torch.where(better, energy, best)
        g = shape if g is None else torch.where(keep[..., None], shape, g)
        damping = torch.where(keep[..., None], damping / 3, damping * 5).clamp(1e-7, 1e7)

        # Gradient and Gauss–Newton matrix of the shape, with the direction of g itself (a change of colour) projected out.
        offset = PIXELS - centres(parameters, frames.shape[1])[..., None]  # [N, F, 2, H·W]
        variance = (2 * parameters[:, 2]).exp()[:, None, None]
        by_x, by_y = (g * offset[:, :, i] / variance for i in (0, 1))
        columns = [by_x, by_y, g * offset.square().sum(2) / variance]
        if moving:
            columns += [by_x * TIME[:, None], by_y * TIME[:, None]]
        jacobian = torch.stack(columns, 1).flatten(2)  # [N, P, F·H·W]
        unit = g.flatten(1) / g.flatten(1).norm(dim=1, keepdim=True).clamp(min=1e-6)
        jacobian = jacobian - (jacobian @ unit[..., None]) * unit[:, None]
        colour, _ = _project(frames, g)
        residual = frames - colour[:, None, :, None] * g[:, :, None]
        pull = torch.einsum("nfcp,nc->nfp", residual, colour).flatten(1)  # [N, F·H·W]
        hessian = colour.square().sum(1)[:, None, None] * jacobian @ jacobian.mT
        hessian = hessian + damping * hessian.diagonal(dim1=1, dim2=2).diag_embed() + 1e-6 * torch.eye(len(columns))
        step = torch.linalg.solve(hessian, (jacobian @ pull[..., None])[..., 0])
        candidate = parameters + step.clamp(-1, 1)
        low = torch.tensor([-2.0, -2.0, -0.6, -2.0, -2.0])[: len(columns)]
        high = torch.tensor([SIDE + 1.0, SIDE + 1.0, 1.1, 2.0, 2.0])[: len(columns)]
        candidate = candidate.clamp(low, high)
    return parameters


def centres(parameters, num_frames):
    """Blob centre in each frame, [N, F, 2]."""
    centre = parameters[:, None, :2].expand(-1, num_frames, -1)
    return centre + parameters[:, None, 3:] * TIME[:, None] if parameters.shape[1] == 5 else centre


def _project(frames, g):
    """Best colour [N, 3] of a shape g [N, F, H·W], and the residual energy [N] that it leaves."""
    power = g.square().sum((1, 2)).clamp(min=1e-6)
    colour = torch.einsum("nfcp,nfp->nc", frames, g) / power[:, None]
    return colour, frames.square().sum((1, 2, 3)) - colour.square().sum(1) * power


def _matched_filter(frames):
    """Starting point [N, 3] of a fit: the best of all pixel positions × both sizes, by the energy that each explains."""
    starts = torch.stack(
        [torch.cat([PIXELS.T, torch.full((SIDE * SIDE, 1), size).log()], 1) for size in SIZES.values()]
    ).flatten(0, 1)  # [288, 3]
    bank = blob(starts[:, None, :2], starts[:, 2])[:, 0]  # [288, H·W]
    explained = (frames[:, 0] @ bank.T).square().sum(1) / bank.square().sum(1)  # [N, 288]
    return starts[explained.argmax(1)]


def palette_rms(frames, g):
    """RMS residual [N] to the nearest blob of this shape that has a palette colour at the right brightness."""
    power, cross = g.square().sum((1, 2)), torch.einsum("nfcp,nfp->nc", frames, g)
    energy = frames.square().sum((1, 2, 3))[:, None] - 2 * cross @ PALETTE.T + power[:, None] * PALETTE.square().sum(1)
    return (energy.amin(1).clamp(min=0) / frames[0].numel()).sqrt()


@torch.no_grad()
def measure(videos):
    """Everything that the rewards and the ablations read off videos uint8 [B, F, 3, H, W], as a dict of tensors."""
    clips = from_uint8(videos)  # [B, F, 3, H·W]
    frames = rearrange(clips, "b f c p -> (b f) 1 c p")
    fit = fit_blob(frames, _matched_filter(frames))
    g = blob(centres(fit, 1), fit[:, 2])
    per_frame = {
        "position": fit[:, :2],
        "log_size": fit[:, 2],
        "colour": _project(frames, g)[0],
        "rms": palette_rms(frames, g),
    }
    seen = {name: value.unflatten(0, (-1, FRAMES)) for name, value in per_frame.items()}  # [B, F, …]
    velocity = torch.einsum("bfd,f->bd", seen["position"], TIME) / TIME.square().sum()  # least-squares line
    middle = seen["position"].mean(1)
    straight = middle[:, None] + velocity[:, None] * TIME[:, None]
    seen |= {"velocity": velocity, "middle": middle}
    seen["jitter"] = (seen["position"] - straight).square().sum(2).mean(1).sqrt()
    seen["presence"] = (seen["colour"].amax(2) / PEAK).clamp(0, 1).mean(1)

    line = torch.cat([middle, seen["log_size"].mean(1, keepdim=True), velocity], 1)
    line = fit_blob(clips, line)
    seen["distance"] = palette_rms(clips, blob(centres(line, FRAMES), line[:, 2]))  # to the manifold, 0 on clean clips
    return seen


def rewards(videos, prompts):
    """The toy's reward model: VQ, MQ and TA in [0, 1] and the distance to the manifold, {name: [B]}.

    VQ = mean_f exp(−rms/0.15): each frame shows a clean blob of a palette colour.
    MQ = exp(−jitter/0.4)·(1 − exp(−(speed/0.2)²))·presence: it moves, in a straight line, and is there.
    TA = mean of direction, speed, colour and size scores against the prompt, times presence.
    """
    seen = measure(videos)
    speed = seen["velocity"].norm(dim=1)
    moves = 1 - (-((speed / 0.2) ** 2)).exp()
    size, colour, direction, pace = (
        torch.tensor([group[w] for w in column]).float()
        for group, column in zip(GRAMMAR, zip(*map(parse, prompts), strict=True), strict=True)
    )
    cosine = (seen["velocity"] * direction).sum(1) / speed.clamp(min=1e-6)
    text = [
        cosine.clamp(min=0) * moves,
        (-(((speed - pace) / 0.3) ** 2)).exp(),
        (-(seen["colour"].mean(1) - PEAK * colour).square().sum(1)).exp(),
        (-(((seen["log_size"].mean(1) - size.log()) / 0.3) ** 2)).exp(),
    ]
    return {
        "VQ": (-seen["rms"] / 0.15).exp().mean(1),
        "MQ": (-seen["jitter"] / 0.4).exp() * moves * seen["presence"],
        "TA": torch.stack(text).mean(0) * seen["presence"],
        "distance": seen["distance"],
    }
