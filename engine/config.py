"""The settings of a run and the command line.

The groups of settings come first, one line a setting: its default, its line of --help and its bounds or choices. In
brackets stands its source: [paper: …] is printed in the paper, [release: …] was read in the released code
(post_train.py, hyvideo/utils/grpo_utils.py and run_post_train.sh of it).
"""

import argparse
import contextlib
import dataclasses
import hashlib
import json
import math
import os
import reprlib
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import torch

from engine.draws import generator
from engine.folder import LOG, is_taken, read_settings, taken
from engine.presets import BUILT_IN, MINI, MINI_LORA, MINI_UNREAD, PRESETS, TINY, TOY
from engine.ranks import FolderError, on_first_rank, short_digest
from engine.scoring import check_weights, load_reward, try_reward
from grpo import micro_batches_per_step, samples_in_update
from prompts import STARTER_EVAL, STARTER_TRAIN, read_prompts, unprintable
from rewards import reward_weights
from sde import SDE, SDE_TYPES, sigma_schedule
from trust_region import KL_MODES, KL_SCHEDULES, STEPWISE_KL, LambdaController, kl_weights

KERNELS = ("flash", "cudnn", "efficient", "fa3", "fa4", "math")  # of the joint attention: video.kernels.KERNELS
CHECKPOINTING = ("full", "attention", "none")
BRANCHES = ("both", "conditional")
VAE_DTYPES = ("float32", "tf32", "bfloat16", "float16")  # tf32: float32 whose products have 10 bits


def option(default, text, low=None, high=None, choices=None):
    """A setting: its default, its line of --help, and its bounds or its choices."""
    bounds = None if low is None else (low, high)
    return dataclasses.field(default=default, metadata={"help": text, "bounds": bounds, "choices": choices})


@dataclass
class Method:
    num_steps: int = option(20, "T, sampling steps of a rollout [paper: 20]", 1, 1000)
    shift: float = option(5.0, "shift of the sigma schedule [release: 5]", 0.1, 100)
    sde_type: str = option("sage_grpo", "sampler of Table 1, or our exact [paper: sage_grpo]", choices=SDE_TYPES)
    eta: float = option(0.5, "η, exploration scale; at most 1 for cps [release: 0.5]", 1e-3, 10)
    sde_steps: int = option(0, "noisy, trained steps, drawn again in each iteration; 0 = all [paper: all]", 0, 1000)
    sde_share: float = option(0.6, "first share of the schedule, for sde_steps; .9 learned more on the toy", 1e-3, 1)
    noisy_last_step: bool = option(True, "add noise in the last step as well, and train it [release: on]")
    group_size: int = option(4, "G, samples per prompt; a group may span ranks [paper: 4]", 2, 10**4)
    batch_size: int = option(8, "samples per rank and iteration [paper: 2 × 4; release: 2]", 1, 10**6)
    reward: str = option("", "FILE.py:NAME, your own function instead of VideoAlign: see rewards.py")
    reward_weights: str = option("B", "weights of Eq. 10: A, B, or a list such as VQ=0.5,MQ=0.5,TA=1 [paper: A and B]")
    max_failed_rewards: float = option(0.1, "the run stops above this share of unscored samples", 0, 0.999)
    train_samples: int = option(0, "train this many extremes of each group; 0 = all samples [paper: all]", 0, 10**4)
    max_advantage: float = option(5.0, "clamp on |A| [release: 5]", 1e-3, 1e3)
    clip_range: float = option(1e-4, "c of clip(ρ, 1 ± c); log π is a mean over D [release: 1e-4]", 1e-10, 1e3)
    equalizer: bool = option(True, "multiply the policy term of step t by S_t, Eq. 9 [paper: on]")
    kl_mode: str = option("dual", "trust region, Eq. 11–14 [paper: dual]", choices=KL_MODES)
    stepwise_kl: str = option("rollout_phase", "Eq. 15, or Eq. 12: closed_form [paper: Eq. 15]", choices=STEPWISE_KL)
    beta_pos: float = option(1.0, "β_pos of Eq. 14 [paper: 1.0]", 0, 1e6)
    beta_vel: float = option(0.1, "β_vel of Eq. 14 [paper: 0.1]", 0, 1e6)
    kl_schedule: str = option("two_stage", "schedule of λ_KL, Fig. 7 [paper: two_stage]", choices=KL_SCHEDULES)
    kl_lambda: float = option(1e-5, "λ_KL, final value [paper: 1e-5]", 0, 1e6)
    kl_lambda_early: float = option(1e-7, "λ_KL at the start of two_stage, milder and ramp [paper: 1e-7]", 0, 1e6)
    kl_target: float = option(1e-5, "target KL of kl_schedule controller [release: 1e-5]", 1e-12, 1e6)
    kl_switch: int = option(50, "iteration where stage two starts, or the ramp ends [paper: not printed]", 0, 10**7)
    kl_steps: int = option(0, "random trained steps with the position KL, per sample; 0 = all [paper: all]", 0, 1000)
    anchor_every: int = option(10, "N of Eq. 13, optimizer steps between the anchor's refreshes [paper: 10]", 1, 10**7)


