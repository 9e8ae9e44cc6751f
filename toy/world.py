"""The low-resolution text-to-video world: prompts, a known manifold of clips, and analytic VQ, MQ and TA.

A clip is 8 frames of 12 × 12 RGB pixels. In it one soft Gaussian blob of peak 2 moves in a straight line on black. Five
numbers (start, velocity, size) and a colour describe it, so the distance of any video to this manifold can be computed.
A policy's samples are latents [B, 3, 8, 12, 12] in these units. The rewards see only the uint8 video.
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
VOCABULARY = list(itertools.chain(*GRAMMAR))
PROMPTS = ["a {} {} blob moves {} {}".format(*words) for words in itertools.product(*GRAMMAR)]  # all 64 of them

TIME = torch.arange(FRAMES) - (FRAMES - 1) / 2  # frames, centred
GRID_X, GRID_Y = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="xy")
PIXELS = torch.stack([GRID_X, GRID_Y]).flatten(1).float()  # [2, 144], (x, y) of every pixel
PALETTE = PEAK * torch.tensor(list(COLOURS.values())).float()  # [4, 3]
BLACK, RANGE = 0.5, 3.0  # uint8 0 … 255 stands for −0.5 … 2.5, so that noise below black stays visible


def parse(prompt):
    """The four attribute words of a prompt, in the order of GRAMMAR. A prompt outside the grammar is an error."""
    words = prompt.split()
    chosen = []
    for group in GRAMMAR:
        found = [word for word in group if word in words]
        if len(found) != 1:
            expected = "; ".join(" | ".join(choices) for choices in GRAMMAR)
            raise ValueError(f"a toy prompt has exactly one word of each of {expected}: got {prompt!r}")
        chosen.append(found[0])
    return chosen


def attributes(words):
    """What the words of B prompts stand for, in numbers: size [B], colour [B, 3], direction [B, 2], speed [B].

    words: one list of four words for each prompt, as parse returns it.
    """
    columns = []
    for place, group in enumerate(GRAMMAR):
        values = [group[words_of_prompt[place]] for words_of_prompt in words]
        columns.append(torch.tensor(values).float())
    return columns


def to_uint8(latents):
    """[B, 3, F, H, W] in world units -> uint8 video [B, F, 3, H, W]."""
    levels = (latents + BLACK) / RANGE * 255
    return levels.round().clamp(0, 255).to(torch.uint8).transpose(1, 2)


def from_uint8(videos):
    """uint8 video [B, F, 3, H, W] -> float [B, F, 3, H·W] in world units."""
    return (videos.float() / 255 * RANGE - BLACK).flatten(3)


# ---------------------------------------------------------------------------------------------- clips
def blob(centre, log_size):
    """Soft blob of peak 1. centre [N, F, 2] and log_size [N] in pixels -> [N, F, H·W]."""
    square = (PIXELS - centre[..., None]).square().sum(2)  # [N, F, H·W]
    variance = (2 * log_size).exp()[:, None, None]
    return (-square / (2 * variance)).exp()


def fine_blob(centre, log_size, scale):
    """The same blob on a raster `scale` times as fine, [N, F, scale·H · scale·W], still measured in the toy's pixels.

    It is narrower and brighter by what a mean over scale × scale pixels widens and dims. So that mean is `blob` again.
    """
    places = (torch.arange(scale * SIDE) + 0.5) / scale - 0.5
    grid_x, grid_y = torch.meshgrid(places, places, indexing="xy")
    square = (torch.stack([grid_x, grid_y]).flatten(1) - centre[..., None]).square().sum(2)
    wanted = (2 * log_size).exp()[:, None, None]
    variance = wanted - (1 - scale**-2) / 12  # a square of side 1 has the variance 1/12 in each direction
    return wanted / variance * (-square / (2 * variance)).exp()


def clean_clips(prompts, generator, scale=1):
    """One point of the manifold for each prompt, [B, 3, F, H, W]. The middle of its path lies at 5.5 ± 1.5 pixels.

    scale: draw each clip larger. The toy has 1; a mean over scale × scale pixels gives the toy's clip.
    """
    words = [parse(prompt) for prompt in prompts]
    count = len(words)
    no_jitter = torch.zeros(count, FRAMES, 2)
    return _render(words, no_jitter, torch.ones(count, 1, 1), torch.ones(count, FRAMES), generator, scale)


def training_clips(prompts, generator, scale=1):
    """What the flow model is pre-trained on: the manifold, badly filmed, so that RL has something to fix.

    Each attribute word is replaced by a random one with p = 0.2. The position jitters by up to 0.6 pixels. One clip in
    ten flickers, one in ten stands still. Pixel noise has a std of up to 0.2; a larger clip has the same noise, larger.
    """
    count = len(prompts)

    def uniform(*shape):
        return torch.rand(shape, generator=generator)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    words = [parse(prompt) for prompt in prompts]
    for place, group in enumerate(GRAMMAR):
        redrawn = uniform(count) < 0.2
        picks = torch.randint(len(group), (count,), generator=generator)
        choices = list(group)
        for i in redrawn.nonzero().flatten().tolist():
            words[i][place] = choices[picks[i]]
    jitter = 0.6 * uniform(count, 1, 1) * normal(count, FRAMES, 2)
    moving = uniform(count, 1, 1) >= 0.1
    flickers = uniform(count, 1) < 0.1
    gain = 1 + 0.3 * flickers * normal(count, FRAMES)
    clips = _render(words, jitter, moving, gain, generator, scale)
    noise_std = 0.2 * uniform(count, 1, 1, 1, 1)
    noise = noise_std * normal(count, 3, FRAMES, SIDE, SIDE)
    return clips + noise.repeat_interleave(scale, 3).repeat_interleave(scale, 4)


def _render(words, jitter, moving, gain, generator, scale):
    """Clips [B, 3, F, H, W] of blobs with the attributes `words`. The generator draws where each path has its middle.

    jitter [B, F, 2] is added to the centre, in pixels. moving [B, 1, 1]: 0 makes the blob stand still. gain [B, F]
    scales the brightness of each frame.
    """
    size, colour, direction, speed = attributes(words)
    middle = 5.5 + 3.0 * (torch.rand(len(words), 1, 2, generator=generator) - 0.5)
    velocity = direction * speed[:, None]  # [B, 2]
    centre = middle + moving * velocity[:, None] * TIME[:, None] + jitter  # [B, F, 2]
    frames = fine_blob(centre, size.log(), scale) * gain[..., None]
    clips = PEAK * torch.einsum("bc,bfp->bcfp", colour, frames)
    return clips.unflatten(-1, (scale * SIDE, scale * SIDE))


# ---------------------------------------------------------------------------------------------- measuring a video
def fit_blob(frames, parameters, steps=6):
    """Least-squares fit of one blob by Levenberg–Marquardt. Returns the best parameters found.

    frames [N, F, 3, H·W]. parameters, where the search starts: [N, 3] (x, y, log size) for a blob that stands still,
    [N, 5] (x, y, log size, vx, vy) for one that moves.

    The best colour of a shape g is linear, c = <frames, g>/<g, g>. So only the shape is searched, with the colour
    projected out (variable projection). A step is kept where it lowers the residual energy; elsewhere damping grows.
    """
    num_frames = frames.shape[1]
    shape = blob(centres(parameters, num_frames), parameters[:, 2])  # [N, F, H·W]
    colour, energy = _project(frames, shape)
    damping = torch.full((len(frames), 1, 1), 1e-2) / 3  # [N, 1, 1]
    low = torch.tensor([-2.0, -2.0, -0.6, -2.0, -2.0])[: parameters.shape[1]]
    high = torch.tensor([SIDE + 1.0, SIDE + 1.0, 1.1, 2.0, 2.0])[: parameters.shape[1]]
    for _ in range(steps):
        step = _damped_step(frames, parameters, shape, colour, damping)
        candidate = (parameters + step.clamp(-1, 1)).clamp(low, high)
        new_shape = blob(centres(candidate, num_frames), candidate[:, 2])
        new_colour, new_energy = _project(frames, new_shape)
        better = new_energy < energy  # [N]
        parameters = torch.where(better[:, None], candidate, parameters)
        shape = torch.where(better[:, None, None], new_shape, shape)
        colour = torch.where(better[:, None], new_colour, colour)
        energy = torch.where(better, new_energy, energy)
        damping = torch.where(better[:, None, None], damping / 3, damping * 5).clamp(1e-7, 1e7)
    return parameters


def _damped_step(frames, parameters, shape, colour, damping):
    """The Levenberg–Marquardt step [N, P] from the present parameters, whose blob is `shape` with `colour`."""
    jacobian = _jacobian(shape, parameters)
    residual = frames - colour[:, None, :, None] * shape[:, :, None]
    pull = torch.einsum("nfcp,nc->nfp", residual, colour).flatten(1)  # [N, F·H·W]
    hessian = colour.square().sum(1)[:, None, None] * jacobian @ jacobian.mT  # Gauss–Newton, [N, P, P]
    diagonal = hessian.diagonal(dim1=1, dim2=2).diag_embed()
    damped = hessian + damping * diagonal + 1e-6 * torch.eye(parameters.shape[1])
    gradient = (jacobian @ pull[..., None])[..., 0]
    return torch.linalg.solve(damped, gradient)


def _jacobian(shape, parameters):
    """Derivatives of a shape by its P parameters, [N, P, F·H·W], without the direction of the shape itself.

    That direction is a change of colour, which fit_blob solves for separately.
    """
    offset = PIXELS - centres(parameters, shape.shape[1])[..., None]  # [N, F, 2, H·W]
    variance = (2 * parameters[:, 2]).exp()[:, None, None]
    by_x = shape * offset[:, :, 0] / variance
    by_y = shape * offset[:, :, 1] / variance
    by_log_size = shape * offset.square().sum(2) / variance
    columns = [by_x, by_y, by_log_size]
    if parameters.shape[1] == 5:  # the blob moves: a velocity shifts each frame by its time
        columns.append(by_x * TIME[:, None])
        columns.append(by_y * TIME[:, None])
    derivatives = torch.stack(columns, 1).flatten(2)  # [N, P, F·H·W]
    flat = shape.flatten(1)
    unit = flat / flat.norm(dim=1, keepdim=True).clamp(min=1e-6)
    return derivatives - (derivatives @ unit[..., None]) * unit[:, None]


def centres(parameters, num_frames):
    """Blob centre in each frame, [N, F, 2]."""
    middle = parameters[:, None, :2].expand(-1, num_frames, -1)
    if parameters.shape[1] == 3:
        return middle
    return middle + parameters[:, None, 3:] * TIME[:, None]


def _project(frames, shape):
    """Best colour [N, 3] of a shape [N, F, H·W], and the residual energy [N] that it leaves."""
    power = shape.square().sum((1, 2)).clamp(min=1e-6)
    colour = torch.einsum("nfcp,nfp->nc", frames, shape) / power[:, None]
    energy = frames.square().sum((1, 2, 3)) - colour.square().sum(1) * power
    return colour, energy


def _matched_filter(frames):
    """Where the fit of each still frame starts, [N, 3]: the pixel position and size whose blob explains most energy."""
    grids = []
    for size in SIZES.values():
        log_size = torch.full((SIDE * SIDE, 1), size).log()
        grids.append(torch.cat([PIXELS.T, log_size], 1))
    starts = torch.cat(grids)  # [288, 3], every pixel with both sizes
    bank = blob(starts[:, None, :2], starts[:, 2])[:, 0]  # [288, H·W]
    explained = (frames[:, 0] @ bank.T).square().sum(1) / bank.square().sum(1)  # [N, 288]
    return starts[explained.argmax(1)]


def palette_rms(frames, shape):
    """RMS residual [N] to the nearest blob of this shape that has a palette colour at the right brightness."""
    power = shape.square().sum((1, 2))
    cross = torch.einsum("nfcp,nfp->nc", frames, shape)
    of_frames = frames.square().sum((1, 2, 3))[:, None]
    of_blobs = power[:, None] * PALETTE.square().sum(1)
    energy = of_frames - 2 * cross @ PALETTE.T + of_blobs  # [N, 4], of frames − blob in each palette colour
    return (energy.amin(1).clamp(min=0) / frames[0].numel()).sqrt()


@torch.no_grad()
def measure(videos):
    """Everything that the rewards and the ablations read off uint8 videos [B, F, 3, H, W], {name: [B, …]}.

    First each frame is fitted alone, which gives position, log_size, colour and rms, all [B, F, …]. The straight line
    through the positions gives velocity, middle and jitter. Then one moving blob, fitted to the whole clip, gives the
    distance.
    """
    clips = from_uint8(videos)  # [B, F, 3, H·W]
    frames = rearrange(clips, "b f c p -> (b f) 1 c p")
    fit = fit_blob(frames, _matched_filter(frames))
    shape = blob(centres(fit, 1), fit[:, 2])
    frame_colour, _ = _project(frames, shape)

    def by_clip(values):
        return values.unflatten(0, (-1, FRAMES))  # [B·F, …] -> [B, F, …]

    position = by_clip(fit[:, :2])
    log_size = by_clip(fit[:, 2])
    colour = by_clip(frame_colour)
    velocity = torch.einsum("bfd,f->bd", position, TIME) / TIME.square().sum()  # slope of the least-squares line
    middle = position.mean(1)
    straight = middle[:, None] + velocity[:, None] * TIME[:, None]

    start = torch.cat([middle, log_size.mean(1, keepdim=True), velocity], 1)
    moving = fit_blob(clips, start)
    whole = blob(centres(moving, FRAMES), moving[:, 2])
    return {
        "position": position,
        "log_size": log_size,
        "colour": colour,
        "rms": by_clip(palette_rms(frames, shape)),
        "velocity": velocity,
        "middle": middle,
        "jitter": (position - straight).square().sum(2).mean(1).sqrt(),
        "presence": (colour.amax(2) / PEAK).clamp(0, 1).mean(1),
        "distance": palette_rms(clips, whole),  # to the manifold; 0 on clean clips
    }


def rewards(videos, prompts):
    """The toy's reward model: VQ, MQ and TA in [0, 1] and the distance to the manifold, {name: [B]}.

    VQ = mean_f exp(−rms/0.15): each frame shows a clean blob of a palette colour.
    MQ = exp(−jitter/0.4)·(1 − exp(−(speed/0.2)²))·presence: the blob moves, in a straight line, and is there.
    TA = the mean of four scores against the prompt (direction, speed, colour, size), times presence.
    """
    seen = measure(videos)
    size, colour, direction, pace = attributes([parse(prompt) for prompt in prompts])
    speed = seen["velocity"].norm(dim=1)
    moves = 1 - (-((speed / 0.2) ** 2)).exp()
    cosine = (seen["velocity"] * direction).sum(1) / speed.clamp(min=1e-6)
    colour_error = (seen["colour"].mean(1) - PEAK * colour).square().sum(1)
    size_error = seen["log_size"].mean(1) - size.log()
    text_scores = [
        cosine.clamp(min=0) * moves,
        (-(((speed - pace) / 0.3) ** 2)).exp(),
        (-colour_error).exp(),
        (-((size_error / 0.3) ** 2)).exp(),
    ]
    return {
        "VQ": (-seen["rms"] / 0.15).exp().mean(1),
        "MQ": (-seen["jitter"] / 0.4).exp() * moves * seen["presence"],
        "TA": torch.stack(text_scores).mean(0) * seen["presence"],
        "distance": seen["distance"],
    }
