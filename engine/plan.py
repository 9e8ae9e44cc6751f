"""The plan of a run: what it will do and cost, in numbers, before anything is spent.

    arithmetic      samples, passes, optimizer steps; every run prints it at its start
    print_memory    GiB on each GPU, by part
    passes          transformer passes per video and sampling step, by what they are made for
    print_cost      those passes, and the FLOPs, hours and disk that follow from them
    print_trace     the same from an iteration of the real code, on tensors that have sizes but no data
All but the trace is computed from the settings and the sizes of the architecture; nothing is measured.
"""

import contextlib
import dataclasses
import math
import time
import weakref
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, shape_wrapper

from config import TOY
from grpo import Batch, micro_batch_loss, micro_batches_per_step, samples_per_condition
from prompts import read_prompts
from sde import Trajectory
from trust_region import kl_weights

VIDEOALIGN = 4 * 2.2e9  # bytes of Qwen2-VL-2B in float32
TEXT_ENCODER = 2 * 7.07e9  # bytes of the language model of Qwen2.5-VL-7B in bf16, the largest part that is read whole
GPUS_PER_MACHINE = 8
# Bytes that the VAE takes for each pixel of a tile of 256 × 256 pixels and all frames while it decodes: six feature
# maps of 128 channels in float32, as traced.
DECODE_BYTES = 6 * 128 * 4
TFLOPS = 400.0  # of a GPU at work; an H100's bf16 matrices reach about twice that where nothing else is done


def branches(config):
    """(branches of guidance that a rollout has, those that are trained)."""
    if config.model == TOY or config.guidance_scale == 1:
        return 1, 1
    return 2, 2 if config.guidance_gradient == "both" else 1


def iterations_per_anchor(config):
    """Iterations from one refresh of a moving anchor to the next: it moves between iterations, never within one."""
    return math.ceil(config.anchor_every / config.optimizer_steps)


