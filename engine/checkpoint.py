"""The run folder: settings, log, and checkpoints that survive a kill at any moment. The one border for a run's files.

A checkpoint is one folder, written under a temporary name and renamed once complete:

    shard-…safetensors   trainable weights, optimizer state and anchor; each rank writes its own parts
    progress.json        counters, settings, the iteration's line of the log, the log's length and SHA-256
    checksums.json       the SHA-256 of every other file

Any number of ranks can read it, and one process without torch.distributed. Reading runs no code, whatever the files
hold: there is no pickle. All files are verified before one of them is interpreted. A folder that holds another file
than those in checksums.json counts as damaged. Other names beside the checkpoints are ignored, but for
`tmp-iteration-<n>`: a save that was killed leaves such a folder, and the next save removes it.

There is no generator to save: `generator` makes each one from (seed, what it is for, iteration, sample), so counters
and seed bring all of them back. The optimizers' hyperparameters come from the settings, not from the checkpoint.

What can be wrong with a run folder is a FolderError: one message, the same on all ranks.
"""

import contextlib
import fcntl
import hashlib
import json
import math
import os
import re
import shlex
import shutil
import socket
import sys
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

# Frozen weights come from the pre-trained model; strict=False because the saved state lacks them on the way in.
TRAINABLE_ONLY = StateDictOptions(ignore_frozen_params=True, strict=False)
CHECKSUMS, PROGRESS, LOG, LOCK = "checksums.json", "progress.json", "metrics.jsonl", ".lock"
MOST_JSON = 2**24  # bytes; a file that is larger is none of ours
BYTES_PER_FILE = 2**31  # DCP builds a file in memory before it writes it
KEYS_OF_PROGRESS = {
    "iteration": int,
    "optimizer_steps_made": int,
    "ranks": int,
    "line": dict,
    "log": dict,
    "settings": dict,
    "prompt_digests": dict,
}


class FolderError(ValueError):
    """What is wrong with a run folder or its disk, and how to mend it."""


@dataclass
class Checkpoint:
    """A checkpoint whose files were verified."""

    path: Path
    progress: dict


# ---------------------------------------------------------------------------------------------- ranks
def _rank():
    return dist.get_rank() if dist.is_initialized() else 0


def _on_all_ranks(work, *arguments):
    """[what work returns on each rank]. Where it fails on one of them, all raise its error, and none waits for it."""
    try:
        outcome = (work(*arguments), None)
    except (OSError, ValueError) as error:
        outcome = (None, str(error))
    outcomes = [outcome]
    if dist.is_initialized():
        outcomes = [None] * dist.get_world_size()
        dist.all_gather_object(outcomes, outcome)
    for _, problem in outcomes:
        if problem is not None:
            raise FolderError(problem)
    return [value for value, _ in outcomes]


def _on_first_rank(work, *arguments):
    """What work returns on the first rank, which alone does it, on all ranks."""

    def work_of_first():
        return work(*arguments) if _rank() == 0 else None

    return _on_all_ranks(work_of_first)[0]


# ---------------------------------------------------------------------------------------------- save
def save(folder, module, optimizers, anchor, progress, keep=2):
    """Write folder/iteration-<n> with n = progress["iteration"]; keep the newest `keep`. Every rank must call it.

    progress: see KEYS_OF_PROGRESS. What is not finite is refused: such a state cannot be trained on, and saving it
    twice would push out the last good one.
    """
    folder = Path(folder)
    state, _ = _state(module, optimizers, anchor)
    tensors = _flat(state)
    _refuse_what_is_not_finite(tensors, folder)
    progress = {**progress, "anchor_refreshed_at": anchor.refreshed_at if anchor is not None else None}
    final = folder / f"iteration-{progress['iteration']:06d}"
    temporary = folder / f"tmp-{final.name}"
    try:
        _on_first_rank(_clear, folder)
        _write_tensors(state, tensors, temporary)
        digests = {}
        for own in _on_all_ranks(_digests_of_own_files, temporary):
            digests |= own
        _on_first_rank(_finish, temporary, final, progress, digests)
    except FolderError as error:
        needed = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        raise FolderError(_on_first_rank(_failed_save, final, temporary, needed, str(error))) from None
    _on_first_rank(_remove_old, folder, keep)
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

    for rank, name in enumerate(_on_all_ranks(first_of_this_rank)):
        if name is not None:
            raise FloatingPointError(
                f"a checkpoint must be finite: got NaN or infinity in {name} of rank {rank}; nothing was saved, the "
                f"checkpoints in {folder} are as they were. Lower the learning rate, and go on from the newest of them"
            )