@dataclass
class Optimization:
    optimizer: str = option("adamw", "muon: for the blocks' matrices [release: muon]", choices=("adamw", "muon"))
    optimizer_steps: int = option(1, "optimizer steps per iteration [paper and release: 1]", 1, 10**4)
    learning_rate: float = option(1e-5, "learning rate, constant [paper: 1e-5]", 1e-10, 1)
    adam_beta1: float = option(0.9, "AdamW's decay of the mean gradient [release: 0.95]", 0, 0.9999)
    adam_beta2: float = option(0.999, "AdamW's decay of the mean squared gradient [release: 0.95]", 0, 0.99999)
    weight_decay: float = option(0.0, "decoupled weight decay [release: 0.01]", 0, 1)
    max_grad_norm: float = option(1.0, "clip the gradient norm to this [release: 1.0]", 1e-6, 1e9)
    micro_batch: int = option(1, "samples per forward and backward pass, on each rank [paper: 2]", 1, 10**6)


@dataclass
class Run:
    name: str = option("", "run folder under --runs [default: the preset's name and a number]")
    runs: str = option("runs", "folder that holds the runs")
    seed: int = option(0, "seed of every random draw", 0, 2**63 - 1)
    iterations: int = option(100, "iterations in all, each a rollout and its update [paper: 100]", 1, 10**7)
    checkpoint_every: int = option(10, "iterations between checkpoints", 1, 10**7)
    keep_checkpoints: int = option(2, "how many of the newest checkpoints are kept", 1, 1000)
    reward_timeout: float = option(1800.0, "seconds that one call of the reward may take", 1, 10**6)


@dataclass
class Evaluation:
    eval_every: int = option(10, "iterations between evaluations: fixed prompts and noise, ODE sampling", 1, 10**7)
    eval_steps: int = option(40, "sampling steps of an evaluation [paper: 40]", 1, 1000)
    eval_noises: int = option(1, "samples per evaluation prompt, each from its own noise", 1, 1000)


@dataclass
class VideoModel:
    """What the toy does not read."""

    model: str = option("", "toy, tiny, mini, or hub id or folder of HunyuanVideo-1.5 in diffusers format")
    frames: int = option(81, "frames of a video, 4k + 1, and 5 or more [paper: 81]", 5, 1025)
    height: int = option(352, "pixels of a rollout [release: its 480p bucket is 352 × 624]", 32, 4096)
    width: int = option(624, "pixels of a rollout", 32, 4096)
    eval_height: int = option(480, "pixels of an evaluation video [release: 480 × 864]", 32, 4096)
    eval_width: int = option(864, "pixels of an evaluation video", 32, 4096)
    fps: int = option(24, "frames per second [release: 24]", 1, 240)
    guidance_scale: float = option(6.0, "guidance in rollout and training [release: 6.0]", 0.1, 100)
    guidance_gradient: str = option("both", "trained branches; one saves passes [release: both]", choices=BRANCHES)
    prompts: str = option(STARTER_TRAIN, "training prompts: .txt (one a line), .csv or .jsonl (prompt)")
    eval_prompts: str = option(STARTER_EVAL, "evaluation prompts: .txt, .csv or .jsonl")
    prompt_cache: str = option("", "folder of encoded prompts [default: prompt_cache under --runs]")
    videoalign: str = option("", "checkpoint folder of VideoAlign (KwaiVGI/VideoReward)")
    videoalign_repo: str = option("", "clone of the VideoAlign repository, for its prompt template")
    clip_score: str = option("", "hub id or folder of a CLIP model: adds CLIPScore to evaluations")
    pick_score: str = option("", "hub id or folder of PickScore: adds PickScore to evaluations")


