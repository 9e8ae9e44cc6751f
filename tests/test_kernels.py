"""The choice of attention's kernel, with kernels and clocks of the test's own where a GPU would be needed."""

import math

import pytest
import torch
from torch.nn import attention
from torch.utils.flop_counter import FlopCounterMode

from engine.config import KERNELS as CHOICES
from engine.trace import CPU_ATTENTION
from tiny.hunyuan import build_tiny_hunyuan
from video import hunyuan, kernels

GPU = torch.device("cuda")
SIZE = 4, 128, 18_018  # heads, numbers to a head, tokens


def clocked(monkeypatch, seconds):
    """Kernels that take so many seconds, or raise what stands in their place; returns what was timed."""
    timed = []

    def seconds_of(name, *where):
        timed.append((name, *where))
        if isinstance(seconds[name], Exception):
            raise seconds[name]
        return seconds[name]

    monkeypatch.setattr(kernels, "seconds_of", seconds_of)
    return timed


def test_the_settings_offer_every_kernel():
    assert CHOICES == tuple(kernels.KERNELS)


def test_auto_takes_the_fastest_and_passes_over_what_raises(monkeypatch, capsys):
    missing, broken = ModuleNotFoundError("No module named 'flash_attn_interface'"), RuntimeError("no\nsuch\ncard")
    seconds = {"flash": 0.030, "cudnn": 0.021, "efficient": broken, "fa3": missing, "fa4": 0.0208}
    timed = clocked(monkeypatch, seconds)
    assert kernels.choose(GPU, torch.bfloat16, *SIZE) == "cudnn"  # fa4's lead is noise, and cudnn comes first
    assert timed == [(name, GPU, torch.bfloat16, *SIZE) for name in seconds]  # not math
    assert capsys.readouterr().out.splitlines() == [
        "attention: efficient is passed over: RuntimeError: no such card",
        "attention: fa3 is passed over: ModuleNotFoundError: No module named 'flash_attn_interface'",
        "attention: cudnn, of these ms forward and backward over 18,018 tokens: flash 30, cudnn 21, fa4 20.8",
    ]
    seconds["fa4"] = 0.015
    assert kernels.choose(GPU, torch.bfloat16, *SIZE) == "fa4"


def test_auto_takes_the_plain_kernel_where_no_other_runs(monkeypatch):
    clocked(monkeypatch, dict.fromkeys(kernels.KERNELS, RuntimeError("no")))
    assert kernels.choose(GPU, torch.bfloat16, *SIZE) == "math"


def test_on_a_cpu_auto_times_nothing_and_takes_the_first_that_runs(monkeypatch, capsys):
    timed, tried = clocked(monkeypatch, {}), []

    def problem_of(name, *where):
        tried.append(name)
        return None if name == "efficient" else "it does not run"

    assert kernels.attention_kernel("auto", "cpu", torch.float32, *SIZE) == "flash"
    monkeypatch.setattr(kernels, "problem_of", problem_of)
    assert kernels.attention_kernel("auto", "cpu", torch.float32, *SIZE) == "efficient"
    assert tried == ["flash", "cudnn", "efficient", "efficient"]  # the choice, and then this rank's own try
    assert not timed and not capsys.readouterr().out


def test_a_kernel_is_timed_forward_and_backward_at_the_size_of_the_run(monkeypatch):
    """On the CPU's own kernel, by a clock that the test moves: the least of the rounds after the first call."""
    now, calls, states = [0.0], [], torch.get_rng_state()
    attend = kernels.attend

    def slower(name, *parts):
        with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
            attended = attend(name, *parts)
        assert counter.get_total_flops() >= (4 + 8) * 4 * 33**2 * 16  # forward, and at least twice that backward
        calls.append([(part.shape, part.stride(), part.requires_grad) for part in parts])
        now[0] += [60.0, 3.0, 5.0, 2.0, 4.0, 6.0][len(calls) - 1]
        return attended

    monkeypatch.setattr(kernels, "attend", slower)
    monkeypatch.setattr(kernels, "clock", lambda device: now[0])
    assert kernels.seconds_of("flash", torch.device("cpu"), torch.float32, 4, 16, 33) == 2.0
    laid_out = (1, 4, 33, 16), (33 * 64, 16, 64, 1), True
    assert calls == [[laid_out] * 3] * (1 + kernels.ROUNDS)
    assert torch.equal(torch.get_rng_state(), states)


