"""The settings of a run, its presets and the command line.

Every setting is a field of Config with its line of --help and, in brackets, its source: [paper: …] is printed in the
paper, [release: …] was read in the released code (post_train.py, hyvideo/utils/grpo_utils.py and run_post_train.sh of
it).
"""

import argparse
import dataclasses
import hashlib
import json
import math
import os
import reprlib
from dataclasses import dataclass
from pathlib import Path

import torch

import checkpoint
from grpo import METHOD, OPTIMIZATION, GRPOConfig, micro_batches_per_step, option
from prompts import BLOBS, STARTER_EVAL, STARTER_TRAIN, read_prompts, unprintable
from sde import SDE, SDE_TYPES, sigma_schedule

TOY, TINY, MINI = "toy", "tiny", "mini"
BUILT_IN = (TOY, TINY, MINI)  # their presets bring the model along, and with it what it can be asked for
RUN, VIDEO, EVALUATION = "run", "video model", "evaluation"  # more groups of --help
PLAN_BOUNDS = {"gpus": (1, 10**5), "gpu_memory_gb": (1, 10**4), "gpu_tflops": (1e-3, 10**5)}  # of a dry run
USAGE = (
    "train.py [--preset NAME] [--dry-run] [--option VALUE …]   or   "
    "train.py --resume RUN [--from CHECKPOINT] [--allow NAME,…] [--iterations N | --export DIR]"
)
# Settings that a resumed run may change freely: what is computed does not depend on them.
FREE = (
    "name runs iterations checkpoint_every keep_checkpoints eval_every micro_batch anchor_offload prompt_cache"
    " reward_timeout checkpointing attention replicate context_parallel compile"
).split()
PROMPT_FILES = ("prompts", "eval_prompts")  # compared by what they hold, not by their place


