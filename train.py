"""Train a video flow model with SAGE-GRPO.

    python train.py                        the toy, on a laptop, in about a minute
    python train.py --preset tiny          the real classes with tiny random weights: proves the path of the full run
    python train.py --preset mini          the real classes with small trained weights: that path learns, and says so
    python train.py --preset paper ...     HunyuanVideo-1.5 with VideoAlign, on all GPUs of this machine
    python train.py --preset release ...   the same with the settings of the released script
    torchrun ... train.py --preset paper   over several machines
    python train.py --resume runs/toy-1    go on where a run stopped, bit for bit on a CPU
    ... --resume RUN --from iteration-000002 --allow eta   from an older checkpoint; with a changed config.json
    add --dry-run                          print settings and plan, start nothing

The loop is `train`. What it calls: collect, update and evaluate in grpo.py, the settings in config.py, the run folder
in checkpoint.py, a policy and a reward from toy/ or from hunyuan.py and videoalign.py.
"""

import json
import os
import shlex
import sys
from dataclasses import asdict
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

import checkpoint
import pictures
from checkpoint import generator
from config import (
    BUILT_IN,
    MINI,
    TINY,
    TOY,
    allowed_changes,
    departures,
    parse,
    planned_ranks,
    prompt_digests,
)
from grpo import AllRanks, OneRank, collect, evaluate, update
from parallel import context_group, device_mesh
from plan import arithmetic, measured_tflops, print_cost, print_memory, print_trace
from prompts import read_prompts
from sde import SDE, sigma_schedule
from toy import world
from toy.model import ToyPolicy
from trust_region import Anchor, kl_weights
from watch import WATCH, Interrupt, TimedReward, enter, run_as_rank


# ------------------------------------------------------------------------------------------------ ranks
def launch_on_all_gpus(config):
    """`python train.py` on a machine with several GPUs becomes torchrun on all of them.

    After Ctrl-C torchrun kills its ranks in 30 s, unless told otherwise: too soon for the end of an iteration and its
    checkpoint. It gives the same hour to ranks whose neighbour has died; they end by themselves: see watch.py.
    """
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "3600")
    count = torch.cuda.device_count()
    if config.model != TOY and count > 1 and "RANK" not in os.environ:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
        os.execv(sys.executable, [sys.executable, *launcher, *sys.argv])


