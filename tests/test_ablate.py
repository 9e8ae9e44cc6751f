"""The ablation grid, its claims and verdicts, and the tables of the pages against results.json."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import train
from engine.config import parse
from paper import ablate, claims, plots
from sde import SDE, sigma_schedule
from toy import world

ROOT = Path(train.__file__).parent


def some_best():
    """The first candidate of each tuned row, in place of a tuning."""
    return {name: choice[0] for name, choice in ablate.candidates().items()}


def test_every_row_is_a_valid_run_and_every_claim_names_rows_of_the_grid():
    rows = ablate.grid(some_best())
    for name, settings in rows.items():
        ablate.config(settings).check(ranks=1)
        assert parse(ablate.as_options(ablate.config(settings)))[0] == ablate.config(settings), name
    for claim in claims.CLAIMS:
        for a, b in claim.pairs:
            assert a in rows and (b is None or b in rows), claim.text
    assert len({claim.text for claim in claims.CLAIMS}) == len(claims.CLAIMS)
    assert ablate.needed(rows, [claim for claim in claims.CLAIMS if claim.quick]).keys() < rows.keys()
    assert set(claims.PAPER_TABLE_2) - rows.keys() == {"before training"}
    assert not set(ablate.SEEDS) & set(ablate.TUNING_SEEDS)


def test_tuned_rows_differ_in_one_setting_and_have_candidates_enough():
    for name, choice in ablate.candidates().items():
        differing = {key for settings in choice for key in settings if settings[key] != choice[0].get(key)}
        assert differing == {"kl_lambda" if name.startswith("kl,") else "learning_rate"}
        assert len(choice) >= (4 if name.startswith("kl,") else 3)


@pytest.mark.parametrize("sampler", ["flow", "dance", "cps", "exact"])
def test_matched_eta_injects_the_same_variance(sampler):
    etas = {"sage_grpo": 0.5, ablate.SAMPLERS[sampler]: ablate.matched_eta(sampler)}
    target, matched = (SDE(name, eta, sigma_schedule(10), False).variance.sum().item() for name, eta in etas.items())
    assert matched == pytest.approx(target, rel=1e-3)


def test_students_quantiles():
    """P(|t| < q) = 0.95, by integrating the density on a fine grid."""
    for dof, quantile in claims.STUDENT.items():
        t = np.linspace(-quantile, quantile, 200_001)
        scale = math.gamma((dof + 1) / 2) / math.gamma(dof / 2) / math.sqrt(dof * math.pi)
        assert np.trapezoid(scale * (1 + t**2 / dof) ** (-(dof + 1) / 2), t) == pytest.approx(0.95, abs=1e-4)


def test_interval_covers_the_truth_as_often_as_it_says():
    draws = np.random.default_rng(0).normal(3.0, 2.0, (5, 4000))
    mean, half = claims.interval(draws)
    assert np.mean(np.abs(mean - 3.0) < half) == pytest.approx(0.95, abs=0.012)
    with pytest.raises(ValueError, match="2 to 10 seeds"):
        claims.interval([1.0])


def test_a_band_is_the_mean_over_seeds_and_its_interval():
    logs = [[{"iteration": 0, "x": x}, {"iteration": 1}, {"iteration": 2, "x": 2 * x}] for x in (1.0, 2.0, 3.0)]
    figure, axis = plots.plt.subplots()
    plots.band(axis, logs, "x", plots.LOOKS[0], "text")
    half = claims.STUDENT[2] * 1.0 / 3**0.5  # a std of 1 over three seeds, and of 2 later
    edges = axis.collections[0].get_paths()[0].vertices[:, 1]
    plots.plt.close(figure)
    assert axis.lines[0].get_xydata().tolist() == [[0, 2], [2, 4]]
    assert (edges.min(), edges.max()) == pytest.approx((4 - 2 * half, 4 + 2 * half))


def test_verdicts():
    table = {"a": {"x": [1.0, 1.1, 1.2]}, "b": {"x": [0.5, 0.6, 0.7]}, "c": {"x": [0.9, 1.2, 1.15]}}
    cases = [
        ("a", "b", 1, "holds"),
        ("b", "a", 1, "does not hold"),
        ("b", "a", -1, "holds"),
        ("a", "c", 1, "cannot be seen"),
    ]
    for a, b, sign, verdict in cases:
        (entry,) = claims.judge(table, [claims.Claim("", "", ((a, b),), "x", sign)])
        assert entry["verdict"] == verdict
        own_sign = np.mean(table[a]["x"]) - np.mean(table[b]["x"])
        assert entry["mean"] == pytest.approx(own_sign, abs=1e-4)
    with pytest.raises(KeyError):
        claims.judge(table, [claims.Claim("", "", (("a", "missing"),), "x")])


def test_every_claim_is_in_one_table_and_the_first_page_has_the_decided_ones():
    results = json.loads((ROOT / "results.json").read_text(encoding="utf-8"))
    tables = claims.tables(results)
    names = ("claims of the paper", "our own options")
    decided, undecided = [], []
    for name in names:
        decided += tables[name].splitlines()[2:]
        undecided += tables[f"{name}, undecided"].splitlines()[2:]
    assert len(decided) + len(undecided) == len(results["claims"]) == len(claims.CLAIMS)
    assert all("cannot be seen" not in line for line in decided)
    assert all("| cannot be seen |" in line for line in undecided)
    assert tables["counts"].startswith(f"The toy has {len(claims.CLAIMS)} such intervals, the miniature 8.")


def test_what_trains_the_extremes_is_compared_with_all_of_its_own_groups():
    """Two seeds of groups of 4: .10 and .12 more than all of them, so .11 ± 12.706 · .01."""
    run = {"VQ": 0.6, "distance": 0.1}
    runs = {
        "all 16": {"0": run | {"after": 0.5}, "1": run | {"after": 0.5}},
        "G 4": {"0": run | {"after": 0.6}, "1": run | {"after": 0.7}},
        "G 4, 2 trained": {"1": run | {"after": 0.82}, "0": run | {"after": 0.7}},
        "8 of 16, λ .15": {"1": run | {"after": 0.52}, "0": run | {"after": 0.5}, "2": run | {"after": 0.9}},
    }
    shown = claims.extremes_table(runs)
    assert "| all 16 | 0.500 | – | 0.600 | 0.100 |" in shown and "| G 4 | 0.650 | – |" in shown
    assert "| G 4, 2 trained | 0.760 | +0.110 ± 0.127 |" in shown
    assert "| 8 of 16, λ .15 | 0.640 | +0.010 ± 0.127 |" in shown  # over the two seeds that both have


def test_agreement_counts_the_signs_of_decided_claims():
    full = [
        dict(text=t, mean=m, verdict=v)
        for t, m, v in (("a", 1, "holds"), ("b", -1, "does not hold"), ("c", 1, "cannot be seen"))
    ]
    quick = [
        dict(text="a", mean=-0.1, verdict="cannot be seen"),
        dict(text="b", mean=-2, verdict="holds"),
        dict(text="c", mean=-1, verdict=""),
    ]
    assert claims.agreement(full, quick) == (["b"], ["a"]) and claims.agreement(quick, full) == (["b"], ["c"])


def test_a_run_of_the_grid_stops_resumes_and_is_summarised(tmp_path):
    small = dict(batch_size=16, micro_batch=16, iterations=1, checkpoint_every=1, runs=str(tmp_path), name="row")
    settings, run = ablate.config(small), tmp_path / "row"
    assert not ablate.is_done(run, settings)
    ablate.run_one((run, settings))
    assert ablate.is_done(run, settings)
    with pytest.raises(ValueError, match="its iterations differ; delete the folder"):
        ablate.is_done(run, ablate.config(small | dict(iterations=2)))
    log = (run / "metrics.jsonl").read_text().splitlines()
    line = json.loads(log[-1])
    unfinished = {name: value for name, value in line.items() if not name.startswith("eval_")}
    killed_in_its_evaluation = [*log[:-1], json.dumps(unfinished)]
    (run / "metrics.jsonl").write_text("\n".join(killed_in_its_evaluation) + "\n")
    assert not ablate.is_done(run, settings)
    ablate.run_one((run, settings))
    assert ablate.is_done(run, settings)
    numbers = ablate.summarise(run, settings.eval_noises)
    assert numbers["Overall"] == pytest.approx(line["eval_VQ"] + line["eval_MQ"] + line["eval_TA"], abs=1e-5)
    assert 0 < numbers["drift"] < 0.5 and 0.2 < numbers["diversity"] < 1.5


def test_diversity_is_the_spread_that_clean_clips_have():
    """The middle of a clean clip's path is uniform within ±1.5 pixels, so its std is 3/√12."""
    prompts = [prompt for prompt in world.PROMPTS for _ in range(2)]
    videos = world.to_uint8(world.clean_clips(prompts, torch.Generator().manual_seed(0)))
    assert ablate.diversity(videos, 2) == pytest.approx(3 / math.sqrt(12), rel=0.12)


