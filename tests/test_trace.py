"""The traced plan: fake tensors against real ones, and what a group of ranks shares."""

import re
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import train
from engine import plan
from engine.config import parse
from engine.trace import CPU_ATTENTION, Ledger, TracedRun, meta_policy, phase_counts, print_trace, trace
from tiny.hunyuan import tiny_transformer
from video import hunyuan, parallel
from video.files import meta_transformer

SIZES = ["--frames", "5", "--height", "96", "--width", "96", "--eval_height", "96", "--eval_width", "96"]
WIDE = tiny_transformer().config | {"num_attention_heads": 8, "num_layers": 2}


def settings(*options):
    config, _ = parse(["--preset", "paper", "--dry-run", *SIZES, *options])
    return config


@pytest.fixture(scope="module")
def traced():
    """Of one process, and of a group of eight."""
    config = settings("--gpus", "8")
    return {n: trace(config, n, WIDE).phases for n in (1, 8)}


def test_a_trace_has_the_flops_and_the_memory_of_real_tensors(traced):
    """The update of one micro-batch. Real tensors are watched by the same ledger, and counted by PyTorch."""
    config = settings("--gpus", "1")
    policy = meta_policy(config, None, None, WIDE)
    counter = FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION)
    with Ledger() as ledger:
        run = TracedRun(config, policy, config.sde(), ledger)
        for parameter in policy.module.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
        run.fill_gradients()
        with ledger.phase("update"):
            run.update()
        with counter:  # apart, since it keeps tensors alive
            run.update()
    real, fake = ledger.phases["update"], traced[1]["update"]
    assert fake["flops"] == real["flops"] == counter.get_total_flops() > 1e9
    for kind in ("weights", "gradients", "anchor", "vae"):
        assert fake["peak"][kind] == real["peak"][kind] > 0
    assert fake["peak"]["rest"] == pytest.approx(real["peak"]["rest"], rel=0.005)


def test_the_ledger_sees_what_the_process_allocates():
    """Against PyTorch's own account of its allocations, on a plain computation with a backward pass."""
    weight = torch.randn(512, 512, requires_grad=True)

    def compute():
        (torch.tanh(torch.randn(2048, 512) @ weight) ** 2).sum().backward()

    with Ledger() as ledger, ledger.phase("compute"):
        compute()
    weight.grad = None
    with torch.profiler.profile(profile_memory=True) as profile:
        compute()
    total, highest = 0, 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            total += event.nbytes()
            highest = max(highest, total)
    assert sum(ledger.phases["compute"]["peak"].values()) == pytest.approx(highest, rel=0.001)


def test_eight_ranks_share_weights_gradients_moments_and_anchor(traced):
    for kind in ("weights", "gradients", "optimizer", "anchor"):
        assert traced[8]["update"]["peak"][kind] == pytest.approx(traced[1]["update"]["peak"][kind] / 8, rel=0.02)
    assert traced[8]["update"]["flops"] == traced[1]["update"]["flops"]
    assert traced[1]["update"]["messages"] == 0 < traced[8]["rollout"]["messages"] < traced[8]["update"]["messages"]
    assert traced[8]["reference"]["peak"]["gathered"] > 0 == traced[8]["optimizer"]["peak"]["gathered"]


def test_an_iteration_has_the_messages_that_are_computed(traced):
    config = settings("--gpus", "8")
    moved = sum(count * traced[8][name]["messages"] for name, count in phase_counts(config).items())
    assert moved == pytest.approx(sum(plan.messages(config, 8, WIDE).values()), rel=0.01)
    shared = settings(
        "--gpus", "8", "--replicate", "2", "--context_parallel", "2", "--micro_batch", "2", "--frames", "81"
    )
    phases = trace(shared, 8, WIDE).phases
    moved = sum(count * phases[name]["messages"] for name, count in phase_counts(shared).items())
    computed = plan.messages(shared, 8, WIDE)
    between_machines = phases["last update"]["messages"] - phases["update"]["messages"]
    assert between_machines == pytest.approx(computed["replicas"], rel=0.01)
    others = [part for name, part in computed.items() if name != "replicas"]
    assert min(others) > 0.01 * moved  # each of them counts
    assert moved == pytest.approx(sum(computed.values()), rel=0.05)  # the text's own are left out


