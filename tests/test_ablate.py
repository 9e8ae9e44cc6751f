"""The ablation grid, its claims and verdicts, the figures, and the README's tables against results.json."""

import json
import math
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch

import train
from sde import SDE, sigma_schedule
from paper import ablate, claims, figures

ROOT = Path(train.__file__).parent


def test_every_row_is_a_valid_run_and_every_claim_names_rows_of_the_grid():
    rows = ablate.grid()
    for name, settings in rows.items():
        ablate.config(settings).check(ranks=1)
        assert ablate.label(settings) == name
    for claim in claims.CLAIMS:
        for a, b in claim.pairs:
            assert a in rows and (b is None or b in rows), claim.text
    assert ablate.needed([claim for claim in claims.CLAIMS if claim.quick]).keys() < rows.keys()


@pytest.mark.parametrize("sde_type", ablate.RIVALS)
def test_matched_eta_injects_the_same_variance(sde_type):
    total = [SDE(name, eta, sigma_schedule(10), False).variance.sum() for name, eta in (("sage_grpo", 0.5), (sde_type, ablate.matched_eta(sde_type)))]
    assert total[1].item() == pytest.approx(total[0].item(), rel=1e-3)


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


def test_verdicts():
    table = {"a": {"x": [1.0, 1.1, 1.2]}, "b": {"x": [0.5, 0.6, 0.7]}, "c": {"x": [0.9, 1.2, 1.15]}}
    cases = [("a", "b", 1, "holds"), ("b", "a", 1, "does not hold"), ("b", "a", -1, "holds"), ("a", "c", 1, "cannot be seen")]
    for a, b, sign, verdict in cases:
        (entry,) = claims.judge(table, [claims.Claim("", "", ((a, b),), "x", sign)])
        assert entry["verdict"] == verdict
        assert entry["mean"] == pytest.approx(np.mean(table[a]["x"]) - np.mean(table[b]["x"]), abs=1e-4)  # the number's own sign
    with pytest.raises(KeyError):
        claims.judge(table, [claims.Claim("", "", (("a", "missing"),), "x")])


def test_agreement_counts_the_signs_of_decided_claims():
    full = [dict(text=t, mean=m, verdict=v) for t, m, v in (("a", 1, "holds"), ("b", -1, "does not hold"), ("c", 1, "cannot be seen"))]
    quick = [dict(text="a", mean=-0.1, verdict="cannot be seen"), dict(text="b", mean=-2, verdict="holds"), dict(text="c", mean=-1, verdict="")]
    assert claims.agreement(full, quick) == (["b"], ["a"]) and claims.agreement(quick, full) == (["b"], ["c"])


def test_a_run_of_the_grid_stops_resumes_and_is_summarised(tmp_path):
    settings = ablate.config(dict(batch_size=16, micro_batch=16, updates=1, checkpoint_every=1, runs=str(tmp_path), name="row"))
    run = tmp_path / "row"
    assert not ablate.is_done(run, settings)
    ablate.run_one((run, settings))
    assert ablate.is_done(run, settings)
    with pytest.raises(ValueError, match="its updates differ; delete the folder"):
        ablate.is_done(run, ablate.config(asdict(settings) | dict(updates=2)))
    (run / "samples_after.npy").unlink()  # as if killed between the checkpoint and the pictures
    ablate.run_one((run, settings))
    assert ablate.is_done(run, settings)
    numbers = ablate.summarise(run, settings.eval_noises)
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert numbers["Overall"] == pytest.approx(last["eval_VQ"] + last["eval_MQ"] + last["eval_TA"], abs=1e-5)
    assert 0 < numbers["drift"] < 0.5 and 0.2 < numbers["diversity"] < 1.5


def test_diversity_is_the_spread_that_clean_clips_have(tmp_path):
    """The middle of a clean clip's path is uniform within ±1.5 pixels, so its std is 3/√12."""
    prompts = [prompt for prompt in figures.world.PROMPTS for _ in range(2)]
    videos = figures.world.to_uint8(figures.world.clean_clips(prompts, torch.Generator().manual_seed(0))).numpy()
    np.save(tmp_path / "samples_before.npy", videos), np.save(tmp_path / "samples_after.npy", videos)
    line = {"update": 0, "distance_mean": 0.0} | {f"eval_{name}": 0.0 for name in ("reward", "VQ", "MQ", "TA", "distance")}
    (tmp_path / "metrics.jsonl").write_text("\n".join([json.dumps(line)] * 2))
    numbers = ablate.summarise(tmp_path, 2)
    assert numbers["diversity"] == pytest.approx(3 / math.sqrt(12), rel=0.12)
    assert numbers["drift"] == numbers["diversity_lost"] == 0


def test_quadrature_of_the_figure_agrees_with_eq_5():
    sigmas = sigma_schedule(20)
    expected = SDE("sage_grpo", 0.5, sigmas).variance.numpy()
    np.testing.assert_allclose(figures.exact_integral(sigmas.numpy(), 0.5), expected, rtol=1e-8)


def test_energy_off_the_arc_and_along_it():
    origin = torch.tensor([figures.RADIUS, 0.0]).double()
    turned = figures.RADIUS * torch.tensor([[math.cos(0.2), math.sin(0.2)], [math.cos(0.2), -math.sin(0.2)]]).double()
    assert figures.off_and_along(turned, origin) == pytest.approx((0, (0.2 * figures.RADIUS) ** 2))
    assert figures.off_and_along(1.1 * origin[None], origin) == pytest.approx(((0.1 * figures.RADIUS) ** 2, 0))


def test_the_diagram_names_functions_that_exist():
    modules = {name: __import__(name) for name in ("train", "sde", "rewards", "equalizer", "grpo", "trust_region")}
    modules |= {"SDE": SDE, "policy": figures.ToyPolicy}
    for *_, functions in figures.BOXES.values():
        for function in functions:
            module, name = function.split(".")
            found = [known for known in dir(modules[module]) if known.startswith(name.rstrip("…"))]
            assert name in found or (name.endswith("…") and found), function


def test_readme_tables_are_those_of_results_json():
    results, readme = json.loads((ROOT / "results.json").read_text()), (ROOT / "README.md").read_text()
    assert results["claims"] == claims.judge(results["rows"], claims.CLAIMS)
    tables = [claims.markdown(results["claims"], kind) for kind in (claims.PAPER, claims.OURS)]
    for table in (*tables, claims.markdown(results["removed"]["claims"]), claims.table_2(results)):
        assert table in readme
    assert len(results["seeds"]) >= 5
