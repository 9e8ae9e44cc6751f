"""A linear video code, written into the released VAE's decoder. The miniature's latents are this code.

Trained by gradients, a small VAE of the released class did not get off black. But its decoder holds a linear decoder
exactly, once its residual branches add nothing, and a linear code of soft moving blobs is good enough.

    clip → blocks of 4 frames × 16 × 16 pixels → the 64 largest principal components of each → a 3 × 3 convolution over
    the blocks → 32 numbers for each block, the latent;  back with another 3 × 3 convolution and the components

The convolutions let neighbouring blocks share what lies on their border. The decoder's five levels split a block into
its 2, 4, 8 and 16 times smaller children, see `write_decoder`.

A clip has nine frames, and its first one has a latent of its own. The decoder unpacks that one in another order, with
the same weights, so it cannot hold this code. It is 0, and the first frame is black; the eight others are the toy's.
"""

import torch
import torch.nn.functional as F
from einops import rearrange

from toy import world

SCALE = 4  # the toy's clips, four times as large
SIDE, FRAMES = SCALE * world.SIDE, world.FRAMES + 1
CHANNELS, COMPONENTS = 32, 64
BLOCK = dict(t=4, y=16, x=16)  # frames, height and width of the pixels in one latent
BLACK = 2 * world.BLACK / world.RANGE - 1  # the VAE's pixels are −1 … 1
CONTRAST = world.RANGE / 2  # world units for one unit of the VAE's pixels
SCALING_FACTOR = 0.5  # of the VAE's config: decode divides by it
CARRIER = 50.0  # a constant beside the last level's channels, which makes its norm nearly linear


def fit(clips, steps, generator):
    """The code that loses little of clips [N, 3, 8, 48, 48]: {name: tensor}.

    components [64, 3072], encode [32, 64, 3, 3] and decode [64, 32, 3, 3]; every latent channel has a std of 1.
    """
    blocks = to_blocks(clips)  # [N, 3072, 2, 3, 3]
    samples = blocks.movedim(1, -1).flatten(0, -2).double()
    _, vectors = torch.linalg.eigh(samples.T @ samples)
    components = vectors.flip(1)[:, :COMPONENTS].T.float()  # the largest first
    targets = torch.einsum("kp,nptyx->ntkyx", components, blocks).flatten(0, 1)  # [2·N, 64, 3, 3]
    encode = torch.eye(CHANNELS, COMPONENTS)[:, :, None, None] * centre_tap()
    decode = encode.transpose(0, 1).clone()
    kernels = [encode.requires_grad_(), decode.requires_grad_()]  # they start as the 32 largest components
    optimizer = torch.optim.Adam(kernels, lr=3e-3)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 3e-3 * (1 - step / steps)
        chosen = targets[torch.randint(len(targets), (200,), generator=generator)]
        error = convolve(convolve(chosen, encode), decode) - chosen
        optimizer.zero_grad()
        error.square().sum(1).mean().backward()
        optimizer.step()
    encode, decode = encode.detach(), decode.detach()
    std = convolve(targets, encode).square().mean((0, 2, 3)).sqrt()  # [32], about 0, which stands for black
    encode = encode / std[:, None, None, None]
    decode = decode * std[:, None, None]
    return {"components": components.contiguous(), "encode": encode, "decode": decode}


def centre_tap():
    kernel = torch.zeros(3, 3)
    kernel[1, 1] = 1
    return kernel


def convolve(grids, kernel):
    """Over the blocks of one latent frame; beyond the edge the outermost ones repeat, as in the VAE."""
    return F.conv2d(F.pad(grids, (1, 1, 1, 1), mode="replicate"), kernel)


def to_blocks(clips):
    """[N, 3, 8, 48, 48] -> [N, 3072, 2, 3, 3]. A block's numbers are in the order frame, row, column, colour."""
    return rearrange(clips, "n c (f t) (h y) (w x) -> n (t y x c) f h w", **BLOCK)


@torch.no_grad()
def encode(clips, code):
    """Clips [N, 3, 8, 48, 48] in the toy's units -> latents [N, 32, 3, 3, 3], the first frame's being 0."""
    coefficients = torch.einsum("kp,nptyx->ntkyx", code["components"], to_blocks(clips))
    latents = convolve(coefficients.flatten(0, 1), code["encode"]).unflatten(0, (len(clips), -1))
    latents = latents.transpose(1, 2)  # [N, 32, 2, 3, 3]
    return torch.cat([torch.zeros_like(latents[:, :, :1]), latents], 2)