def _clear(folder):
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob("tmp-iteration-*"):
        _remove(leftover)


def _remove(path):
    """A folder with all that is in it; of a link to one the link alone."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _write_tensors(state, tensors, path):
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
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
    return _digests(sorted(path.glob(f"shard-{_rank() + 1:05d}-*")))


def _digests(paths):
    """{name: SHA-256} of files, in threads: about 0.6 s per GB and thread."""
    with ThreadPoolExecutor() as pool:
        return dict(zip([path.name for path in paths], pool.map(_digest, paths), strict=True))


def _digest(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _finish(temporary, final, progress, digests):
    (temporary / PROGRESS).write_text(_strict_json(progress))
    digests |= _digests([temporary / PROGRESS])
    (temporary / CHECKSUMS).write_text(_strict_json(digests))
    for name in (PROGRESS, CHECKSUMS):
        _flush(temporary / name)  # DCP has flushed its own files
    _flush(temporary)
    os.rename(temporary, final)  # atomic: the checkpoint is there as a whole, or not at all
    _flush(final.parent)


def _flush(path):
    """Force a file or folder to disk: a rename must not outrun the data that it names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _failed_save(final, temporary, needed, cause):
    """The message of a save that failed; what it has written is removed."""
    shutil.rmtree(temporary, ignore_errors=True)
    names = [path.name for path in complete(final.parent)]
    return (
        f"{final} could not be written: {cause}. It needs {needed:,} bytes; {_free(final.parent):,} are free in "
        f"{final.parent}. Checkpoints that are there: {', '.join(names) or 'none'}. Mend that, and --resume"
    )


def _free(folder):
    """Free bytes where a folder is, or will be."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def _remove_old(folder, keep):
    """Remove all but the newest `keep` checkpoints that have all their files; those that lack some do not count."""
    listed = [path for path in complete(folder) if _files_differ(path) is None]
    for old in listed[:-keep]:
        with warn_of_failure(f"removing {old}"):
            _remove(old.rename(folder / f"tmp-{old.name}"))  # first out of sight, then gone


def check_room(folder, module, optimizers, anchor, keep):
    """FolderError where the disk cannot hold the checkpoints of one moment: `keep`, and the one being written."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    size = _bytes(trained) * (1 if anchor is None else 2)
    for optimizer in optimizers:
        moments = 2 if isinstance(optimizer, torch.optim.AdamW) else 1  # Muon has one
        size += moments * sum(_bytes(group["params"]) for group in optimizer.param_groups)
    _on_first_rank(_check_room, Path(folder), size, keep)


def _bytes(tensors):
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _check_room(folder, size, keep):
    missing = max(keep - len(complete(folder)), 0) + 1
    if missing * size > _free(folder):
        raise FolderError(
            f"{folder} must have room for keep_checkpoints + 1 checkpoints of {size:,} bytes: {missing} more need "
            f"{missing * size:,} bytes, got {_free(folder):,} free; make room, lower keep_checkpoints, or choose "
            "another --runs"
        )


# ---------------------------------------------------------------------------------------------- find and verify
def complete(folder):
    """All checkpoints of a folder, oldest first. Whether they are whole, only `choose` knows."""
    folder = Path(folder)
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if re.fullmatch(r"iteration-\d{6,15}", path.name)]
    return sorted(found, key=_iteration_of)


def _iteration_of(path):
    return int(path.name.removeprefix("iteration-"))


def latest(run, name=None):
    """The newest checkpoint of a run, or the one called name; not verified."""
    found = {path.name: path for path in complete(Path(run) / "checkpoints")}
    if not found:
        raise FileNotFoundError(f"a run to resume must hold a complete checkpoint: {run} has none; start it anew")
    if name is not None and name not in found:
        raise FolderError(f"--from must name a checkpoint of {run}: got {name!r}; it has {', '.join(found)}")
    return found[name or list(found)[-1]]


def choose(run, name=None):
    """The newest Checkpoint of a run, or the one called name, verified. Every rank must call it.

    Where it is damaged, the error names the newest one that is whole; to go on from that one is the user's decision.
    """
    return _on_first_rank(_choose, Path(run), name)


