"""What a run is made of: policy, rewards, prompts, optimizers, anchor; for the toy, the miniatures, the full run."""

import sys
from functools import partial
from pathlib import Path

import torch

from engine.plan import takes_muon
from engine.presets import BUILT_IN, MINI, TINY, TOY
from engine.scoring import load_reward
from prompts import read_prompts
from toy import world
from toy.model import ToyPolicy
from trust_region import Anchor, LambdaController


def build(config, run, ranks, device, mesh):
    """(policy, training reward, evaluation reward, training prompts, evaluation prompts)."""
    if config.model == TOY:
        reward = load_reward(config.reward) if config.reward else world.rewards
        return ToyPolicy(), reward, reward, world.PROMPTS, world.PROMPTS
    prompts, eval_prompts = read_prompts(config.prompts), read_prompts(config.eval_prompts)
    if config.model == TINY:
        prompts, eval_prompts = prompts[:4], eval_prompts[:4]
    if config.model in BUILT_IN:
        write_small_models(config.model, run / config.model, ranks)
    policy = load_hunyuan(config, run, device, mesh, ranks.context)
    if ranks.rank == 0:  # now, so that the text encoders come and go once; the other ranks find the prompts encoded
        policy.encode(prompts + eval_prompts)
    ranks.exchange(None)  # all wait for it
    policy.encode(prompts + eval_prompts)
    reward, eval_reward = build_reward(config, run, device)  # its 8 GiB after the text encoders' 13, not beside them
    return policy, reward, eval_reward, prompts, eval_prompts


def write_small_models(model, folder, ranks):
    """Write the models that a preset brings along into the run folder, by the first rank."""
    from tiny.hunyuan import build_tiny_hunyuan
    from tiny.miniature import build_miniature
    from tiny.videoalign import build_tiny_template, build_tiny_videoalign
    from video.files import obey_umask

    if ranks.rank == 0 and not (folder / "complete").exists():
        if model == MINI:
            build_miniature(folder / "model")
        else:
            build_tiny_hunyuan(folder / "model")
            build_tiny_videoalign(folder / "videoalign")
            build_tiny_template(folder / "videoalign_repo")
        obey_umask(folder)
        (folder / "complete").touch()
    ranks.exchange(None)  # nobody reads before it is written


def check_written(folder, check, *arguments):
    """Check files that the run itself has written: they come back by being written again, not from a download."""
    try:
        check(*arguments)
    except (OSError, ValueError) as error:
        problem = str(error).removesuffix("; download it again")
        raise ValueError(f"{problem}; delete {folder}: a run that goes on writes it again") from error


def build_reward(config, run, device):
    """(training reward, evaluation reward) of a video model."""
    if config.model == MINI:
        from tiny import miniature

        reward = load_reward(config.reward) if config.reward else miniature.reward
        return reward, reward
    from video.clip import CLIPScore, PickScore

    if config.reward:
        reward = load_reward(config.reward)
    else:
        reward = load_videoalign(config, run, device)
    extra = []
    if config.clip_score:
        extra.append(CLIPScore(config.clip_score, device))
    if config.pick_score:
        extra.append(PickScore(config.pick_score, device))
    return reward, partial(evaluation_reward, reward, extra, not config.reward)


def load_videoalign(config, run, device):
    from video import videoalign
    from video.files import one_after_another

    folder, repo = config.videoalign, config.videoalign_repo
    if config.model == TINY:
        folder, repo = run / TINY / "videoalign", run / TINY / "videoalign_repo"
        check_written(run / TINY, videoalign.check_folder, folder, repo)
    return one_after_another(lambda: videoalign.VideoAlign(folder, repo, device, fps=config.fps))


def evaluation_reward(reward, extra, summed, videos, prompts):
    """The training reward's scores, VideoAlign's with their sum `Overall`, and those of the further scorers."""
    scores = dict(reward(videos, prompts))
    if summed:
        scores["Overall"] = sum(scores.values())
    for cause in getattr(reward, "failures", []):
        print(f"evaluation: not scored: {cause}", file=sys.stderr)
    for scorer in extra:
        scores |= scorer(videos, prompts)
    return scores


def load_hunyuan(config, run, device, mesh, context):
    from video import files, hunyuan

    model = config.model
    if config.model in BUILT_IN:
        model = run / config.model / "model"
        check_written(run / config.model, files.check_model, model)
    return hunyuan.load(
        str(model),
        hunyuan.latent_shape(config.frames, config.height, config.width),
        prompt_cache=config.prompt_cache or Path(config.runs) / "prompt_cache",
        device=device,
        compute_dtype=getattr(torch, config.compute_dtype),
        lora_rank=config.lora_rank,
        guidance_scale=config.guidance_scale,
        mesh=mesh,
        seed=config.seed,
        micro_batch=config.micro_batch,
        guidance_gradient=config.guidance_gradient,
        checkpointing=config.checkpointing,
        attention=config.attention,
        context=context,
        compile=config.compile,
        vae_dtype=config.vae_dtype,
    )


def make_optimizers(module, config):
    """[AdamW] on all trained weights, or [Muon, AdamW]: Muon on the 2-D weights of the blocks, AdamW on the rest.

    Muon's steps are scaled to the size of AdamW's, as in the released code, so one learning rate serves both.

    Its Newton–Schulz iteration runs in bf16 and lifts all directions of a gradient to one size, also those that hold
    nothing but rounding noise. Where a gradient has low rank (the blocks' modulation, with few passes in a batch), the
    update therefore differs between machines and numbers of ranks; where it has full rank, it agrees
    (tests/test_train.py).
    """
    settings = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
    matrices, others = [], []
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        if config.optimizer == "muon" and takes_muon(name, parameter):
            matrices.append(parameter)
        else:
            others.append(parameter)
    optimizers = []
    if matrices:
        optimizers.append(torch.optim.Muon(matrices, adjust_lr_fn="match_rms_adamw", **settings))
    if others:  # a LoRA consists of matrices alone
        optimizers.append(torch.optim.AdamW(others, betas=(config.adam_beta1, config.adam_beta2), **settings))
    return optimizers


def make_controller(config):
    """What sets λ_KL at each backward pass; None where it follows a schedule."""
    if config.kl_schedule != "controller":
        return None
    return LambdaController(config.kl_lambda_early, config.kl_lambda, config.kl_target)


def make_anchor(module, config):
    """The reference of the position KL; None where the KL mode has no such term."""
    if not config.has_anchor:
        return None
    return Anchor(module, None if config.kl_mode == "fixed" else config.anchor_every, config.anchor_offload)