def arithmetic(config, ranks):
    """What a run of these settings does on so many processes, in numbers, before anything is spent."""
    trained, samples = config.trained_steps(), config.batch_size * (ranks // config.context_parallel)
    per_step = micro_batches_per_step(config.batch_size, trained, config)
    micro_batches = per_step * config.optimizer_steps
    sampled_branches, trained_branches = branches(config)
    passes = config.batch_size * sampled_branches
    trained_passes = config.batch_size * trained_branches
    doubled = ", doubled by guidance" if sampled_branches == 2 else ""
    prompts = samples // config.group_size
    shared = f", {config.context_parallel} to a video" if config.context_parallel > 1 else ""
    sizes = f"{config.batch_size} / {config.micro_batch} × {trained}"
    in_all = config.optimizer_steps * config.iterations
    lines = [
        f"samples per iteration    {samples} = {prompts} prompts × {config.group_size}, on {ranks} rank(s){shared}",
        f"trained steps            {trained} of {config.num_steps}",
        f"micro-batches            {micro_batches} = {sizes} per iteration and rank",
        f"optimizer steps          {config.optimizer_steps} per iteration, of {per_step} micro-batches each;"
        f" {in_all} in all, {config.optimizer}",
        f"passes per rank          rollout {passes} × {config.num_steps}, update {trained_passes} × {trained} with"
        f" gradient; counted per sample{doubled}",
    ]
    if trained_passes < passes and config.optimizer_steps > 1:
        lines.append("                         from the second optimizer step on as many more without gradient")
    w_pos, _ = kl_weights(config.kl_mode)
    if w_pos:
        lines.append(
            f"reference passes         {passes} × {config.kl_steps or trained} without gradient, unless the anchor is"
            " the rollout's policy"
        )
    if config.kl_mode in ("moving", "dual"):
        often = iterations_per_anchor(config)
        lines.append(f"anchor refresh           every {config.anchor_every} optimizer steps = {often} iteration(s)")
        if often == 1:  # Eq. 11 against the anchor is then Eq. 12
            lines.append("                         so the anchor is always the rollout's policy: no position control;")
            lines.append("                         raise anchor_every")
    return "\n".join(lines)


def memory(config, shards):
    """hunyuan.memory_estimate for a Config whose model is shared by so many GPUs."""
    import hunyuan

    _, trained_branches = branches(config)
    parts = hunyuan.memory_estimate(
        hunyuan.token_count(config.frames, config.height, config.width) // config.context_parallel,
        shards,
        config.lora_rank,
        config.micro_batch,
        config.anchor_offload,
        muon=config.optimizer == "muon",
        branches=trained_branches,
        checkpointing=config.checkpointing,
    )
    w_pos, _ = kl_weights(config.kl_mode)
    if not w_pos:
        parts["anchor"] = 0.0
    return parts


def peak_memory(config, shards):
    """GiB of an iteration's peak on each GPU, by part: that of the update, or of a decode where that needs more."""
    parts = memory(config, shards)
    parts["videoalign"] = VIDEOALIGN / 2**30
    parts["rollout"] = rollout_bytes(config) / 2**30
    update_alone = sum(parts[name] for name in ("activations", "gathered", "gradients"))
    parts["decode"] = max(0.0, DECODE_BYTES * config.frames * 256**2 / 2**30 - update_alone)
    return parts


def rollout_bytes(config):
    """Of a rank's samples: states, means, the reference's means, and a branch of guidance if it is stored."""
    import hunyuan

    latents = 1 + config.num_steps  # states
    latents += config.num_steps * (2 if reference_share(config) else 1)
    sampled_branches, trained_branches = branches(config)
    if trained_branches < sampled_branches:
        latents += config.num_steps
    latent = math.prod(hunyuan.latent_shape(config.frames, config.height, config.width))
    return 4 * config.batch_size * latents * latent


def print_memory(config, ranks, gpu_memory_gb):
    """The dry run's estimate of memory per GPU, from the configuration alone; SystemExit where it cannot fit."""
    import hunyuan

    shards = ranks // config.replicate
    parts = peak_memory(config, shards)
    total, parameters = sum(parts.values()), hunyuan.meta_transformer().num_parameters()
    tokens = hunyuan.token_count(config.frames, config.height, config.width)
    eval_tokens = hunyuan.token_count(config.frames, config.eval_height, config.eval_width)
    print(f"tokens per video         {tokens:,} in training, {eval_tokens:,} in evaluation")
    print(f"parameters               {parameters:,}")
    print(
        "memory per GPU (GiB)     "
        + " + ".join(f"{name} {size:.1f}" for name, size in parts.items())
        + f" = {total:.1f}"
    )
    if gpu_memory_gb and total > gpu_memory_gb:
        raise SystemExit(
            f"the estimate must fit the GPU: got {total:.1f} GiB for {gpu_memory_gb:g}; use more GPUs, --lora_rank 64, "
            "--anchor_offload, --micro_batch 1, or fewer frames and pixels"
        )


# ---------------------------------------------------------------------------------------------- FLOPs and hours
def pass_counts(config):
    """{purpose: (passes without gradient, passes with gradient) of the network for each video and sampling step}."""
    sampled_branches, trained_branches = branches(config)
    trained_share = config.trained_steps() / config.num_steps
    later = 0.0
    if trained_branches < sampled_branches:  # the stored branch serves until the first optimizer step
        later = trained_share * (1 - 1 / config.optimizer_steps)
    return {
        "rollout": (sampled_branches, 0),
        "reference": (reference_share(config) * sampled_branches, 0),
        "update": (later, trained_share * trained_branches),
    }


def passes(config):
    """{purpose: passes for each video and sampling step}, in forward passes of the network, as (linear, attention)."""
    multiples = pass_with_gradient(config)
    counts = pass_counts(config)
    return {name: tuple(plain + times * trained for times in multiples) for name, (plain, trained) in counts.items()}


def pass_with_gradient(config):
    """(linear, attention) of one pass with gradient, in forward passes.

    That is the forward; what checkpointing computes again; backward, which is 2 forwards of a linear map (1 in a LoRA,
    whose base has no gradient of its own) and 2.5 of attention.
    """
    linear, attention = 1 + (1 if config.lora_rank else 2), 1 + 2.5
    if config.checkpointing != "none":
        linear += 1
    if config.checkpointing == "full":
        attention += 1
    return linear, attention


def measured_tflops(config, line, forward):
    """TFLOP/s of this rank's rollout and update: the FLOPs of the passes that a line of the log counts, by its seconds.

    forward: (linear, attention), the FLOPs of one forward pass of one video: hunyuan.pass_flops.
    """
    linear, attention = pass_with_gradient(config)
    _, trained_branches = branches(config)
    trained = config.batch_size * config.trained_steps() * trained_branches
    plain = line["rollout_passes"] + line["update_passes"] - trained
    flops = (plain + trained * linear) * forward[0] + (plain + trained * attention) * forward[1]
    seconds = line["rollout_seconds"] + line["update_seconds"]
    return flops / config.context_parallel / seconds / 1e12


def reference_share(config):
    """Share of all steps, over many iterations, whose mean under the anchor must be computed."""
    w_pos, _ = kl_weights(config.kl_mode, config.beta_pos, config.beta_vel)
    if not w_pos:
        return 0.0
    share = (config.kl_steps or config.trained_steps()) / config.num_steps
    if config.kl_mode == "fixed":  # it is the rollout's policy once, at the start
        return share
    return share * (1 - 1 / iterations_per_anchor(config))


def forward_equivalents(config, linear, attention):
    """Passes per video and step in whole forward passes, where one forward has these FLOPs of each kind."""
    whole = linear + attention
    return {name: (a * linear + b * attention) / whole for name, (a, b) in passes(config).items()}


def cost(config, linear, attention):
    """({purpose: FLOPs of an iteration on each GPU}, FLOPs of all iterations), for a forward pass of these FLOPs."""
    videos_and_steps = config.batch_size * config.num_steps / config.context_parallel
    iteration = {name: videos_and_steps * (a * linear + b * attention) for name, (a, b) in passes(config).items()}
    return iteration, config.iterations * sum(iteration.values())


def evaluation_cost(config):
    """FLOPs of a run's evaluations, of all GPUs together."""
    import hunyuan

    tokens = hunyuan.token_count(config.frames, config.eval_height, config.eval_width)
    evaluations = 1 + math.ceil(config.iterations / config.eval_every)  # the first before training
    samples = len(read_prompts(config.eval_prompts)) * config.eval_noises
    sampled_branches, _ = branches(config)
    return evaluations * samples * config.eval_steps * sampled_branches * sum(hunyuan.pass_flops(tokens))


def print_cost(config, ranks, tflops):
    """FLOPs, hours, disk, messages. The hours leave out VAE, reward model, text tokens, messages and waiting."""
    import hunyuan

    forward = hunyuan.pass_flops(hunyuan.token_count(config.frames, config.height, config.width))
    iteration, run = cost(config, *forward)
    equivalents = forward_equivalents(config, *forward)
    shown = " + ".join(f"{name} {value:.1f}" for name, value in equivalents.items())
    print(f"passes per video, step   {shown} = {sum(equivalents.values()):.1f} forward passes")
    each = sum(iteration.values())
    in_all = f"{each / 1e15:.0f} an iteration, {run / 1e15:,.0f} a run"
    print(f"PFLOP per GPU            {sum(forward) / 1e15:.2f} a pass, {in_all}")
    rate = (tflops or TFLOPS) * 1e12
    minutes, training = each / rate / 60, run / rate / 3600
    evaluating = evaluation_cost(config) / ranks / rate / 3600
    print(
        f"time at {rate / 1e12:g} TFLOP/s      {minutes:.1f} minutes an iteration, {training:.1f} hours for all"
        f" {config.iterations}, {evaluating:.1f} more for evaluations; VAE, rewards and messages not counted"
    )
    size = checkpoint_bytes(config) / 1e9
    count = config.keep_checkpoints + 1
    most = f"{count} at most while one is written: {count * size:.0f}"
    print(f"disk                     {size:.0f} GB a checkpoint, {most}")
    parts = messages(config, ranks)
    shown = " + ".join(f"{name} {part / 2**40:.1f}" for name, part in parts.items())
    print(f"messages (TiB)           {shown} = {sum(parts.values()) / 2**40:.1f} an iteration over each GPU's link")
    reading, training = (part / 1e9 for part in host_memory(config, ranks))
    print(
        f"host memory              {reading:.0f} GB of each machine of {GPUS_PER_MACHINE} GPUs while the model is read,"
        f" then {training:.0f} GB beside PyTorch's own"
    )


def messages(config, ranks, architecture=None):
    """{purpose: bytes that cross each GPU's link in an iteration}, of collectives counted as in MESSAGES.

    With P parameters of w bytes, of which T are trained:
    gather      P·w for a forward pass, as much again for its backward
    reduce      4·T for a pass with gradient
    replicas    2 · 4·T / shards for it, where machines hold whole models
    context     4 exchanges of a share of the tokens (q, k, v, output) for each block's forward pass, for its second
                one under checkpointing, and for its backward; those of the text are left out
    """
    import hunyuan

    shards = ranks // config.replicate
    transformer = hunyuan.prepare(hunyuan.meta_transformer(architecture))
    sizes = transformer.config
    width = 2 if config.compute_dtype == "bfloat16" else 4
    total = transformer.num_parameters()
    trained = hunyuan.trained_parameters(transformer, config.lora_rank)
    if config.lora_rank:
        total += trained
    counts = pass_counts(config).values()
    calls = config.batch_size * config.num_steps / samples_per_condition(config)  # for each pass of a video and step
    plain = calls * sum(without for without, _ in counts)
    with_gradient = calls * sum(with_ for _, with_ in counts)
    parts = {"gather": 0.0, "reduce": 0.0, "replicas": 0.0, "context": 0.0}
    if shards > 1:
        parts["gather"] = width * total * (plain + 2 * with_gradient)
        parts["reduce"] = 4 * trained * with_gradient
    if config.replicate > 1:
        parts["replicas"] = 2 * 4 * trained / shards * with_gradient
    if config.context_parallel > 1:
        tokens = hunyuan.token_count(config.frames, config.height, config.width) / config.context_parallel
        exchange = 4 * width * tokens * sizes.num_attention_heads * sizes.attention_head_dim * sizes.num_layers
        times = 2 if config.checkpointing == "none" else 3
        parts["context"] = exchange * samples_per_condition(config) * (plain + times * with_gradient)
    return parts


def host_memory(config, ranks):
    """(bytes of a machine's memory while a model is read, while it trains)."""
    offloaded = 0.0
    if config.anchor_offload:
        of_one_gpu = memory(dataclasses.replace(config, anchor_offload=False), ranks // config.replicate)["anchor"]
        offloaded = 2**30 * of_one_gpu * min(ranks, GPUS_PER_MACHINE)
    return max(TEXT_ENCODER, offloaded), offloaded


def checkpoint_bytes(config):
    """Trained weights, which are as large as their gradients, the optimizer's moments and the anchor."""
    parts = memory(dataclasses.replace(config, anchor_offload=False), shards=1)
    return 2**30 * (parts["gradients"] + parts["optimizer"] + parts["anchor"])


# ---------------------------------------------------------------------------------------------- the trace
# What a trace knows of memory. "rest": activations, what backward keeps, temporaries, states of the rollout.
KINDS = ("weights", "gathered", "gradients", "optimizer", "anchor", "vae", "rest")
TEXT_TOKENS = 200  # of a prompt of the trace, and of the empty one: a long caption
GLYPH_TOKENS = 8


def attention_product(q, k):
    """Half the FLOPs of Q·Kᵀ, from the shapes [B, heads, S, D] of both."""
    return q[0] * q[1] * q[2] * k[2] * q[3]


# PyTorch has no formula for the CPU's attention, which the trace runs. Its other formulas are those of FlopCounterMode.
CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: (
        lambda q, k, *rest, **options: 4 * attention_product(q, k)  # Q·Kᵀ and the sum over V
    ),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        # Five products of that size: one is the scores', again.
        lambda gradient, q, k, *rest, **options: 10 * attention_product(q, k)
    ),
}
FLOPS = flop_registry | {
    operator: shape_wrapper(formula) for operator, formula in CPU_ATTENTION.items()
}
# Collectives, as the dispatcher knows them, and how often the bytes of their largest argument cross a GPU's link.
MESSAGES = {"_allgather_base_": 1, "allgather_": 1, "_reduce_scatter_base_": 1, "alltoall_base_": 1, "allreduce_": 2}