@dataclass
class Hardware:
    """Precision, memory and speed of the video model."""

    compute_dtype: str = option("bfloat16", "master weights: float32 [paper: bf16]", choices=("bfloat16", "float32"))
    vae_dtype: str = option("float16", "of the VAE decoder [release: fp16]", choices=VAE_DTYPES)
    lora_rank: int = option(0, "rank of the LoRA; 0 = full fine-tuning [paper: 0]", 0, 4096)
    checkpointing: str = option("full", "backward recomputes all, all but attention, or nothing", choices=CHECKPOINTING)
    attention: str = option("auto", "attention kernel; auto: the fastest when timed", choices=("auto", *KERNELS))
    compile: bool = option(False, "torch.compile every block of the transformer, which takes minutes at the start")
    replicate: int = option(1, "groups of ranks that each hold a whole model: the number of machines, or 1", 1, 10**4)
    context_parallel: int = option(1, "ranks that share the tokens of one video", 1, 64)
    anchor_offload: bool = option(False, "keep the moving anchor in host memory [release: on]")


GROUPS = {
    "method": Method,
    "optimization": Optimization,
    "run": Run,
    "evaluation": Evaluation,
    "video model": VideoModel,
    "precision, memory and speed of the video model": Hardware,
}


# The fields of a dataclass's last base come first.
@dataclass
class Config(Hardware, VideoModel, Evaluation, Run, Optimization, Method):
    """All settings of a run. Defaults are the paper's; a preset overrides some, an option overrides both."""

    def __post_init__(self):
        for field in dataclasses.fields(self):  # a config.json may have been edited
            allowed = (int, float) if field.type is float else (field.type,)
            value = getattr(self, field.name)
            if type(value) not in allowed:  # isinstance would take True for an int
                raise ValueError(f"{field.name} must be of type {field.type.__name__}: got {reprlib.repr(value)}")

    def check(self, ranks):
        """Raise on the first setting that cannot work on this number of ranks. No file is read."""
        self.check_values()
        self.check_ranks(ranks)
        micro_batches_per_step(samples_in_update(self), self.trained_steps(), self)
        if self.kl_steps > self.trained_steps():
            raise ValueError(f"kl_steps must be at most the {self.trained_steps()} trained steps: got {self.kl_steps}")

    def check_values(self):
        """Raise on the first setting whose value cannot work, whether an option or a config.json has brought it."""
        for field in dataclasses.fields(self):
            value, choices = getattr(self, field.name), field.metadata["choices"]
            if choices and value not in choices:
                raise ValueError(f"{field.name} must be one of {', '.join(choices)}: got {value!r}")
            bounds = field.metadata["bounds"]
            if bounds and not bounds[0] <= value <= bounds[1]:  # nan is within no bounds
                low, high = bounds
                rule = f"{field.name} must lie in [{low:g}, {high:g}]"
                raise ValueError(f"{rule}: got {value}; the default is {field.default}")
            if field.type is str and unprintable(value):
                rule = f"{field.name} must not contain characters that cannot be seen or written"
                raise ValueError(f"{rule}: got {value!r}, with {unprintable(value)}; remove it")
        reward_weights(self.reward_weights)
        if self.kl_schedule == "controller":
            LambdaController(self.kl_lambda_early, self.kl_lambda, self.kl_target)
        if self.name:
            check_name(self.name)
        check_folder_to_make("runs", self.runs)
        if self.prompt_cache:
            check_folder_to_make("prompt_cache", self.prompt_cache)

    def check_ranks(self, ranks):
        """Raise unless this number of ranks can share the models, the videos and the groups evenly."""
        if ranks % self.replicate:
            raise ValueError(
                f"replicate must divide the number of ranks: got {self.replicate} and {ranks}; use the number of "
                "machines, or 1"
            )
        if self.optimizer == "muon" and 0 < self.lora_rank < ranks // self.replicate:
            # torch.optim.Muon fails where a matrix has fewer rows than shards, in the first update (torch 2.13 to 2.15;
            # 2.11 does not). A full model's matrices have many.
            raise ValueError(
                "with muon, lora_rank must be at least the number of ranks that share a model, so that each has a row "
                f"of every matrix: got {self.lora_rank} and {ranks // self.replicate}; raise lora_rank or replicate, "
                "or use adamw"
            )
        if ranks // self.replicate % self.context_parallel:
            raise ValueError(
                "context_parallel must divide the number of ranks in each replicate group: got "
                f"{self.context_parallel} and {ranks // self.replicate}; use a divisor, or another number of ranks"
            )
        makers = ranks // self.context_parallel  # of videos of their own
        if self.batch_size * makers % self.group_size:
            rule = "group_size must divide batch_size × ranks"
            if self.context_parallel > 1:
                rule += " / context_parallel"
            raise ValueError(
                f"{rule}: got {self.group_size} and {self.batch_size} × {makers}; use a batch_size that is a multiple "
                f"of {self.group_size}, or another number of ranks"
            )
        if self.model == TOY and ranks > 1:
            raise ValueError(f"the toy runs in one process: got {ranks} ranks; start it with python, not torchrun")

    def check_video_model(self):
        """Raise on sizes, prompts and model files that cannot work. The files of a hub id cannot be seen from here."""
        from video import files, hunyuan
        from video.prompts import check_prompts

        for size in ((self.height, self.width), (self.eval_height, self.eval_width)):
            hunyuan.check_context(self.frames, *size, self.context_parallel)
        prompts = read_prompts(self.prompts) + read_prompts(self.eval_prompts)
        if self.model == TINY:
            from tiny.hunyuan import tiny_tokenizer

            tokenizers = tiny_tokenizer(), files.ByT5Tokenizer()
        elif self.model == MINI:
            from tiny import miniature

            tokenizers = miniature.check(prompts)
        else:
            tokenizers = files.check_model(self.model)
        if tokenizers:
            check_prompts(prompts, *tokenizers)

    def check_model_words(self, chosen, planned):
        """What the model says of itself beside the settings, of which somebody chose some. A plan downloads nothing."""
        from video import files
        from video.prompts import check_prompts

        is_folder = files.is_folder(self.model)
        if planned and not is_folder:
            return
        files.check_model_words(self.model, self.guidance_scale, self.shift, chosen)
        if not is_folder:  # the folder of a hub id, now that it is there
            tokenizers = files.check_model(files.model_folder(self.model))
            check_prompts(read_prompts(self.prompts) + read_prompts(self.eval_prompts), *tokenizers)

    def check_rewards(self):
        """Raise unless the files of the reward models fit together, and an own reward keeps its contract."""
        if self.reward:
            self.try_own_reward()
        else:
            known = ["VQ", "MQ", "TA", *(["distance"] if self.model in (TOY, MINI) else [])]
            check_weights(reward_weights(self.reward_weights), known)
        if self.model in (TOY, MINI):  # both have the toy's analytic rewards
            return
        from video import clip, videoalign

        for name in ("clip_score", "pick_score"):
            if getattr(self, name):
                clip.check_clip(name, getattr(self, name))
        if self.model == TINY or self.reward:
            return
        for name, what in (("videoalign", "checkpoint"), ("videoalign_repo", "clone of its code")):
            given = getattr(self, name)
            if not given or not Path(given).is_dir():
                raise ValueError(f"--{name} must be the folder of VideoAlign's {what}: got {given!r}; see the README")
        videoalign.check_folder(Path(self.videoalign), self.videoalign_repo)

    def try_own_reward(self):
        """Let it score two grey videos of a rollout's size, before any weight is loaded.

        Two, so that a mean over the videos does not pass for the score of each.
        """
        from toy import world

        shape, prompt = (world.FRAMES, 3, world.SIDE, world.SIDE), world.PROMPTS[0]
        if self.model != TOY:
            shape, prompt = (self.frames, 3, self.height, self.width), read_prompts(self.prompts)[0]
        videos = torch.full((2, *shape), 128, dtype=torch.uint8)
        try_reward(load_reward(self.reward), videos, prompt, reward_weights(self.reward_weights))

    def check_new_run(self):
        """Raise where the run folder exists, or where a restart of this launch could not find it.

        Only the first rank looks: it also makes the folder, maybe before a slower rank comes here. Where torchrun may
        restart the ranks, folder.open_run looks: it asks all ranks whether this is a restart.
        """
        if may_restart():
            if not self.name:
                rule = "with torchrun --max-restarts a run needs a --name, so that a restart finds its folder"
                raise ValueError(f"{rule}: got none; add --name")
        elif int(os.environ.get("RANK", 0)) == 0 and self.name and is_taken(Path(self.runs) / self.name):
            raise ValueError(taken(Path(self.runs) / self.name))

    @property
    def has_anchor(self):
        """Whether the KL has a position term, which needs a reference."""
        w_pos, _ = kl_weights(self.kl_mode, self.beta_pos, self.beta_vel)
        return w_pos > 0

    def sde(self, iteration=0):
        """The sampler of an iteration's rollouts, on all ranks the same."""
        sigmas = sigma_schedule(self.num_steps, self.shift)
        sde = SDE(self.sde_type, self.eta, sigmas, self.noisy_last_step)
        if not self.sde_steps:
            return sde
        first = math.ceil(self.sde_share * self.num_steps)
        candidates = sde.stochastic[:first].nonzero().flatten()
        if self.sde_steps > len(candidates):
            rule = f"sde_steps are drawn from the {len(candidates)} noisy steps in the first sde_share of the schedule"
            raise ValueError(f"{rule}: got {self.sde_steps}; lower it, or raise sde_share or num_steps")
        order = torch.randperm(len(candidates), generator=generator(self.seed, "sde_steps", iteration))
        drawn = candidates[order[: self.sde_steps]]
        return SDE(self.sde_type, self.eta, sigmas, self.noisy_last_step, drawn)

    def trained_steps(self):
        """Steps of a rollout that have noise, and so a log-probability."""
        stochastic = int(self.sde().stochastic.sum())
        if stochastic == 0:
            raise ValueError(
                f"a rollout needs at least one noisy step: got none in {self.num_steps} steps; raise num_steps or keep "
                "noisy_last_step"
            )
        return stochastic


