"""The plan's FLOPs against those that PyTorch counts in the real class, its passes against those of a real update."""

import functools
import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderKLHunyuanVideo15, HunyuanVideo15Transformer3DModel
from torch.utils.flop_counter import FlopCounterMode

import train
from engine import plan
from engine.config import parse
from engine.trace import CPU_ATTENTION
from tiny.hunyuan import GLYPH_DIM, TEXT_DIM, tiny_transformer
from video import hunyuan
from video.files import meta_transformer
from video.prompts import Prompt

TEXT = 3  # tokens of the prompt


def deep_transformer(lora_rank=0, checkpointing="none"):
    """Of eight blocks, in which nearly all of its FLOPs are, as in the released one."""
    stock = HunyuanVideo15Transformer3DModel.from_config({**tiny_transformer().config, "num_layers": 8})
    return hunyuan.make_trainable(stock, lora_rank, checkpointing)


def counted(transformer, side, backward=False):
    """(linear, attention): FLOPs of one pass for a latent of 2 × side × side."""
    vae = SimpleNamespace(enable_slicing=lambda: None, enable_tiling=lambda: None)
    policy = hunyuan.HunyuanPolicy(transformer, vae, None, None, guidance_scale=1.0)
    prompt = Prompt(torch.randn(TEXT, TEXT_DIM), torch.zeros(0, GLYPH_DIM))
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
        linear, _ = plan.pass_flops(tokens, transformer.config)
        _, attention = plan.pass_flops(tokens + TEXT, transformer.config)
        planned.append((linear, attention))
    # The text's own refiner attends, too: at both sizes to the same tokens.
    for kind in (0, 1):
        assert large[kind] - small[kind] == planned[1][kind] - planned[0][kind]


def test_the_released_pass_has_the_flops_of_its_sizes():
    linear, attention = plan.pass_flops(18_018)
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
    planned = plan.gradient_cost(config)
    for kind in (0, 1):
        assert whole[kind] / forward[kind] == pytest.approx(planned[kind], rel=0.06)


FORWARD_PASS = plan.pass_flops(18_018)  # of the paper preset's videos


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
    flops = sum(plan.iteration_flops(config, FORWARD_PASS).values())
    assert plan.measured_tflops(config, line, FORWARD_PASS) == pytest.approx(flops / 4e12)


def equivalents(*options):
    config, _ = parse(["--preset", "paper", "--dry-run", *options])
    return plan.forward_passes(config, FORWARD_PASS)


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


def paper(*options):
    config, _ = parse(["--preset", "paper", "--dry-run", *options])
    return config


@functools.cache
def trained_in(lora_rank=0):
    """Parameters that are trained in the released architecture, counted in the transformer that trains them."""
    transformer = hunyuan.make_trainable(meta_transformer(), lora_rank)
    return sum(parameter.numel() for parameter in transformer.parameters() if parameter.requires_grad)


def test_a_checkpoint_has_the_bytes_of_what_is_saved(monkeypatch):
    """Of a small transformer: its trained weights, the optimizer's moments and the anchor, counted in the optimizer."""
    small = hunyuan.make_trainable(tiny_transformer())
    monkeypatch.setattr(plan, "prepared_transformer", lambda architecture=None: small)
    for optimizer in ("adamw", "muon"):
        config = paper("--optimizer", optimizer)
        trained = [p for p in small.parameters() if p.requires_grad]
        saved = 2 * sum(p.numel() for p in trained)
        for made in train.make_optimizers(small, config):
            for parameter in trained:
                parameter.grad = torch.ones_like(parameter)
            made.step()
            saved += sum(v.numel() for state in made.state.values() for v in state.values() if v.ndim)
        assert plan.checkpoint_bytes(config) == 4 * saved


