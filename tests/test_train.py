"""The command line, the run folder, resuming bit for bit, stopping."""

import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file

import train
from engine import checkpoint, evaluation, folder, pictures, show
from engine.checkpoint import listed
from engine.config import Config
from engine.draws import draw_prompts
from engine.folder import read_log
from engine.watch import WATCH
from grpo import OneRank

ROOT = Path(train.__file__).parent
SMALL = ["--batch_size", "16", "--micro_batch", "16", "--group_size", "4", "--num_steps", "4", "--eval_steps", "2"]
SMALL += ["--eval_noises", "1", "--optimizer_steps", "3", "--anchor_every", "6"]
SMALL += ["--checkpoint_every", "2", "--eval_every", "3"]


# 24 backward passes an iteration: λ_KL rises for four of the five iterations, and then moves by the KL.
CONTROLLER = ["--kl_schedule", "controller", "--kl_target", "1e-3", "--kl_mode", "fixed"]
CONTROLLER += ["--batch_size", "8", "--micro_batch", "1"]


def lines_of(run):
    return [{k: v for k, v in line.items() if not k.endswith("_seconds")} for line in read_log(run)]


def weights_of(run):
    """Every tensor of the newest checkpoint: weights, optimizer moments and anchor."""
    tensors = {}
    for path in checkpoint.find(run).glob("*.safetensors"):
        tensors |= load_file(path)
    return tensors


# anchor_every 9: the anchor is the policy when the run stops, so going on must know when it was refreshed
@pytest.mark.parametrize(
    "extra", [[], ["--kl_mode", "fixed"], ["--anchor_every", "9"], ["--optimizer", "muon"], CONTROLLER]
)
def test_resume_is_bit_for_bit(tmp_path, extra, monkeypatch):
    monkeypatch.setattr(pictures, "report", lambda *arguments: None)
    common = ["--runs", str(tmp_path), *SMALL, *extra]
    train.main([*common, "--name", "whole", "--iterations", "5"])
    train.main([*common, "--name", "parts", "--iterations", "3"])
    train.main(["--resume", str(tmp_path / "parts"), "--iterations", "5"])
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    a, b = weights_of(whole), weights_of(parts)
    assert a.keys() == b.keys()
    assert any(name.startswith("anchor.") for name in a) and any("exp_avg" in name for name in a)
    assert any("momentum_buffer" in name for name in a) == ("muon" in extra)
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert lines_of(parts) == lines_of(whole)


def test_run_folder_holds_what_is_promised(tmp_path, capsys, drawn_curves):
    train.main(["--runs", str(tmp_path), *SMALL, "--iterations", "3"])
    run = tmp_path / "toy-1"
    for name in ("config.json", "metrics.jsonl", "curves.png", "samples_before.npy", "samples_before_after.gif"):
        assert (run / name).stat().st_size > 0
    assert [p.name for p in listed(run / "checkpoints")] == ["iteration-000002", "iteration-000003"]
    shown = capsys.readouterr().out
    assert "before    after 3  change" in shown and "reward" in shown and "TA" in shown
    train.main(["--runs", str(tmp_path), *SMALL, "--iterations", "1"])
    assert (tmp_path / "toy-2").is_dir()
    with pytest.raises(SystemExit):
        train.main(["--runs", str(tmp_path), *SMALL, "--name", "toy-1"])
    assert "exists; continue it with --resume" in capsys.readouterr().err


def test_an_evaluation_that_fails_loses_nothing_and_is_made_on_resume(tmp_path, monkeypatch):
    common = ["--runs", str(tmp_path), *SMALL, "--eval_every", "2"]
    train.main([*common, "--name", "whole", "--iterations", "3"])
    evaluate = evaluation.evaluate

    def fails_at_2(*arguments):
        if listed(tmp_path / "cut" / "checkpoints"):
            raise OSError("disk full")
        return evaluate(*arguments)

    monkeypatch.setattr(evaluation, "evaluate", fails_at_2)
    with pytest.raises(OSError, match="disk full"):
        train.main([*common, "--name", "cut", "--iterations", "3"])
    monkeypatch.setattr(evaluation, "evaluate", evaluate)
    assert checkpoint.find(tmp_path / "cut").name == "iteration-000002"
    train.main(["--resume", str(tmp_path / "cut")])
    assert lines_of(tmp_path / "cut") == lines_of(tmp_path / "whole")


