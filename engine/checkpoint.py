"""Checkpoints that survive a kill at any moment. engine/folder.py has the rest of the run folder.

A checkpoint is one folder, written under a temporary name and renamed once complete:

    shard-…safetensors   trainable weights, optimizer state and anchor; each rank writes its own parts
    progress.json        counters, settings, digests of what the run reads, its line of the log and those not yet in it
    checksums.json       the SHA-256 of every other file

Any number of ranks can read it, and one process without torch.distributed. Reading runs no code, whatever the files
hold: there is no pickle. All files are verified before one of them is interpreted. A folder that holds another file
than those in checksums.json counts as damaged. Other names beside the checkpoints are ignored, but for
`tmp-iteration-<n>`: a save that was killed leaves such a folder, and the next save removes it.

There is no generator to save: `engine.draws` makes each one from (seed, what it is for, iteration, sample), so
counters and seed bring all of them back. The optimizers' hyperparameters come from the settings, not from here.
"""

import contextlib
import hashlib
import math
import os
import re
import shlex
import shutil
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
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

from engine.folder import flush, set_aside, strict_json, warn_of_failure, write_whole
from engine.ranks import FolderError, on_all_ranks, on_first_rank, own_rank
from video.json_file import read_json

# A checkpoint has no frozen weights, they are the model's: a save leaves them out, and loading must not ask for them.
TRAINABLE_ONLY = StateDictOptions(ignore_frozen_params=True, strict=False)
CHECKSUMS, PROGRESS = "checksums.json", "progress.json"
FIX = "restore it from a copy"
BYTES_PER_FILE = 2**31  # DCP builds a file in memory before it writes it
KEYS_OF_PROGRESS = {
    "iteration": int,
    "optimizer_steps_made": int,
    "ranks": int,
    "line": dict,
    "log_first": int,
    "log_waiting": list,
    "settings": dict,
    "prompt_digests": dict,
    "file_digests": dict,
    "controller": dict,
}


@dataclass
class Checkpoint:
    """A checkpoint whose files were verified."""

    path: Path
    progress: dict


# ------------------------------------------------------------------------------------------------ save
def save(folder, module, optimizers, anchor, progress, keep=2):
    """Write folder/iteration-<n> with n = progress["iteration"]; keep the newest `keep`. Every rank must call it.

    progress: see KEYS_OF_PROGRESS. What is not finite is refused: such a state cannot be trained on, and saving it
    twice would push out the last good one. The run folder around must be there: it is not made anew.
    """
    folder = Path(folder)
    state, _ = _state(module, optimizers, anchor)
    tensors = _flat(state)
    _refuse_what_is_not_finite(tensors, folder)
    progress = {**progress, "anchor_refreshed_at": anchor.refreshed_at if anchor is not None else None}
    final = folder / f"iteration-{progress['iteration']:06d}"
    temporary = folder / f"tmp-{final.name}"
    try:
        on_first_rank(_clear, folder)
        _write_tensors(state, tensors, temporary)
        digests = {}
        for own in on_all_ranks(_digests_of_own_files, temporary):
            digests |= own
        on_first_rank(_finish, temporary, final, progress, digests)
    except FolderError as error:
        needed = _bytes(tensors.values())
        raise FolderError(on_first_rank(_failed_save, final, temporary, needed, str(error))) from None
    on_first_rank(_remove_old, folder, keep)
    return final


def _state(module, optimizers, anchor):
    """({"module": …, "optimizer": …, "anchor": …}: nothing but tensors; the optimizers' param_groups)."""
    weights, moments = get_state_dict(module, optimizers, options=TRAINABLE_ONLY)
    copies = anchor.state_dict() if anchor is not None else {}
    state = {"module": weights, "optimizer": moments["state"], "anchor": copies}
    return state, moments["param_groups"]


