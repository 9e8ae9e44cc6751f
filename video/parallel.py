"""How one model and its videos are spread over many GPUs. hunyuan.py uses this; nothing here knows of GRPO.

    device_mesh     the GPUs that share the weights, for FSDP2
    context_group   the GPUs that share the tokens of one video: context parallelism
    split_tokens    makes a transformer work on its own share of the tokens
    own_backward    makes FSDP2 reduce a pass's gradients at once
    reduce_between_machines   lets gradients leave the machine once per optimizer step

**Context parallelism** (Ulysses: Jacobs et al. 2023, arXiv 2309.14509). C neighbouring ranks make the same videos, each
on S / C of the S video tokens. Linear maps, norms and MLPs act on each token alone, so they need no message. Attention
needs all tokens, but each head alone: before it the ranks exchange "all heads of my tokens" for "my heads of all
tokens", and back after it. The text is short. Every rank holds all of its tokens and computes all but the attention.

    x_embedder → own tokens → blocks: [ q, k, v → own heads → attention → own tokens → … ] → proj_out → all tokens

**Gradients.** The loss is computed from the whole velocity, by every rank alike. What follows for backward:
    all tokens of proj_out   every rank has the whole gradient already: it takes its own tokens' part, and no sum
    video, heads ↔ tokens    the reverse exchange
    text                     each rank has a part of the gradient, and the sum over the ranks is the whole one. This
                             holds through all maps of the text, up to the weights; only where one rank's heads serve
                             all ranks must the parts be added up on the way (`all_heads`)
So the gradient of a weight is the sum over the C ranks. FSDP takes the mean over all ranks, which is C times too small;
`all_tokens` makes up for it.
"""

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule


def own_rank():
    return dist.get_rank() if dist.is_initialized() else 0


# ---------------------------------------------------------------------------------------------- who shares what
def device_mesh(device_type, replicate):
    """The mesh that FSDP2 shards over: all ranks, or `replicate` groups of ranks that hold a whole model each."""
    world = dist.get_world_size()
    if replicate == 1:
        return dist.init_device_mesh(device_type, (world,))
    # Neighbouring ranks shard, and torchrun's neighbours share a machine: weights are gathered within it.
    return dist.init_device_mesh(device_type, (replicate, world // replicate), mesh_dim_names=("replicate", "shard"))


def context_group(size, timeout):
    """The process group of the `size` neighbouring ranks, this one among them, that share each video; None for 1."""
    if size == 1:
        return None
    group, _ = dist.new_subgroups(size, timeout=timeout)
    return group


def check_heads(heads, size):
    if heads % size:
        divisors = [str(number) for number in range(1, heads + 1) if heads % number == 0]
        rule = f"context_parallel must divide the transformer's {heads} heads"
        raise ValueError(f"{rule}: got {size}; use {', '.join(divisors)}")


# ---------------------------------------------------------------------------------------------- a transformer
def split_tokens(transformer, group):
    """Let the transformer work on this rank's share of the video tokens, and return the velocity of all.

    Its attention processors do the exchange around the attention: see hunyuan.UnmaskedAttention.
    """
    transformer.x_embedder.register_forward_hook(lambda module, inputs, tokens: own_part(tokens, 1, group))
    # cos and sin, [S, D] each: a token keeps the position that it has among all.
    transformer.rope.register_forward_hook(
        lambda module, inputs, tables: tuple(own_part(table, 0, group) for table in tables)
    )
    transformer.proj_out.register_forward_hook(lambda module, inputs, tokens: AllTokens.apply(tokens, group))


def own_part(x, dim, group):
    return x.chunk(group.size(), dim)[group.rank()]


def own_heads(x, group):
    """[B, L, H, D] of the text, which every rank has -> [B, L, H/C, D]."""
    return own_part(x, 2, group)


def heads_of_all_tokens(x, group):
    """[B, S/C, H, D], all heads of this rank's tokens -> [B, S, H/C, D], this rank's heads of all tokens."""
    return Exchange.apply(x, 2, 1, group)


def tokens_of_all_heads(x, group):
    """[B, S, H/C, D] -> [B, S/C, H, D], the inverse of heads_of_all_tokens."""
    return Exchange.apply(x, 1, 2, group)


def all_heads(x, group):
    """[B, L, H/C, D], this rank's heads of the text -> [B, L, H, D]."""
    return AllHeads.apply(x, group)


def exchange(x, split, join, group):
    """Cut x along one dimension, give each rank its piece, and join what comes from the ranks along another."""
    # [C, …]. Collectives take contiguous tensors; `stack` may keep another order of x in memory, which some of
    # attention's kernels give to gradients.
    pieces = torch.stack(x.chunk(group.size(), split)).contiguous()
    received = torch.empty_like(pieces)
    dist.all_to_all_single(received, pieces, group=group)
    return torch.cat(received.unbind(), join)


def gather(x, dim, group):
    x = x.contiguous()
    parts = [torch.empty_like(x) for _ in range(group.size())]
    dist.all_gather(parts, x, group=group)
    return torch.cat(parts, dim)


class Exchange(torch.autograd.Function):
    """`exchange`, whose backward is the reverse exchange."""

    @staticmethod
    def forward(ctx, x, split, join, group):
        ctx.reverse = join, split, group
        return exchange(x, split, join, group)

    @staticmethod
    def backward(ctx, gradient):
        return exchange(gradient, *ctx.reverse), None, None, None


class AllHeads(torch.autograd.Function):
    """Gather dimension 2. Backward: each rank has a part of the gradient; the sum of a rank's own heads is theirs."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return gather(x, 2, group)

    @staticmethod
    def backward(ctx, gradient):
        # A copy, which all_reduce writes into; in float32, since a sum in bf16 would round once more for each rank.
        total = gradient.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.group)
        return own_part(total, 2, ctx.group).to(gradient.dtype), None


class AllTokens(torch.autograd.Function):
    """Gather dimension 1. Backward: the own tokens' part of a gradient that is whole on every rank, times C."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return gather(x, 1, group)

    @staticmethod
    def backward(ctx, gradient):
        return own_part(gradient, 1, ctx.group) * ctx.group.size(), None


# ---------------------------------------------------------------------------------------------- one pass's gradients
def own_backward(result):
    """The same numbers; as soon as their gradient is known, backward goes through all that made them before all else.

    A loss that holds several passes of a sharded model, such as guidance's two branches, adds up each weight's
    gradients of all passes before FSDP can reduce and shard them. So the whole gradients of the earlier passes wait on
    every GPU, 15 GiB in bf16. With a backward of their own they are reduced at once. That costs a reduction more for
    each pass.
    """
    if not result.requires_grad:
        return result
    leaf = result.detach().requires_grad_()
    leaf.register_post_accumulate_grad_hook(lambda leaf: torch.autograd.backward(result, leaf.grad))
    return leaf


def reduce_between_machines(module, last):
    """Call before the backward pass of each micro-batch. `last`: it is the last one of its optimizer step.

    On a mesh of two dimensions, where each machine holds a whole model, FSDP2 sums a micro-batch's gradients within a
    machine and then over the machines, on the slowest link. The sum of sums is the same if the machines exchange theirs
    once, so only the last micro-batch does.
    """
    if isinstance(module, FSDPModule):
        module.set_requires_all_reduce(last)