class Ledger(TorchDispatchMode):
    """Every storage that is alive, by kind; within a `phase` the most bytes at a time, FLOPs and bytes of messages.

    A storage is found where an operator returns it, and leaves when Python drops it. FSDP frees gathered weights by
    resizing their storage to 0, which no operator shows: `resize_` itself is watched.
    """

    def __init__(self):
        super().__init__()
        self.entries = {}  # address of a storage's C++ object -> [bytes, kind]
        self.now = dict.fromkeys(KINDS, 0)
        self.phases = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function.namespace == "prim":  # a question about a tensor; there are hundreds of thousands
            return result
        if function.namespace == "c10d":
            self.messages += message_bytes(function, args)
        formula = FLOPS.get(function.overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **(kwargs or {}), out_val=result)
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.enter(tensor)
        return result

    def __enter__(self):
        self.messages, self.flops, self.peak = 0, 0, dict(self.now)
        self.resize = torch.UntypedStorage.resize_
        ledger = self

        def resize(storage, size):
            ledger.resize(storage, size)
            if storage._cdata in ledger.entries:
                ledger.change(storage._cdata, size, "gathered")

        torch.UntypedStorage.resize_ = resize
        return super().__enter__()

    def __exit__(self, *error):
        torch.UntypedStorage.resize_ = self.resize
        return super().__exit__(*error)

    def enter(self, tensor, kind="rest"):
        """Take in the storage of a tensor, or of this rank's part of it."""
        storage = getattr(tensor, "_local_tensor", tensor).untyped_storage()
        if storage._cdata not in self.entries:
            self.entries[storage._cdata] = [0, kind]
            weakref.finalize(storage, self.leave, storage._cdata)
        self.change(storage._cdata, storage.nbytes(), None if kind == "rest" else kind)

    def change(self, address, size, kind=None):
        entry = self.entries[address]
        self.now[entry[1]] -= entry[0]
        entry[:] = size, kind or entry[1]
        self.now[entry[1]] += size
        if sum(self.now.values()) > sum(self.peak.values()):
            self.peak = dict(self.now)

    def leave(self, address):
        size, kind = self.entries.pop(address)
        self.now[kind] -= size

    @contextlib.contextmanager
    def phase(self, name):
        """Record what happens within, once."""
        self.messages, self.flops, self.peak = 0, 0, dict(self.now)
        yield
        self.phases[name] = {"peak": self.peak, "flops": self.flops, "messages": self.messages}


