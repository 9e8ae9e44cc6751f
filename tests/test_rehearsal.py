"""The grid of short runs of the miniature: its command lines and its table."""

import json

import pytest

from config import departures, parse
from paper import rehearsal


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
    assert config.iterations == (4 if arm == "2 ranks, then 1" else 8)
    assert "iterations" in departures(config, ranks)  # never taken for the preset's own run


def test_a_run_on_two_ranks_is_ended_by_one_with_all_samples(tmp_path):
    run = tmp_path / "run"
    begin, finish = rehearsal.commands("2 ranks, then 1", [], run, seed=0)
    assert "torch.distributed.run" in begin and "torch.distributed.run" not in finish and "--resume" in finish
    (run / "checkpoints" / "iteration-000004").mkdir(parents=True)
    assert rehearsal.commands("2 ranks, then 1", [], run, seed=0) == [finish]
    (run / "config.json").write_text(json.dumps({"batch_size": 32, "seed": 5}))
    rehearsal.join_ranks(run)
    assert json.loads((run / "config.json").read_text()) == {"batch_size": 64, "seed": 5}


def test_the_table_has_mean_and_deviation():
    run = {"before": 0.5, "after": 0.6, "VQ": 0.4, "MQ": 0.4, "TA": 1.0, "distance": 0.1}
    entry = {"options": [], "seeds": {"0": run, "1": {**run, "after": 0.7}}}
    shown = rehearsal.markdown({"an arm": entry, "not run": {"options": [], "seeds": {}}})
    assert "| an arm | 0.500 ± 0.000 | 0.650 ± 0.071 | 0.150 ± 0.071 |" in shown and "not run" not in shown