def test_no_gradient_of_one_branch_waits_for_the_other(traced, monkeypatch):
    monkeypatch.setattr(parallel, "own_backward", lambda result: result)
    together = trace(settings("--gpus", "8"), 8, WIDE).phases["update"]
    apart = traced[8]["update"]
    whole = 2 * sum(p.numel() for p in hunyuan.make_trainable(meta_transformer(WIDE)).parameters() if p.requires_grad)
    assert sum(together["peak"].values()) - sum(apart["peak"].values()) > 0.5 * whole
    assert together["flops"] == apart["flops"] and together["messages"] < apart["messages"]


def test_an_iteration_has_the_flops_that_are_computed():
    """Computed without text and VAE, so from a little below; the trace has 208 tokens of text beside 2,100 of video."""
    size = ["--frames", "81", "--height", "160", "--width", "160"]
    config = settings("--gpus", "8", "--micro_batch", "2", *size)
    phases = trace(config, 1, WIDE).phases
    counts = phase_counts(config)
    forward = plan.pass_flops(hunyuan.token_count(81, 160, 160), WIDE)
    for name, computed in plan.iteration_flops(config, forward).items():
        assert computed < counts[name] * phases[name]["flops"] < 1.35 * computed, name


def test_a_trace_is_printed_with_what_follows_from_it(traced, monkeypatch, capsys):
    config, phases = settings("--gpus", "8"), traced[8]
    monkeypatch.setattr("engine.trace.trace", lambda *arguments: SimpleNamespace(phases=phases))
    print_trace(config, 8, None)
    shown = capsys.readouterr().out
    peaks = {name: (sum(phase["peak"].values()) + plan.VIDEOALIGN) / 2**30 for name, phase in phases.items()}
    for name, peak in peaks.items():
        assert re.search(rf"^  {name} +{peak:.1f} = ", shown, re.M), name
    highest = max(peaks, key=peaks.get)
    assert f"traced peak              {peaks[highest]:.1f} GiB, in the {highest}; computed: " in shown
    passes = re.search(r"passes +rollout (\S+) \+ reference (\S+) \+ update (\S+) = (\S+) forward passes", shown)
    shares = dict(zip(("rollout", "reference", "update"), map(float, passes.groups()), strict=False))
    computed = plan.forward_passes(config, plan.training_flops(config, WIDE))
    assert shares == pytest.approx(computed, rel=0.2)  # what embeds the text is much of so small a network's update
    assert shares["reference"] == pytest.approx(computed["reference"], abs=0.01)
    assert float(passes[4]) == pytest.approx(sum(shares.values()), abs=0.02)


@pytest.mark.parametrize("options", [[], ["--train_samples", "2", "--kl_steps", "5", "--sde_steps", "6"]])
def test_an_iteration_has_the_passes_that_are_computed(options):
    """Those of whoever trains a part of the samples and steps, too."""
    config = settings("--gpus", "8", *options)
    passes, counts = plan.passes(config), phase_counts(config)
    sampled, trained = plan.branches(config)
    in_all = config.batch_size * config.num_steps
    assert counts["rollout"] * sampled / in_all == passes["rollout"][0]
    assert counts["reference"] * sampled / in_all == pytest.approx(passes["reference"][0])
    assert counts["update"] * trained / in_all == pytest.approx(passes["update"][1])


def test_a_trace_is_a_part_of_a_plan(capsys):
    with pytest.raises(SystemExit):
        train.main(["--trace"])
    assert "add --dry-run" in capsys.readouterr().err