def message_bytes(function, args):
    """Bytes that a collective moves over one GPU's link, about; 0 of one that moves none."""
    times = MESSAGES.get(function._schema.name.removeprefix("c10d::"), 0)
    return times * max((leaf.nbytes for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)), default=0)


class WithoutData(TorchFunctionMode):
    """Answers the questions about values that the stock forward pass and the optimizer step ask, which have none.

    The masks that HunyuanPolicy hands over keep every token, and it hands over no image.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.Tensor.__bool__:  # "is there no image", "is the gradient norm finite"
            return True
        if function is torch.Tensor.__index__:  # a sample's condition: all are alike
            return 0
        if function is torch.Tensor.__getitem__ and getattr(args[1], "dtype", None) == torch.bool:
            tokens, mask = args
            return tokens[:0] if getattr(mask, "keeps_none", False) else tokens[:]
        result = function(*args, **(kwargs or {}))
        if function is torch.Tensor.__invert__:
            result.keeps_none = True
        return result


def empty_mask(frames, places, dtype, device, batch_size):
    """In place of the VAE's own, which fills the mask row by row: thousands for each tile, minutes of a trace."""
    tokens = frames * places
    return torch.empty(tokens, tokens, dtype=dtype, device=device).expand(batch_size, -1, -1)


def meta_policy(config, mesh, context, architecture=None):
    """The policy as hunyuan.load makes it, before it has memory. architecture: another than the released one."""
    import hunyuan

    dtype = getattr(torch, config.compute_dtype)
    transformer = hunyuan.meta_transformer(architecture, dtype if config.lora_rank else torch.float32)
    hunyuan.prepare(transformer, config.lora_rank, config.checkpointing, ["flash"], context)
    if mesh is not None:
        hunyuan.shard(transformer, mesh, dtype)
    with torch.device("meta"):
        vae = hunyuan.AutoencoderKLHunyuanVideo15().requires_grad_(False)
    for module in vae.modules():
        if hasattr(module, "prepare_causal_attention_mask"):
            module.prepare_causal_attention_mask = empty_mask
    shape = hunyuan.latent_shape(config.frames, config.height, config.width)
    return hunyuan.HunyuanPolicy(
        transformer, vae, None, shape, config.guidance_scale, dtype, config.micro_batch, config.guidance_gradient
    )