def _flat(state, prefix=""):
    """{name: tensor} of nested dicts, with the names that DCP gives them."""
    tensors = {}
    for name, value in state.items():
        if isinstance(value, dict):
            tensors |= _flat(value, f"{prefix}{name}.")
        else:
            tensors[f"{prefix}{name}"] = value
    return tensors


def _refuse_what_is_not_finite(tensors, folder):
    def first_of_this_rank():
        for name, tensor in tensors.items():
            own = tensor.to_local() if hasattr(tensor, "to_local") else tensor
            if not own.isfinite().all():
                return name
        return None

    for rank, name in enumerate(on_all_ranks(first_of_this_rank)):
        if name is not None:
            raise FloatingPointError(
                f"a checkpoint must be finite: got NaN or infinity in {name} of rank {rank}; nothing was saved, the "
                f"checkpoints in {folder} are as they were. Lower the learning rate, and go on from the newest of them"
            )


def _clear(folder):
    folder.mkdir(exist_ok=True)
    for leftover in folder.glob("tmp-iteration-*"):
        _remove(leftover)


def _remove(path):
    """A folder with all that is in it; of a link to one the link alone."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _write_tensors(state, tensors, path):
    size = _bytes(tensors.values())
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    count = math.ceil(size / ranks / BYTES_PER_FILE)  # files of one rank
    file_of, seen = {}, 0
    for name, tensor in tensors.items():
        file_of[name] = 1 + seen * count // max(size, 1)
        seen += tensor.numel() * tensor.element_size()
    _run(dcp.save, state, storage_writer=dcp.HuggingFaceStorageWriter(str(path), file_of, save_distributed=True))


def _run(dcp_function, state, **storage):
    """dcp.save or dcp.load; what fails on any rank is a FolderError on all."""
    try:
        with warnings.catch_warnings():  # it warns that no process group exists, which is meant
            warnings.filterwarnings("ignore", message=".*torch.distributed is disabled.*")
            dcp_function(state, **storage)
    except dcp.CheckpointException as error:
        causes = [f"rank {rank}: {cause}" for rank, (cause, _) in error.failures.items()]
        raise FolderError("; ".join(causes)) from None


def _digests_of_own_files(path):
    """{name: SHA-256} of what this rank has written: no rank has to read the others' files."""
    return _digests(sorted(path.glob(f"shard-{own_rank() + 1:05d}-*")))


def _digests(paths):
    """{name: SHA-256} of files, in threads: about 0.6 s per GB and thread."""
    with ThreadPoolExecutor() as pool:
        return dict(zip([path.name for path in paths], pool.map(_digest, paths), strict=True))


def _digest(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _finish(temporary, final, progress, digests):
    write_whole(temporary / PROGRESS, strict_json(progress))
    digests |= _digests([temporary / PROGRESS])
    write_whole(temporary / CHECKSUMS, strict_json(digests))
    flush(temporary)  # DCP has flushed its own files
    os.rename(temporary, final)  # atomic: the checkpoint is there as a whole, or not at all
    flush(final.parent)


def _failed_save(final, temporary, needed, cause):
    """The message of a save that failed; what it has written is removed."""
    shutil.rmtree(temporary, ignore_errors=True)
    names = [path.name for path in listed(final.parent)]
    return (
        f"{final} could not be written: {cause}. It needs {needed:,} bytes; {_free(final.parent):,} are free in "
        f"{final.parent}. Checkpoints that are there: {', '.join(names) or 'none'}. Fix that, and --resume"
    )


def _free(folder):
    """Free bytes where a folder is, or will be."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def _remove_old(folder, keep):
    """Remove all but the newest `keep` checkpoints that have all their files; those that lack some do not count."""
    intact = [path for path in listed(folder) if _files_differ(path) is None]
    for old in intact[:-keep]:
        with warn_of_failure(f"removing {old}"):
            _remove(old.rename(folder / f"tmp-{old.name}"))  # first out of sight, then gone


# ------------------------------------------------------------------------------------------------ room
def check_room(folder, module, optimizers, anchor, keep):
    """FolderError where the disk cannot hold the checkpoints of one moment: `keep`, and the one being written."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    size = _bytes(trained) * (1 if anchor is None else 2)
    for optimizer in optimizers:
        moments = 2 if isinstance(optimizer, torch.optim.AdamW) else 1  # Muon has one
        size += moments * sum(_bytes(group["params"]) for group in optimizer.param_groups)
    on_first_rank(_check_room, Path(folder), size, keep)


def _bytes(tensors):
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _check_room(folder, size, keep):
    missing = max(keep - len(listed(folder)), 0) + 1
    if missing * size > _free(folder):
        raise FolderError(
            f"{folder} must have room for keep_checkpoints + 1 checkpoints of {size:,} bytes: {missing} more need "
            f"{missing * size:,} bytes, got {_free(folder):,} free; make room, lower keep_checkpoints, or choose "
            "another --runs"
        )


# ------------------------------------------------------------------------------------------------ find and verify
def listed(folder):
    """All checkpoints of a folder, oldest first. Whether they are whole, only `choose` knows."""
    folder = Path(folder)
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if re.fullmatch(r"iteration-\d{6,15}", path.name)]
    return sorted(found, key=_iteration_of)