def join_ranks(backend, timeout):
    """init_process_group, for restarts, too.

    torchrun's store outlives a restart, and PyTorch (2.11 to 2.13) looks up the ranks' addresses in it under the same
    names each time: a rank that comes before another then connects to the one that has died. On one machine the count
    of restarts keeps them apart; each machine counts for itself, so that several cannot agree on such a name.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or os.environ["GROUP_WORLD_SIZE"] != "1":
        dist.init_process_group(backend, timeout=timeout)
        return
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    store = dist.PrefixStore(f"start-{os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group(backend, timeout=timeout, store=store, rank=rank, world_size=world)


def setup_ranks(config):
    """(ranks, device, mesh) of this process; the mesh is None on one process.

    A collective fails after reward_timeout and half an hour more: one rank may be in its reward that long while the
    others wait for it, and half an hour leaves room for a save or a slow disk. That is for hangs that watch.py does not
    see. NCCL then ends the process, by PyTorch's default for TORCH_NCCL_ASYNC_ERROR_HANDLING, 3.
    """
    local = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", local) if torch.cuda.is_available() and config.model != TOY else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        WATCH.start(OneRank())
        return OneRank(), device, None
    timeout = timedelta(seconds=config.reward_timeout + 1800)
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        join_ranks(backend, timeout)
    ranks = AllRanks(context_group(config.context_parallel, timeout))
    WATCH.start(ranks)
    return ranks, device, device_mesh(device.type, config.replicate)


# ------------------------------------------------------------------------------------------------ randomness
def settle_vector_math():
    """Call the functions that PyTorch takes from oneMKL on one number each, before two threads can meet in one of them.

    On the CPU, oneMKL chooses a kernel at a function's first call. When two threads make that call together, one of
    them may run a kernel with errors of 1.5e-4 (seen with torch 2.13), and two identical runs differ from the first
    batch on.
    """
    number = torch.ones(1)
    for function in (torch.exp, torch.expm1, torch.log, torch.sqrt, torch.sin, torch.cos, torch.tanh, torch.erf):
        function(number)


def sample_generators(config, purpose, iteration, ranks):
    """One generator for each of this rank's samples, by its place among the samples of all ranks.

    So neither noise nor order depends on the number of ranks, and no two iterations or purposes share them.
    """
    first = ranks.rank * config.batch_size
    return [generator(config.seed, purpose, iteration, place) for place in range(first, first + config.batch_size)]


def draw_prompts(prompts, count, seed, iteration):
    """The prompts of one iteration: the list in a new order each epoch, read without gaps."""
    places = range(iteration * count, (iteration + 1) * count)
    orders = {}
    for epoch in {place // len(prompts) for place in places}:
        orders[epoch] = torch.randperm(len(prompts), generator=generator(seed, "prompts", epoch)).tolist()
    return [prompts[orders[place // len(prompts)][place % len(prompts)]] for place in places]


def own_prompts(prompts, config, iteration, ranks):
    """The prompt of each of this rank's samples: every drawn prompt stands G times in a row among all ranks'
    samples.
    """
    drawn = draw_prompts(prompts, config.batch_size * ranks.world // config.group_size, config.seed, iteration)
    first = ranks.rank * config.batch_size
    return [drawn[place // config.group_size] for place in range(first, first + config.batch_size)]


# ------------------------------------------------------------------------------------------------ what a run is made of
def load_hunyuan(config, run, device, mesh, context):
    import hunyuan

    model = run / config.model / "model" if config.model in BUILT_IN else config.model
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
    )


def build(config, run, ranks, device, mesh):
    """(policy, training reward, evaluation reward, training prompts, evaluation prompts)."""
    if config.model == TOY:
        return ToyPolicy(), world.rewards, world.rewards, world.PROMPTS, world.PROMPTS
    prompts, eval_prompts = read_prompts(config.prompts), read_prompts(config.eval_prompts)
    if config.model == TINY:
        prompts, eval_prompts = prompts[:4], eval_prompts[:4]
    if config.model in BUILT_IN:
        write_small_models(config.model, run / config.model, ranks, device)
    reward, eval_reward = build_reward(config, run, device)
    policy = load_hunyuan(config, run, device, mesh, ranks.context)
    if ranks.process == 0:  # now, so that the text encoders come and go once; the other ranks find the prompts encoded
        policy.encode(prompts + eval_prompts)
    wait_for_all(ranks, device)
    policy.encode(prompts + eval_prompts)
    return policy, reward, eval_reward, prompts, eval_prompts


def wait_for_all(ranks, device):
    ranks.gather(torch.zeros(1, device=device)).sum().item()


def write_small_models(model, folder, ranks, device):
    """Write the models that a preset brings along into the run folder, by the first rank."""
    from tiny.hunyuan import build_tiny_hunyuan
    from tiny.miniature import build_miniature
    from tiny.videoalign import build_tiny_template, build_tiny_videoalign

    if ranks.process == 0 and not (folder / "complete").exists():
        if model == MINI:
            build_miniature(folder / "model")
        else:
            build_tiny_hunyuan(folder / "model")
            build_tiny_videoalign(folder / "videoalign")
            build_tiny_template(folder / "videoalign_repo")
        (folder / "complete").touch()
    wait_for_all(ranks, device)  # nobody reads before it is written


def build_reward(config, run, device):
    """(training reward, evaluation reward) of a video model."""
    if config.model == MINI:
        from tiny import miniature

        return miniature.reward, miniature.reward
    from hunyuan import one_after_another
    from videoalign import CLIPScore, PickScore, VideoAlign

    videoalign, repo = config.videoalign, config.videoalign_repo
    if config.model == TINY:
        videoalign, repo = run / TINY / "videoalign", run / TINY / "videoalign_repo"
    reward = one_after_another(lambda: VideoAlign(videoalign, repo, device, fps=config.fps))
    extra = []
    if config.clip_score:
        extra.append(CLIPScore(config.clip_score, device))
    if config.pick_score:
        extra.append(PickScore(config.pick_score, device))
    return reward, partial(evaluation_reward, reward, extra)


def evaluation_reward(reward, extra, videos, prompts):
    """The training reward's scores, their sum `Overall`, and those of the further scorers."""
    scores = reward(videos, prompts)
    scores["Overall"] = sum(scores.values())
    for cause in reward.failures:
        print(f"evaluation: not scored: {cause}", file=sys.stderr)
    for scorer in extra:
        scores |= scorer(videos, prompts)
    return scores


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
        if config.optimizer == "muon" and "blocks." in name and parameter.ndim == 2:
            matrices.append(parameter)
        else:
            others.append(parameter)
    optimizers = []
    if matrices:
        optimizers.append(torch.optim.Muon(matrices, adjust_lr_fn="match_rms_adamw", **settings))
    if others:  # a LoRA consists of matrices alone
        optimizers.append(torch.optim.AdamW(others, **settings))
    return optimizers


