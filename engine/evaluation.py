"""An evaluation: fixed prompts and noise, ODE sampling, and what it leaves in the run folder."""

import io
from functools import partial

import numpy as np

from engine import pictures
from engine.draws import generator
from engine.folder import warn_of_failure, write_whole
from engine.presets import TOY
from engine.watch import enter
from grpo import evaluate
from sde import SDE, sigma_schedule


def evaluation_is_due(config, iteration):
    """At the start, every eval_every iterations, and at the end."""
    return iteration == config.iterations or iteration % config.eval_every == 0


def run_evaluation(policy, reward, prompts, config, iteration, run, ranks):
    """Evaluate on fixed prompts and noise; returns the metrics. What it saves in the run folder:

    samples_before.npy (iteration 0) or samples_after.npy: uint8 thumbnails [prompts · eval_noises, F', 3, H', W'], all
    noises of a prompt are adjacent. Of the video model also an mp4 for each prompt and a contact sheet.
    """
    enter("an evaluation")
    repeated = [prompt for prompt in prompts for _ in range(config.eval_noises)]
    ode = SDE(config.sde_type, 0.0, sigma_schedule(config.eval_steps, config.shift))
    noise = [generator(config.seed, "eval", place) for place in range(len(repeated))]
    latent_shape = policy.latent_shape
    folder = run / "eval" / f"iteration-{iteration:06d}"
    if config.model != TOY:
        from video import hunyuan

        latent_shape = hunyuan.latent_shape(config.frames, config.eval_height, config.eval_width)
    keep = partial(keep_video, config, folder, ranks)
    metrics, thumbnails = evaluate(policy, reward, repeated, latent_shape, ode, noise, config, ranks, keep)
    if ranks.rank == 0:
        keep_thumbnails(config, folder, run, iteration, thumbnails.numpy(), repeated)
    return metrics


def keep_thumbnails(config, folder, run, iteration, thumbnails, prompts):
    """samples_before.npy or samples_after.npy, and the video model's contact sheet. A full disk costs these alone."""
    name = "samples_before.npy" if iteration == 0 else "samples_after.npy"
    with warn_of_failure(f"writing {run / name}"):
        content = io.BytesIO()
        np.save(content, thumbnails)
        write_whole(run / name, content.getvalue())
    if config.model != TOY:
        with warn_of_failure(f"writing the contact sheet in {folder}", Exception):  # fonts, too, can be damaged
            pictures.contact_sheet(thumbnails, prompts, folder / "contact_sheet.png")


def keep_video(config, folder, ranks, place, video):
    """Write the mp4 of a video model's sample; hand on its thumbnail."""
    if config.model != TOY:
        from video.mp4 import write_video

        with warn_of_failure(f"writing a video in {folder}"):
            folder.mkdir(parents=True, exist_ok=True)
            own = folder / f"rank-{ranks.rank}.mp4"  # two may make one video, where evaluate wraps around
            write_video(own, video, config.fps)
            own.replace(folder / f"{place:03d}.mp4")
    return pictures.thumbnail(video)