def test_rank_correlation_of_equal_and_reversed_orders():
    names = [name for name in claims.PAPER_TABLE_2 if name.endswith(",A")]
    for sign in (1, -1):
        rows = {name: {"Overall": [sign * claims.PAPER_TABLE_2[name][0] * 3]} for name in names}
        assert claims.rank_correlation({"rows": rows}, "A") == pytest.approx(sign)


def test_results_are_written_one_row_a_line_and_read_back(tmp_path):
    results = {"seeds": [0, 1], "rows": {"a": {"x": [1.5]}, "b": {"x": [2.5]}}, "claims": [{"text": "ö"}], "empty": []}
    ablate.write_results(tmp_path / "results.json", results)
    text = (tmp_path / "results.json").read_text()
    assert json.loads(text) == results and len(text.splitlines()) == 11


def test_tables_are_put_in_their_places(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "tables", lambda results: {"first": results["first"], "second": results["second"]})
    results, pages = {"first": "1", "second": "2"}, (tmp_path / "a.md", tmp_path / "b.md")
    place = "before\n<!-- table: {} -->\nold\n<!-- end -->\nafter\n"
    for page, name in zip(pages, ("second", "first"), strict=True):
        page.write_text(place.format(name), encoding="utf-8")
    claims.write_tables(results, pages)
    assert pages[0].read_text() == place.format("second").replace("old", "2")
    assert pages[1].read_text() == place.format("first").replace("old", "1")
    with pytest.raises(ValueError, match="one place for each table: got 0 for 'first'"):
        claims.write_tables(results, pages[:1])
    pages[0].write_text(place.format("first"), encoding="utf-8")
    with pytest.raises(ValueError, match="one place for each table: got 2 for 'first'"):
        claims.write_tables(results, pages)


def test_tables_of_the_pages_are_those_of_results_json():
    results = json.loads((ROOT / "results.json").read_text(encoding="utf-8"))
    text = "".join((ROOT / page).read_text(encoding="utf-8") for page in claims.PAGES)
    assert results["claims"] == claims.judge(results["rows"], claims.CLAIMS)
    tables = claims.tables(results)
    for name, table in tables.items():
        assert f"<!-- table: {name} -->\n{table}\n<!-- end -->" in text
    assert sorted(re.findall("<!-- table: (.+) -->", text)) == sorted(tables)
    assert len(results["seeds"]) >= 5
    best = {
        name: max(tried, key=lambda entry: np.mean(entry["Overall"]))["settings"]
        for name, tried in results["tuning"].items()
    }
    rows = ablate.grid(best)
    assert {name: row["settings"] for name, row in results["rows"].items()} == json.loads(json.dumps(rows))