@dataclass
class Config(GRPOConfig):
    """All settings of a run. Defaults are the paper's; a preset overrides some, an option overrides both."""

    num_steps: int = option(METHOD, 20, "T, sampling steps of a rollout [paper: 20]", bounds=(1, 1000))
    shift: float = option(METHOD, 5.0, "shift of the sigma schedule [release: 5]", bounds=(0.1, 100))
    sde_type: str = option(METHOD, "sage_grpo", "sampler of Table 1, or our exact [paper: sage_grpo]", SDE_TYPES)
    eta: float = option(METHOD, 0.5, "η, exploration scale; at most 1 for cps [release: 0.5]", bounds=(1e-3, 10))
    sde_steps: int = option(
        METHOD,
        0,
        "steps of an iteration that have noise and are trained, drawn anew from the first sde_share of the schedule, "
        "the others are ODE steps; 0 = all [paper: all]",
        bounds=(0, 1000),
    )
    sde_share: float = option(METHOD, 0.6, "share of the schedule that sde_steps are drawn from", bounds=(1e-3, 1))
    noisy_last_step: bool = option(METHOD, True, "inject noise in the last step, too, and train it [release: on]")

    optimizer: str = option(
        OPTIMIZATION,
        "adamw",
        "adamw, or muon for the blocks' matrices and adamw for the rest [release: muon]",
        ("adamw", "muon"),
    )
    learning_rate: float = option(OPTIMIZATION, 1e-5, "learning rate, constant [paper: 1e-5]", bounds=(1e-10, 1))
    weight_decay: float = option(OPTIMIZATION, 0.0, "decoupled weight decay [release: 0.01]", bounds=(0, 1))
    compute_dtype: str = option(
        OPTIMIZATION,
        "bfloat16",
        "of the transformer; masters are float32 [paper: bf16]",
        ("bfloat16", "float32"),
        video=True,
    )
    lora_rank: int = option(
        OPTIMIZATION, 0, "rank of the LoRA; 0 = full fine-tuning [paper: 0]", video=True, bounds=(0, 4096)
    )
    checkpointing: str = option(
        OPTIMIZATION,
        "full",
        "what the backward pass recomputes: all, all but the attention's output (faster, more memory), or nothing",
        ("full", "attention", "none"),
        video=True,
    )
    attention: str = option(
        OPTIMIZATION,
        "auto",
        "kernel of the joint attention, with and without a gradient; auto: the first of these that runs",
        ("auto", "flash", "cudnn", "efficient", "math"),
        video=True,
    )
    replicate: int = option(
        OPTIMIZATION,
        1,
        "groups of ranks that hold a whole model each, which FSDP shards within the group; with one group for each "
        "machine only gradients go from machine to machine, at the price of memory",
        video=True,
        bounds=(1, 10**4),
    )
    compile: bool = option(
        OPTIMIZATION, False, "compile every block of the transformer (torch.compile), in the first minutes", video=True
    )
    context_parallel: int = option(
        OPTIMIZATION,
        1,
        "ranks that share the tokens of one video, for sizes that do not fit, or take too long, on one GPU",
        video=True,
        bounds=(1, 64),
    )
    anchor_offload: bool = option(
        OPTIMIZATION, False, "keep the moving anchor in host memory [release: on]", video=True
    )

    name: str = option(RUN, "", "run folder under --runs [default: the preset's name and a number]")
    runs: str = option(RUN, "runs", "folder that holds the runs")
    seed: int = option(RUN, 0, "seed of every random draw", bounds=(0, 2**63 - 1))
    iterations: int = option(
        RUN, 100, "iterations in all: rollouts of all samples, each with its update [paper: judged after 100]",
        bounds=(1, 10**7),
    )  # fmt: skip
    checkpoint_every: int = option(RUN, 10, "iterations between checkpoints", bounds=(1, 10**7))
    keep_checkpoints: int = option(RUN, 2, "newest checkpoints that are kept", bounds=(1, 1000))
    reward_timeout: float = option(
        RUN, 1800.0, "seconds that one call of the reward may take before the run stops", bounds=(1, 10**6)
    )

    model: str = option(
        VIDEO, "", "the policy: toy, tiny, or a hub id or local folder of HunyuanVideo-1.5 in diffusers format"
    )
    frames: int = option(
        VIDEO, 81, "frames of a video, 4k + 1, and 5 or more [paper: 81]", video=True, bounds=(5, 1025)
    )
    height: int = option(
        VIDEO, 352, "pixels of a rollout [release: its 480p bucket is 352 × 624]", video=True, bounds=(32, 4096)
    )
    width: int = option(VIDEO, 624, "pixels of a rollout", video=True, bounds=(32, 4096))
    fps: int = option(VIDEO, 24, "frames a second [release: 24]", video=True, bounds=(1, 240))
    guidance_scale: float = option(
        VIDEO, 6.0, "classifier-free guidance, in rollout and training [release: 6.0]", video=True, bounds=(0.1, 100)
    )
    guidance_gradient: str = option(
        VIDEO,
        "both",
        "branches of guidance that are trained; conditional alone saves a pass of every two: its partner is stored by "
        "the rollout [release: both]",
        ("both", "conditional"),
        video=True,
    )
    prompts: str = option(
        VIDEO, STARTER_TRAIN, "training prompts: .txt (one a line), .csv or .jsonl (prompt)", video=True
    )
    prompt_cache: str = option(VIDEO, "", "folder of encoded prompts [default: prompt_cache under --runs]", video=True)
    videoalign: str = option(VIDEO, "", "checkpoint folder of VideoAlign (KwaiVGI/VideoReward)", video=True)
    videoalign_repo: str = option(VIDEO, "", "clone of the VideoAlign repository, for its prompt template", video=True)

    eval_every: int = option(
        EVALUATION, 10, "iterations between evaluations: fixed prompts and noise, ODE sampling", bounds=(1, 10**7)
    )
    eval_steps: int = option(EVALUATION, 40, "sampling steps of an evaluation [paper: 40]", bounds=(1, 1000))
    eval_noises: int = option(EVALUATION, 1, "noises per evaluation prompt", bounds=(1, 1000))
    eval_height: int = option(
        EVALUATION, 480, "pixels of an evaluation video [release: 480 × 864]", video=True, bounds=(32, 4096)
    )
    eval_width: int = option(EVALUATION, 864, "pixels of an evaluation video", video=True, bounds=(32, 4096))
    eval_prompts: str = option(EVALUATION, STARTER_EVAL, "evaluation prompts: .txt, .csv or .jsonl", video=True)
    clip_score: str = option(EVALUATION, "", "hub id or folder of a CLIP model: adds CLIPScore", video=True)
    pick_score: str = option(EVALUATION, "", "hub id or folder of PickScore: adds PickScore", video=True)

    def __post_init__(self):
        for field in dataclasses.fields(self):  # a config.json may have been edited
            allowed = (int, float) if field.type is float else (field.type,)
            value = getattr(self, field.name)
            if type(value) not in allowed:  # isinstance would take True for an int
                raise ValueError(f"{field.name} must be of type {field.type.__name__}: got {reprlib.repr(value)}")

    def check(self, ranks):
        """Raise on the first setting that cannot work on this number of ranks, before anything is loaded."""
        self.check_values()
        if ranks % self.replicate:
            raise ValueError(
                f"replicate must divide the ranks, into groups of equal size: got {self.replicate} and {ranks}; "
                "use the number of machines, or 1"
            )
        if ranks // self.replicate % self.context_parallel:
            raise ValueError(
                "context_parallel must divide the ranks, or those of each of the replicate groups: got "
                f"{self.context_parallel} and {ranks // self.replicate}; use a divisor, or other ranks"
            )
        makers = ranks // self.context_parallel  # of videos of their own
        if self.batch_size * makers % self.group_size:
            rule = "group_size must divide batch_size × ranks"
            if self.context_parallel > 1:
                rule += " / context_parallel"
            raise ValueError(
                f"{rule}: got {self.group_size} and {self.batch_size} × {makers}; use a batch_size that is a multiple "
                f"of {self.group_size}, or other ranks"
            )
        if self.model == TOY and ranks > 1:
            raise ValueError(f"the toy runs on one process: got {ranks} ranks; start it with python, not torchrun")
        micro_batches_per_step(self.batch_size, self.trained_steps(), self)
        if self.kl_steps > self.trained_steps():
            raise ValueError(f"kl_steps are among the {self.trained_steps()} trained steps: got {self.kl_steps}")
        if self.model != TOY:
            self.check_video_model()

    def check_values(self):
        """Raise on the first setting whose value cannot work, whether an option or a config.json has brought it."""
        self.check_algorithm()
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
                raise ValueError(f"{field.name} must be text without control characters: got {value!r}; remove them")
        if self.name:
            check_name(self.name)
        check_folder_to_make("runs", self.runs)
        if self.prompt_cache:
            check_folder_to_make("prompt_cache", self.prompt_cache)

    def check_new_run(self):
        """Apart from check(), since a run that goes on has its folder. So has one whose ranks torchrun starts again.

        Only the first rank looks: it also makes the folder, maybe before a slower rank comes here.
        """
        if int(os.environ.get("RANK", 0)) != 0:
            return
        run = Path(self.runs) / self.name
        started_again = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
        if self.name and checkpoint.is_taken(run) and not started_again:
            raise ValueError(checkpoint.taken(run))

    def check_video_model(self):
        """Raise on sizes, prompts and model files that cannot work. The files of a hub id cannot be seen from here."""
        import hunyuan

        for size in ((self.height, self.width), (self.eval_height, self.eval_width)):
            hunyuan.check_context(self.frames, *size, self.context_parallel)
        prompts = read_prompts(self.prompts) + read_prompts(self.eval_prompts)
        if self.model == TINY:
            from tiny.hunyuan import tiny_tokenizer

            tokenizers = tiny_tokenizer(), hunyuan.ByT5Tokenizer()
        elif self.model == MINI:
            from tiny import miniature

            tokenizers = miniature.check(prompts)
        else:
            tokenizers = hunyuan.check_model(self.model)
        if tokenizers:
            hunyuan.check_prompts(prompts, *tokenizers)

    def check_rewards(self):
        """Apart from check(), since a dry run needs no files of the reward model."""
        if self.model in (TOY, MINI):  # both have the toy's analytic rewards
            return
        import videoalign

        for name in ("clip_score", "pick_score"):
            if getattr(self, name):
                videoalign.check_clip(name, getattr(self, name))
        if self.model == TINY:
            return
        for name, what in (("videoalign", "checkpoint"), ("videoalign_repo", "clone of its code")):
            given = getattr(self, name)
            if not given or not Path(given).is_dir():
                raise ValueError(f"--{name} must be the folder of VideoAlign's {what}: got {given!r}, see the README")
        videoalign.check_folder(Path(self.videoalign), self.videoalign_repo)

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
        order = torch.randperm(len(candidates), generator=checkpoint.generator(self.seed, "sde_steps", iteration))
        drawn = candidates[order[: self.sde_steps]]
        return SDE(self.sde_type, self.eta, sigmas, self.noisy_last_step, drawn)

    def trained_steps(self):
        """Steps of a rollout that have noise, and so a log-probability."""
        stochastic = int(self.sde().stochastic.sum())
        if stochastic == 0:
            raise ValueError(
                f"a rollout needs a stochastic step: got none of {self.num_steps}; "
                "raise num_steps or keep noisy_last_step"
            )
        return stochastic