def test_a_kernel_that_a_gradient_changes_is_passed_over(monkeypatch):
    """Else the ratio of rollout and update would not be 1."""
    exact = kernels.attention

    def changed(name, *parts):
        return exact(name, *parts) * (1 if torch.is_grad_enabled() else 1 + 1e-6)

    monkeypatch.setattr(kernels, "attention", changed)
    with pytest.raises(RuntimeError, match="with a gradient it rounds otherwise"):
        kernels.seconds_of("flash", torch.device("cpu"), torch.float32, 4, 16, 33)


@pytest.mark.parametrize("name", kernels.PACKAGES)
def test_a_package_that_is_not_installed_is_refused_by_name(name):
    with pytest.raises(ValueError, match=f"have a kernel that runs on cpu .*got {name}: ModuleNotFoundError: .*; use"):
        kernels.attention_kernel(name, "cpu", torch.float32, *SIZE)
    assert attention.current_flash_attention_impl() is None


def plain_attention(calls):
    """A kernel in the place of PyTorch's own flash attention, as a package registers one; it counts its calls."""

    def forward(q, k, v, dropout_p=0.0, is_causal=False, *, attn_mask=None, scale=None):
        calls.append("forward")
        scores = q @ k.mT / math.sqrt(q.shape[-1])
        return scores.softmax(-1) @ v, scores.logsumexp(-1).transpose(1, 2).contiguous().transpose(1, 2)

    class Handle:
        def __init__(self):
            self.library = torch.library.Library("aten", "IMPL", "CPU")
            self.library.impl("_scaled_dot_product_flash_attention_for_cpu", forward, "CPU")

        def remove(self):
            self.library = None  # as PyTorch's own handles do

    return Handle


# A package's kernel takes the place of PyTorch's own, which PyTorch warns of once.
overriding = pytest.mark.filterwarnings("ignore:Warning only once for all operators")


@pytest.fixture
def package(monkeypatch):
    """fa3, as if its package were installed and for CPUs; returns the calls of it."""
    if not torch.backends.cuda.flash_sdp_enabled():
        pytest.skip("this process may not use flash attention: see ranks.obey_cpu_capability")
    calls = []
    monkeypatch.setitem(attention._registry._FLASH_ATTENTION_IMPLS, "FA3", plain_attention(calls))
    yield calls
    kernels.use("flash")


@overriding
def test_selective_checkpointing_knows_the_operator_of_a_package(package, tmp_path):
    """fa3 computes the attention, the gradients stay the same, and backward does not compute its output again."""
    folder, shape = build_tiny_hunyuan(tmp_path / "tiny"), hunyuan.latent_shape(5, 64, 48)
    found, counts = {}, {}
    for kernel, kind in (("flash", "none"), ("fa3", "none"), ("fa3", "attention"), ("fa3", "full")):
        policy = hunyuan.load(folder, shape, tmp_path, attention=kernel, checkpointing=kind, guidance_scale=1.0)
        x = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0))
        package.clear()
        policy.velocity(x, torch.tensor([0.5]), policy.encode(["dog"])).square().sum().backward()
        assert policy.kernel == kernel
        counts[kernel, kind] = len(package)
        found[kernel, kind] = {name: p.grad for name, p in policy.module.named_parameters() if p.grad is not None}
    blocks = len(policy.module.transformer_blocks)
    assert counts["flash", "none"] == 0
    # The refiner of the text calls the same operator, and is not among the blocks.
    assert counts["fa3", "full"] - counts["fa3", "none"] == blocks
    assert counts["fa3", "attention"] == counts["fa3", "none"] >= blocks
    largest = max(gradient.abs().max() for gradient in found["flash", "none"].values())
    for kind in ("none", "attention", "full"):
        for name, gradient in found["flash", "none"].items():
            assert (found["fa3", kind][name] - gradient).abs().max() < 1e-5 * largest, (kind, name)


@overriding
def test_another_choice_puts_pytorchs_own_kernel_back(package):
    q = torch.randn(1, 2, 16, 8, requires_grad=True)
    kernels.use("fa3")
    kernels.attend("fa3", q, q, q)
    assert package == ["forward"]
    for name in ("flash", "math"):
        kernels.use("fa3")
        kernels.use(name)
        kernels.attend(name, q, q, q)
    assert package == ["forward"]