def _choose(run, name):
    chosen = latest(run, name)
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
    for path in reversed(complete(run / "checkpoints")):
        with contextlib.suppress(OSError, ValueError):
            verify(path)
            return path
    return None


def verify(path):
    """The progress of a checkpoint; FolderError says in which way it is not what was saved."""
    problem = _files_differ(path)
    if problem is not None:
        raise FolderError(problem)
    saved = read_json(path / CHECKSUMS)
    for name, digest in _digests([path / name for name in saved]).items():
        if digest != saved[name]:
            raise FolderError(
                f"{name} has changed since it was saved: its SHA-256 is {digest}, {CHECKSUMS} has {saved[name]!r}"
            )
    progress = read_json(path / PROGRESS)
    _check_progress(progress)
    if progress["iteration"] != _iteration_of(path):
        raise FolderError(f"{PROGRESS} must be of the iteration in the folder's name: got {progress['iteration']}")
    return progress


def _files_differ(path):
    """In which way the files of a checkpoint are others than those of checksums.json; None where they are the same."""
    if not path.is_dir():
        return "it is not a folder"
    try:
        saved = read_json(path / CHECKSUMS)
    except FolderError as error:
        return f"{error} (a checkpoint of an earlier version has none: finish that run with that version)"
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
    refreshed_at, log = progress.get("anchor_refreshed_at"), progress["log"]
    if refreshed_at is not None and type(refreshed_at) is not int:
        raise FolderError(f"{PROGRESS} must hold anchor_refreshed_at, a number or null: got {refreshed_at!r}")
    if type(log.get("bytes")) is not int or type(log.get("sha256")) is not str:
        raise FolderError(f"{PROGRESS} must hold the log's bytes and sha256: got {log!r}")
    for number in (progress["iteration"], progress["optimizer_steps_made"], log["bytes"], refreshed_at or 0):
        if number < 0:
            raise FolderError(f"{PROGRESS} must hold counters from 0 on: got {number}")


def set_aside_newer(chosen):
    """Rename the checkpoints after the chosen one: the run will make these iterations again. They are not deleted."""
    _on_first_rank(_set_aside_newer, chosen.path)


def _set_aside_newer(path):
    for newer in complete(path.parent):
        if _iteration_of(newer) > _iteration_of(path):
            kept = _set_aside(newer)
            print(f"{newer.name} is newer than {path.name}, which the run goes on from: renamed to {kept.name}")


def _set_aside(path):
    """Give a file or folder a free name that nothing here reads."""
    number = 1
    while (aside := path.with_name(f"{path.name}.set-aside-{number}")).exists():
        number += 1
    return path.rename(aside)


# ---------------------------------------------------------------------------------------------- load
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
        if not _are_rows_once(saved[name].chunks, tensor.shape):
            raise FolderError(f"{path} must hold each row of {name} once: got {len(saved[name].chunks)} other parts")
    _run(dcp.load, state, storage_reader=dcp.HuggingFaceStorageReader(str(path)))


def _are_rows_once(chunks, shape):
    """Whether the parts of a tensor follow one another along its first dimension, as FSDP shards it."""
    if not shape:
        return len(chunks) == 1
    end = 0
    for chunk in sorted(chunks, key=lambda chunk: (*chunk.offsets, *chunk.sizes)):
        if tuple(chunk.offsets) != (end, *[0] * (len(shape) - 1)) or chunk.sizes[1:] != shape[1:]:
            return False
        end += chunk.sizes[0]
    return end == shape[0]


# ---------------------------------------------------------------------------------------------- randomness
def generator(*key):
    """A torch.Generator of its own for each purpose: its seed is a hash of the key, e.g. (seed, "noise", iteration,
    sample).

    No generator lives from one iteration to the next, so the counters of a checkpoint restore them all, and a sample's
    noise does not depend on the number of ranks. On the CPU, so that it does not depend on the device either.
    """
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


# ---------------------------------------------------------------------------------------------- run folder and settings
def open_run(resumed, runs, name, default):
    """(run folder, whether the run goes on, whether it goes on after a restart of this launch), on every rank.

    A new run never writes into an existing folder. Without a name it is called <default>-<n>.

    `torchrun --max-restarts` starts all ranks again with the same command: a note beside the runs says which folder
    this launch has opened. Each machine's agent counts its own restarts, so the first rank's count alone does not tell.
    """
    restarts = _on_all_ranks(lambda: int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)))
    return _on_first_rank(_open_run, resumed, Path(runs), name, default, max(restarts) > 0)