def test_an_interrupted_run_saves_and_says_how_to_go_on(tmp_path):
    command = [sys.executable, "train.py", "--runs", str(tmp_path), "--name", "cut", *SMALL, "--iterations", "10000"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    log = tmp_path / "cut" / "metrics.jsonl"
    deadline = time.time() + 300
    while not (log.exists() and len(log.read_text().splitlines()) > 2):
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    shown, _ = process.communicate(timeout=300)
    done = lines_of(tmp_path / "cut")[-1]["iteration"]
    assert process.returncode == 0 and f"go on with: python train.py --resume {tmp_path / 'cut'}" in shown
    assert checkpoint.find(tmp_path / "cut").name == f"iteration-{done:06d}"
    train.main(["--resume", str(tmp_path / "cut"), "--iterations", str(done + 1)])
    assert lines_of(tmp_path / "cut")[-1]["iteration"] == done + 1


def test_where_a_run_stops_its_resumption_makes_the_evaluation(tmp_path, monkeypatch):
    """A signal in the second iteration, after which an evaluation is due."""
    append = train.Log.append

    def append_and_ask(log, line):
        append(log, line)
        WATCH.asked = signal.SIGTERM if line["iteration"] == 1 else None

    monkeypatch.setattr(train.Log, "append", append_and_ask)
    run = ["--runs", str(tmp_path), *SMALL, "--name", "run", "--iterations", "4", "--eval_every", "2"]
    train.main(run)
    assert [line["iteration"] for line in lines_of(tmp_path / "run")] == [0, 1, 2]
    assert "eval_reward" not in lines_of(tmp_path / "run")[-1]
    train.main(["--resume", str(tmp_path / "run")])
    assert ["eval_reward" in line for line in lines_of(tmp_path / "run")] == [True, False, True, False, True]


def test_a_board_that_fails_does_not_end_a_run(tmp_path, monkeypatch, capsys):
    board = SimpleNamespace(add_scalar=Mock(side_effect=OSError("disk full")))
    monkeypatch.setattr(show, "tensorboard", lambda run: board)
    train.main(["--runs", str(tmp_path), *SMALL, "--name", "run", "--iterations", "1"])
    assert "warning: writing TensorBoard's log failed, the run goes on" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace())  # it lacks SummaryWriter
    assert folder.tensorboard(tmp_path) is None


def test_a_run_that_was_killed_before_its_pictures_makes_them_on_resume(tmp_path):
    train.main(["--runs", str(tmp_path), *SMALL, "--name", "run", "--iterations", "1"])
    for name in ("samples_after.npy", "samples_before_after.gif"):
        (tmp_path / "run" / name).unlink()
    train.main(["--resume", str(tmp_path / "run")])
    assert (tmp_path / "run" / "samples_after.npy").exists() and (
        tmp_path / "run" / "samples_before_after.gif"
    ).exists()