def _iteration_of(path):
    return int(path.name.removeprefix("iteration-"))


def find(run, name=None):
    """The newest checkpoint of a run, or the one called name; not verified."""
    found = {path.name: path for path in listed(Path(run) / "checkpoints")}
    if not found:
        raise FileNotFoundError(f"a run to resume must hold a complete checkpoint: {run} has none; start it anew")
    if name is not None and name not in found:
        raise FolderError(f"--from must name a checkpoint of {run}: got {name!r}; it has {', '.join(found)}")
    return found[name or list(found)[-1]]


def choose(run, name=None):
    """The newest Checkpoint of a run, or the one called name, verified. Every rank must call it.

    Where it is damaged, the error names the newest one that is whole; to go on from that one is the user's decision.
    """
    return on_first_rank(_choose, Path(run), name)


def _choose(run, name):
    chosen = find(run, name)
    try:
        return Checkpoint(chosen, verify(chosen))
    except (OSError, ValueError) as error:
        problem = f"{chosen} is damaged: {error}"
    good = _newest_whole(run)
    if good is None:
        raise FolderError(f"{problem}. No checkpoint of this run is whole; restore one from a copy, or start anew")
    command = f"python train.py --resume {shlex.quote(str(run))} --from {good.name}"
    raise FolderError(f"{problem}. The newest whole checkpoint is {good.name}; to go on from it: {command}")


def _newest_whole(run):
    for path in reversed(listed(run / "checkpoints")):
        with contextlib.suppress(OSError, ValueError):
            verify(path)
            return path
    return None


def verify(path):
    """The progress of a checkpoint; FolderError says in which way it is not what was saved."""
    problem = _files_differ(path)
    if problem is not None:
        raise FolderError(problem)
    saved = read_json(path / CHECKSUMS, FIX)
    for name, digest in _digests([path / name for name in saved]).items():
        if digest != saved[name]:
            raise FolderError(
                f"{name} has changed since it was saved: its SHA-256 is {digest}, {CHECKSUMS} has {saved[name]!r}"
            )
    progress = read_json(path / PROGRESS, FIX)
    _check_progress(progress)
    if progress["iteration"] != _iteration_of(path):
        raise FolderError(f"{PROGRESS} must be of the iteration in the folder's name: got {progress['iteration']}")
    return progress


def _files_differ(path):
    """In which way the files of a checkpoint are others than those of checksums.json; None where they are the same."""
    if not path.is_dir():
        return "it is not a folder"
    try:
        saved = read_json(path / CHECKSUMS, FIX)
    except (OSError, ValueError) as error:
        return str(error)
    found = {file.name for file in path.iterdir()}
    wanted = {*saved, CHECKSUMS, PROGRESS}
    if wanted - found:
        return f"it lacks {', '.join(sorted(wanted - found))}"
    if found - wanted:
        foreign = ", ".join(sorted(found - wanted))
        return f"it holds what its save did not write: {foreign}; move that out of the folder"
    for name in sorted(found):
        if not (path / name).is_file():
            return f"{name} is not a file"
    return None


