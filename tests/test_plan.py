"""The plan's FLOPs against those that PyTorch counts in the real class, its passes against those of a real update."""

from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import hunyuan
import plan
import train
from config import parse
from plan import CPU_ATTENTION
from tiny.hunyuan import GLYPH_DIM, TEXT_DIM, tiny_transformer

TEXT = 3  # tokens of the prompt


def deep_transformer(lora_rank=0, checkpointing="none"):
    """Of eight blocks, in which nearly all of its FLOPs are, as in the released one."""
    stock = hunyuan.HunyuanVideo15Transformer3DModel.from_config({**tiny_transformer().config, "num_layers": 8})
    return hunyuan.prepare(stock, lora_rank, checkpointing)


def counted(transformer, side, backward=False):
    """(linear, attention): FLOPs of one pass for a latent of 2 × side × side."""
    vae = SimpleNamespace(enable_slicing=lambda: None, enable_tiling=lambda: None)
    policy = hunyuan.HunyuanPolicy(transformer, vae, None, None, guidance_scale=1.0)
    prompt = hunyuan.Prompt(torch.randn(TEXT, TEXT_DIM), torch.zeros(0, GLYPH_DIM))
    with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter, torch.set_grad_enabled(backward):
        v = policy.velocity(torch.randn(1, 32, 2, side, side), torch.tensor([0.5]), [prompt])
        if backward:
            v.square().sum().backward()
    by_operator = counter.get_flop_counts()["Global"]
    attention = sum(flops for operator, flops in by_operator.items() if operator in CPU_ATTENTION)
    return sum(by_operator.values()) - attention, attention


def test_a_pass_has_the_flops_that_pytorch_counts():
    """In the difference of two sizes what acts on the text alone drops out, and the rest is equal to the last one."""
    transformer = deep_transformer()
    small, large = counted(transformer, 6), counted(transformer, 10)
    planned = []
    for side in (6, 10):
        tokens = 2 * side * side
        linear, _ = hunyuan.pass_flops(tokens, transformer.config)
        _, attention = hunyuan.pass_flops(tokens + TEXT, transformer.config)
        planned.append((linear, attention))
    # The text's own refiner attends, too: at both sizes to the same tokens.
    for kind in (0, 1):
        assert large[kind] - small[kind] == planned[1][kind] - planned[0][kind]


def test_the_released_pass_has_the_flops_of_its_sizes():
    linear, attention = hunyuan.pass_flops(18_018)
    assert linear == pytest.approx(2 * 18_018 * 54 * 12 * 2048**2, rel=0.001)  # and what embeds and projects
    assert attention == 4 * 18_018**2 * 2048 * 54


@pytest.mark.parametrize("lora_rank", [0, 1])
@pytest.mark.parametrize("checkpointing", ["full", "attention", "none"])
def test_an_update_has_the_passes_that_are_planned(checkpointing, lora_rank):
    """Forward, recomputation and backward, as multiples of the forward pass."""
    transformer = deep_transformer(lora_rank, checkpointing)
    forward, whole = counted(transformer, 10), counted(transformer, 10, backward=True)
    options = ["--guidance_scale", "1", "--checkpointing", checkpointing, "--lora_rank", str(lora_rank)]
    config, _ = parse(["--preset", "paper", "--dry-run", *options])
    planned = plan.passes(config)["update"]
    for kind in (0, 1):
        assert whole[kind] / forward[kind] == pytest.approx(planned[kind], rel=0.06)


FORWARD_PASS = hunyuan.pass_flops(18_018)  # of the paper preset's videos


@pytest.mark.parametrize(
    ("options", "trained", "reference"),
    [
        ([], 40, 40),
        (["--lora_rank", "8", "--checkpointing", "attention", "--context_parallel", "2"], 40, 40),
        (["--guidance_gradient", "conditional", "--kl_steps", "5"], 20, 10),
    ],
)
def test_the_rate_that_is_logged_is_of_the_flops_that_are_planned(options, trained, reference):
    """`trained`, `reference`: passes of one video with 20 steps; with a fixed anchor no iteration goes without."""
    config, _ = parse(["--preset", "paper", "--dry-run", "--kl_mode", "fixed", *options])
    line = {"rollout_passes": 8 * 40, "update_passes": 8 * (trained + reference)}
    line |= {"rollout_seconds": 1.5, "update_seconds": 2.5}
    iteration, _ = plan.cost(config, *FORWARD_PASS)
    assert plan.measured_tflops(config, line, FORWARD_PASS) == pytest.approx(sum(iteration.values()) / 4e12)


def equivalents(*options):
    config, _ = parse(["--preset", "paper", "--dry-run", *options])
    return plan.forward_equivalents(config, *FORWARD_PASS)


def test_what_each_option_saves():
    ours = equivalents()
    assert ours["rollout"] == 2 and ours["reference"] == pytest.approx(1.8)  # 9 of 10 iterations, both branches
    assert equivalents("--kl_mode", "fixed")["reference"] == 2 and equivalents("--kl_mode", "none")["reference"] == 0
    assert equivalents("--kl_steps", "5")["reference"] == pytest.approx(1.8 / 4)
    half = equivalents("--guidance_gradient", "conditional")["update"]
    assert half == pytest.approx(ours["update"] / 2)
    later = equivalents("--guidance_gradient", "conditional", "--optimizer_steps", "2")["update"]
    assert later == pytest.approx(half + 0.5)  # the second optimizer step's unconditional branch is made anew
    assert equivalents("--sde_steps", "10")["update"] == pytest.approx(ours["update"] / 2)
    unguided = equivalents("--guidance_scale", "1")
    assert all(unguided[name] == pytest.approx(ours[name] / 2) for name in ours)
    few = equivalents("--guidance_gradient", "conditional", "--checkpointing", "attention", "--kl_steps", "5")
    assert 12 < sum(ours.values()) < 12.6 and sum(few.values()) < 6.5


def test_a_dry_run_states_flops_hours_and_disk(capsys):
    train.main(["--preset", "paper", "--dry-run", "--gpus", "8", "--gpu_tflops", "200", "--iterations", "10"])
    shown = capsys.readouterr().out
    config, _ = parse(["--preset", "paper", "--dry-run", "--iterations", "10"])
    iteration, run = plan.cost(config, *FORWARD_PASS)
    assert run == pytest.approx(10 * sum(iteration.values()))
    hours = run / 200e12 / 3600
    assert f"{hours:.1f} hours for all 10" in shown and "132 GB a checkpoint, 3 at most" in shown


def test_a_checkpoint_has_the_bytes_of_what_is_saved(monkeypatch):
    """Of a small transformer: its trained weights, AdamW's moments and the anchor, counted in the optimizer itself."""
    small = tiny_transformer()
    monkeypatch.setattr(hunyuan, "meta_transformer", lambda config=None: tiny_transformer())
    for optimizer in ("adamw", "muon"):
        config, _ = parse(["--preset", "paper", "--dry-run", "--optimizer", optimizer])
        trained = [p for p in hunyuan.prepare(small).parameters() if p.requires_grad]
        for parameter in trained:
            parameter.grad = torch.ones_like(parameter)
        saved = 2 * sum(p.numel() for p in trained)
        for made in train.make_optimizers(small, config):
            made.step()
            saved += sum(v.numel() for state in made.state.values() for v in state.values() if v.ndim)
        assert plan.checkpoint_bytes(config) == 4 * saved
