"""The run folder: settings, log, and checkpoints that survive a kill at any moment.

A checkpoint is one folder, written under a temporary name and renamed once complete.

Built on torch.distributed.checkpoint, so each rank writes its own shards and another number of ranks can read them; it
works the same in one process without torch.distributed. A save that is killed leaves a folder whose name starts with
`tmp-`, which is never read and is removed by the next save; the checkpoint before it stays whole.

What is saved: trainable weights, optimizer, anchor, and the counters in progress.json. There is no generator to save:
train.py makes each one from (seed, what it is for, update, sample), so the counters and the seed bring all of them back.
"""

import json
import os
import shutil
import warnings
from pathlib import Path

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

# Frozen weights come from the pre-trained model; strict=False because the saved state lacks them on the way in.
TRAINABLE_ONLY = StateDictOptions(ignore_frozen_params=True, strict=False)


def _rank():
    return dist.get_rank() if dist.is_initialized() else 0


def _barrier():
    if dist.is_initialized():
        dist.barrier()


def _state(module, optimizer, anchor):
    weights, moments = get_state_dict(module, optimizer, options=TRAINABLE_ONLY)
    return {"module": weights, "optimizer": moments, "anchor": anchor.state_dict() if anchor is not None else {}}


def _run(dcp_function, state, folder):
    with warnings.catch_warnings():  # it warns that no process group exists, which is meant
        warnings.filterwarnings("ignore", message=".*torch.distributed is disabled.*")
        dcp_function(state, checkpoint_id=folder)


def save(folder, module, optimizer, anchor, progress, keep=2):
    """Write folder/update-<n> with n = progress["update"]; keep the newest `keep`. Every rank must call it."""
    folder = Path(folder)
    final = folder / f"update-{progress['update']:06d}"
    temporary = folder / f"tmp-{final.name}"
    if _rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob("tmp-*"):
            shutil.rmtree(leftover)
    _barrier()
    _run(dcp.save, _state(module, optimizer, anchor), temporary)
    _barrier()
    if _rank() == 0:
        counters = {**progress, "anchor_refreshed_at": anchor.refreshed_at if anchor is not None else None}
        (temporary / "progress.json").write_text(json.dumps(counters))
        for path in temporary.iterdir():
            _flush(path)
        if final.exists():  # a run that was interrupted right after saving this very update
            final.rename(folder / f"tmp-old-{final.name}")
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
    return sorted(Path(folder).glob("update-*"))


def latest(folder):
    """The newest complete checkpoint; FileNotFoundError where there is none."""
    found = complete(folder)
    if not found:
        raise FileNotFoundError(f"a run to resume must hold a complete checkpoint: {folder} has none; start it anew")
    return found[-1]


def load(path, module, optimizer, anchor):
    """Bring weights, optimizer and anchor back in place, bit for bit; returns the progress that was saved."""
    progress = json.loads((Path(path) / "progress.json").read_text())
    state = _state(module, optimizer, anchor)
    _run(dcp.load, state, path)
    set_state_dict(
        module,
        optimizer,
        model_state_dict=state["module"],
        optim_state_dict=state["optimizer"],
        options=TRAINABLE_ONLY,
    )
    if anchor is not None:
        anchor.load_state_dict(state["anchor"], progress["anchor_refreshed_at"])
    return progress


# ---------------------------------------------------------------------------------------------- settings and log
def open_run(resumed, runs, name, default, settings):
    """The run folder on every rank, with config.json: that of a resumed run, or a new one made by rank 0.

    A new run never writes into an existing folder. Without a name it is called <default>-<n>.
    """
    chosen = [resumed]
    if _rank() == 0:
        run = Path(resumed) if resumed else _new_run(Path(runs), name, default)
        (run / "config.json").write_text(json.dumps(settings, indent=1, ensure_ascii=False))
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
    settings = json.loads(path.read_text())
    if unknown := sorted(settings.keys() - known):
        raise ValueError(f"{path} holds settings that this version does not know: {', '.join(unknown)}")
    return settings


def read_log(run, last_update):
    """metrics.jsonl up to an update: what a killed run logged beyond its checkpoint is cut off, since it happens again."""
    path = Path(run) / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    kept = [line for line in lines if line["update"] <= last_update]
    path.write_text("".join(json.dumps(line) + "\n" for line in kept))
    return kept
