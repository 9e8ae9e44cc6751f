"""Train a video flow model with SAGE-GRPO.

    python train.py                        the toy, on a laptop, in about two minutes
    python train.py --preset tiny          the real classes with tiny random weights: proves the path of the full run
    python train.py --preset paper ...     HunyuanVideo-1.5 with VideoAlign, on all GPUs of this machine
    torchrun ... train.py --preset paper   the same over several machines
    python train.py --resume runs/toy-1    go on where a run stopped, bit for bit
    add --dry-run                          print settings and batch arithmetic, start nothing
"""

import argparse
import dataclasses
import json
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

import checkpoint
from checkpoint import Interrupt, generator
from grpo import GRPOConfig, OneProcess, Ranks, collect, evaluate, optimizer_steps, option, update
from prompts import STARTER_EVAL, STARTER_TRAIN, read_prompts
from sde import SDE, SDE_TYPES, sigma_schedule
import pictures
from toy import world
from toy.model import ToyPolicy
from trust_region import Anchor, kl_weights

TOY, TINY = "toy", "tiny"


@dataclass
class Config(GRPOConfig):
    """All settings of a run. Defaults are the paper's, in brackets; a preset overrides some, an option overrides both."""

    model: str = option("", "the policy: toy, tiny, or a hub id or local folder of HunyuanVideo-1.5 in diffusers format")
    name: str = option("", "run folder under --runs [default: the preset's name and a number]")
    runs: str = option("runs", "folder that holds the runs")
    seed: int = option(0, "seed of every random draw")
    updates: int = option(100, "rollout updates in all [paper: judged after 100]")
    num_steps: int = option(20, "T, sampling steps of a rollout [paper: 20]")
    shift: float = option(5.0, "shift of the sigma schedule [paper: 5]")
    sde_type: str = option("sage_grpo", "sampler of Table 1, or our exact [paper: sage_grpo]", SDE_TYPES)
    eta: float = option(0.5, "η, exploration scale; at most 1 for cps [released code: 0.5]")
    noisy_last_step: bool = option(True, "inject noise in the last step, too, and train it [released code: on]")
    learning_rate: float = option(1e-5, "learning rate of AdamW, constant, no weight decay [paper: 1e-5]")
    eval_every: int = option(10, "updates between evaluations: fixed prompts and noise, ODE sampling")
    eval_steps: int = option(40, "sampling steps of an evaluation [paper: 40]")
    eval_noises: int = option(1, "noises per evaluation prompt")
    checkpoint_every: int = option(10, "updates between checkpoints")
    keep_checkpoints: int = option(2, "newest checkpoints that are kept")
    # The options below are read by the video model alone, not by the toy.
    frames: int = option(81, "frames of a video, 4k + 1 [paper: 81]")
    height: int = option(480, "pixels [paper: 480p]")
    width: int = option(832, "pixels; 832 makes tokens divisible by 8 [paper: 480p, e.g. 864]")
    fps: int = option(24, "frames a second [paper: 24]")
    guidance_scale: float = option(6.0, "classifier-free guidance, in rollout and training [paper: 6.0]")
    compute_dtype: str = option("bfloat16", "of the transformer; masters are float32 [paper: bf16]", ("bfloat16", "float32"))
    lora_rank: int = option(0, "rank of the LoRA; 0 = full fine-tuning [paper: 0]")
    anchor_offload: bool = option(False, "keep the moving anchor in host memory [released code: on]")
    prompts: str = option(STARTER_TRAIN, "training prompts: .txt (one a line), .csv or .jsonl (prompt)")
    eval_prompts: str = option(STARTER_EVAL, "evaluation prompts, likewise")
    prompt_cache: str = option("", "folder of encoded prompts [default: prompt_cache under --runs]")
    videoalign: str = option("", "checkpoint folder of VideoAlign (KwaiVGI/VideoReward), with model_config.json")
    videoalign_repo: str = option("", "clone of the VideoAlign repository, for its prompt template")
    clip_score: str = option("", "hub id or folder of a CLIP model: adds CLIPScore to the evaluation")
    pick_score: str = option("", "hub id or folder of PickScore: adds PickScore to the evaluation")

    def __post_init__(self):
        for field in dataclasses.fields(self):  # a config.json may have been edited
            if not isinstance(value := getattr(self, field.name), (int, float) if field.type is float else field.type):
                raise ValueError(f"{field.name} must be of type {field.type.__name__}: got {value!r}")

    def check(self, ranks):
        super().check()
        for name in ("updates", "eval_every", "eval_steps", "eval_noises", "checkpoint_every", "keep_checkpoints", "fps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1: got {getattr(self, name)}")
        for name in ("learning_rate", "eta", "guidance_scale"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive: got {getattr(self, name)}")
        if self.lora_rank < 0:
            raise ValueError(f"lora_rank must be 0 (full fine-tuning) or positive: got {self.lora_rank}")
        if self.batch_size * ranks % self.group_size:
            raise ValueError(
                f"group_size must divide batch_size × ranks: got {self.group_size} and {self.batch_size} × {ranks}; "
                f"use a batch_size that is a multiple of {self.group_size}, or other ranks"
            )
        if self.model == TOY and ranks > 1:
            raise ValueError(f"the toy runs on one process: got {ranks} ranks; start it with python, not torchrun")
        optimizer_steps(self.batch_size, self.trained_steps(), self)
        if self.model != TOY:
            import hunyuan

            hunyuan.latent_shape(self.frames, self.height, self.width)
            read_prompts(self.prompts), read_prompts(self.eval_prompts)
            if self.model != TINY:
                hunyuan.check_model(self.model)

    def check_rewards(self):
        """Apart from check(), since a dry run needs no files of the reward model."""
        for name, what in (("videoalign", "checkpoint"), ("videoalign_repo", "clone of its code")):
            if self.model not in (TOY, TINY) and not Path(getattr(self, name) or "-").is_dir():
                raise ValueError(f"--{name} must be the folder of VideoAlign's {what}: got {getattr(self, name)!r}, see the README")

    def sde(self):
        return SDE(self.sde_type, self.eta, sigma_schedule(self.num_steps, self.shift), self.noisy_last_step)

    def trained_steps(self):
        stochastic = int(self.sde().stochastic.sum())
        if stochastic == 0:
            raise ValueError(f"a rollout needs a stochastic step: got none of {self.num_steps}; raise num_steps or keep noisy_last_step")
        return stochastic


PRESETS = {
    "toy": dict(  # measured on the toy, see the README; the rest is the paper's
        model=TOY, group_size=16, batch_size=128, micro_batch=128, accumulation=1,  # 8 prompts × 16, one step a pass
        reward_setting="A",  # its three scores lie in [0, 1], and their mean is what the table shows
        updates=70, num_steps=10, noisy_last_step=False, learning_rate=2e-4,
        anchor_every=90, kl_velocity="closed_form", kl_lambda=0.03, kl_lambda_early=3e-4, kl_switch=35,
        eval_steps=10, eval_noises=2,
    ),
    "tiny": dict(  # the smallest run in which every part of the full run takes part
        model=TINY, batch_size=4, micro_batch=2, accumulation=2, num_steps=4, updates=3, eval_steps=4, eval_every=2,
        checkpoint_every=2, anchor_every=3, kl_switch=1, frames=5, height=64, width=64, compute_dtype="float32",
        learning_rate=1e-4,
    ),
    "paper": dict(  # setting B; every value is a default above, with its source beside it, but for:
        model="hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-480p_t2v",
        micro_batch=1, accumulation=8,  # the paper's 2 × 4 samples per optimizer update, at half the activation memory
    ),
}  # fmt: skip


# ------------------------------------------------------------------------------------------------ configuration
def parse(arguments):
    """(config, options) from the command line. Unknown options, and those that a resumed run cannot take, are refused."""
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style, allow_abbrev=False)
    parser.add_argument("--preset", choices=PRESETS, help="settings to start from [default: toy]")
    parser.add_argument("--resume", metavar="RUN", help="run folder to continue; takes --updates or --export, nothing else")
    parser.add_argument("--export", metavar="DIR", help="with --resume: write the newest checkpoint for diffusers, and stop")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved settings and the arithmetic, and stop")
    parser.add_argument("--gpus", type=int, help="dry run: ranks to plan for [default: those of this launch]")
    parser.add_argument("--gpu_memory_gb", type=float, help="dry run: memory of one GPU in GiB; refuses what cannot fit")
    for field in dataclasses.fields(Config):
        kind = {"type": field.type} if field.type is not bool else {"action": argparse.BooleanOptionalAction}
        if field.metadata["choices"]:
            kind["choices"] = field.metadata["choices"]
        presets = [f"{preset} {values[field.name]!r}" for preset, values in PRESETS.items() if field.name in values]
        help_text = field.metadata["help"].replace("%", "%%") + f" ({'; '.join([f'default {field.default!r}', *presets])})"
        parser.add_argument(f"--{field.name}", default=argparse.SUPPRESS, help=help_text, **kind)
    options = parser.parse_args(arguments)
    try:
        return resolve(options), options
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))