def make_anchor(module, config):
    """The reference of the position KL; None where the KL mode has no such term."""
    w_pos, _ = kl_weights(config.kl_mode, config.beta_pos, config.beta_vel)
    if not w_pos:
        return None
    return Anchor(module, None if config.kl_mode == "fixed" else config.anchor_every, config.anchor_offload)


# ------------------------------------------------------------------------------------------------ evaluation
def run_evaluation(policy, reward, prompts, config, iteration, run, ranks):
    """Evaluate on fixed prompts and noise; returns the metrics. What it saves in the run folder:

    samples_before.npy (iteration 0) or samples_after.npy: uint8 thumbnails [prompts · eval_noises, F', 3, H', W'], the
    noises of a prompt beside each other. Of the video model also an mp4 for each prompt and a contact sheet.
    """
    enter("an evaluation")
    repeated = [prompt for prompt in prompts for _ in range(config.eval_noises)]
    ode = SDE(config.sde_type, 0.0, sigma_schedule(config.eval_steps, config.shift))
    noise = [generator(config.seed, "eval", place) for place in range(len(repeated))]
    latent_shape = policy.latent_shape
    folder = run / "eval" / f"iteration-{iteration:06d}"
    if config.model != TOY:
        import hunyuan

        latent_shape = hunyuan.latent_shape(config.frames, config.eval_height, config.eval_width)
    keep = partial(keep_video, config, folder, ranks)
    metrics, thumbnails = evaluate(policy, reward, repeated, latent_shape, ode, noise, config, ranks, keep)
    if ranks.process == 0:
        keep_thumbnails(config, folder, run, iteration, thumbnails.numpy(), repeated)
    return metrics


def keep_thumbnails(config, folder, run, iteration, thumbnails, prompts):
    """samples_before.npy or samples_after.npy, and the video model's contact sheet. A full disk costs these alone."""
    name = "samples_before.npy" if iteration == 0 else "samples_after.npy"
    with checkpoint.warn_of_failure(f"writing {run / name}"):
        np.save(run / f"tmp-{name}", thumbnails)
        (run / f"tmp-{name}").replace(run / name)
    if config.model != TOY:
        with checkpoint.warn_of_failure(f"writing the contact sheet in {folder}"):
            pictures.contact_sheet(thumbnails, prompts, folder / "contact_sheet.png")


def keep_video(config, folder, ranks, place, video):
    """Write the mp4 of a video model's sample; hand on its thumbnail."""
    if config.model != TOY:
        from videoalign import write_video

        with checkpoint.warn_of_failure(f"writing a video in {folder}"):
            folder.mkdir(parents=True, exist_ok=True)
            own = folder / f"rank-{ranks.process}.mp4"  # two may make one video, where evaluate wraps around
            write_video(own, video, config.fps)
            own.replace(folder / f"{place:03d}.mp4")
    return pictures.thumbnail(video)


def evaluation_is_due(config, iteration):
    """At the start, every eval_every iterations, and at the end."""
    return iteration == config.iterations or iteration % config.eval_every == 0


