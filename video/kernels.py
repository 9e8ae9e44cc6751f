"""The kernels of attention: those that there are, those that run, and the one that a run takes.

FlashAttention-3 and 4 are packages of their own. Where one is installed, PyTorch lets it take the place of its own
FlashAttention-2, behind the same operators. So it is one choice for a whole process, and what knows the operators, such
as selective checkpointing, knows the packages, too.
"""

import warnings

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.attention import (
    SDPBackend,
    activate_flash_attention_impl,
    current_flash_attention_impl,
    restore_flash_attention_impl,
    sdpa_kernel,
)

from grpo import clock
from video.parallel import own_rank

# In the order in which a CPU looks for one that runs, and in which those of equal speed are preferred.
KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "fa3": SDPBackend.FLASH_ATTENTION,
    "fa4": SDPBackend.FLASH_ATTENTION,
    "math": SDPBackend.MATH,
}
PACKAGES = {"fa3": "FA3", "fa4": "FA4"}  # PyTorch's names for them
FUSED_ATTENTION = (  # the operators of all kernels but `math`
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
)
ROUNDS = 5
AS_FAST = 1.02  # times the fastest: less is noise of the clock, which must not change a run's kernel at its next start


def attention_kernel(wanted, device, dtype, heads, head_dim, tokens):
    """The name of the kernel that the attention of all ranks takes, which this process is then ready to call.

    `auto` is chosen by the first rank, at the run's own size. Every rank must call it.
    """
    device = torch.device(device)
    name = wanted
    if wanted == "auto":
        chosen = [choose(device, dtype, heads, head_dim, tokens)] if own_rank() == 0 else [None]
        if dist.is_initialized():
            dist.broadcast_object_list(chosen)
        name = chosen[0]
    problem = problem_of(name, device, dtype, head_dim)
    if problem is not None:
        rule = f"attention must have a kernel that runs on {device} in {dtype} with {head_dim} numbers to a head"
        raise ValueError(f"{rule}: got {name}: {problem}; use --attention auto")
    return name


def choose(device, dtype, heads, head_dim, tokens):
    """On a GPU the fastest kernel; on a CPU, which has no two that are fused, the first that runs.

    `math` holds all scores at once, 10 GB in bf16 at 352 × 624 × 81, so it is taken only where no other kernel runs.
    """
    fused = [name for name in KERNELS if name != "math"]
    if device.type == "cpu":
        return next((name for name in fused if problem_of(name, device, dtype, head_dim) is None), "math")
    seconds = {}
    for name in fused:
        try:
            seconds[name] = seconds_of(name, device, dtype, heads, head_dim, tokens)
        except Exception as error:  # what the kernels of a package raise is theirs to choose
            print(f"attention: {name} is passed over: {in_one_line(error)}")
    if not seconds:
        return "math"
    fastest = next(name for name in seconds if seconds[name] <= AS_FAST * min(seconds.values()))
    shown = ", ".join(f"{name} {1e3 * value:.3g}" for name, value in seconds.items())
    print(f"attention: {fastest}, of these ms forward and backward over {tokens:,} tokens: {shown}")
    return fastest


def seconds_of(name, device, dtype, heads, head_dim, tokens):
    """The least seconds of an attention and its backward. RuntimeError where a gradient changes what it returns.

    Rollouts have no gradient and updates have one, and their ratio must be 1 before the first optimizer step.
    """
    generator = torch.Generator(device).manual_seed(0)  # of its own: the run's draws must not depend on the timing
    parts = []
    for _ in range(3):
        part = torch.randn(1, tokens, heads, head_dim, generator=generator, device=device, dtype=dtype)
        parts.append(part.transpose(1, 2).requires_grad_())  # as the transformer lays them out
    use(name)
    attended = attend(name, *parts)  # the first call may compile
    with torch.no_grad():
        if not torch.equal(attention(name, *parts), attended):
            raise RuntimeError("with a gradient it rounds otherwise")
    taken = []
    for _ in range(ROUNDS):
        started = clock(device)
        attend(name, *parts)
        taken.append(clock(device) - started)
    return min(taken)


def problem_of(name, device, dtype, head_dim):
    """Why a kernel does not run forward and backward, in one line; None where it does. It is tried on a few zeros."""
    q = torch.zeros(1, 1, 16, head_dim, device=device, dtype=dtype, requires_grad=True)
    try:
        use(name)
        attend(name, q, q, q)
    except Exception as error:  # as above
        return in_one_line(error)
    return None


def use(name):
    """Let PyTorch's flash attention call the package of this name, or else its own kernel."""
    if name in PACKAGES:
        activate_flash_attention_impl(PACKAGES[name])
    elif current_flash_attention_impl() is not None:
        restore_flash_attention_impl()


def attend(name, q, k, v):
    """Forward and backward of one attention; returns what the forward does."""
    with torch.enable_grad():
        attended = attention(name, q, k, v)
    torch.autograd.grad(attended, (q, k, v), attended.detach())
    return attended.detach()


def attention(name, q, k, v):
    with sdpa_kernel(KERNELS[name]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the reasons why a kernel cannot run, one warning each
        return F.scaled_dot_product_attention(q, k, v)


def in_one_line(error):
    return " ".join(f"{type(error).__name__}: {error}".split())
