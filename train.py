"""Train a video flow model with SAGE-GRPO.

    python train.py                        the toy, on a laptop, in about a minute
    python train.py --preset tiny          the real classes with tiny random weights: takes the path of the full run
    python train.py --preset mini          the real classes with small trained weights: that path learns, and says so
    python train.py --preset paper ...     HunyuanVideo-1.5 with VideoAlign, on all GPUs of this machine
    python train.py --preset release ...   the same with the settings of the released script
    torchrun ... train.py --preset paper   over several machines
    python train.py --resume runs/toy-1    go on where a run stopped, bit for bit on a CPU
    ... --resume RUN --from iteration-000002 --allow eta   from an older checkpoint; with a changed config.json
    add --dry-run                          print settings and plan, start nothing

`main` opens a run, `train` is its loop. What they call stands below, or in
    grpo.py               collect, update: the algorithm
    engine/config.py      the settings            engine/build.py        policy, rewards, optimizers, anchor
    engine/checkpoint.py  what a save holds       engine/evaluation.py   fixed prompts and noise
    engine/folder.py      the run folder          engine/ranks.py, watch.py   many processes, and the death of one
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch.distributed as dist

from engine import checkpoint
from engine.build import build, load_hunyuan, make_anchor, make_controller, make_optimizers
from engine.config import allowed_changes, check_exported_model, common_facts, input_digests, parse, planned_ranks
from engine.draws import own_prompts, sample_generators
from engine.evaluation import evaluation_is_due, run_evaluation
from engine.folder import LOG, Log, locked, open_run, write_settings
from engine.plan import arithmetic, print_cost, print_memory
from engine.presets import BUILT_IN
from engine.ranks import FolderError, check_launch_variables, launch_on_all_gpus, on_first_rank, own_rank, setup_ranks
from engine.scoring import Scorer
from engine.show import Display, flops_of_a_pass, throughput
from engine.watch import WATCH, enter, run_as_rank
from grpo import collect, update
from video.numerics import settle_vector_math


def main(arguments=None):
    check_launch_variables()
    config, options = parse(arguments)
    if options.dry_run:
        print_plan(config, options)
        return
    if arguments is None:  # not when called from Python: it replaces the process
        launch_on_all_gpus(config)
    settle_vector_math()
    try:
        ranks, device, mesh = setup_ranks(config, common_facts(config, options))
        if options.export:
            export(config, options, ranks, device, mesh)
        else:
            start(config, options, ranks, device, mesh)
    except FolderError as error:  # the same one on all ranks
        if own_rank() == 0:
            print(f"train.py: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def train(config, run, check_lock, chosen, changes, log, ranks, device, mesh):
    """Train from a Checkpoint, or from the start where `chosen` is None."""
    if ranks.rank == 0:
        print(arithmetic(config, ranks.world))
    policy, reward, eval_reward, prompts, eval_prompts = build(config, run, ranks, device, mesh)
    reward = Scorer(reward, ranks, device, config.reward_timeout)
    eval_reward = Scorer(eval_reward, ranks, device, config.reward_timeout)
    optimizers = make_optimizers(policy.module, config)
    anchor = make_anchor(policy.module, config)
    trained = (policy.module, optimizers, anchor)  # what a checkpoint holds
    controller = make_controller(config)
    inputs = input_digests(config)
    iteration, steps_made, line = 0, 0, {"iteration": 0}  # iterations, and optimizer steps, that the run has made
    if chosen is not None:
        iteration, steps_made, line = go_on(chosen, trained, controller)
        changes = changes | changed_kernel(chosen, policy)
    check_lock()
    checkpoint.check_room(run / "checkpoints", *trained, config.keep_checkpoints)
    if evaluation_is_due(config, iteration):  # a resumed run makes the one after its checkpoint again
        line |= run_evaluation(policy, eval_reward, eval_prompts, config, iteration, run, ranks)
        check_lock()
    log.append(line)

    display, forward = Display(run, config, ranks, iteration), flops_of_a_pass(config, policy)
    WATCH.saves = True  # from here on a signal asks for a save
    stop = False
    while iteration < config.iterations and not stop:
        noise = sample_generators(config, "noise", iteration, ranks)
        orders = sample_generators(config, "order", iteration, ranks)
        texts = own_prompts(prompts, config, iteration, ranks)
        sde = config.sde(iteration)
        enter("its rollout")
        batch = collect(policy, reward, texts, sde, noise, config, steps_made, ranks, display.rollout_step)
        reward.check_failed(batch.metrics["reward_failed"], config.max_failed_rewards)
        enter("its update")
        metrics, steps_made = update(
            policy, batch, config, optimizers, anchor, orders, iteration, steps_made, ranks, controller
        )
        iteration += 1
        for cause in reward.failures:
            print(f"rank {ranks.rank}, iteration {iteration}: not scored: {cause}", file=sys.stderr)
        line = {"iteration": iteration, **batch.metrics, **reward.seconds, **metrics}
        line |= {"optimizer_steps_made": steps_made, **throughput(config, forward, line, device, ranks)}
        if changes:  # settings that the run went on with; the first line that they made says so
            line["allowed"], changes = changes, {}

        check_lock()  # what follows writes in the run folder
        stop = any(ranks.exchange(WATCH.asked is not None))  # all ranks stop together
        if stop or iteration == config.iterations or iteration % config.checkpoint_every == 0:
            progress = {"iteration": iteration, "optimizer_steps_made": steps_made, "line": line, **log.state()}
            progress |= {"ranks": ranks.dp_world, "settings": asdict(config), **inputs}
            progress |= {"controller": controller.state_dict() if controller else {}, "attention": kernel_of(policy)}
            enter("a save")
            checkpoint.save(run / "checkpoints", *trained, progress, config.keep_checkpoints)
        # After the save, so that nothing is lost where it fails; where the run stops, its resumption makes it.
        if evaluation_is_due(config, iteration) and (not stop or iteration == config.iterations):
            line |= run_evaluation(policy, eval_reward, eval_prompts, config, iteration, run, ranks)
            check_lock()
        log.append(line)  # a line is written once, as a whole
        display.iteration(line)
    display.end(iteration, eval_prompts, ranks.dp_world)


# ------------------------------------------------------------------------------------------------ what main calls
def print_plan(config, options):
    ranks = planned_ranks(config, options)
    print(json.dumps(asdict(config), indent=1, ensure_ascii=False))
    print(arithmetic(config, ranks))
    if config.model not in BUILT_IN:
        print_cost(config, ranks, options.gpu_tflops, options.gpu_price)
        print_memory(config, ranks, options.gpu_memory_gb)
        if options.trace:
            from engine.trace import print_trace

            print_trace(config, ranks, options.gpu_tflops)


def export(config, options, ranks, device, mesh):
    from video import files

    chosen = checkpoint.choose(options.resume, options.origin)
    check_exported_model(config, chosen.progress, options.allow)
    policy = load_hunyuan(config, Path(options.resume), device, mesh, ranks.context)
    checkpoint.load_weights(chosen, policy.module)
    files.export(policy, options.export, config.shift)
    if ranks.rank == 0:
        print(f"exported {chosen.path.name} to {options.export}")
        if config.lora_rank:  # without prefix=None diffusers loads nothing, and only warns
            names = 'prefix=None, weight_name="pytorch_lora_weights.safetensors"'
            print(f"stock diffusers loads it by transformer.load_lora_adapter({options.export!r}, {names})")


def start(config, options, ranks, device, mesh):
    """Open the run folder and verify what is in it, before anything is built; then train."""
    preset = config.model if config.model in BUILT_IN else options.preset or "paper"
    run = open_run(options.resume, config.runs, config.name, preset)
    with locked(run) as check_lock:
        chosen, changes, log = None, {}, Log(run)
        if options.resume or on_first_rank(checkpoint.listed, run / "checkpoints"):  # a restart finds its own
            chosen = checkpoint.choose(run, options.origin)
            changes = allowed_changes(config, ranks.dp_world, chosen.progress, options.allow)
            log = Log(run, chosen.progress, renew=LOG in options.allow)
            if log.renewed:
                changes[LOG] = ["damaged", "restarted"]
        write_settings(run, asdict(config))
        train(config, run, check_lock, chosen, changes, log, ranks, device, mesh)


# ------------------------------------------------------------------------------------------------ what train calls
def go_on(chosen, trained, controller):
    """Load a Checkpoint. Returns the iterations and optimizer steps that it has made, and its line of the log."""
    checkpoint.load(chosen, *trained)
    if controller is not None and chosen.progress["controller"]:  # empty if kl_schedule was changed since
        controller.load_state_dict(chosen.progress["controller"])
    checkpoint.set_aside_newer(chosen)
    return chosen.progress["iteration"], chosen.progress["optimizer_steps_made"], chosen.progress["line"]


def changed_kernel(chosen, policy):
    """{"attention": [old, new]} where the attention's kernel is not the checkpoint's: it rounds numbers otherwise.

    --attention auto may find another one to be the fastest, say on another card. The toy has no choice.
    """
    before, now = chosen.progress.get("attention"), kernel_of(policy)
    return {} if before in (None, now) else {"attention": [before, now]}


def kernel_of(policy):
    return getattr(policy, "kernel", None)


if __name__ == "__main__":
    run_as_rank(main)
    if dist.is_initialized():
        dist.destroy_process_group()