# ------------------------------------------------------------------------------------------------ the run
def main(arguments=None):
    config, options = parse(arguments)
    if options.dry_run:
        print_plan(config, options)
        return
    if arguments is None:  # not when called from Python: it replaces the process
        launch_on_all_gpus(config)
    settle_vector_math()
    ranks, device, mesh = setup_ranks(config)
    try:
        if options.export:
            export(config, options, ranks, device, mesh)
        else:
            start(config, options, ranks, device, mesh)
    except checkpoint.FolderError as error:  # the same one on all ranks
        if ranks.process == 0:
            print(f"train.py: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def print_plan(config, options):
    ranks = planned_ranks(config, options)
    print(json.dumps(asdict(config), indent=1, ensure_ascii=False))
    print(arithmetic(config, ranks))
    if config.model not in BUILT_IN:
        print_cost(config, ranks, options.gpu_tflops)
        print_memory(config, ranks, options.gpu_memory_gb)
        if options.trace:
            print_trace(config, ranks, options.gpu_tflops, make_optimizers, make_anchor)


def export(config, options, ranks, device, mesh):
    import hunyuan

    chosen = checkpoint.choose(options.resume, options.origin)
    policy = load_hunyuan(config, Path(options.resume), device, mesh, ranks.context)
    checkpoint.load_weights(chosen, policy.module)
    hunyuan.export(policy, options.export)
    if ranks.process == 0:
        print(f"exported {chosen.path.name} to {options.export}")


def start(config, options, ranks, device, mesh):
    """Open the run folder and verify what is in it, before anything is built; then train."""
    preset = config.model if config.model in BUILT_IN else options.preset or "paper"
    run, goes_on, restarted = checkpoint.open_run(options.resume, config.runs, config.name, preset)
    with checkpoint.locked(run):
        chosen, changes, log = None, {}, checkpoint.Log(run)
        if goes_on:
            chosen = checkpoint.choose(run, None if restarted else options.origin)
            changes = allowed_changes(config, ranks.world, chosen.progress, options.allow)
            log = checkpoint.Log(run, chosen.progress["log"], renew=checkpoint.LOG in options.allow)
            if log.renewed:
                changes[checkpoint.LOG] = ["damaged", "begun anew"]
        checkpoint.write_settings(run, asdict(config))
        if train(config, run, chosen, changes, log, ranks, device, mesh):
            checkpoint.forget_launch(config.runs)


def train(config, run, chosen, changes, log, ranks, device, mesh):
    """Train from a Checkpoint, or from the start where `chosen` is None. Returns whether all iterations were made."""
    first = ranks.process == 0
    if first:
        print(arithmetic(config, ranks.processes))
    policy, reward, eval_reward, prompts, eval_prompts = build(config, run, ranks, device, mesh)
    reward = TimedReward(reward, config.reward_timeout)
    eval_reward = TimedReward(eval_reward, config.reward_timeout)
    optimizers = make_optimizers(policy.module, config)
    anchor = make_anchor(policy.module, config)
    digests = prompt_digests(config)
    iteration, steps_made, line = 0, 0, {"iteration": 0}  # iterations, and optimizer steps, that the run has made
    if chosen is not None:
        checkpoint.load(chosen, policy.module, optimizers, anchor)
        checkpoint.set_aside_newer(chosen)
        iteration, steps_made = chosen.progress["iteration"], chosen.progress["optimizer_steps_made"]
        line = chosen.progress["line"]
        checkpoint.note_launch(config.runs, run)
    checkpoint.check_room(run / "checkpoints", policy.module, optimizers, anchor, config.keep_checkpoints)
    if evaluation_is_due(config, iteration):  # a resumed run makes the one after its checkpoint again
        line |= run_evaluation(policy, eval_reward, eval_prompts, config, iteration, run, ranks)
    log.append(line)

    interrupt, board = Interrupt(), checkpoint.tensorboard(run) if first else None
    bar = tqdm(initial=iteration, total=config.iterations, desc=run.name, disable=not (first and sys.stderr.isatty()))
    stop = False
    while iteration < config.iterations and not stop:
        noise = sample_generators(config, "noise", iteration, ranks)
        orders = sample_generators(config, "order", iteration, ranks)
        sde = config.sde(iteration)
        texts = own_prompts(prompts, config, iteration, ranks)
        enter("its rollout")
        batch = collect(policy, reward, texts, sde, noise, config, steps_made, ranks, partial(show_step, bar, config))
        enter("its update")
        metrics, steps_made = update(policy, batch, config, optimizers, anchor, orders, iteration, steps_made, ranks)
        for cause in reward.failures:
            print(f"rank {ranks.process}, iteration {iteration + 1}: not scored: {cause}", file=sys.stderr)
        iteration += 1
        line = {"iteration": iteration, **batch.metrics, **metrics, "optimizer_steps_made": steps_made}
        line |= load_of_gpu(config, policy, line, device, ranks)
        if changes:  # settings that the run went on with; the first line that they made says so
            line["allowed"], changes = changes, {}

        stop = any(ranks.exchange(interrupt.asked))  # all ranks stop together
        if stop or iteration == config.iterations or iteration % config.checkpoint_every == 0:
            progress = {"iteration": iteration, "optimizer_steps_made": steps_made, "line": line, "log": log.position()}
            progress |= {"ranks": ranks.world, "settings": asdict(config), "prompt_digests": digests}
            enter("a save")
            checkpoint.save(run / "checkpoints", policy.module, optimizers, anchor, progress, config.keep_checkpoints)
        if evaluation_is_due(config, iteration):  # after the save, so that nothing is lost where it fails
            line |= run_evaluation(policy, eval_reward, eval_prompts, config, iteration, run, ranks)
        log.append(line)  # a line is written once, as a whole
        if first:
            show_iteration(run, config, bar, board, line)
    bar.close()
    done = iteration == config.iterations
    if first:
        show_end(config, run, iteration, done, eval_prompts, ranks.world)
    return done


def load_of_gpu(config, policy, line, device, ranks):
    """What the last iteration made of a GPU, or of a CPU.

    tflops         of the video model: FLOPs of the passes that the line counts, by the seconds of rollout and update
    peak_gpu_gib   of a GPU: the most that tensors took since the last call, on the rank with most
    """
    if config.model == TOY:
        return {}
    import hunyuan

    tokens = hunyuan.token_count(config.frames, config.height, config.width)
    rate = {"tflops": measured_tflops(config, line, hunyuan.pass_flops(tokens, policy.module.config))}
    if device.type != "cuda":
        return rate
    peak = torch.cuda.max_memory_allocated(device) / 2**30
    torch.cuda.reset_peak_memory_stats(device)
    return rate | {"peak_gpu_gib": max(ranks.exchange(peak))}


def show_step(bar, config, k):
    bar.set_postfix_str(f"rollout step {k + 1} of {config.num_steps}")


def show_iteration(run, config, bar, board, line):
    """On the bar, or as a line of its own where stderr is a file: a bar would fill it with its redrawings."""
    if "eval_reward" in line and line["iteration"] < config.iterations:  # the last ones come with the run's pictures
        draw_curves(run, config)
    bar.update()
    kl = line.get("kl_position", line["kl_velocity"])
    bar.set_postfix(reward=f"{line['reward_mean']:.3f}", kl=f"{kl:.1e}")
    if bar.disable:
        seconds = sum(value for name, value in line.items() if name.endswith("_seconds"))
        numbers = f"reward {line['reward_mean']:.4f}, KL {kl:.1e}, gradient norm {line['grad_norm']:.3g}"
        evaluated = f", evaluated {line['eval_reward']:.4f}" if "eval_reward" in line else ""
        told = f"iteration {line['iteration']} of {bar.total}: {numbers}, {seconds:.1f} s{evaluated}"
        print(told, file=sys.stderr, flush=True)
    if board is not None:
        for name, value in line.items():
            if name != "allowed":
                board.add_scalar(name, value, line["iteration"])


def draw_curves(run, config):
    with checkpoint.warn_of_failure("drawing the curves", Exception):
        pictures.curves(checkpoint.read_log(run), config.clip_range, run / "curves.png")


def show_end(config, run, iteration, done, eval_prompts, world_size):
    """Draw the run, which is saved by now. Where an older file that the pictures show is damaged, there are none."""
    if not done:
        draw_curves(run, config)
        print(f"stopped after iteration {iteration}; go on with: python train.py --resume {shlex.quote(str(run))}")
        return
    with checkpoint.warn_of_failure("drawing the run's pictures", Exception):
        pictures.report(run, checkpoint.read_log(run), config, eval_prompts)
    if config.model == MINI:
        from tiny import miniature

        differing = departures(config, world_size)
        print(miniature.verdict(checkpoint.read_log(run), differing, lora=config.lora_rank > 0))


if __name__ == "__main__":
    run_as_rank(main)
    if dist.is_initialized():
        dist.destroy_process_group()