def _open_run(resumed, runs, name, default, restarted):
    note = _note_of_launch(runs)
    if restarted and note is not None and note.is_file():
        run = Path(note.read_text())
        run.mkdir(parents=True, exist_ok=True)
        print(f"a restart of this launch goes on in {run}", file=sys.stderr)
        return run, bool(complete(run / "checkpoints")), True
    if resumed:
        return Path(resumed), True, False
    run = _new_run(runs, name, default)
    _note_launch(runs, run)  # before the folder is there, for a start that dies in between
    run.mkdir(parents=True, exist_ok=True)
    return run, False, False


def _new_run(runs, name, default):
    if not name:
        taken = [path.name.removeprefix(f"{default}-") for path in runs.glob(f"{default}-*")]
        numbers = [int(number) for number in taken if number.isdecimal()]
        name = f"{default}-{max(numbers, default=0) + 1}"
    if is_taken(runs / name):
        raise FolderError(taken(runs / name))
    return runs / name


def is_taken(run):
    """Whether a new run may not have this folder. What a start leaves that failed before its first line is free."""
    left_by_a_start = {LOCK, "config.json", "config.json.tmp", "tiny", "mini"}
    is_free = run.is_dir() and {path.name for path in run.iterdir()} <= left_by_a_start
    return os.path.lexists(run) and not is_free


def taken(run):
    return f"{run} exists; continue it with --resume {shlex.quote(str(run))}, or choose another --name"


@contextlib.contextmanager
def locked(run):
    """The run folder is this launch's alone. The lock ends with the first rank's process, in whatever way that ends."""
    held = []
    _on_first_rank(_lock, run, held)
    try:
        yield
    finally:
        for file in held:
            file.close()


def _lock(run, held):
    held.append(open(run / LOCK, "ab+"))
    try:
        fcntl.flock(held[0], fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        rule = "one launch at a time may train in a run folder"
        raise FolderError(f"{rule}: another one does in {run}; stop it first, or choose another --name") from None
    except OSError as error:  # some network file systems have no locks
        print(f"warning: {run} cannot be locked, start no second launch in it: {error}", file=sys.stderr)


def _note_of_launch(runs):
    """Where a launch that may restart notes its run folder; None for any other."""
    if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) == 0:
        return None
    launch = os.environ["TORCHELASTIC_RUN_ID"]
    if launch == "none":  # torchrun without a rendezvous id: its own process tells its launches apart
        launch = f"{socket.gethostname()} {os.getppid()}"
    return runs / f".launch-{hashlib.sha256(launch.encode()).hexdigest()[:16]}"


def note_launch(runs, run):
    """From here on a restart of this launch goes on in this folder, from its newest checkpoint whatever --from says."""
    _on_first_rank(_note_launch, Path(runs), run)


def _note_launch(runs, run):
    note = _note_of_launch(runs)
    if note is not None:
        runs.mkdir(parents=True, exist_ok=True)
        note.write_text(str(run))


def forget_launch(runs):
    """A run that is done needs no note for a restart."""
    note = _note_of_launch(Path(runs))
    if _rank() == 0 and note is not None:
        note.unlink(missing_ok=True)


def write_settings(run, settings):
    """config.json, under a temporary name first: what stood there stays whole until the rename."""

    def write():
        temporary = run / "config.json.tmp"
        temporary.write_text(json.dumps(settings, indent=1, ensure_ascii=False))
        os.replace(temporary, run / "config.json")

    _on_first_rank(write)


def read_settings(run, known):
    """config.json of a run to continue; settings that this version does not know are refused, not dropped."""
    path = Path(run) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"--resume must name a run folder with a config.json: got {run}")
    settings = read_json(path)
    if "accumulation" in settings:
        raise ValueError(
            f"{path} was written by a version whose `accumulation` made several optimizer steps of one rollout; now "
            "`optimizer_steps` counts them (default 1, as in the paper) and the anchor moves between iterations. "
            "Going on would train by another algorithm: finish that run with the version that began it, or start anew"
        )
    unknown = sorted(settings.keys() - set(known))
    if unknown:
        raise ValueError(f"{path} holds settings that this version does not know: {', '.join(unknown)}")
    return settings


