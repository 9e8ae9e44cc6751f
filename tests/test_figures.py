"""The paper's figures: what they compute, against independent values; the diagram; the README's pictures of a run."""

import json
import math
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image

import equalizer
import grpo
import rewards
import sde
import trust_region
from engine import draws
from paper import figures
from sde import SDE, predict_x0, sigma_schedule
from toy import world
from toy.model import ToyPolicy


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


# ------------------------------------------------------------------------------------------------ what they compute
def test_quadrature_of_the_figure_agrees_with_eq_5():
    sigmas = sigma_schedule(20)
    expected = SDE("sage_grpo", 0.5, sigmas).variance.numpy()
    np.testing.assert_allclose(figures.exact_integral(sigmas.numpy(), 0.5), expected, rtol=1e-8)


def test_the_erratums_coefficients_give_eq_7_with_its_score():
    sigmas = sigma_schedule(8)
    erratum = figures.erratum_sde(0.7, sigmas)
    right = SDE("sage_grpo", 0.7, sigmas)
    x = torch.randn(5, 3, dtype=torch.float64, generator=rng(0))
    v = torch.randn(5, 3, dtype=torch.float64, generator=rng(1))
    for k in range(8):
        sigma = sigmas[k]
        printed_score = -(x - predict_x0(x, v, sigma)) / sigma**2
        expected = x - (sigma - sigmas[k + 1]) * v + right.variance[k] / 2 * printed_score
        mean, std = erratum.transition(x, v, k)
        torch.testing.assert_close(mean, expected, rtol=1e-12, atol=1e-12)
        assert (std == right.std[k]).all()
        right_mean, _ = right.transition(x, v, k)
        assert (mean - right_mean).abs().max() > 1e-4  # the comparison can tell the two scores apart


def test_marginal_errors_of_short_schedules_by_hand():
    """For N(0, 1) data the velocity is a multiple of x, so each Euler step multiplies the std by a known factor.

    At sigma = 1 the velocity is x itself: a single step ends at 0, an error of 100%.
    """
    last, worst = figures.marginal_errors(SDE("sage_grpo", 0.0, [1.0, 0.0]))
    assert last == worst == pytest.approx(1.0)
    std = 1.0
    for sigma, sigma_next in ((1.0, 0.5), (0.5, 0.0)):
        slope = (sigma - (1 - sigma)) / (sigma**2 + (1 - sigma) ** 2)  # v = slope·x for N(0, 1) data
        std *= 1 - (sigma - sigma_next) * slope
    last, worst = figures.marginal_errors(SDE("sage_grpo", 0.0, [1.0, 0.5, 0.0]))
    assert last == pytest.approx(abs(std - 1))
    assert worst == pytest.approx(max(abs(std - 1), abs(0.5 / math.sqrt(0.5) - 1)))


def test_slope_of_a_power_law():
    errors = [3.0 * steps**-2 for steps in figures.LENGTHS]
    assert figures.last_slope(errors) == pytest.approx(-2)
    errors[-5] = 1e3  # of the last four points alone, and of all four
    assert figures.last_slope(errors) == pytest.approx(-2)
    errors[-4] = 1e3
    assert figures.last_slope(errors) < -3


def test_curves_of_errors_are_those_of_their_sampler(monkeypatch):
    """N(0, 1) data at η = 1: the erratum's score ends 35% and 52% too wide; Flow-GRPO's worst step stalls at 15%."""
    monkeypatch.setattr(figures, "LENGTHS", [20, 50])
    last, _ = figures.error_curves(figures.ERRATUM, eta=1.0)
    assert last == pytest.approx([0.35, 0.52], abs=0.005)
    last, worst = figures.error_curves("flow_grpo", eta=1.0)
    assert last == pytest.approx([0.073, 0.030], abs=0.001) and worst == pytest.approx([0.172, 0.155], abs=0.001)


def test_energy_off_the_arc_and_along_it():
    origin = torch.tensor([figures.RADIUS, 0.0]).double()
    ahead = [math.cos(0.2), math.sin(0.2)]
    behind = [math.cos(0.2), -math.sin(0.2)]
    turned = figures.RADIUS * torch.tensor([ahead, behind]).double()
    assert figures.off_and_along(turned, origin) == pytest.approx((0, (0.2 * figures.RADIUS) ** 2))
    assert figures.off_and_along(1.1 * origin[None], origin) == pytest.approx(((0.1 * figures.RADIUS) ** 2, 0))


@pytest.mark.parametrize("sde_type", ["sage_grpo", "flow_grpo"])
def test_noise_of_the_last_step_leaves_the_arc_with_its_own_variance(sde_type):
    """Noise of variance Σ² in every direction adds Σ² to the energy in the normal direction."""
    sigmas = sigma_schedule(figures.STEPS)
    data = figures.arc_world()
    origin = torch.tensor([-figures.RADIUS, 0.0]).double()
    energies = figures.sample_energies(lambda x, sigma: data.velocity(x, sigma[0].item()), sigmas, origin, count=2000)
    noisy = energies[f"{sde_type}, noisy last step"]["off"]
    clean = energies[f"{sde_type}, deterministic last step"]["off"]
    expected = SDE(sde_type, figures.ETA, sigmas).variance[-1].item()
    assert noisy - clean == pytest.approx(expected, rel=0.12)