def trace(config, processes, make_optimizers, make_anchor, architecture=None):
    """A Ledger of the second iteration of a run: the real code, on tensors that have sizes but no data.

    Each phase runs once, on one micro-batch where it runs over micro-batches, and is counted as often as an iteration
    runs it. make_optimizers, make_anchor: train.py's.
    """
    # Here, since they are no public part of PyTorch, and no run should depend on them.
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from parallel import context_group, device_mesh

    mesh, context = None, None
    if processes > 1:
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=processes)
        context = context_group(config.context_parallel, timedelta(hours=1))
        mesh = device_mesh("cpu", config.replicate)
    try:
        policy, sde = meta_policy(config, mesh, context, architecture), config.sde()
        with FakeTensorMode(allow_non_fake_inputs=True), WithoutData(), Ledger() as ledger:
            run = TracedRun(config, policy, sde, ledger, make_optimizers, make_anchor)
            run.fill_gradients()
            run.optimizer_step()  # that of the first iteration, which makes the moments
            run.iteration()
    finally:
        if processes > 1:
            dist.destroy_process_group()
    return ledger


def phase_counts(config):
    """{phase of a trace: how often an iteration does it, in the mean over a run}; an evaluation is counted apart."""
    batches = config.batch_size / config.micro_batch
    return {
        "rollout": config.num_steps * batches,
        "decode": config.batch_size,
        "reference": reference_share(config) * config.num_steps * batches,
        "update": config.trained_steps() * batches,
        "optimizer": config.optimizer_steps,
        "evaluation": 0,
    }