def resolve(options):
    """The Config of a command line, checked; ValueError or FileNotFoundError says what cannot be."""
    names, preset = [field.name for field in dataclasses.fields(Config)], options.preset or TOY
    given = {name: value for name, value in vars(options).items() if name in names}
    if options.resume:
        refused = sorted(given.keys() - {"updates"}) + (["preset"] if options.preset else [])
        if refused:
            raise ValueError(f"--resume keeps a run's own settings; only --updates may change: got {', '.join(refused)}")
        config = Config(**checkpoint.read_settings(options.resume, names) | given)
        if config.updates < (done := checkpoint.last_update(options.resume)):
            raise ValueError(f"updates must be at least those that the run has made: got {config.updates}, it has made {done}")
    else:
        config = Config(**PRESETS[preset] | given)
        foreign = {TOY: {"model", *names[names.index("frames") :]}, TINY: {"model"}}.get(preset, set()) & given.keys()
        if foreign:
            raise ValueError(f"the {preset} preset does not read {', '.join(sorted(foreign))}; use --preset paper, or leave it out")
    if (options.gpus or options.gpu_memory_gb) and not options.dry_run:
        raise ValueError("--gpus and --gpu_memory_gb plan a run that is not started: add --dry-run")
    if options.export:  # which any number of ranks can do
        if not options.resume or config.model == TOY:
            raise ValueError("--export writes what diffusers loads, so it needs --resume with a run of HunyuanVideo: got none")
        return config
    config.check(planned_ranks(config, options))
    if not options.dry_run:
        config.check_rewards()
    return config