def test_gradient_norm_over_all_weights():
    """∇(a·b + 2a) = (b + 2, a); a weight that the value does not contain counts as 0."""
    a, b, unused = (torch.tensor(number, requires_grad=True) for number in (3.0, 2.0, 1.0))
    norm = figures.norm_by_weights(a * b + 2 * a, [a, b, unused])
    assert norm.item() == pytest.approx(5.0)  # √(4² + 3²)


def test_measured_norms_follow_eq_8_and_the_equalizer_flattens_them():
    sampler = SDE("sage_grpo", 0.5, sigma_schedule(4), noisy_last_step=False)
    before, after = figures.norms_before_and_after(sampler, ToyPolicy())
    measured = before["‖∇_v log π‖"] / before["N_t of Eq. 8"]
    assert (measured / measured[0] - 1).abs().max() < 0.02  # one factor for all steps
    scaled = after["‖∇_v log π‖"]
    assert scaled.max() / scaled.min() < 1.02


# ------------------------------------------------------------------------------------------------ the diagram
def test_the_diagram_names_functions_that_exist():
    owners = {
        "draws": draws,
        "sde": sde,
        "rewards": rewards,
        "equalizer": equalizer,
        "grpo": grpo,
        "trust_region": trust_region,
        "SDE": SDE,
        "policy": ToyPolicy,
    }
    for *_, functions in figures.BOXES.values():
        for function in functions:
            owner, name = function.split(".")
            if name.endswith("…"):
                stem = name.rstrip("…")
                assert any(known.startswith(stem) for known in dir(owners[owner])), function
            else:
                assert hasattr(owners[owner], name), function


def test_arrows_join_boxes_at_their_edges():
    for begin, end in figures.ARROWS:
        assert begin in figures.BOXES and end in figures.BOXES
    assert figures.share_inside(5.0, 0.0) == pytest.approx(figures.HALF_WIDTH / 5)
    assert figures.share_inside(0.0, -2.0) == pytest.approx(figures.HALF_HEIGHT / 2)
    corner = (3 * figures.HALF_WIDTH, 3 * figures.HALF_HEIGHT)
    assert figures.share_inside(*corner) == pytest.approx(1 / 3)


# ------------------------------------------------------------------------------------------------ pictures of a run
@pytest.fixture
def run(tmp_path, monkeypatch):
    """A finished run of the toy of two iterations, with an evaluation at either end."""
    monkeypatch.setattr(figures, "FOLDER", tmp_path / "figures")
    folder = tmp_path / "run"
    folder.mkdir()
    settings = {"model": "toy", "iterations": 2, "eval_noises": 2, "clip_range": 1e-4}
    (folder / "config.json").write_text(json.dumps(settings))
    scores = {"eval_reward": 0.5, "eval_VQ": 0.6, "eval_MQ": 0.3, "eval_TA": 0.6, "eval_distance": 0.1}
    names = ("kl_position", "kl_velocity", "ratio_min", "ratio_max", "ratio_mean", "VQ_mean", "MQ_mean", "TA_mean")
    made = dict.fromkeys((*names, "reward_mean"), 0.0) | {"lambda_kl": 0.1, "grad_norm": 0.01}
    last = {"iteration": 2, **scores, **made, "eval_reward": 0.75, "eval_VQ": 0.5}
    log = [{"iteration": 0} | scores, {"iteration": 1} | made, last]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    prompts = np.repeat(world.PROMPTS, 2)
    for seed, name in enumerate(("samples_before.npy", "samples_after.npy")):
        np.save(folder / name, world.to_uint8(world.training_clips(prompts, rng(seed))).numpy())
    return folder


def test_pictures_of_a_finished_run(run, monkeypatch, drawn_curves):
    spy = Mock(wraps=figures.pictures.side_by_side)
    monkeypatch.setattr(figures.pictures, "side_by_side", spy)
    notes = Mock(wraps=figures.note)
    monkeypatch.setattr(figures, "note", notes)
    figures.main(["--run", str(run)])
    for videos, name in zip(spy.call_args.args[:2], ("samples_before.npy", "samples_after.npy"), strict=True):
        assert np.array_equal(videos, np.load(run / name)[::2])  # the first of two noises
    movie = figures.FOLDER / "default_run.gif"
    with Image.open(movie) as opened:
        assert opened.n_frames == world.FRAMES and opened.width < 900
    assert movie.stat().st_size < 1.5e6
    with Image.open(figures.FOLDER / "default_run.png") as curves:
        assert curves.size == (900, 350)
    assert (figures.FOLDER / "curves.png").stat().st_size > 0
    peak = "VQ peaks at iteration 0\n(0.600) and ends at 0.500:"
    assert notes.call_args_list[0].args[1].startswith(f"the reward rises; but {peak}")
    _, log = figures.read_run(run)
    assert figures.first_to_last(log, "eval_reward") == "0.500 → 0.750"


@pytest.mark.parametrize("name", ["metrics.jsonl", "samples_before.npy", "samples_after.npy", "config.json"])
def test_a_folder_without_the_runs_files_is_refused(run, name):
    (run / name).unlink()
    with pytest.raises(SystemExit, match=f"must be the folder of a finished run: .* has no {name}"):
        figures.main(["--run", str(run)])


@pytest.mark.parametrize(
    "changed, message",
    [({"model": "tiny"}, "must be a run of the toy"), ({"iterations": 3}, "has made 2 of 3 iterations")],
)
def test_other_runs_are_refused(run, changed, message):
    settings = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(settings | changed))
    with pytest.raises(SystemExit, match=message):
        figures.main(["--run", str(run)])