def check_name(name):
    """A run's name is one folder in --runs, which no name leads out of."""
    leaves = "/" in name or "\\" in name or name.startswith(".")
    if leaves or name != name.strip() or len(name.encode()) > 200:
        rule = "name must be one folder's name: no / or \\, no dot in front, no space at its ends, at most 200 bytes"
        raise ValueError(f"{rule}. Got {name!r}; put the run elsewhere with --runs")


def check_folder_to_make(setting, folder):
    """Raise unless the folder is there or can be made, and can be written to."""
    rule = f"{setting} must be a folder that is there or can be made"
    if not folder:
        raise ValueError(f"{rule}: got none; name one")
    path = Path(folder).absolute()
    existing = next(ancestor for ancestor in (path, *path.parents) if os.path.lexists(ancestor))
    longest = max(len(os.fsencode(part)) for part in path.parts)  # file systems take 255 bytes
    if longest > 255 or not existing.is_dir() or not os.access(existing, os.W_OK):
        raise ValueError(f"{rule}: got {folder!r}, and {existing} is no folder that this can be made in; name another")


# The miniature knows one size, and is scored by the toy's rewards.
MINI_UNREAD = ("frames", "height", "width", "eval_height", "eval_width", "videoalign", "videoalign_repo",
               "clip_score", "pick_score")  # fmt: skip