class TracedRun:
    """A policy, its optimizers and its anchor, and the phases of an iteration."""

    def __init__(self, config, policy, sde, ledger, make_optimizers, make_anchor):
        import hunyuan

        self.config, self.policy, self.sde, self.ledger = config, policy, sde, ledger
        self.module = policy.module
        self.module.to_empty(device="cpu")
        policy.vae.to_empty(device="cpu")
        sizes = self.module.config
        text = torch.empty(TEXT_TOKENS, sizes.text_embed_dim), torch.empty(GLYPH_TOKENS, sizes.text_embed_2_dim)
        policy.unconditional = hunyuan.Prompt(*text)
        for parameter in self.module.parameters():
            ledger.enter(parameter, "weights")
        for tensor in (*self.policy.vae.parameters(), *self.policy.vae.buffers()):
            ledger.enter(tensor, "vae")
        self.optimizers = make_optimizers(self.module, config)
        self.anchor = make_anchor(self.module, config)
        for copy in self.anchor._copies if self.anchor else ():
            if not config.anchor_offload:
                ledger.enter(copy, "anchor")
        self.batch = self.rolled_out()

    def rolled_out(self):
        """A Batch whose tensors have the sizes of a rollout's."""
        config, shape = self.config, self.policy.latent_shape
        samples, steps = config.batch_size, config.num_steps
        conditions = [self.policy.unconditional] * samples
        states = torch.empty(samples, steps + 1, *shape)
        trajectory = Trajectory(states, torch.empty(samples, steps, *shape), torch.empty(samples, steps))
        sampled, trained = branches(config)
        stored = torch.empty(samples, steps, *shape) if trained < sampled else None
        advantages, valid = torch.empty(samples), torch.ones(samples, dtype=torch.bool)
        return Batch(self.sde, conditions, trajectory, stored, advantages, valid, 0, {})

    def iteration(self):
        """Every phase once."""
        import hunyuan

        states = self.batch.trajectory.states
        micro_batch = slice(self.config.micro_batch)
        with torch.no_grad(), self.ledger.phase("rollout"):
            v = self.velocity(states[micro_batch, 0])
            self.sde.transition(states[micro_batch, 0], v, 0)
        with self.ledger.phase("decode"):
            self.policy.decode(states[:1, -1])  # it decodes one after another
        if self.anchor is not None:
            with torch.no_grad(), self.ledger.phase("reference"), self.anchor.swapped_in():
                self.velocity(states[micro_batch, 0])
        self.fill_gradients()
        with self.ledger.phase("update"):
            self.update()
        with self.ledger.phase("optimizer"):
            self.optimizer_step()
        shape = hunyuan.latent_shape(self.config.frames, self.config.eval_height, self.config.eval_width)
        with torch.no_grad(), self.ledger.phase("evaluation"):
            x = torch.empty(1, *shape)
            self.policy.velocity(x, torch.empty(1), self.batch.conditions[:1])
            self.policy.decode(x)

    def velocity(self, x):
        conditions = self.batch.conditions[: len(x) : samples_per_condition(self.config)]
        return self.policy.velocity(x, torch.empty(len(x)), conditions)

    def fill_gradients(self):
        """The gradients that the micro-batches before have left."""
        for parameter in self.module.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.empty_like(parameter)
                self.ledger.enter(parameter.grad, "gradients")

    def update(self):
        """Forward and backward of one micro-batch."""
        config = self.config
        rows, steps = torch.arange(config.micro_batch), torch.zeros(config.micro_batch, dtype=torch.long)
        weights = torch.ones(config.batch_size, config.num_steps, dtype=torch.float64)
        means = self.batch.trajectory.means.clone() if self.anchor else None  # the reference's
        loss, _ = micro_batch_loss(self.policy, self.batch, config, means, weights, rows, steps, weights[0], 1.0)
        loss.backward()

    def optimizer_step(self):
        trained = [parameter for parameter in self.module.parameters() if parameter.requires_grad]
        torch.nn.utils.clip_grad_norm_(trained, self.config.max_grad_norm)
        for optimizer in self.optimizers:
            optimizer.step()
            for state in optimizer.state.values():
                for tensor in tree_leaves(state):
                    if isinstance(tensor, torch.Tensor):
                        self.ledger.enter(tensor, "optimizer")
            optimizer.zero_grad()