def test_prompts_are_drawn_without_gaps():
    """Also where an iteration crosses from one epoch into the next; and each epoch has an order of its own."""
    for prompts, count in (("abcdef", 4), ("abc", 2)):
        epochs, size = 6, len(prompts)
        drawn = [
            prompt
            for iteration in range(epochs * size // count)
            for prompt in draw_prompts(prompts, count, 0, iteration)
        ]
        orders = [drawn[epoch * size : (epoch + 1) * size] for epoch in range(epochs)]
        assert all(sorted(order) == list(prompts) for order in orders)
        assert len({tuple(order) for order in orders}) > 2


def test_no_two_draws_of_a_run_share_their_noise(tmp_path, monkeypatch):
    """Every sample of every iteration, and each purpose, has a generator of its own; the same on each start of the
    run.
    """
    seeds = {"noise": [], "order": []}
    collect, update = train.collect, train.update

    def seen_by_collect(policy, reward, texts, sde, noise, *rest):
        seeds["noise"].append([generator.initial_seed() for generator in noise])
        return collect(policy, reward, texts, sde, noise, *rest)

    def seen_by_update(policy, batch, config, optimizers, anchor, orders, *rest):
        seeds["order"].append([generator.initial_seed() for generator in orders])
        return update(policy, batch, config, optimizers, anchor, orders, *rest)

    monkeypatch.setattr(train, "collect", seen_by_collect)
    monkeypatch.setattr(train, "update", seen_by_update)
    for name in ("a", "b"):
        train.main(["--runs", str(tmp_path), *SMALL, "--name", name, "--iterations", "3"])
    assert seeds["noise"][:3] == seeds["noise"][3:] and seeds["order"][:3] == seeds["order"][3:]
    drawn = [seed for purpose in seeds.values() for iteration in purpose[:3] for seed in iteration]
    assert len(drawn) == len(set(drawn)) == 2 * 3 * 16


@pytest.mark.parametrize("rank", [0, 1])
def test_a_sample_has_the_same_draws_on_any_number_of_ranks(rank):
    class Ranks(OneRank):
        dp_world = 2

    ranks, whole = Ranks(), OneRank()
    ranks.dp_rank = rank
    one, half = Config(batch_size=8, group_size=4), Config(batch_size=4, group_size=4)
    own = slice(4 * rank, 4 * rank + 4)
    for purpose in ("noise", "order"):
        of_all = [g.initial_seed() for g in train.sample_generators(one, purpose, 5, whole)]
        assert [g.initial_seed() for g in train.sample_generators(half, purpose, 5, ranks)] == of_all[own]
    prompts, iteration = list("abcdefg"), 2
    of_all = train.own_prompts(prompts, one, iteration, whole)
    assert of_all[:4] == of_all[:1] * 4 and of_all[4:] == of_all[4:5] * 4 and of_all[0] != of_all[4]
    assert train.own_prompts(prompts, half, iteration, ranks) == of_all[own]


@pytest.mark.parametrize("mode, every", [("fixed", None), ("moving", 7), ("dual", 7)])
def test_the_anchor_is_that_of_the_kl_mode(mode, every):
    module = torch.nn.Linear(2, 2)
    anchor = train.make_anchor(module, Config(kl_mode=mode, anchor_every=7, anchor_offload=True))
    assert anchor.every == every and anchor.offload
    assert not train.make_anchor(module, Config(kl_mode=mode)).offload
    for nothing in (Config(kl_mode="stepwise"), Config(kl_mode="none"), Config(kl_mode="dual", beta_pos=0.0)):
        assert train.make_anchor(module, nothing) is None


# ---------------------------------------------------------------------------------------------- optimizers
def matrices_with_full_rank_gradients():
    torch.manual_seed(0)
    module = torch.nn.ModuleDict({"blocks": torch.nn.ModuleList([torch.nn.Linear(32, 32) for _ in range(2)])})
    x, y = torch.randn(2, 256, 32)
    (module["blocks"][1](module["blocks"][0](x).tanh()) - y).square().mean().backward()
    return module


@pytest.mark.parametrize("weight_decay", [0.0, 0.5])
def test_muon_takes_orthogonal_steps_of_adamws_size(weight_decay):
    """Newton–Schulz makes all singular values of a step about 1; 0.2·√32 scales its RMS to 0.2, that of AdamW's
    steps.
    """
    module = matrices_with_full_rank_gradients()
    optimizers = train.make_optimizers(module, Config(optimizer="muon", learning_rate=1e-2, weight_decay=weight_decay))
    assert [type(optimizer).__name__ for optimizer in optimizers] == ["Muon", "AdamW"]
    assert [len(optimizer.param_groups[0]["params"]) for optimizer in optimizers] == [2, 2]
    before = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    for optimizer in optimizers:
        optimizer.step()
    for name, parameter in module.named_parameters():
        step = before[name] * (1 - 1e-2 * weight_decay) - parameter.detach()
        if parameter.ndim == 2:
            values = torch.linalg.svdvals(step / (1e-2 * 0.2 * 32**0.5))
            of_gradient = torch.linalg.svdvals(parameter.grad)
            assert 0.3 < values.min() and values.max() < 1.3 and of_gradient.max() > 20 * of_gradient.min()
        else:  # AdamW's first step is the learning rate times the gradient's sign
            torch.testing.assert_close(step, 1e-2 * parameter.grad.sign(), rtol=1e-3, atol=1e-6)


def test_adamw_takes_all_without_muon_and_a_lora_leaves_it_nothing():
    module = matrices_with_full_rank_gradients()
    (only,) = train.make_optimizers(module, Config(weight_decay=0.01, adam_beta1=0.8, adam_beta2=0.7))
    assert isinstance(only, torch.optim.AdamW) and only.defaults["weight_decay"] == 0.01
    assert only.defaults["betas"] == (0.8, 0.7)
    assert len(only.param_groups[0]["params"]) == 4
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name.endswith("weight"))  # as of a LoRA: matrices alone
    (only,) = train.make_optimizers(module, Config(optimizer="muon"))
    assert isinstance(only, torch.optim.Muon)