# The LoRA that the miniature has a reference of. It wants a higher learning rate than full training: see RESULTS.md.
MINI_LORA = dict(lora_rank=16, learning_rate=5e-3)
# What a run of the miniature may change and still be compared with its reference.
BAND_COVERS = {*FREE, "seed", "compute_dtype", "batch_size"} - {"iterations"}
PAPER = dict(model="hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-480p_t2v")  # all else: the defaults above
PRESETS = {
    "toy": dict(  # measured on the toy, see RESULTS.md; the rest is the paper's
        model=TOY,
        group_size=16,
        batch_size=128,  # 8 prompts × 16
        micro_batch=128,
        reward_setting="A",  # its three scores lie in [0, 1], and their mean is what the table shows
        iterations=70,
        num_steps=10,
        noisy_last_step=False,
        learning_rate=6e-4,
        kl_schedule="fixed",
        kl_lambda=0.1,
        eval_steps=10,
        eval_noises=2,
    ),
    "tiny": dict(  # the smallest run in which every part of the full run takes part
        model=TINY,
        batch_size=4,
        micro_batch=2,
        iterations=3,
        num_steps=4,
        learning_rate=1e-4,
        anchor_every=2,
        kl_switch=1,
        frames=5,
        height=64,
        width=64,
        compute_dtype="float32",
        eval_height=64,
        eval_width=96,
        eval_steps=4,
        eval_every=2,
        checkpoint_every=2,
    ),
    "mini": dict(  # the paper's recipe on a model that a laptop can train: a rehearsal that ends in a number
        model=MINI,
        group_size=16,
        batch_size=64,  # of all ranks together, see preset_config
        micro_batch=32,
        reward_setting="A",
        iterations=48,
        num_steps=10,
        learning_rate=5e-4,
        kl_schedule="fixed",
        kl_lambda=0.03,
        guidance_scale=3.0,
        frames=9,
        height=48,
        width=48,
        fps=8,
        prompts=BLOBS,
        eval_prompts=BLOBS,
        compute_dtype="float32",
        eval_height=48,
        eval_width=48,
        eval_steps=10,
        eval_every=12,
    ),
    "paper": PAPER,
    "release": PAPER | dict(  # what the released script runs, where that differs from the paper's text
        batch_size=2,
        optimizer="muon",
        weight_decay=0.01,
        kl_schedule="ramp",
        kl_switch=3,  # a fork's ramp takes 100 backward passes, 2.5 iterations of the script's 40
        anchor_offload=True,
    ),
}  # fmt: skip


