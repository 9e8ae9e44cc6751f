"""The benchmarks at their smallest sizes."""

import json
import math
from functools import partial

import pytest

from engine.plan import pass_flops
from paper import bench, gpu
from paper.ablate import write_results
from paper.rehearsal import HALVED, SHORT
from tiny.hunyuan import tiny_transformer
from video import hunyuan


def test_ratios_of_steps_and_files_are_finite(tmp_path):
    ratios = bench.bench_step(tmp_path, elements=1000, rounds=1) | bench.bench_checkpoint(tmp_path, rounds=1, side=30)
    assert len(ratios) == 7 and all(0 < ratio < math.inf for ratio in ratios.values())


def test_part_of_an_iteration_is_outside_the_network(tmp_path):
    shares = bench.bench_outside(tmp_path, rounds=1, samples=2)
    assert len(shares) == 2 and all(-1 < share < 1 for share in shares.values())


@pytest.fixture
def no_seconds(monkeypatch):
    """FLOPs are counted in a call of their own."""
    monkeypatch.setattr(bench, "in_turns", lambda functions, rounds: [1.0] * len(functions))


def test_flops_are_linear_in_steps_and_samples_and_more_in_frames(tmp_path, no_seconds):
    exponents = bench.bench_exponents(tmp_path, rounds=1, base=(1, 4, 5))
    for name in ("num_steps", "batch_size"):
        assert exponents[f"exponent of an iteration's FLOPs in {name}"] == pytest.approx(1, abs=0.01)
    # The latent has (frames − 1) / 4 + 1 frames, and the text stays as long: below 1.
    assert 0.5 < exponents["exponent of an iteration's FLOPs in frames"] < 1.2


def test_our_order_of_passes_costs_what_the_released_one_does_and_the_options_less(tmp_path, no_seconds):
    size = ("--num_steps", "2", "--group_size", "2", "--batch_size", "2")
    measured = bench.bench_order(tmp_path, rounds=1, size=size)
    ratios = [ratio for name, ratio in measured.items() if name.startswith("FLOPs")]
    ours, attention, fewer_kl, conditional, all_three = ratios
    assert ours == pytest.approx(1, rel=0.02)
    assert all_three < conditional < 0.8 < min(attention, fewer_kl) and max(attention, fewer_kl) < ours


def test_the_picture_of_reward_per_flop(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_results(tmp_path / "results.json", {"seeds": [0]})
    assert bench.bench_reward(tmp_path) == {} and "no picture" in capsys.readouterr().out
    run = {"before": 0.5, "VQ": 0.4, "MQ": 0.4, "TA": 1.0, "distance": 0.1}
    seeds = {"0": {**run, "after": 0.55}, "1": {**run, "after": 0.56}}
    three = {**seeds, "2": {**run, "after": 0.57}}
    arms = {
        "short run": {"options": SHORT, "seeds": three},
        "2 ranks": {"options": SHORT, "seeds": three},
        "halved passes": {"options": [*SHORT, *HALVED], "seeds": seeds},
        "one seed": {"options": SHORT, "seeds": {"0": seeds["0"]}},
    }
    write_results(tmp_path / "results.json", {"seeds": [0], "rehearsal": arms})
    tflop = bench.bench_reward(tmp_path, tmp_path / "picture.png")
    assert list(tflop) == ["TFLOP of a run, halved passes", "TFLOP of a run, short run"]
    assert 1.7 < tflop["TFLOP of a run, short run"] / tflop["TFLOP of a run, halved passes"] < 2
    assert (tmp_path / "picture.png").stat().st_size > 10_000


def test_the_measurements_of_a_gpu_on_a_tiny_model(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(hunyuan, "compile_blocks", partial(hunyuan.compile_blocks, backend="eager"))
    monkeypatch.setattr(gpu, "ROUNDS", 1)
    monkeypatch.setattr(gpu, "VAE_DTYPES", ("float32", "tf32"))  # the others are slow on a CPU
    gpu.main(["--tiny", "--out", str(tmp_path / "rows.json")])
    rows = json.loads((tmp_path / "rows.json").read_text())
    kinds = [title.split(", ", 1)[1] for title in rows if title.startswith("64")]
    decoders = ["VAE in float32", "VAE in tf32"]
    others = ["attention's output kept", "full training of 1 blocks", *decoders, "compiled"]
    assert kinds == ["flash", "math", *others]
    matrices, row, *_, vae, _ = rows.values()
    per_pass = sum(pass_flops(hunyuan.token_count(5, 64, 64), tiny_transformer().config))
    assert matrices["TFLOP/s"] > 0 and vae["decode seconds"] > 0
    assert row["share forward"] * matrices["TFLOP/s"] * row["forward seconds"] == pytest.approx(per_pass / 1e12)
    assert row["peak GiB"] is None and row["computed GiB"] > 0
    assert "| 64 × 64 × 5, compiled |" in capsys.readouterr().out


def test_the_released_architecture_is_not_measured_on_a_cpu(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit, match="use --tiny"):
        gpu.main([])