SETTINGS = [field.name for field in dataclasses.fields(Config)]


def check_name(name):
    """A run's name is one folder in --runs, which no name leads out of."""
    leaves = "/" in name or "\\" in name or name.startswith(".")
    if leaves or name != name.strip() or len(name.encode()) > 200:
        rule = "name must be a single folder name: no / or \\, no leading dot, no space at its ends, at most 200 bytes"
        raise ValueError(f"{rule}: got {name!r}; to put the run elsewhere, use --runs")


def check_folder_to_make(setting, folder):
    """Raise unless the folder is there or can be made, and can be written to."""
    rule = f"{setting} must be a folder that exists or can be created"
    if not folder:
        raise ValueError(f"{rule}: got none; give one")
    path = Path(folder).absolute()
    existing = next(ancestor for ancestor in (path, *path.parents) if os.path.lexists(ancestor))
    longest = max(len(os.fsencode(part)) for part in path.parts)  # file systems take 255 bytes
    if longest > 255 or not existing.is_dir() or not os.access(existing, os.W_OK):
        cause = f"{existing} is not a folder in which it can be created"
        raise ValueError(f"{rule}: got {folder!r}, and {cause}; choose another")


# ------------------------------------------------------------------------------------------------ command line
USAGE = (
    "train.py [--preset NAME] [--dry-run] [--option VALUE …]   or   "
    "train.py --resume RUN [--from CHECKPOINT] [--allow NAME,…] [--iterations N | --export DIR]"
)
PLAN_OPTIONS = {  # of a dry run: type, bounds, help
    "gpus": (int, 1, 10**5, "GPUs to plan for [default: this launch's; video models without one: 8]"),
    "gpu_memory_gb": (float, 1, 10**4, "memory of one GPU in GiB; refuses what cannot fit"),
    "gpu_tflops": (float, 1e-3, 10**5, "TFLOP/s of the transformer, to compute the hours [default: an H200's]"),
    "gpu_price": (float, 1e-3, 10**4, "dollars per GPU-hour; prints what the run costs"),
}


