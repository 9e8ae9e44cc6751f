"""The grid of short runs of the miniature: its command lines and its table."""

import json
from pathlib import Path

import pytest

import train
from engine.config import departures, parse
from paper import claims, rehearsal


@pytest.mark.parametrize("arm", rehearsal.arms())
def test_every_arm_is_a_valid_run(arm, tmp_path, monkeypatch):
    options = rehearsal.arms()[arm]
    lines = rehearsal.commands(arm, options, tmp_path / "runs" / "an arm", seed=3)
    ranks = rehearsal.TWO_RANKS if arm.startswith("2 ranks") else 1
    assert ("torch.distributed.run" in lines[0]) == (ranks == 2)
    arguments = lines[0][lines[0].index("--preset") :]
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    config, _ = parse([*arguments, "--dry-run"])
    assert config.seed == 3 and config.batch_size * ranks == (128 if "twice the rollouts" in arm else 64)
    assert config.iterations == (16 if "twice the iterations" in arm else 4 if arm == "2 ranks, then 1" else 8)
    differing = departures(config, ranks)
    assert "iterations" in differing  # never taken for the preset's own run
    assert "lora_rank" not in differing and ("LoRA" not in arm or "learning_rate" not in differing)


def test_a_run_on_two_ranks_is_ended_by_one_with_all_samples(tmp_path):
    run = tmp_path / "run"
    begin, finish = rehearsal.commands("2 ranks, then 1", [], run, seed=0)
    assert "torch.distributed.run" in begin and "torch.distributed.run" not in finish and "--resume" in finish
    (run / "checkpoints" / "iteration-000004").mkdir(parents=True)
    assert rehearsal.commands("2 ranks, then 1", [], run, seed=0) == [finish]
    (run / "config.json").write_text(json.dumps({"batch_size": 32, "seed": 5}))
    rehearsal.join_ranks(run)
    assert json.loads((run / "config.json").read_text()) == {"batch_size": 64, "seed": 5}


RUN = {"VQ": 0.4, "MQ": 0.4, "TA": 1.0, "distance": 0.1}


def some_arm(starts, gains, options=()):
    """An arm as results.json has it, of so many seeds."""
    seeds = {}
    for seed, (start, gain) in enumerate(zip(starts, gains, strict=True)):
        seeds[str(seed)] = {**RUN, "before": start, "after": start + gain}
    return {"options": [*rehearsal.SHORT, *options], "seeds": seeds}


def test_the_table_compares_gains_seed_by_seed():
    """Two seeds: gains .10 and .14 against .05 and .07, so .05 and .07 more: .06 ± 12.706 · .01."""
    starts = [0.5, 0.4, 0.5, 0.5, 0.5]
    arms = {
        "short run": some_arm(starts, [0.05, 0.07, 0.06, 0.06, 0.06]),
        "an arm": some_arm(starts[:2], [0.10, 0.14]),
        "one seed": some_arm(starts[:1], [0.02]),
        "three seeds": some_arm(starts[:3], [0.05, 0.07, 0.06]),
        "not run": some_arm([], []),
    }
    shown, full = claims.miniature_table(arms), claims.full_miniature_table(arms)
    assert "| an arm (2 seeds) | +0.120 | +0.060 ± 0.127 | 0.456 | 0.263 |" in shown
    assert "| one seed (1 seeds) | +0.020 | – | 0.456 | 0.044 |" in shown
    assert "| three seeds (3 seeds) | +0.060 | +0.000 ± 0.000 |" in shown and "| short run | +0.060 | – |" in shown
    assert "| an arm (2 seeds) | 0.450 → 0.570 | 0.400 | 0.400 | 1.000 | 0.100 | 0.263 |" in full
    assert "not run" not in shown + full


def test_arms_are_ordered_by_their_gain_per_tflop_and_another_guidance_comes_last():
    starts = [0.5, 0.4]
    arms = {
        "guidance 1": some_arm([0.3, 0.2], [0.09, 0.09], ["--guidance_scale", "1"]),
        "worse": some_arm(starts, [0.01, 0.01]),
        "short run": some_arm(starts, [0.04, 0.04]),
        "half": some_arm(starts, [0.03, 0.03], [*rehearsal.HALVED, "--train_samples", "8"]),
    }
    rows = claims.ranked_arms(arms)
    assert [row.arm for row in rows] == ["half", "short run", "worse", "guidance 1"]
    assert rows[0].efficiency == pytest.approx(0.03 / rows[0].tflop) and rows[-1].elsewhere
    lines = claims.miniature_table(arms).splitlines()[2:]
    assert [line.split(" | ")[0] for line in lines] == [f"| {row.title}" for row in rows]


@pytest.mark.parametrize("arm", rehearsal.arms())
def test_results_json_has_the_options_of_every_arm(arm):
    results = json.loads((Path(train.__file__).parent / "results.json").read_text(encoding="utf-8"))
    assert results["rehearsal"][arm]["options"] == [*rehearsal.SHORT, *rehearsal.arms()[arm]]


def test_a_claim_on_the_miniature_compares_the_arms_that_it_names():
    assert {arm for pair in claims.ON_MINIATURE.values() for arm in pair} <= rehearsal.arms().keys()
    run = {"VQ": 0.4, "MQ": 0.4, "TA": 0.6, "distance": 0.1}
    better, nearer = run | {"VQ": 0.5}, run | {"distance": 0.05}
    arms = {"short run": {"seeds": {"0": better, "1": better}}, "dance_grpo": {"seeds": {"0": run, "1": run}}}
    arms["exact"] = {"seeds": {"0": nearer, "1": nearer}}
    (sampler,) = [claim for claim in claims.CLAIMS if claims.ON_MINIATURE.get(claim.text, ("", ""))[1] == "dance_grpo"]
    assert claims.on_miniature({"text": sampler.text}, arms) == "+0.100 ± 0.000: holds"
    distance = {"text": "its trained samples lie nearer to the manifold than SAGE's"}
    assert claims.on_miniature(distance, arms) == "-0.050 ± 0.000: holds"
    assert claims.on_miniature({"text": "another claim"}, arms) == "–"