def test_the_memory_is_a_hand_made_sum():
    total, trained = 8_326_608_160, trained_in()
    tokens = 21 * 22 * 39 + 1256
    block = 2 * tokens * 2048 * 54 / 2**30  # the inputs of all blocks in one pass
    base = plan.memory(paper("--gpus", "8"), 8)
    assert base["weights"] == pytest.approx(4 * total / 8 / 2**30)
    assert base["gradients"] == base["anchor"] == base["optimizer"] / 2 == pytest.approx(4 * trained / 8 / 2**30)
    assert base["activations"] == pytest.approx(2 * block + 100 * tokens * 2048 / 2**30)

    def change(**changes):
        """{part: GiB more than the paper preset}, where it is not the same."""
        other = plan.memory(replace(paper("--gpus", "8"), **changes), 8)
        return {name: other[name] - size for name, size in base.items() if other[name] != size}

    assert change(anchor_offload=True) == change(kl_mode="none") == change(beta_pos=0.0) == {"anchor": -base["anchor"]}
    assert change(micro_batch=2) == {"activations": pytest.approx(2 * block)}
    assert change(guidance_gradient="conditional") == {"activations": pytest.approx(-block)}
    assert change(checkpointing="attention") == {"activations": pytest.approx(2 * block)}
    muon = change(optimizer="muon")
    assert -0.5 < muon.pop("optimizer") / base["optimizer"] < -0.4 and not muon  # one moment for most weights
    lora = plan.memory(paper("--gpus", "1", "--lora_rank", "64"), 1)
    adapter = trained_in(lora_rank=64)
    assert lora["gradients"] == pytest.approx(4 * adapter / 2**30)
    assert lora["weights"] == pytest.approx((2 * total + 4 * adapter) / 2**30)


def test_rollouts_and_the_decoder_are_a_part_of_the_peak():
    latent = 4 * 32 * 21 * 22 * 39 / 2**30  # GiB of one video's latent
    for options, latents in (
        ([], 21 + 20 + 20),  # states, means, the reference's means
        (["--guidance_gradient", "conditional"], 21 + 20 + 20 + 20),  # and the unconditional branch
        (["--kl_mode", "none"], 21 + 20),
    ):
        assert plan.peak_memory(paper(*options), 8)["rollout"] == pytest.approx(8 * latents * latent)
    small = paper("--gpus", "8", "--lora_rank", "8", "--height", "64", "--width", "64")
    # Bytes of a number; and a quarter more where cuDNN's kernels are those for matrix units.
    for vae_dtype, width, more in (("float32", 4, 1), ("tf32", 4, 1.25), ("bfloat16", 2, 1.25), ("float16", 2, 1.25)):
        parts = plan.peak_memory(replace(small, vae_dtype=vae_dtype), 8)
        tile = more * 6 * 128 * width * 81 * 256**2 / 2**30
        assert parts["decode"] == pytest.approx(tile - parts["activations"] - parts["gathered"] - parts["gradients"])
        assert parts["decode"] > 4 and parts["vae"] == pytest.approx(width * 1.26e9 / 2**30)


def test_host_memory_is_that_of_a_machine():
    anchor = 4 * trained_in()
    assert plan.host_memory(paper("--gpus", "8"), 8) == (2 * 7.07e9, 0)
    for gpus, on_a_machine in ((4, anchor), (8, anchor), (32, anchor / 4)):
        config = paper("--gpus", str(gpus), "--anchor_offload")
        assert plan.host_memory(config, gpus) == pytest.approx((max(2 * 7.07e9, on_a_machine), on_a_machine))


@pytest.mark.parametrize("size", [(33, 256, 272), (5, 256, 256), (5, 352, 624)])
def test_a_decode_has_the_flops_that_pytorch_counts(size):
    """In the VAE itself with its tiles, on tensors without data."""
    with torch.device("meta"):
        vae = AutoencoderKLHunyuanVideo15().requires_grad_(False)
        latent = torch.empty(1, *hunyuan.latent_shape(*size))
    vae.enable_tiling()
    with FlopCounterMode(display=False) as counter:
        vae.decode(latent)
    assert plan.decode_flops(*size) == pytest.approx(counter.get_total_flops(), rel=0.002)


def test_hours_and_price_are_a_hand_made_sum(capsys):
    """10 iterations on 8 GPUs, evaluated before, after 4, 8 and 10: four times 16 prompts × 3 noises, 6 for a GPU."""
    options = ["--preset", "paper", "--dry-run", "--gpus", "8", "--iterations", "10", "--eval_every", "4"]
    options += ["--eval_noises", "3", "--eval_steps", "30"]
    train.main([*options, "--gpu_tflops", "200", "--gpu_price", "3", "--vae_dtype", "tf32"])
    shown = capsys.readouterr().out
    linear, attention = FORWARD_PASS
    slower = (linear + attention) / 200 / (linear / 215 + attention / 600)  # than the card that was measured
    passes = sum(equivalents().values())
    decode = slower * 674 / 198
    score = slower * 4 * 256 * 2 * (1.3e9 + 4 * 0.66e9) / 29e12  # 7 frames of 3.4 s, in pairs
    training = 10 * 8 * 20 * passes * (linear + attention) / 200e12 / 3600
    linear, attention = plan.pass_flops(34_020)
    sampling = slower * 30 * 2 * (linear / 215e12 + attention / 600e12)
    evaluation = 4 * 6 * (sampling + slower * 1380 / 198 + score) / 3600
    expected = [training, 10 * 8 * decode / 3600, 10 * 8 * score / 3600, evaluation]
    pattern = r"hours +transformer (\S+) \+ VAE (\S+) \+ reward model (\S+) \+ evaluations (\S+) = (\S+)"
    printed = re.search(pattern, shown)
    assert [float(part) for part in printed.groups()] == pytest.approx([*expected, sum(expected)], abs=0.051)
    assert f"{60 * sum(expected[:3]) / 10:.1f} minutes an iteration" in shown
    assert f"${sum(expected) * 8 * 3:,.0f} at $3 for an hour of each of 8 GPUs" in shown