def parse(arguments):
    """(config, options) from the command line. Unknown options, and those that a resumed run cannot take, are
    refused.
    """
    parser = command_line()
    options = parser.parse_args(arguments)
    try:
        return resolve(options), options
    except (ValueError, OSError) as error:
        parser.error(" ".join(str(error).split()))  # one line, whatever a library's message looks like


def command_line():
    """The parser: what to do, then every setting, in groups."""
    parser = argparse.ArgumentParser(
        usage=USAGE,
        description="Train a video flow model with SAGE-GRPO. Without options: the toy, on a laptop.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--preset", choices=PRESETS, help="settings to start from [default: toy]")
    parser.add_argument("--resume", metavar="RUN", help="run folder to continue, with the settings of its config.json")
    parser.add_argument("--from", dest="origin", metavar="CHECKPOINT", help="with --resume: not from the newest one")
    allow = "with --resume: settings that may differ from the checkpoint's"
    parser.add_argument("--allow", metavar="NAME,…", default="", help=allow)
    parser.add_argument("--export", metavar="DIR", help="with --resume: write the checkpoint for diffusers, and stop")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved settings and the plan, and stop")
    for name, (kind, _, _, text) in PLAN_OPTIONS.items():
        parser.add_argument(f"--{name}", type=kind, help=f"dry run: {text}")
    trace = "dry run: also trace an iteration on tensors without data: memory by phase, FLOPs, messages; takes minutes"
    parser.add_argument("--trace", action="store_true", help=trace)
    for title, settings in GROUPS.items():
        group = parser.add_argument_group(title)
        for field in dataclasses.fields(settings):
            kind = {"action": argparse.BooleanOptionalAction} if field.type is bool else {"type": field.type}
            if field.metadata["choices"]:
                kind["choices"] = field.metadata["choices"]
            group.add_argument(f"--{field.name}", default=argparse.SUPPRESS, help=help_line(field), **kind)
    return parser


def help_line(field):
    """What a setting is, its default, and the presets that set it otherwise."""
    values = [f"default {field.default!r}"]
    for preset, settings in PRESETS.items():
        if field.name in settings:
            values.append(f"{preset} {settings[field.name]!r}")
    text = field.metadata["help"].replace("%", "%%")  # argparse fills in %-formats
    return f"{text} ({'; '.join(values)})"