def planned_ranks(config, options):
    """The ranks of this launch: torchrun's, or else the GPUs that launch_on_all_gpus will take. A dry run may state them."""
    if options.gpus or "WORLD_SIZE" in os.environ:
        return options.gpus or int(os.environ["WORLD_SIZE"])
    return 1 if config.model == TOY else max(1, torch.cuda.device_count())


def arithmetic(config, ranks):
    """What a run of these settings does, in numbers, before anything is spent."""
    trained, samples = config.trained_steps(), config.batch_size * ranks
    steps = optimizer_steps(config.batch_size, trained, config)
    guided = 1 if config.model == TOY or config.guidance_scale == 1 else 2
    per_step = config.batch_size * guided
    lines = [
        f"samples per update       {samples} = {samples // config.group_size} prompts × {config.group_size}, on {ranks} rank(s)",
        f"trained steps            {trained} of {config.num_steps}",
        f"micro-batches per update {config.batch_size // config.micro_batch * trained}"
        f" = {config.batch_size} / {config.micro_batch} × {trained}, per rank",
        f"optimizer updates        {steps} per update, {steps * config.updates} in all",
        f"one-sample passes        rollout {per_step} × {config.num_steps}, update {per_step} × {trained} with gradient, per rank"
        f" ({guided} per sample and step)",
    ]
    if kl_weights(config.kl_mode)[0]:
        lines.append("reference passes         as many without gradient, in updates whose rollout's policy is not the anchor")
    if config.kl_mode in ("moving", "dual"):
        often = config.anchor_every / steps
        lines.append(f"anchor refresh           every {config.anchor_every} optimizer updates = {often:g} updates")
        if often <= 1:  # at 1, Eq. 11 against the anchor is Eq. 12
            what = "always the rollout's policy: no" if often == 1 else "renewed within an update: hardly any"
            lines.append(f"                         so the anchor is {what} position control; raise anchor_every")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------ ranks and randomness