def test_context_parallelism_shares_passes_but_no_decodes():
    alone, shared = (plan.gpu_hours(paper(*options), 8) for options in ([], ["--context_parallel", "2"]))
    assert shared["transformer"] == pytest.approx(alone["transformer"] / 2) and shared["VAE"] == alone["VAE"]
    slow = plan.gpu_hours(paper("--vae_dtype", "float32", "--compute_dtype", "float32"), 8)
    assert slow["VAE"] == pytest.approx(281 / 29 * alone["VAE"])
    assert slow["transformer"] == pytest.approx(12 * alone["transformer"])


@pytest.mark.parametrize(
    "gpus, replicate, within, between",
    [
        (8, 1, {"gather", "reduce"}, set()),
        (8, 2, {"gather", "reduce", "replicas"}, set()),
        (64, 8, {"gather", "reduce"}, {"replicas"}),
        (64, 1, set(), {"gather", "reduce"}),
    ],
)
def test_messages_stay_in_a_machine_or_leave_it(gpus, replicate, within, between):
    config = paper("--gpus", str(gpus), "--replicate", str(replicate))
    assert tuple(map(set, plan.messages_by_reach(config, gpus))) == (within, between)


def test_gradients_leave_a_machine_once_for_each_pass_of_a_last_micro_batch():
    config = paper("--gpus", "64", "--replicate", "8", "--optimizer_steps", "2")
    assert plan.messages(config, 64)["replicas"] == 2 * 2 * (2 * 4 * trained_in() / 8)  # two steps, two branches


def test_the_rates_give_the_seconds_that_were_measured():
    """To within a tenth; of full training, a third of the blocks was measured."""
    rows = json.loads((Path(train.__file__).parent / "results.json").read_text(encoding="utf-8"))["gpu"]
    compared = 0
    for size, tokens in (("352 × 624 × 81", 18_018), ("480 × 832 × 81", 32_760)):
        for kind, options, share in (
            ("cudnn", ["--lora_rank", "64"], 1),
            ("attention's output kept", ["--lora_rank", "64", "--checkpointing", "attention"], 1),
            ("full training of 18 blocks", [], 18 / 54),
        ):
            row, config, forward = rows[f"{size}, {kind}"], paper(*options), plan.pass_flops(tokens)
            rate = 1e12 * plan.transformer_tflops(config, forward)
            assert row["forward seconds"] == pytest.approx(share * sum(forward) / rate, rel=0.1)
            flops = plan.flops_with_backward(config, forward)
            assert row["with backward"] == pytest.approx(share * flops / rate, rel=0.1)
            compared += 1
    assert compared == 6
    assert plan.transformer_tflops(paper("--lora_rank", "64"), plan.pass_flops(18_018)) < 310


@pytest.mark.parametrize("preset, gpus, most_passes, most_hours", [("fast", 8, 4.2, 14), ("small", 1, 4.2, 11)])
def test_the_cheap_presets_cost_what_is_promised(preset, gpus, most_passes, most_hours):
    config, _ = parse(["--preset", preset, "--dry-run", "--gpus", str(gpus)])
    passes = sum(plan.forward_passes(config, plan.training_flops(config)).values())
    assert most_passes - 0.5 < passes <= most_passes
    assert most_hours / 2 < sum(plan.gpu_hours(config, gpus).values()) <= most_hours
    assert sum(plan.peak_memory(config, gpus).values()) < 60


@pytest.mark.parametrize("attention", ["auto", "fa3"])
def test_a_plan_says_that_the_kernel_is_measured(attention, capsys):
    plan.print_cost(paper("--attention", attention), 8, None)
    assert ("attention                the kernel that" in capsys.readouterr().out) == (attention == "auto")
