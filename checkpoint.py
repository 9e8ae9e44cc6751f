"""The run folder: settings, log, and checkpoints that survive a kill at any moment.

A checkpoint is one folder, written under a temporary name and renamed once complete.

Built on torch.distributed.checkpoint, so each rank writes its own shards and another number of ranks can read them; it
works the same in one process without torch.distributed. A save that is killed leaves a folder whose name starts with
`tmp-`, which is never read and is removed by the next save; the checkpoint before it stays whole.

What is saved: trainable weights, optimizer, anchor, and the counters in progress.json. There is no generator to save:
`generator` makes each one from (seed, what it is for, iteration, sample), so the counters and the seed bring all of them back.
"""

import hashlib
import json
import os
import shutil
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)

# Frozen weights come from the pre-trained model; strict=False because the saved state lacks them on the way in.
TRAINABLE_ONLY = StateDictOptions(ignore_frozen_params=True, strict=False)


def _rank():
    return dist.get_rank() if dist.is_initialized() else 0


def _barrier():
    if dist.is_initialized():
        dist.barrier()


def _state(module, optimizers, anchor):
    weights, moments = get_state_dict(module, optimizers, options=TRAINABLE_ONLY)
    return {"module": weights, "optimizer": moments, "anchor": anchor.state_dict() if anchor is not None else {}}


def _run(dcp_function, state, folder):
    with warnings.catch_warnings():  # it warns that no process group exists, which is meant
        warnings.filterwarnings("ignore", message=".*torch.distributed is disabled.*")
        dcp_function(state, checkpoint_id=folder)


def save(folder, module, optimizers, anchor, progress, keep=2):
    """Write folder/iteration-<n> with n = progress["iteration"]; keep the newest `keep`. Every rank must call it."""
    folder = Path(folder)
    final = folder / f"iteration-{progress['iteration']:06d}"
    temporary = folder / f"tmp-{final.name}"
    if _rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob("tmp-*"):
            shutil.rmtree(leftover)
    _barrier()
    _run(dcp.save, _state(module, optimizers, anchor), temporary)
    _barrier()
    if _rank() == 0:
        counters = {**progress, "anchor_refreshed_at": anchor.refreshed_at if anchor is not None else None}
        (temporary / "progress.json").write_text(json.dumps(counters))
        for path in temporary.iterdir():
            _flush(path)
        os.rename(temporary, final)  # atomic: the checkpoint is there as a whole, or not at all
        _flush(folder)
        for old in complete(folder)[:-keep]:
            doomed = old.rename(folder / f"tmp-{old.name}")  # first out of sight, then gone
            shutil.rmtree(doomed)
    _barrier()
    return final


def _flush(path):
    """Force a file or folder to disk: a rename must not outrun the data that it names."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def complete(folder):
    """All complete checkpoints of a folder, oldest first."""
    return sorted(Path(folder).glob("iteration-*"))


def latest(run):
    """The newest complete checkpoint of a run; FileNotFoundError where there is none."""
    found = complete(Path(run) / "checkpoints")
    if not found:
        raise FileNotFoundError(f"a run to resume must hold a complete checkpoint: {run} has none; start it anew")
    return found[-1]


def last_iteration(run):
    """The iteration after which the newest checkpoint of a run was made."""
    return int(latest(run).name.removeprefix("iteration-"))


def load(path, module, optimizers, anchor):
    """Bring weights, optimizers and anchor back in place, bit for bit; returns the progress that was saved."""
    progress = json.loads((Path(path) / "progress.json").read_text())
    state = _state(module, optimizers, anchor)
    _run(dcp.load, state, path)
    set_state_dict(
        module,
        optimizers,
        model_state_dict=state["module"],
        optim_state_dict=state["optimizer"],
        options=TRAINABLE_ONLY,
    )
    if anchor is not None:
        anchor.load_state_dict(state["anchor"], progress["anchor_refreshed_at"])
    return progress


def load_weights(path, module):
    """The trained weights alone, for an export."""
    state = {"module": get_model_state_dict(module, options=TRAINABLE_ONLY)}
    _run(dcp.load, state, path)
    set_model_state_dict(module, state["module"], options=TRAINABLE_ONLY)


# ---------------------------------------------------------------------------------------------- randomness
def generator(*key):
    """A torch.Generator of its own for each purpose: its seed is a hash of the key, e.g. (seed, "noise", iteration, sample).

    No generator lives from one iteration to the next, so the counters of a checkpoint restore them all, and a sample's
    noise does not depend on the number of ranks. On the CPU, so that it does not depend on the device either.
    """
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


# ---------------------------------------------------------------------------------------------- settings and log
def open_run(resumed, runs, name, default, settings):
    """The run folder on every rank, with config.json: that of a resumed run, or a new one made by rank 0.

    A new run never writes into an existing folder. Without a name it is called <default>-<n>.
    """
    chosen = [resumed]
    if _rank() == 0:
        run = Path(resumed) if resumed else _new_run(Path(runs), name, default)
        _replace(run / "config.json", json.dumps(settings, indent=1, ensure_ascii=False))
        chosen = [str(run)]
    if dist.is_initialized():
        dist.broadcast_object_list(chosen, src=0)
    return Path(chosen[0])


def _new_run(runs, name, default):
    if not name:
        numbers = [int(number) for path in runs.glob(f"{default}-*") if (number := path.name[len(default) + 1 :]).isdigit()]
        name = f"{default}-{max(numbers, default=0) + 1}"
    if (runs / name).exists():
        raise SystemExit(f"{runs / name} exists; continue it with --resume {runs / name}, or choose another --name")
    (runs / name).mkdir(parents=True)
    return runs / name


def read_settings(run, known):
    """config.json of a run to continue; settings that this version does not know are refused, not dropped."""
    path = Path(run) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"--resume must name a run folder with a config.json: got {run}")
    try:
        settings = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} must be the JSON that the run wrote: {error}") from None
    if "accumulation" in settings:
        raise ValueError(
            f"{path} was written by a version whose `accumulation` made several optimizer steps of one rollout; now "
            "`optimizer_steps` counts them (default 1, as in the paper) and the anchor moves between iterations. Going on "
            "would train by another algorithm: finish that run with the version that began it, or start anew"
        )
    unknown = sorted(settings.keys() - set(known))
    if unknown:
        raise ValueError(f"{path} holds settings that this version does not know: {', '.join(unknown)}")
    return settings


def read_log(run, iteration):
    """metrics.jsonl up to an iteration: what a killed run logged beyond its checkpoint is cut off, since it happens again.

    A new run's log has one line, for the evaluation before the first iteration.
    """
    if iteration == 0:
        return [{"iteration": 0}]
    path, kept = Path(run) / "metrics.jsonl", []
    for text in path.read_text().splitlines():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            break  # cut short, by a full disk say; whether it is needed is checked below
        if line["iteration"] > iteration:
            break
        kept.append(line)
    if not kept or kept[-1]["iteration"] != iteration:
        raise ValueError(
            f"{path} must hold a line for each iteration up to the checkpoint's, {iteration}: got {len(kept)} whole lines"
        )
    return kept


def write_log(run, log):
    """All of metrics.jsonl anew, by the first rank: it is short, and so no kill can leave half of it."""
    if _rank() == 0:
        _replace(Path(run) / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in log))


def tensorboard(run):
    """A TensorBoard writer where the package is installed, else None: metrics.jsonl holds the same."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(run / "tensorboard")


def _replace(path, text):
    """Write a file under a temporary name and rename it: what stood there before stays whole until then."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(text)
    os.replace(temporary, path)