# ------------------------------------------------------------------------------------------------ command line
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
    """The parser: what to do, then every field of Config, in groups."""
    parser = argparse.ArgumentParser(
        usage=USAGE,
        description="Train a video flow model with SAGE-GRPO. Without options: the toy, on a laptop.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--preset", choices=PRESETS, help="settings to start from [default: toy]")
    parser.add_argument("--resume", metavar="RUN", help="run folder to continue, with the settings of its config.json")
    parser.add_argument("--from", dest="origin", metavar="CHECKPOINT", help="with --resume: not the newest one")
    allow = "with --resume: settings that may differ from the checkpoint's"
    parser.add_argument("--allow", metavar="NAME,…", default="", help=allow)
    parser.add_argument("--export", metavar="DIR", help="with --resume: write the checkpoint for diffusers, and stop")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved settings and the plan, and stop")
    parser.add_argument(
        "--gpus", type=int, help="dry run: GPUs to plan for [default: this launch's; video models without one: 8]"
    )
    parser.add_argument(
        "--gpu_memory_gb", type=float, help="dry run: memory of one GPU in GiB; refuses what cannot fit"
    )
    parser.add_argument(
        "--gpu_tflops", type=float, help="dry run: TFLOP/s that a GPU really reaches, for the hours [default: 400]"
    )
    parser.add_argument(
        "--trace",
        action="store_true",
        help="dry run: also run an iteration on tensors without data; peaks by phase, FLOPs, messages; some minutes",
    )
    groups = {name: parser.add_argument_group(name) for name in (METHOD, OPTIMIZATION, RUN, VIDEO, EVALUATION)}
    for field in dataclasses.fields(Config):
        kind = {"action": argparse.BooleanOptionalAction} if field.type is bool else {"type": field.type}
        if field.metadata["choices"]:
            kind["choices"] = field.metadata["choices"]
        group = groups[field.metadata["group"]]
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
    names = [field.name for field in dataclasses.fields(Config)]
    given = {name: value for name, value in vars(options).items() if name in names}
    options.allow = [name for name in options.allow.split(",") if name]
    foreign = sorted(set(options.allow) - {*names, checkpoint.LOG})
    if foreign:
        known = f"names of settings, or {checkpoint.LOG}, with commas between"
        raise ValueError(f"--allow takes {known}: got {', '.join(foreign)}")
    if options.resume == "":
        raise ValueError("--resume must name a run folder: got ''; a shell variable in the command is probably unset")
    if not options.resume and (options.allow or options.origin is not None):
        raise ValueError("--from and --allow belong to a run that goes on: add --resume RUN")
    if options.resume:
        config = resumed_config(options, given, names)
    else:
        config = preset_config(options.preset or TOY, given, options)
    check_plan(options)
    if options.export is not None:
        check_export(config, options)
        return config
    config.check(planned_ranks(config, options))
    if not options.dry_run:
        config.check_rewards()
        if not options.resume:
            config.check_new_run()
    return config


def check_plan(options):
    """The options that only a dry run reads."""
    for name, (low, high) in PLAN_BOUNDS.items():
        value = getattr(options, name)
        if value is not None and not options.dry_run:
            raise ValueError(f"--{', --'.join(PLAN_BOUNDS)} plan a run that is not started: add --dry-run")
        if value is not None and not low <= value <= high:
            raise ValueError(f"{name} must lie in [{low:g}, {high:g}]: got {value}; name what one machine or GPU has")
    if options.trace and not options.dry_run:
        raise ValueError("--trace belongs to the plan of a run that is not started: add --dry-run")


def check_export(config, options):
    """Any number of ranks can export, and no prompt and no reward is needed."""
    if not options.resume or config.model == TOY:
        rule = "--export writes what diffusers loads, so it needs --resume with a run of HunyuanVideo"
        raise ValueError(f"{rule}: got none")
    foreign = [name for name in ("iterations", "allow") if getattr(options, name, None)]
    if foreign:
        raise ValueError(f"--export takes --resume and --from, nothing else: got {', '.join(foreign)}")
    check_folder_to_make("export", options.export)
    is_first = int(os.environ.get("RANK", 0)) == 0  # which may have begun to write before a slower rank comes here
    if is_first and os.path.isdir(options.export) and os.listdir(options.export):
        raise ValueError(f"export must be a folder that is new or empty: {options.export} holds files; name another")
    config.replicate = config.context_parallel = 1  # so that any number of ranks will do
    config.check_values()
    if config.model not in BUILT_IN:
        import hunyuan

        hunyuan.check_model(config.model)


