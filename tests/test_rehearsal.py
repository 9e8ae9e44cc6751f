"""The grid of short runs of the miniature: its command lines and its table."""

import json

import pytest

from config import departures, parse
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
    assert config.seed == 3 and config.batch_size * ranks == 64
    assert config.iterations == (16 if "twice" in arm else 4 if arm == "2 ranks, then 1" else 8)
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


def test_the_table_compares_gains_seed_by_seed():
    """Two seeds: gains .10 and .14 against .05 and .07, so .05 and .07 more: .06 ± 12.706 · .01."""
    run = {"VQ": 0.4, "MQ": 0.4, "TA": 1.0, "distance": 0.1}
    short = {"0": {**run, "before": 0.5, "after": 0.55}, "1": {**run, "before": 0.4, "after": 0.47}}
    other = {"1": {**run, "before": 0.3, "after": 0.44}, "0": {**run, "before": 0.6, "after": 0.70}}
    arms = {"short run": {"seeds": short}, "an arm": {"seeds": other}, "not run": {"seeds": {}}}
    shown = claims.miniature_table(arms)
    assert "| an arm | 0.450 → 0.570 | +0.120 | +0.060 ± 0.127 | 0.400 | 0.400 | 1.000 | 0.100 | 2 |" in shown
    assert "not run" not in shown


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