def resolve(options):
    """The Config of a command line, checked; a ValueError or an OSError says what cannot be."""
    given = {name: value for name, value in vars(options).items() if name in SETTINGS}
    options.allow = [name for name in options.allow.split(",") if name]
    check_options(options, given)
    if options.resume:
        config = Config(**read_settings(options.resume, SETTINGS) | given)
    else:
        config = preset_config(options.preset or TOY, given, options)
    chosen = SETTINGS if options.resume else given  # those of a run that goes on were accepted when it began
    exports = options.export is not None
    trains = not exports and not options.dry_run
    checks = [
        (exports, partial(check_export, config, options.export)),
        (not exports, partial(config.check, planned_ranks(config, options))),
        (not exports and config.model != TOY, config.check_video_model),
        (trains, config.check_rewards),
        (trains and not options.resume, config.check_new_run),  # a run that goes on has its folder
        (not exports and config.model not in BUILT_IN, partial(config.check_model_words, chosen, options.dry_run)),
    ]
    for applies, check in checks:
        if applies:
            check()
    return config


def may_restart():
    return int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) > 0


def check_options(options, given):
    """Raise on options that do not go together, or that are out of bounds. `given`: the settings among them."""
    foreign = sorted({*options.allow} - {*SETTINGS, LOG})
    fixed = sorted(given.keys() - {"iterations"})
    if options.preset:
        fixed.append("preset")
    beside_export = sorted({*options.allow} - {"model"})
    if hasattr(options, "iterations"):
        beside_export.append("iterations")
    planned = [name for name in PLAN_OPTIONS if getattr(options, name) is not None]
    faults = [
        (foreign, f"--allow takes names of settings, or {LOG}, separated by commas: got {', '.join(foreign)}"),
        (
            options.resume == "",
            "--resume must name a run folder: got ''; a shell variable in the command is probably unset",
        ),
        (
            not options.resume and (options.allow or options.origin is not None),
            "--from and --allow only apply to a resumed run: add --resume RUN",
        ),
        (
            options.origin is not None and may_restart(),
            "--from would return to that checkpoint at each restart: drop torchrun's --max-restarts, or move the newer "
            "checkpoints out of the run folder and drop --from",
        ),
        (
            options.resume and fixed,
            "--resume takes a run's settings from its config.json; only --iterations may change: got "
            f"{', '.join(fixed)}; to change another setting, edit that file and name it in --allow",
        ),
        (planned and not options.dry_run, f"--{', --'.join(PLAN_OPTIONS)} only apply to a plan: add --dry-run"),
        (options.trace and not options.dry_run, "--trace only applies to a plan: add --dry-run"),
        (
            options.export is not None and not options.resume,
            "--export writes a model for diffusers, so it needs --resume with a run of HunyuanVideo: got none",
        ),
        (
            options.export is not None and beside_export,
            "--export can only be combined with --resume, --from and --allow model: got " + ", ".join(beside_export),
        ),
    ]
    for fault, message in faults:
        if fault:
            raise ValueError(message)
    for name in planned:
        _, low, high, _ = PLAN_OPTIONS[name]
        value = getattr(options, name)
        if not low <= value <= high:
            raise ValueError(f"{name} must lie in [{low:g}, {high:g}]: got {value}; give what one machine or GPU has")


def check_export(config, folder):
    """Any number of ranks can export, and no prompt and no reward is needed."""
    if config.model == TOY:
        raise ValueError("--export writes a model for diffusers, so it needs a run of HunyuanVideo: got the toy's")
    check_folder_to_make("export", folder)
    is_first = int(os.environ.get("RANK", 0)) == 0  # which may have begun to write before a slower rank comes here
    if is_first and os.path.isdir(folder) and os.listdir(folder):
        raise ValueError(f"export must be a new or empty folder: {folder} holds files; choose another")
    config.replicate = config.context_parallel = 1  # so that any number of ranks will do
    config.check_values()
    if config.model not in BUILT_IN:
        from video import files

        files.check_model(config.model)