def resumed_config(options, given, names):
    """The settings of a run that goes on: those of its config.json, but for the number of iterations.

    `allowed_changes` compares them with the checkpoint's, once its files are verified.
    """
    refused = sorted(given.keys() - {"iterations"})
    if options.preset:
        refused.append("preset")
    if refused:
        raise ValueError(
            "--resume takes a run's settings from its config.json; only --iterations may change: got "
            f"{', '.join(refused)}; to change another setting, edit that file and name it in --allow"
        )
    return Config(**checkpoint.read_settings(options.resume, names) | given)


def prompt_digests(config):
    """{setting: SHA-256} of the prompts in a run's two files, which may move but not change under a run."""
    if config.model == TOY:
        return {}
    digests = {}
    for name in PROMPT_FILES:
        text = json.dumps(read_prompts(getattr(config, name)))
        digests[name] = hashlib.sha256(text.encode()).hexdigest()
    return digests


def allowed_changes(config, ranks, progress, allowed):
    """{name: [old, new]} of the settings that differ from a checkpoint's; FolderError where one is not in `allowed`.

    A checkpoint of a version that had no such setting counts as having its default.
    """
    done = progress["iteration"]
    if config.iterations < done:
        raise checkpoint.FolderError(
            f"iterations must be at least those that the run has made: got {config.iterations}, it has made {done}"
        )
    known = {field.name for field in dataclasses.fields(Config)}
    try:
        saved = Config(**{name: value for name, value in progress["settings"].items() if name in known})
    except ValueError as error:
        raise checkpoint.FolderError(f"the checkpoint's own settings cannot be: {error}") from None
    changes = {}
    for name in sorted(known - {*FREE, *PROMPT_FILES, "batch_size"}):
        if getattr(saved, name) != getattr(config, name):
            changes[name] = [getattr(saved, name), getattr(config, name)]
    now = prompt_digests(config)
    for name in PROMPT_FILES:
        digest = progress["prompt_digests"].get(name)
        if digest != now.get(name):
            changes[name] = [f"prompts of SHA-256 {digest!s:.12}…", f"{now.get(name)!s:.12}…"]
    if saved.batch_size * progress["ranks"] != config.batch_size * ranks:
        old, new = f"{saved.batch_size} × {progress['ranks']} ranks", f"{config.batch_size} × {ranks} ranks"
        changes["batch_size"] = [old, new]
    refused = {name: change for name, change in changes.items() if name not in allowed}
    if refused:
        described = ", ".join(f"{name} {old!r} → {new!r}" for name, (old, new) in refused.items())
        raise checkpoint.FolderError(
            f"a run goes on with the settings of its checkpoint: got {described}. Put them back in config.json, or "
            f"change the algorithm on purpose with --allow {','.join(changes)}, which the log will record"
        )
    return changes


def preset_config(preset, given, options):
    """A preset with the command line's own settings over it."""
    video = [field.name for field in dataclasses.fields(Config) if field.metadata["video"]]
    unread = {TOY: ["model", *video], TINY: ["model"], MINI: ["model", *MINI_UNREAD]}
    foreign = sorted(name for name in unread.get(preset, []) if name in given)
    if foreign:
        raise ValueError(f"the {preset} preset does not read {', '.join(foreign)}; use --preset paper, or leave it out")
    config = Config(**PRESETS[preset] | given)
    if preset == MINI:
        share_batch(config, given, max(1, planned_ranks(config, options) // config.context_parallel))
    return config


def share_batch(config, given, ranks):
    """The miniature's samples are shared by the ranks, so that its result does not depend on how many there are."""
    if "batch_size" not in given:
        if config.batch_size % ranks:
            rule = f"the ranks must share the {config.batch_size} samples of the mini preset evenly"
            raise ValueError(f"{rule}: got {ranks}; use as many as divide it, or --batch_size")
        config.batch_size //= ranks
    if "micro_batch" not in given:
        config.micro_batch = math.gcd(config.micro_batch, config.batch_size)


def departures(config, ranks):
    """The settings in which a run of the miniature differs from its reference, but for those that its band covers."""
    preset = Config(**PRESETS[MINI] | (MINI_LORA if config.lora_rank else {}))
    differing = []
    for field in dataclasses.fields(Config):
        if field.name not in BAND_COVERS and getattr(config, field.name) != getattr(preset, field.name):
            differing.append(field.name)
    if config.batch_size * ranks != preset.batch_size:
        differing.append("batch_size")
    return differing


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