def launch_on_all_gpus(config):
    """`python train.py` on a machine with several GPUs becomes torchrun on all of them.

    After Ctrl-C torchrun kills its ranks in 30 s, unless told otherwise: too soon for the end of an update and its checkpoint.
    """
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "3600")
    count = torch.cuda.device_count()
    if config.model != TOY and count > 1 and "RANK" not in os.environ:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
        os.execv(sys.executable, [sys.executable, *launcher, *sys.argv])


def setup_ranks(config):
    """(gather, device, mesh) of this process; the mesh is None on one process."""
    local = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", local) if torch.cuda.is_available() and config.model != TOY else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return OneProcess(), device, None
    if not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    return Ranks(), device, dist.init_device_mesh(device.type, (dist.get_world_size(),))


def draw_prompts(prompts, count, seed, update_index):
    """The prompts of one update: the list in a new order each epoch, read without gaps."""
    places = range(update_index * count, (update_index + 1) * count)
    orders = {
        epoch: torch.randperm(len(prompts), generator=generator(seed, "prompts", epoch)).tolist()
        for epoch in {place // len(prompts) for place in places}
    }
    return [prompts[orders[place // len(prompts)][place % len(prompts)]] for place in places]


# ------------------------------------------------------------------------------------------------ policy and rewards
def load_hunyuan(config, run, device, mesh):
    import hunyuan

    model = run / "tiny" / "model" if config.model == TINY else config.model
    cache = config.prompt_cache or Path(config.runs) / "prompt_cache"
    return hunyuan.load(
        str(model), config.frames, config.height, config.width, cache, device, getattr(torch, config.compute_dtype),
        config.lora_rank, config.guidance_scale, mesh, config.seed,
    )  # fmt: skip


def build(config, run, gather, device, mesh):
    """(policy, training reward, evaluation reward, training prompts, evaluation prompts)."""
    if config.model == TOY:
        return ToyPolicy(), world.rewards, world.rewards, world.PROMPTS, world.PROMPTS

    prompts, eval_prompts = read_prompts(config.prompts), read_prompts(config.eval_prompts)
    videoalign, repo = config.videoalign, config.videoalign_repo
    if config.model == TINY:
        model, videoalign, repo = (run / "tiny" / part for part in ("model", "videoalign", "videoalign_repo"))
        prompts, eval_prompts = prompts[:4], eval_prompts[:4]
        if gather.rank == 0 and not repo.exists():
            from tiny.hunyuan import build_tiny_hunyuan
            from tiny.videoalign import build_tiny_template, build_tiny_videoalign

            build_tiny_hunyuan(model), build_tiny_videoalign(videoalign), build_tiny_template(repo)
        gather(torch.zeros(1, device=device)).sum().item()  # nobody reads before it is written
    from videoalign import CLIPScore, PickScore, VideoAlign

    reward = VideoAlign(videoalign, repo, device, fps=config.fps)
    extra = [kind(where, device) for kind, where in ((CLIPScore, config.clip_score), (PickScore, config.pick_score)) if where]
    policy = load_hunyuan(config, run, device, mesh)
    policy.encode(prompts + eval_prompts)  # now, so that the text encoders come and go once

    def eval_reward(videos, texts):
        scores = reward(videos, texts)
        scores["Overall"] = sum(scores.values())
        for cause in reward.failures:
            print(f"evaluation: not scored: {cause}", file=sys.stderr)
        for scorer in extra:
            scores |= scorer(videos, texts)
        return scores

    return policy, reward, eval_reward, prompts, eval_prompts


def run_evaluation(policy, reward, prompts, config, update_index, run, gather):
    """Evaluate on fixed prompts and noise. Writes the videos as mp4 and a contact sheet (the toy: neither).

    Returns (metrics, thumbnails uint8 [prompts · eval_noises, F', 3, H', W'], the noises of a prompt beside each other).
    """
    ode = SDE(config.sde_type, 0.0, sigma_schedule(config.eval_steps, config.shift))
    generators = [generator(config.seed, "eval", i) for i in range(len(prompts) * config.eval_noises)]
    folder = run / "eval" / f"update-{update_index:06d}"
    if config.model != TOY:
        folder.mkdir(parents=True, exist_ok=True)

    def keep(place, video):
        if config.model != TOY:
            from videoalign import write_video

            mine = folder / f"rank-{gather.rank}.mp4"  # two ranks may make one video, where evaluate wraps around
            write_video(mine, video, config.fps)
            mine.replace(folder / f"{place:03d}.mp4")
        return pictures.thumbnail(video)

    repeated = [prompt for prompt in prompts for _ in range(config.eval_noises)]
    metrics, thumbnails = evaluate(policy, reward, repeated, ode, generators, config, gather, keep)
    if config.model != TOY and gather.rank == 0:
        pictures.contact_sheet(thumbnails.numpy(), repeated, folder / "contact_sheet.png")
    return metrics, thumbnails.numpy()


# ------------------------------------------------------------------------------------------------ the run
def main(arguments=None):
    config, options = parse(arguments)
    if options.dry_run:
        print(json.dumps(asdict(config), indent=1, ensure_ascii=False))
        ranks = planned_ranks(config, options)
        print(arithmetic(config, ranks))
        return print_memory(config, ranks, options.gpu_memory_gb) if config.model not in (TOY, TINY) else None
    if arguments is None:  # not when called from Python: it replaces the process
        launch_on_all_gpus(config)
    gather, device, mesh = setup_ranks(config)
    first = gather.rank == 0
    if options.export:
        import hunyuan

        policy = load_hunyuan(config, Path(options.resume), device, mesh)
        checkpoint.load_weights(checkpoint.latest(options.resume), policy.module)
        hunyuan.export(policy, options.export)
        return print(f"exported to {options.export}") if first else None
    default = config.model if config.model in (TOY, TINY) else "paper"
    run = checkpoint.open_run(options.resume, config.runs, config.name, default, asdict(config))
    if first:
        print(arithmetic(config, gather.world))

    policy, reward, eval_reward, prompts, eval_prompts = build(config, run, gather, device, mesh)
    trained = [p for p in policy.module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=config.learning_rate, weight_decay=0.0)
    w_pos, _ = kl_weights(config.kl_mode, config.beta_pos, config.beta_vel)
    every = None if config.kl_mode == "fixed" else config.anchor_every
    anchor = Anchor(policy.module, every, config.anchor_offload) if w_pos else None
    sde, done, optimizer_updates = config.sde(), 0, 0
    if options.resume:
        progress = checkpoint.load(checkpoint.latest(run), policy.module, optimizer, anchor)
        done, optimizer_updates = progress["update"], progress["optimizer_updates"]
    log, thumbnails, stop = checkpoint.read_log(run, done), None, False  # all ranks read the log, the first one writes it

    def evaluate_into(line):
        scores, thumbnails = run_evaluation(policy, eval_reward, eval_prompts, config, line["update"], run, gather)
        line |= scores
        checkpoint.write_log(run, log)
        return thumbnails

    def due(update_index):
        return update_index == config.updates or update_index % config.eval_every == 0

    if due(done) and "eval_reward" not in log[-1]:  # a new run, or one that was killed in its evaluation
        thumbnails = evaluate_into(log[-1])
    if first and done == 0:
        np.save(run / "samples_before.npy", thumbnails)

    interrupt, board = Interrupt(), checkpoint.tensorboard(run) if first else None
    bar = tqdm(range(done, config.updates), initial=done, total=config.updates, desc=run.name, disable=not first)
    for index in bar:
        groups = draw_prompts(prompts, config.batch_size * gather.world // config.group_size, config.seed, index)
        places = range(gather.rank * config.batch_size, (gather.rank + 1) * config.batch_size)  # among all ranks' samples
        noises = [generator(config.seed, "noise", index, place) for place in places]
        orders = [generator(config.seed, "order", index, place) for place in places]
        texts = [groups[place // config.group_size] for place in places]

        def show_step(k):
            bar.set_postfix_str(f"rollout step {k + 1} of {config.num_steps}")

        batch = collect(policy, reward, texts, sde, noises, config, optimizer_updates, gather, show_step)
        metrics, optimizer_updates = update(policy, batch, config, optimizer, anchor, orders, index, optimizer_updates, gather)
        metrics = {"update": index + 1, **batch.metrics, **metrics, "optimizer_updates": optimizer_updates}
        for cause in getattr(reward, "failures", []):
            print(f"rank {gather.rank}, update {index + 1}: not scored: {cause}", file=sys.stderr)
        stop = bool(gather(torch.tensor([interrupt.asked], device=device)).any())  # all ranks stop together
        log.append(metrics)
        checkpoint.write_log(run, log)
        if stop or index + 1 == config.updates or (index + 1) % config.checkpoint_every == 0:
            progress = {"update": index + 1, "optimizer_updates": optimizer_updates}
            checkpoint.save(run / "checkpoints", policy.module, optimizer, anchor, progress, config.keep_checkpoints)
        if due(index + 1):  # after the save, so that nothing is lost where it fails
            thumbnails = evaluate_into(metrics)
        bar.set_postfix(reward=f"{metrics['reward_mean']:.3f}", kl=f"{metrics.get('kl_position', metrics['kl_velocity']):.1e}")
        if board is not None:
            for name, value in metrics.items():
                board.add_scalar(name, value, index + 1)
        if stop:
            break
    bar.close()
    finished = log[-1]["update"] == config.updates
    if finished and thumbnails is None:  # a run that was killed between its last evaluation and its pictures
        thumbnails = evaluate_into(log[-1])
    if first and finished:
        pictures.report(run, log, config, eval_prompts, thumbnails)
    elif first:
        pictures.curves(log, config.clip_range, run / "curves.png")
        print(f"stopped after update {log[-1]['update']}; go on with: python train.py --resume {run}")


def print_memory(config, ranks, gpu_memory_gb):
    """The dry run's estimate of memory per GPU, from the configuration alone; SystemExit where it cannot fit."""
    import hunyuan

    tokens = hunyuan.token_count(config.frames, config.height, config.width)
    parts = hunyuan.memory_estimate(tokens, ranks, config.lora_rank, config.micro_batch, config.anchor_offload)
    if not kl_weights(config.kl_mode)[0]:
        parts["total"] -= parts.pop("anchor")
    parts["videoalign"] = 4 * 2.2e9 / 2**30  # Qwen2-VL-2B in float32
    total, parameters = parts.pop("total") + parts["videoalign"], hunyuan.meta_transformer().num_parameters()
    print(f"tokens per video         {tokens} = latent frames × height/16 × width/16, parameters {parameters:,}")
    print("memory per GPU (GiB)     " + " + ".join(f"{name} {size:.1f}" for name, size in parts.items()) + f" = {total:.1f}")
    if gpu_memory_gb and total > gpu_memory_gb:
        raise SystemExit(
            f"the estimate must fit the GPU: got {total:.1f} GiB for {gpu_memory_gb:g}; use more GPUs, --lora_rank 64, "
            "--anchor_offload, --micro_batch 1, or fewer frames and pixels"
        )


if __name__ == "__main__":
    main()
    if dist.is_initialized():
        dist.destroy_process_group()