def _check_progress(progress):
    for name, kind in KEYS_OF_PROGRESS.items():
        if type(progress.get(name)) is not kind:
            raise FolderError(f"{PROGRESS} must hold {name} of type {kind.__name__}: got {progress.get(name)!r}")
    refreshed_at = progress.get("anchor_refreshed_at")
    if refreshed_at is not None and type(refreshed_at) is not int:
        raise FolderError(f"{PROGRESS} must hold anchor_refreshed_at, a number or null: got {refreshed_at!r}")
    for number in (progress["iteration"], progress["optimizer_steps_made"], progress["log_first"], refreshed_at or 0):
        if number < 0:
            raise FolderError(f"{PROGRESS} must hold counters from 0 on: got {number}")


def set_aside_newer(chosen):
    """Rename the checkpoints after the chosen one: the run will make these iterations again. They are not deleted."""
    on_first_rank(_set_aside_newer, chosen.path)


def _set_aside_newer(path):
    for newer in listed(path.parent):
        if _iteration_of(newer) > _iteration_of(path):
            kept = set_aside(newer)
            print(f"{newer.name} is newer than {path.name}, which the run goes on from: renamed to {kept.name}")


# ------------------------------------------------------------------------------------------------ load
def load(chosen, module, optimizers, anchor):
    """Bring weights, optimizers and anchor back in place, bit for bit, from what `choose` returned."""
    state, param_groups = _state(module, optimizers, anchor)
    tensors = _flat(state)
    saved = _saved_tensors(chosen.path)
    foreign = sorted(saved.keys() - tensors.keys())
    if foreign:
        raise FolderError(f"{chosen.path} must hold this run's tensors and no others: got {foreign[0]}, too")
    _read_tensors(chosen.path, state, tensors, saved)
    set_state_dict(
        module,
        optimizers,
        model_state_dict=state["module"],
        optim_state_dict={"state": state["optimizer"], "param_groups": param_groups},
        options=TRAINABLE_ONLY,
    )
    if anchor is not None:
        refreshed_at = chosen.progress["anchor_refreshed_at"]
        if refreshed_at is None:
            raise FolderError(f"{chosen.path / PROGRESS} must say when this run's anchor was refreshed: got null")
        anchor.load_state_dict(state["anchor"], refreshed_at)


def load_weights(chosen, module):
    """The trained weights alone, for an export."""
    state = {"module": get_model_state_dict(module, options=TRAINABLE_ONLY)}
    _read_tensors(chosen.path, state, _flat(state), _saved_tensors(chosen.path))
    set_model_state_dict(module, state["module"], options=TRAINABLE_ONLY)


def _saved_tensors(path):
    """{name: DCP's description} of the tensors in a checkpoint."""
    try:
        return dcp.HuggingFaceStorageReader(str(path)).read_metadata().state_dict_metadata
    except Exception as error:  # a stranger's file, with its right checksum, can be wrong in any way
        raise FolderError(f"{path} must hold safetensors as DCP writes them: {error!r}") from None


def _read_tensors(path, state, tensors, saved):
    """Fill the tensors of a state; the checkpoint must hold each, as a whole, of the same shape and type."""
    for name, tensor in tensors.items():
        wanted = f"{tuple(tensor.shape)} {tensor.dtype}"
        got = f"{tuple(saved[name].size)} {saved[name].properties.dtype}" if name in saved else "nothing"
        if got != wanted:
            raise FolderError(
                f"{path} must hold this run's {name}, {wanted}: got {got}; was the model or a setting changed?"
            )
    _run(dcp.load, state, storage_reader=dcp.HuggingFaceStorageReader(str(path)))