def read_json(path):
    """The object in a JSON file; FolderError where there is none."""
    if not path.is_file():  # opening a pipe would wait for ever
        raise FolderError(f"{path} must be a file")
    if path.stat().st_size > MOST_JSON:
        raise FolderError(f"{path} must be the JSON that the run wrote: got {path.stat().st_size:,} bytes")
    try:
        value = json.loads(path.read_bytes(), parse_constant=_refuse_constant)
        json.dumps(value, ensure_ascii=False).encode()  # fails on half a surrogate pair, which no file can hold
    except (OSError, ValueError, RecursionError) as error:
        raise FolderError(f"{path} must be the JSON that the run wrote: {error}") from None
    if not isinstance(value, dict):
        raise FolderError(f"{path} must be the JSON that the run wrote, an object: got {type(value).__name__}")
    return value


def _refuse_constant(name):
    raise ValueError(f"{name} is not JSON")


def _strict_json(value):
    """JSON that every reader takes: null for NaN and infinity, which JSON does not have."""
    return json.dumps(_finite(value), allow_nan=False)


def _finite(value):
    if isinstance(value, dict):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_finite(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


@contextlib.contextmanager
def warn_of_failure(what, failures=OSError):
    """For what a run can do without, such as a picture: a warning on stderr where it fails, and the run goes on."""
    try:
        yield
    except failures as error:
        print(f"warning: {what} failed, the run goes on: {error!r}", file=sys.stderr, flush=True)


# ---------------------------------------------------------------------------------------------- log
class Log:
    """metrics.jsonl, one line for each iteration, written by the first rank, at a cost that does not grow.

    A checkpoint holds the line of its own iteration, and length and SHA-256 of the log before it. A run that goes on
    verifies these bytes; its first line then takes the place of all that followed them, which happens again. What
    cannot be written, on a full disk say, waits for the next line.
    """

    def __init__(self, run, kept=None, renew=False):
        """kept: {"bytes", "sha256"} of a checkpoint; None begins a new log. renew: a damaged log may be begun anew."""
        self.path = Path(run) / LOG
        self.bytes, self.sha256, self.waiting = 0, hashlib.sha256(), b""
        self.renewed = False
        if kept is not None:
            self.renewed = _on_first_rank(self._take_up, kept, renew)

    def _take_up(self, kept, renew):
        """Verify the bytes that a checkpoint knows of. Returns whether the log was begun anew instead."""
        known = b""
        if self.path.is_file() and self.path.stat().st_size >= kept["bytes"]:
            with open(self.path, "rb") as file:
                known = file.read(kept["bytes"])
        digest = hashlib.sha256(known)
        if (len(known), digest.hexdigest()) == (kept["bytes"], kept["sha256"]):
            self.bytes, self.sha256 = len(known), digest
            return False
        if not renew:
            raise FolderError(
                f"{self.path} must begin with the {kept['bytes']:,} bytes that it had when the checkpoint was made: "
                f"they have changed or are missing. Restore them, or add `--allow {LOG}`: the file is set aside and a "
                "new log begun; training does not read it"
            )
        if os.path.lexists(self.path):
            _set_aside(self.path)
        return True

    def append(self, line):
        if _rank() != 0:
            return
        self.waiting += f"{_strict_json(line)}\n".encode()
        with warn_of_failure(f"writing {self.path}"):
            with open(self.path, "r+b" if self.bytes else "wb") as file:
                file.seek(self.bytes)
                file.truncate()  # what a killed or failed write has left
                file.write(self.waiting)
            self.sha256.update(self.waiting)
            self.bytes += len(self.waiting)
            self.waiting = b""

    def position(self):
        """Length and SHA-256 of what is written, for a checkpoint."""
        if _rank() == 0 and self.bytes:
            with warn_of_failure(f"flushing {self.path}"):
                _flush(self.path)
        return {"bytes": self.bytes, "sha256": self.sha256.hexdigest()}


def read_log(run):
    """The lines of a run's metrics.jsonl, NaN where one has null; a last one that was cut short, by a kill say, is
    left out.
    """
    path = Path(run) / LOG
    lines = []
    for number, text in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        try:
            line = json.loads(text)
            lines.append({name: math.nan if value is None else value for name, value in line.items()})
        except (ValueError, AttributeError) as error:
            raise FolderError(f"{path} must hold a JSON object in each line: line {number}, {error}") from None
    return lines


def tensorboard(run):
    """A TensorBoard writer where the package is installed, else None: metrics.jsonl holds the same."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(run / "tensorboard")