@torch.no_grad()
def write_decoder(vae, code):
    """Make the decoder of a VAE the code's, with what its residual branches add set to 0.

    A level turns the coefficients of a block in `basis` into those of its children in `child_basis`: the map from the
    one to the other is the level's convolution, at the centre tap of space and the last of time, less the shortcut.
    The last level ends in (s, −s) for the three colours and a constant, since SiLU(s) − SiLU(−s) = s.
    """
    decoder = vae.decoder
    for block in (decoder.mid_block, *decoder.up_blocks):
        for resnet in block.resnets:
            zero(resnet.conv2.conv)
    for attention in decoder.mid_block.attentions:
        zero(attention.proj_out)

    first = decoder.conv_in.conv
    zero(first)
    first.weight[:, :, -1] = code["decode"] * SCALING_FACTOR
    repeats = first.out_channels // CHANNELS
    shortcut = torch.eye(CHANNELS).repeat_interleave(repeats, 0)
    first.weight[:, :, -1, 1, 1] -= shortcut

    basis = code["components"].unflatten(1, (*BLOCK.values(), 3))  # [64, frames, height, width, colour]
    sizes = code["decode"].square().sum((1, 2, 3)).sqrt()  # [64], of each component's coefficient
    *levels, last = [block.upsamplers[0] for block in decoder.up_blocks if block.upsamplers is not None]
    for level in levels:
        children = split(basis, 2 if level.add_temporal_upsample else 1)
        width = level.conv.conv.out_channels // len(children)
        basis, maps, sizes = smaller_basis(children, sizes, width)
        write_level(level, maps)
    pixels = split(basis, 1).flatten(2).transpose(1, 2)  # [4, 3, K], the children of the last level are pixels
    write_level(last, torch.cat([pixels, -pixels], 1))
    write_pixels(decoder, last)


def split(basis, times):
    """The children of each basis block, in the order in which the VAE packs them: time, row, column."""
    return rearrange(basis, "k (a t) (b y) (c x) r -> (a b c) k t y x r", a=times, b=2, c=2)


def smaller_basis(children, sizes, width):
    """The basis [L, t, y, x, 3] of the children [C, K, t, y, x, 3], L ≤ width, under coefficients of these sizes.

    They are the principal components of all children together. Also returns the maps [C, L, K] to the coefficients in
    it, and the sizes of those.
    """
    rows = (children * sizes[:, None, None, None, None]).flatten(0, 1).flatten(1)  # [C·K, t·y·x·3]
    _, _, components = torch.linalg.svd(rows.double(), full_matrices=False)
    basis = components[:width].float()
    maps = torch.einsum("lp,ckp->clk", basis, children.flatten(2))
    new_sizes = (maps * sizes).square().sum((0, 2)).sqrt()
    return basis.unflatten(1, children.shape[2:]), maps, new_sizes


def write_level(level, maps):
    """Give each of the C children the coefficients maps [C, L, K] · parent, in the first L of its channels."""
    convolution = level.conv.conv
    zero(convolution)
    wanted = torch.zeros(len(maps), convolution.out_channels // len(maps), convolution.in_channels)
    wanted[:, : maps.shape[1], : maps.shape[2]] = maps
    shortcut = torch.eye(convolution.in_channels).repeat_interleave(level.repeats, 0)
    convolution.weight[:, :, -1, 1, 1] = wanted.flatten(0, 1) - shortcut


def write_pixels(decoder, last):
    """Out of (s, −s) behind the last level come the colours s, by a constant of CARRIER in the channel beside them."""
    width = decoder.norm_out.gamma.numel()
    last.conv.conv.bias.unflatten(0, (-1, width))[:, 6] = CARRIER
    decoder.norm_out.gamma.fill_(CARRIER / width**0.5)
    convolution = decoder.conv_out.conv
    zero(convolution)
    convolution.weight[:, :3, -1, 1, 1] = torch.eye(3) / CONTRAST
    convolution.weight[:, 3:6, -1, 1, 1] = -torch.eye(3) / CONTRAST
    convolution.bias.fill_(BLACK)


def zero(convolution):
    convolution.weight.zero_()
    convolution.bias.zero_()