def print_trace(config, processes, tflops, make_optimizers, make_anchor):
    """The trace as a table, and what follows from it."""
    started = time.perf_counter()
    ledger = trace(config, processes, make_optimizers, make_anchor)
    counts, reward = phase_counts(config), VIDEOALIGN / 2**30
    print(f"traced, on each GPU      GiB at the peak of each phase; {reward:.1f} of them are VideoAlign's weights")
    moved, peaks, flops = 0.0, {}, {}
    for name, phase in ledger.phases.items():
        parts = {kind: size / 2**30 for kind, size in phase["peak"].items()}
        peaks[name] = sum(parts.values()) + reward
        flops[name] = counts[name] * phase["flops"]
        moved += counts[name] * phase["messages"]
        shown = " + ".join(f"{kind} {size:.1f}" for kind, size in parts.items() if size >= 0.05)
        print(f"  {name:10} {peaks[name]:5.1f} = {shown}; {phase['flops'] / 1e15:.2f} PFLOP, {counts[name]:g} times")
    highest = max(peaks, key=peaks.get)
    computed = sum(peak_memory(config, processes // config.replicate).values())
    print(f"traced peak              {peaks[highest]:.1f} GiB, in the {highest}; computed: {computed:.1f}")
    sampled_branches, _ = branches(config)
    forward = flops["rollout"] / sampled_branches
    shares = {name: flops[name] / forward for name in ("rollout", "reference", "update")}
    shown = " + ".join(f"{name} {share:.2f}" for name, share in shares.items())
    print(f"traced passes            {shown} = {sum(shares.values()):.2f} forward passes for each video and step")
    iteration = sum(flops.values())
    seconds = iteration / ((tflops or TFLOPS) * 1e12)
    hours = config.iterations * seconds / 3600
    print(
        f"traced PFLOP             {iteration / 1e15:.0f} an iteration and GPU, VAE and {TEXT_TOKENS} text tokens"
        f" counted: {seconds / 60:.1f} minutes, {hours:.1f} hours for all {config.iterations}"
    )
    print(f"traced messages (TiB)    {moved / 2**40:.1f} an iteration over each GPU's link")
    print(f"traced in                {time.perf_counter() - started:.0f} s")
