"""One iteration of the real code on tensors that have sizes but no data: peaks by phase, FLOPs, messages.

    print_trace   what a dry run with --trace prints
    trace         a Ledger of the phases of an iteration
    Ledger        what is alive, computed and sent, seen where PyTorch dispatches its operators
    TracedRun     the phases: rollout, decode, reference, update, optimizer, evaluation
The plan computes the same from sizes; where the two differ, the trace is right, but for kernels: it runs the CPU's.
Only a dry run imports this file, since it uses parts of PyTorch that are not public.
"""

import contextlib
import time
import weakref
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, shape_wrapper

from engine.build import make_anchor, make_optimizers
from engine.plan import VIDEOALIGN, branches, gpu_seconds, peak_memory, reference_share, training_flops
from grpo import Batch, copies_in_update, micro_batch_loss, samples_in_update
from sde import Trajectory
from video import files, hunyuan
from video.parallel import context_group, device_mesh, reduce_between_machines
from video.prompts import Prompt

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
FLOPS = flop_registry | {operator: shape_wrapper(formula) for operator, formula in CPU_ATTENTION.items()}
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
    dtype = getattr(torch, config.compute_dtype)
    transformer = hunyuan.build_transformer(
        architecture, dtype, config.lora_rank, config.checkpointing, ["flash"], context, mesh
    )
    with torch.device("meta"):
        vae = files.AutoencoderKLHunyuanVideo15().requires_grad_(False)
    for parameter in vae.parameters():  # its own `to` warns of modules that it does not have
        parameter.data = parameter.data.to(hunyuan.decoder_dtype(config.vae_dtype))
    for module in vae.modules():
        if hasattr(module, "prepare_causal_attention_mask"):
            module.prepare_causal_attention_mask = empty_mask
    shape = hunyuan.latent_shape(config.frames, config.height, config.width)
    return hunyuan.HunyuanPolicy(
        transformer, vae, None, shape, config.guidance_scale, dtype, config.micro_batch, config.guidance_gradient
    )


def trace(config, processes, architecture=None):
    """A Ledger of the second iteration of a run: the real code, on tensors that have sizes but no data.

    Each phase runs once, on one micro-batch where it runs over micro-batches, and is counted as often as an iteration
    runs it.
    """
    # Here, since they are no public part of PyTorch, and no run should depend on them.
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.testing._internal.distributed.fake_pg import FakeStore

    mesh, context = None, None
    if processes > 1:
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=processes)
        context = context_group(config.context_parallel, timedelta(hours=1))
        mesh = device_mesh("cpu", config.replicate)
    try:
        policy, sde = meta_policy(config, mesh, context, architecture), config.sde()
        with FakeTensorMode(allow_non_fake_inputs=True), WithoutData(), Ledger() as ledger:
            run = TracedRun(config, policy, sde, ledger)
            run.fill_gradients()
            run.optimizer_step()  # that of the first iteration, which makes the moments
            run.iteration()
    finally:
        if processes > 1:
            dist.destroy_process_group()
    return ledger


def phase_counts(config):
    """{phase of a trace: how often an iteration does it, on average over a run}; an evaluation is counted apart."""
    batches = config.batch_size / config.micro_batch
    counts = {
        "rollout": config.num_steps * batches,
        "decode": config.batch_size,
        "reference": reference_share(config) * config.num_steps * batches,
        "update": config.trained_steps() * samples_in_update(config) / config.micro_batch,
        "optimizer": config.optimizer_steps,
        "evaluation": 0,
    }
    if config.replicate > 1:
        counts["last update"] = config.optimizer_steps
        counts["update"] -= config.optimizer_steps
    return counts


class TracedRun:
    """A policy, its optimizers and its anchor, and the phases of an iteration."""

    def __init__(self, config, policy, sde, ledger):
        self.config, self.policy, self.sde, self.ledger = config, policy, sde, ledger
        self.module = policy.module
        self.module.to_empty(device="cpu")
        policy.vae.to_empty(device="cpu")
        sizes = self.module.config
        text = torch.empty(TEXT_TOKENS, sizes.text_embed_dim), torch.empty(GLYPH_TOKENS, sizes.text_embed_2_dim)
        policy.unconditional = Prompt(*text)
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
        return Batch(self.sde, conditions, trajectory, advantages, valid, 0, {}, stored)

    def iteration(self):
        """Every phase once."""
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
        if self.config.replicate == 1:
            self.fill_gradients()
        # Where machines hold whole models, FSDP2 keeps the sums of this machine until the last micro-batch.
        with self.ledger.phase("update"):
            self.update(last=self.config.replicate == 1)
        if self.config.replicate > 1:
            with self.ledger.phase("last update"):
                self.update(last=True)
        with self.ledger.phase("optimizer"):
            self.optimizer_step()
        shape = hunyuan.latent_shape(self.config.frames, self.config.eval_height, self.config.eval_width)
        with torch.no_grad(), self.ledger.phase("evaluation"):
            x = torch.empty(1, *shape)
            self.policy.velocity(x, torch.empty(1), self.batch.conditions[:1])
            self.policy.decode(x)

    def velocity(self, x):
        conditions = self.batch.conditions[: len(x) : copies_in_update(self.config)]
        return self.policy.velocity(x, torch.empty(len(x)), conditions)

    def fill_gradients(self):
        """The gradients that the micro-batches before have left."""
        for parameter in self.module.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.empty_like(parameter)
                self.ledger.enter(parameter.grad, "gradients")

    def update(self, last=True):
        """Forward and backward of one micro-batch. last: of its optimizer step."""
        config = self.config
        reduce_between_machines(self.module, last)
        rows, steps = torch.arange(config.micro_batch), torch.zeros(config.micro_batch, dtype=torch.long)
        batch = self.batch
        batch.scales = torch.ones(config.num_steps, dtype=torch.float64)
        batch.position_weights = torch.ones(config.batch_size, config.num_steps, dtype=torch.float64)
        batch.means_ref = batch.trajectory.means.clone() if self.anchor else None
        loss, _ = micro_batch_loss(self.policy, batch, rows, steps, config, 1.0)
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


def print_trace(config, processes, tflops):
    """The trace as a table, and what follows from it."""
    started = time.perf_counter()
    ledger = trace(config, processes)
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
    flops["update"] += flops.pop("last update", 0)
    shares = {name: flops.get(name, 0) / forward for name in ("rollout", "reference", "update")}
    shown = " + ".join(f"{name} {share:.2f}" for name, share in shares.items())
    print(f"traced passes            {shown} = {sum(shares.values()):.2f} forward passes for each video and step")
    iteration = sum(flops.values())
    decode = flops["decode"]
    seconds = sum(gpu_seconds(config, training_flops(config), iteration - decode, decode, 0, tflops).values())
    hours = config.iterations * seconds / 3600
    print(
        f"traced PFLOP             {iteration / 1e15:.0f} an iteration and GPU, VAE and {TEXT_TOKENS} text tokens"
        f" counted: {seconds / 60:.1f} minutes, {hours:.1f} hours for all {config.iterations}"
    )
    print(f"traced messages (TiB)    {moved / 2**40:.1f} an iteration over each GPU's link")
    print(f"traced in                {time.perf_counter() - started:.0f} s")