def preset_config(preset, given, options):
    """A preset with the command line's own settings over it."""
    video = [field.name for group in (VideoModel, Hardware) for field in dataclasses.fields(group)]
    unread = {TOY: video, TINY: ["model"], MINI: ["model", *MINI_UNREAD]}
    foreign = sorted(name for name in unread.get(preset, []) if name in given)
    if foreign:
        raise ValueError(f"the {preset} preset does not read {', '.join(foreign)}; use --preset paper, or omit that")
    config = Config(**PRESETS[preset] | given)
    if preset == MINI:
        share_batch(config, given, max(1, planned_ranks(config, options) // config.context_parallel))
    return config


def share_batch(config, given, ranks):
    """The miniature's samples are shared by the ranks, so that its result does not depend on how many there are."""
    if "batch_size" not in given:
        if config.batch_size % ranks:
            rule = f"the number of ranks must divide the {config.batch_size} samples of the mini preset"
            raise ValueError(f"{rule}: got {ranks}; use a divisor, or set --batch_size")
        config.batch_size //= ranks
    if "micro_batch" not in given:
        config.micro_batch = math.gcd(config.micro_batch, config.batch_size)


def planned_ranks(config, options):
    """The ranks of this launch: torchrun's, or else the GPUs that train.launch_on_all_gpus will take.

    A dry run may state them; where it does not, and the machine has no GPU, a video model is planned for 8.
    """
    if options.gpus:
        return options.gpus
    if "WORLD_SIZE" in os.environ:
        return int(os.environ["WORLD_SIZE"])
    if config.model == TOY:
        return 1
    if torch.cuda.device_count():
        return torch.cuda.device_count()
    return 8 if options.dry_run and config.model not in BUILT_IN else 1


# ------------------------------------------------------------------------------------------------ comparing two runs
# Settings that a resumed run may change freely: what is computed does not depend on them.
FREE = (
    "name runs iterations checkpoint_every keep_checkpoints eval_every micro_batch anchor_offload prompt_cache"
    " reward_timeout checkpointing attention replicate context_parallel compile"
).split()
# What a run of the miniature may change and still be compared with its reference.
BAND_COVERS = {*FREE, "seed", "compute_dtype", "vae_dtype", "batch_size"} - {"iterations"}
PROMPT_FILES = ("prompts", "eval_prompts")  # compared by what they hold, not by their place


def prompt_digests(config):
    """{setting: SHA-256} of the prompts in a run's two files and of its own reward, which may move but not change."""
    digests = {}
    if config.reward:
        file, _, name = config.reward.rpartition(":")
        digests["reward"] = f"{hashlib.sha256(Path(file).read_bytes()).hexdigest()}:{name}"
    if config.model == TOY:
        return digests
    for name in PROMPT_FILES:
        text = json.dumps(read_prompts(getattr(config, name)))
        digests[name] = hashlib.sha256(text.encode()).hexdigest()
    return digests


def common_facts(config, options):
    """{name: value} of what must be the same on all ranks: the command line, and what the files that it names hold."""
    facts = {name: value for name, value in vars(options).items() if name not in SETTINGS}
    files = (*PROMPT_FILES, "reward")
    facts |= {name: value for name, value in dataclasses.asdict(config).items() if name not in files}
    if options.export is None:  # an export reads neither prompts nor a reward
        facts |= {name: f"SHA-256 {digest}" for name, digest in prompt_digests(config).items()}
    return facts


def binding(config, ranks, digests):
    """{name: value} of all that a run computes with and must keep when it goes on."""
    values = {name: value for name, value in dataclasses.asdict(config).items() if name not in FREE}
    values["batch_size"] = f"{config.batch_size * ranks} on all ranks"
    for name in PROMPT_FILES:
        values[name] = f"prompts of SHA-256 {digests.get(name)!s:.12}…"
    values["reward"] = (
        f"a file and function of SHA-256 {digests['reward']}" if "reward" in digests else "the model's own"
    )
    if config.train_samples:  # chosen among those of a group that lie on one rank
        held = math.gcd(config.batch_size, config.group_size)
        values["train_samples"] = f"{config.train_samples} of {config.group_size}, chosen among {held}"
    return values


def allowed_changes(config, ranks, progress, allowed):
    """{name: [old, new]} of the settings that differ from a checkpoint's; FolderError where one is not in `allowed`.

    A checkpoint of a version that had no such setting counts as having its default. Every rank must call it.
    """
    done = progress["iteration"]
    if config.iterations < done:
        raise FolderError(
            f"iterations must be at least the {done} that the run has already made: got {config.iterations}"
        )
    try:
        saved = Config(**{name: value for name, value in progress["settings"].items() if name in SETTINGS})
    except ValueError as error:
        raise FolderError(f"the checkpoint's own settings are invalid: {error}") from None
    old = binding(saved, progress["ranks"], progress["prompt_digests"])
    new = binding(config, ranks, prompt_digests(config))
    files, saved_files = on_first_rank(file_digests, config), progress["file_digests"]
    for name in files.keys() & saved_files.keys():  # which may move: what lies there is compared
        old[name], new[name] = first_difference(saved_files[name], files[name])
    changes = {name: [old[name], new[name]] for name in sorted(new) if old[name] != new[name]}
    refuse_other_tensors(saved, config, changes)
    refused = {name: change for name, change in changes.items() if name not in allowed}
    if refused:
        described = ", ".join(f"{name} {before!r} → {after!r}" for name, (before, after) in refused.items())
        raise FolderError(
            f"a resumed run must keep the settings of its checkpoint: got {described}. Restore them (settings are in "
            "config.json), or change the algorithm on purpose with "
            f"--allow {','.join(changes)}; the log will record it"
        )
    return changes


def refuse_other_tensors(saved, config, changes):
    """FolderError on changes of settings that decide which tensors there are: no checkpoint could be loaded."""
    fixed = ["lora_rank", "optimizer"]
    if saved.has_anchor != config.has_anchor:
        fixed += ["kl_mode", "beta_pos"]
    if saved.model in BUILT_IN or config.model in BUILT_IN:
        fixed.append("model")
    found = [f"{name} {before!r} → {after!r}" for name, (before, after) in changes.items() if name in fixed]
    if found:
        raise FolderError(
            f"a checkpoint's tensors depend on {', '.join(fixed)}, so --allow cannot change these: got "
            f"{', '.join(found)}. Restore it in config.json, or write the weights with --export and start a new run"
        )


# ------------------------------------------------------------------------------------------------ files that are read
SMALL_FILE = 2**24  # bytes


def input_digests(config):
    """What a checkpoint holds of the files that a run reads. Every rank must call it."""
    return {"prompt_digests": prompt_digests(config), "file_digests": on_first_rank(file_digests, config)}


def file_digests(config):
    """{setting: {file: text that another file would not have}} of the models that a run reads on this machine."""
    names = [name for name in ("clip_score", "pick_score") if getattr(config, name)]
    if config.model not in BUILT_IN:  # these write their files themselves
        names += ["model"] if config.reward else ["model", "videoalign", "videoalign_repo"]
    return {name: states_of_files(name, getattr(config, name)) for name in names}


def states_of_files(name, place):
    """{file: its state} of a folder and the folders in it; of a hub id its revision in this machine's cache."""
    if not place or not Path(place).is_dir():
        return {"revision": f"{hub_revision(name, place)} of {place!r}"}
    patterns = ("prompt_template.py",) if name == "videoalign_repo" else ("[!.]*", "[!.]*/[!.]*")
    paths = sorted(path for pattern in patterns for path in Path(place).glob(pattern))
    files = [path for path in paths if path.is_file() and path.suffix != ".md"]
    return {str(path.relative_to(place)): state_of_file(path) for path in files}


def hub_revision(name, hub_id):
    from huggingface_hub import try_to_load_from_cache

    with contextlib.suppress(ValueError):  # it is no hub id
        found = try_to_load_from_cache(hub_id, "model_index.json" if name == "model" else "config.json")
        if isinstance(found, str):
            return Path(found).parent.name
    return "none in this machine's cache"


def state_of_file(path):
    """Of a small file the contents. A model's 54 GB must not be read for this: of a large one size and time."""
    state = path.stat()
    if state.st_size > SMALL_FILE:
        return f"{state.st_size:,} bytes of {datetime.fromtimestamp(state.st_mtime, UTC).isoformat()}"
    return short_digest(path)


def first_difference(saved, now):
    """Two {file: state} as two texts, of the first file in which they differ; the same text where they do not."""
    differing = sorted(file for file in {*saved, *now} if saved.get(file) != now.get(file))
    if not differing:
        return "the same files", "the same files"
    more = f", and {len(differing) - 1} more" if differing[1:] else ""
    return tuple(f"{differing[0]}: {files.get(differing[0], 'missing')}{more}" for files in (saved, now))


def check_exported_model(config, progress, allowed):
    """FolderError where an export would be of another model than the run has trained. Every rank must call it."""
    now = on_first_rank(file_digests, config)
    before, after = first_difference(progress["file_digests"].get("model", {}), now.get("model", {}))
    if before != after and "model" not in allowed:
        raise FolderError(
            f"an export needs the model that the run started with: got {before} → {after}. Restore it, or add "
            "--allow model"
        )


def departures(config, ranks):
    """The settings in which a run of the miniature differs from its reference, but for those that its band covers."""
    preset = Config(**PRESETS[MINI] | (MINI_LORA if config.lora_rank else {}))
    differing = [
        name for name in SETTINGS if name not in BAND_COVERS and getattr(config, name) != getattr(preset, name)
    ]
    if config.batch_size * ranks != preset.batch_size:
        differing.append("batch_size")
    return differing
