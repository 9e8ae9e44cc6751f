"""The run folder: killed saves, damaged and hostile checkpoints, changed settings, full disks, the log, restarts."""

import json
import math
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

import faults
import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import checkpoint
import pictures
import train
from config import Config

ROOT = Path(train.__file__).parent
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}
SMALL = [*faults.SMALL, "--keep_checkpoints", "2"]


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """A run of three iterations with the checkpoints 2 and 3."""
    folder = tmp_path_factory.mktemp("template")
    train.main(["--runs", str(folder), "--name", "run", "--iterations", "3", *SMALL])
    return folder / "run"


@pytest.fixture
def run(template, tmp_path):
    shutil.copytree(template, tmp_path / "run")
    return tmp_path / "run"


def refused(capsys, *arguments):
    """The message of a command that ends with exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        train.main(list(map(str, arguments)))
    assert stop.value.code == 2
    return capsys.readouterr().err.split("error: ")[1].strip()


def progress_of(iteration):
    log = {"bytes": 0, "sha256": ""}
    counters = {"iteration": iteration, "optimizer_steps_made": 0, "ranks": 1}
    return {**counters, "line": {}, "log": log, "settings": asdict(Config()), "prompt_digests": {}}


def stamp(path):
    """Give a checkpoint the checksums of what it holds now, as a stranger would."""
    files = [file for file in path.iterdir() if file.name != "checksums.json"]
    (path / "checksums.json").write_text(json.dumps(checkpoint._digests(files)))


# ---------------------------------------------------------------------------------------------- saves and kills
SAVE_FOR_EVER = """
import sys, torch, checkpoint
from test_checkpoint import progress_of
from trust_region import Anchor
module = torch.nn.Linear(600, 600)
optimizers, anchor = [torch.optim.AdamW(module.parameters())], Anchor(module, 2)
module(torch.ones(1, 600)).sum().backward()
optimizers[0].step()
for iteration in range(1, 10**6):
    with torch.no_grad():
        module.weight.fill_(iteration)
    checkpoint.save(sys.argv[1] + "/checkpoints", module, optimizers, anchor, progress_of(iteration))
    print(iteration, flush=True)
"""


@pytest.mark.parametrize("moment", range(6))
def test_a_killed_save_leaves_a_resumable_run(tmp_path, moment):
    """kill -9 at six moments of a loop that does nothing but save: the newest checkpoint is whole and current."""
    command = [sys.executable, "-c", SAVE_FOR_EVER, str(tmp_path)]
    environment = {**ENVIRONMENT, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    announced = [int(process.stdout.readline()) for _ in range(2)][-1]
    time.sleep(0.007 * moment)
    process.send_signal(signal.SIGKILL)
    announced = max([announced, *map(int, process.communicate()[0].split())])
    module = torch.nn.Linear(600, 600)
    optimizers, anchor = [torch.optim.AdamW(module.parameters())], train.Anchor(module, 2)
    chosen = checkpoint.choose(tmp_path)
    checkpoint.load(chosen, module, optimizers, anchor)
    iteration = chosen.progress["iteration"]
    assert iteration in (announced, announced + 1)  # killed between the rename and the announcement: one more
    assert (module.weight == iteration).all()
    folder = tmp_path / "checkpoints"
    checkpoint.save(folder, module, optimizers, anchor, progress_of(iteration + 1))
    assert not list(folder.glob("tmp-*")) and len(checkpoint.complete(folder)) == 2


def test_a_save_that_was_killed_is_not_read(tmp_path):
    (tmp_path / "checkpoints" / "tmp-iteration-000009").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="must hold a complete checkpoint"):
        checkpoint.latest(tmp_path)


def test_what_is_not_finite_is_not_saved(tmp_path):
    module = torch.nn.Linear(3, 3)
    optimizers = [torch.optim.AdamW(module.parameters())]
    checkpoint.save(tmp_path, module, optimizers, None, progress_of(1))
    with torch.no_grad():
        module.bias[1] = torch.nan
    for iteration in (2, 3):
        with pytest.raises(FloatingPointError, match="must be finite: got NaN or infinity in module.bias of rank 0"):
            checkpoint.save(tmp_path, module, optimizers, None, progress_of(iteration))
    assert [path.name for path in tmp_path.iterdir()] == ["iteration-000001"]


# ---------------------------------------------------------------------------------------------- damage
def test_random_faults_are_refused_or_harmless(tmp_path, monkeypatch):
    """A short version of tests/faults.py."""
    for name in ("report", "curves"):
        monkeypatch.setattr(pictures, name, getattr(pictures, name))  # run_faults replaces them
    outcomes, bad = faults.run_faults(tmp_path, 25, seed=1)
    assert not bad
    assert all(outcomes[outcome] > 2 for outcome in faults.GOOD), outcomes


def test_a_damaged_newest_checkpoint_is_named_with_the_command_that_goes_on(run, capsys):
    undamaged = run.with_name("undamaged")
    shutil.copytree(run, undamaged)
    train.main(["--resume", str(undamaged), "--iterations", "4"])
    shard = next((run / "checkpoints" / "iteration-000003").glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[10_000:14_000] = bytes(4000)
    shard.write_bytes(data)
    message = refused(capsys, "--resume", run, "--iterations", 4)
    assert "iteration-000003 is damaged: shard-00001-model-00001-of-00001.safetensors has changed" in message
    command = f"python train.py --resume {run} --from iteration-000002"
    assert message.endswith(f"The newest whole checkpoint is iteration-000002; to go on from it: {command}")
    assert "it has iteration-000002, iteration-000003" in refused(capsys, "--resume", run, "--from", "../x")
    train.main([*command.split()[2:], "--iterations", "4"])
    names = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert names == ["iteration-000003", "iteration-000003.set-aside-1", "iteration-000004"]
    assert faults.same(faults.result(run), faults.result(undamaged))


def test_what_is_damaged_does_not_count_among_the_kept(run):
    (run / "checkpoints" / "iteration-000003" / "progress.json").unlink()
    checkpoint._remove_old(run / "checkpoints", keep=1)
    assert [path.name for path in checkpoint.complete(run / "checkpoints")] == ["iteration-000002", "iteration-000003"]


def test_stray_names_are_ignored(run):
    folder = run / "checkpoints"
    shutil.copytree(folder / "iteration-000003", folder / "iteration-4.bak")
    (folder / "iteration-xyz").mkdir()
    (folder / "foo").write_text("")
    train.main(["--resume", str(run), "--iterations", "4"])
    assert (folder / "iteration-4.bak").is_dir() and (folder / "foo").exists()


def test_a_linked_checkpoint_and_a_stray_file_are_no_obstacle(run, tmp_path):
    folder = run / "checkpoints"
    shutil.move(folder / "iteration-000002", tmp_path / "elsewhere")
    (folder / "iteration-000002").symlink_to(tmp_path / "elsewhere")
    (folder / "tmp-iteration-000004").write_text("")
    train.main(["--resume", str(run), "--iterations", "6"])
    assert [path.name for path in checkpoint.complete(folder)] == ["iteration-000005", "iteration-000006"]
    assert list((tmp_path / "elsewhere").iterdir())  # what was linked is not ours to delete


def test_one_launch_at_a_time(run, capsys):
    with checkpoint.locked(run):
        assert "one launch at a time may train in a run folder" in refused(capsys, "--resume", run, "--iterations", 4)
    train.main(["--resume", str(run), "--iterations", "4"])


NEXT_SHARD = "shard-00002-model-00001-of-00001.safetensors"


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp", NEXT_SHARD, "progress.json"])
@pytest.mark.parametrize("stamped", [False, True])
def test_loading_runs_no_code(run, capsys, name, stamped):
    """Pickles where torch.distributed.checkpoint's own format has them, and in our files; also with right checksums."""
    path, mark = run / "checkpoints" / "iteration-000003", run / "mark"
    (path / name).write_bytes(pickle.dumps(faults.Payload(mark)))
    if stamped:
        stamp(path)
    if stamped and not name.endswith(("safetensors", "json")):
        train.main(["--resume", str(run), "--iterations", "4"])  # a file that nothing opens
    else:
        assert "iteration-000003" in refused(capsys, "--resume", run, "--iterations", 4)
    assert not mark.exists()
    pickle.loads(pickle.dumps(faults.Payload(mark)))  # the payload itself works
    assert mark.exists()


def test_tensors_that_are_not_this_runs_are_refused(run, capsys):
    path = run / "checkpoints" / "iteration-000003"
    shard = next(path.glob("*.safetensors"))
    tensors = load_file(shard)
    name = "module.write.weight"
    for changed, message in (
        ({name: tensors[name][:1]}, f"this run's {name}"),
        ({name: tensors[name].half()}, f"this run's {name}"),
        ({"module.more": torch.ones(1)}, "got module.more, too"),
    ):
        save_file({key: value.contiguous() for key, value in (tensors | changed).items()}, shard)
        stamp(path)
        assert message in refused(capsys, "--resume", run, "--iterations", 4)
    save_file(tensors, shard, {"DCP_SHARDING_INFO": "{}"})
    stamp(path)
    assert "must hold safetensors as DCP writes them" in refused(capsys, "--resume", run, "--iterations", 4)


def test_parts_that_overlap_or_leave_gaps_are_refused(run, capsys):
    """Rows 0 to 1/4 twice and 1/2 to 1: as many numbers as the tensor has, but not the tensor."""
    path = run / "checkpoints" / "iteration-000003"
    shard = next(path.glob("*.safetensors"))
    tensors = load_file(shard)
    name = next(name for name, tensor in tensors.items() if tensor.ndim == 2 and len(tensor) % 4 == 0)
    quarter = len(tensors[name]) // 4

    def write(target, first, last, place):
        everything = tensors if target == shard else {name: tensors[name]}
        places = {key: {"saved_offsets": [0] * tensor.ndim} for key, tensor in everything.items()}
        places[name]["saved_offsets"] = [place, 0]
        own = everything | {name: tensors[name][first:last].contiguous()}
        save_file(own, target, {"DCP_SHARDING_INFO": json.dumps(places), "DCP_VERSION": "1.0"})

    second, third = (path / f"shard-0000{rank}-model-00001-of-00001.safetensors" for rank in (2, 3))
    for places, whole in (((0, 1, 2), True), ((0, 0, 2), False), ((1, 1, 2), False)):
        write(shard, 0, quarter, places[0] * quarter)
        write(second, quarter, 2 * quarter, places[1] * quarter)
        write(third, 2 * quarter, 4 * quarter, places[2] * quarter)
        stamp(path)
        if whole:
            train.main(["--resume", str(run)])
        else:
            assert f"must hold each row of {name} once" in refused(capsys, "--resume", run)


def test_counters_that_cannot_be_are_refused(run, capsys):
    path = run / "checkpoints" / "iteration-000003"
    progress = json.loads((path / "progress.json").read_text())
    for changed, message in (
        ({"log": progress["log"] | {"bytes": 10**18}}, "must begin with the 1,000,000,000,000,000,000 bytes"),
        ({"anchor_refreshed_at": None}, "must say when this run's anchor was refreshed"),
    ):
        (path / "progress.json").write_text(json.dumps(progress | changed))
        stamp(path)
        assert message in refused(capsys, "--resume", run, "--iterations", 4)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=5), children, max_size=3),
    max_leaves=4,
)


@hypothesis_settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_progress_is_understood_or_refused(template, data):
    """Also one whose checksums are right: what comes back has counters that a run can go on from."""
    whole = json.loads((template / "checkpoints" / "iteration-000003" / "progress.json").read_text())
    name = data.draw(st.sampled_from([*whole, "more"]))
    text = data.draw(st.binary(max_size=30) | st.just(json.dumps(whole | {name: data.draw(JSON)}).encode()))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "iteration-000003"
        path.mkdir()
        (path / "progress.json").write_bytes(text)
        stamp(path)
        try:
            progress = checkpoint.verify(path)
            train.allowed_changes(Config(iterations=3), 1, progress, [])
        except checkpoint.FolderError:
            return
        assert progress["iteration"] == 3 and progress["optimizer_steps_made"] >= 0


@hypothesis_settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_log_is_as_it_was_or_refused(data):
    lines = b'{"iteration": 0}\n{"iteration": 1}\n'
    text = data.draw(st.binary(max_size=40) | st.binary(max_size=9).map(lambda more: lines + more))
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "metrics.jsonl").write_bytes(text)
        try:
            log = checkpoint.Log(folder, {"bytes": len(lines), "sha256": checkpoint.hashlib.sha256(lines).hexdigest()})
        except checkpoint.FolderError:
            assert not text.startswith(lines)
            return
        log.append({"iteration": 2})
        assert [line["iteration"] for line in checkpoint.read_log(folder)] == [0, 1, 2]


# ---------------------------------------------------------------------------------------------- settings
def test_a_change_of_the_algorithm_must_be_allowed_and_is_logged(run, capsys):
    config = json.loads((run / "config.json").read_text())
    changed = {"eta": 0.7, "seed": 3, "keep_checkpoints": 5, "micro_batch": 2}
    (run / "config.json").write_text(json.dumps(config | changed))
    message = refused(capsys, "--resume", run, "--iterations", 4)
    assert "got eta 0.5 → 0.7, seed 0 → 3." in message and "with --allow eta,seed" in message
    assert "got seed 0 → 3" in refused(capsys, "--resume", run, "--iterations", 4, "--allow", "eta")
    assert "--allow takes names of settings" in refused(capsys, "--resume", run, "--allow", "etaa")
    train.main(["--resume", str(run), "--iterations", "5", "--allow", "eta,seed"])
    log = checkpoint.read_log(run)
    assert log[4]["allowed"] == {"eta": [0.5, 0.7], "seed": [0, 3]}
    assert "allowed" not in log[3] and "allowed" not in log[5]
    train.main(["--resume", str(run), "--iterations", "6"])  # now they are the run's own


@pytest.mark.parametrize(
    "ranks, batch_size, fits", [(2, 4, True), (1, 8, True), (1, 4, False), (2, 8, False), (8, 1, True)]
)
def test_another_number_of_ranks_must_keep_the_samples(ranks, batch_size, fits):
    progress = progress_of(1) | {"ranks": 2, "settings": asdict(Config(model="toy", batch_size=4))}
    config = Config(model="toy", batch_size=batch_size, iterations=9)
    if fits:
        assert train.allowed_changes(config, ranks, progress, []) == {}
        return
    with pytest.raises(checkpoint.FolderError, match="batch_size '4 × 2 ranks'"):
        train.allowed_changes(config, ranks, progress, [])
    assert list(train.allowed_changes(config, ranks, progress, ["batch_size"])) == ["batch_size"]


def test_a_prompt_file_may_move_but_not_change(tmp_path):
    for name, text in {"old.txt": "a cat\na dog\n", "moved.txt": "a cat\na dog\n", "new.txt": "a cat\na god\n"}.items():
        (tmp_path / name).write_text(text)

    def settings(name):
        return Config(model="tiny", prompts=str(tmp_path / name), eval_prompts=str(tmp_path / "old.txt"))

    old = settings("old.txt")
    progress = progress_of(1) | {"settings": asdict(old), "prompt_digests": train.prompt_digests(old)}
    assert train.allowed_changes(settings("moved.txt"), 1, progress, []) == {}
    with pytest.raises(checkpoint.FolderError, match="prompts 'prompts of SHA-256 .* with --allow prompts,"):
        train.allowed_changes(settings("new.txt"), 1, progress, [])
    assert list(train.allowed_changes(settings("new.txt"), 1, progress, ["prompts"])) == ["prompts"]


def test_the_folder_of_a_start_that_failed_is_free(tmp_path, monkeypatch, capsys):
    command = ["--runs", str(tmp_path), *SMALL, "--name", "run", "--iterations", "1"]
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="no memory"):
        patch.setattr(train, "build", lambda *arguments: (_ for _ in ()).throw(RuntimeError("no memory")))
        train.main(command)
    train.main(command)
    assert "exists; continue it with" in refused(capsys, *command)


def test_a_resumed_run_keeps_its_settings(run, capsys):
    assert "only --iterations may change: got eta" in refused(capsys, "--resume", run, "--eta", 0.7)
    assert "variable in the command is probably unset" in refused(capsys, "--resume", "")
    assert "belong to a run that goes on" in refused(capsys, "--allow", "eta")
    config = json.loads((run / "config.json").read_text())
    for settings, message in (
        (json.dumps(config | {"warp": 9}), "settings that this version does not know: warp"),
        (json.dumps(config | {"iterations": 2}), "must be at least those that the run has made: got 2, it has made 3"),
        (json.dumps(config | {"eta": "high"}), "eta must be of type float: got 'high'"),
        (json.dumps(config | {"accumulation": 1}), "finish that run with the version that began it, or start anew"),
        (json.dumps(config | {"eta": float("nan")}), "NaN is not JSON"),
        (json.dumps(config | {"name": "\ud800"}), "surrogates not allowed"),
        ("{", "config.json must be the JSON that the run wrote"),
        ("[]", "an object: got list"),
        ("[" * 100_000, "recursion"),
    ):
        (run / "config.json").write_text(settings)
        assert message in refused(capsys, "--resume", run)


# ---------------------------------------------------------------------------------------------- log
def test_a_log_beyond_the_checkpoint_is_cut_on_resume(run, capsys):
    before = (run / "metrics.jsonl").read_bytes()
    with open(run / "metrics.jsonl", "a") as file:  # as after a kill between two checkpoints
        file.write(json.dumps({"iteration": 4, "reward_mean": 9.0}) + '\n{"iteration": 5, "rew')
    train.main(["--resume", str(run)])
    assert (run / "metrics.jsonl").read_bytes().startswith(before[: before.rindex(b"\n", 0, -1)])
    assert [line["iteration"] for line in checkpoint.read_log(run)] == [0, 1, 2, 3]

    (run / "metrics.jsonl").write_bytes(before.replace(b'"iteration": 1', b'"iteration": 7'))
    message = refused(capsys, "--resume", run, "--iterations", 4)
    assert "metrics.jsonl must begin with the" in message and "add `--allow metrics.jsonl`" in message
    train.main(["--resume", str(run), "--iterations", "4", "--allow", "metrics.jsonl"])
    assert [line["iteration"] for line in checkpoint.read_log(run)] == [3, 4]
    assert checkpoint.read_log(run)[-1]["allowed"] == {"metrics.jsonl": ["damaged", "begun anew"]}
    assert (run / "metrics.jsonl.set-aside-1").exists()


def test_the_log_is_strict_json_and_costs_the_same_at_any_length(tmp_path):
    log = checkpoint.Log(tmp_path)
    line = {"iteration": 1, "eval_reward": float("nan"), "kl": float("inf"), "allowed": {"eta": [0.5, float("-inf")]}}
    log.append(line)
    (read,) = checkpoint.read_log(tmp_path)
    assert math.isnan(read.pop("eval_reward")) and math.isnan(read.pop("kl"))
    assert read == {"iteration": 1, "allowed": {"eta": [0.5, None]}}

    def seconds(lines):
        started = time.perf_counter()
        for _ in range(lines):
            log.append({"iteration": 1, "padding": "x" * 1000})
        return (time.perf_counter() - started) / lines

    first = seconds(300)
    seconds(20_000)
    assert seconds(300) < 5 * first + 1e-3
    assert log.position() == {
        "bytes": (tmp_path / "metrics.jsonl").stat().st_size,
        "sha256": checkpoint._digest(tmp_path / "metrics.jsonl"),
    }


def test_pictures_are_drawn_from_a_log_with_nulls(run):
    log = checkpoint.read_log(run)
    for name in ("eval_reward", "eval_VQ"):
        log[0][name] = math.nan
    log[1]["kl_velocity"] = math.nan
    for name in ("samples_before.npy", "samples_after.npy"):
        assert np.load(run / name).shape[0] > 0
    pictures.report(run, log, Config(eval_noises=2), train.world.PROMPTS)


# ---------------------------------------------------------------------------------------------- disks
@pytest.fixture
def small_disk(tmp_path):
    """A file system of 9 MB: room for three checkpoints of 2.85 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=9m", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a tmpfs is not allowed here")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_room_is_checked_before_the_first_iteration(small_disk, capsys):
    message = refused(capsys, "--runs", small_disk, *SMALL, "--keep_checkpoints", 4)
    assert "must have room for keep_checkpoints + 1 checkpoints of 2," in message and "free; make room" in message


def fill(disk, leave):
    (disk / "filler").write_bytes(b"")
    free = shutil.disk_usage(disk).free
    (disk / "filler").write_bytes(bytes(max(free - leave, 0)))


def test_a_disk_that_fills_up_costs_no_checkpoint(small_disk, capsys, monkeypatch):
    """It is full when the third checkpoint is written: one message, two whole checkpoints, a log that goes on."""
    collect = train.collect

    def collect_and_fill(*arguments):
        if checkpoint.complete(small_disk / "run" / "checkpoints")[1:]:
            fill(small_disk, 500_000)
        return collect(*arguments)

    monkeypatch.setattr(train, "collect", collect_and_fill)
    message = refused(capsys, "--runs", small_disk, "--name", "run", "--iterations", 4, *SMALL)
    assert "iteration-000003 could not be written" in message and "No space left on device" in message
    assert "It needs 2," in message and f"are free in {small_disk / 'run' / 'checkpoints'}" in message
    assert "Checkpoints that are there: iteration-000001, iteration-000002" in message
    monkeypatch.setattr(train, "collect", collect)
    (small_disk / "filler").unlink()
    train.main(["--resume", str(small_disk / "run"), "--iterations", "4"])
    assert [line["iteration"] for line in checkpoint.read_log(small_disk / "run")] == [0, 1, 2, 3, 4]


def test_log_and_pictures_may_fail(run, capsys, monkeypatch):
    """No space for the log and the samples: warnings, and the run is saved. The line comes with the next one."""
    log = checkpoint.Log(run)
    shutil.rmtree(run / "tensorboard", ignore_errors=True)
    log.path.unlink()
    log.path.mkdir()
    log.append({"iteration": 0})
    assert "warning: writing" in capsys.readouterr().err
    log.path.rmdir()
    log.append({"iteration": 1})
    assert [line["iteration"] for line in checkpoint.read_log(run)] == [0, 1]

    def full(*arguments, **keywords):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    monkeypatch.setattr(pictures, "report", full)
    train.main(["--runs", str(run.parent), "--name", "no-pictures", "--iterations", "1", *SMALL])
    shown = capsys.readouterr().err
    assert shown.count("No space left on device") == 3 and "the run goes on" in shown
    assert checkpoint.latest(run.parent / "no-pictures").name == "iteration-000001"


# ---------------------------------------------------------------------------------------------- restarts
KILL_RANK_1 = """
import os, signal, sys
import checkpoint, train
save = checkpoint.save
def save_and_die(*arguments):
    final = save(*arguments)
    started_once = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    if started_once and os.environ["LOCAL_RANK"] == "1" and final.name == "iteration-000002":
        os.kill(os.getpid(), signal.SIGKILL)
    return final
checkpoint.save = save_and_die
train.run_evaluation = lambda *arguments: {}  # the launch is what is tested
train.pictures.report = lambda *arguments: None
train.main(sys.argv[1:])
"""


def test_a_restarted_launch_goes_on_in_the_same_folder(tmp_path):
    """torchrun --max-restarts on two ranks of the tiny preset; one is killed with -9 after the second checkpoint."""
    (tmp_path / "kill_rank_1.py").write_text(KILL_RANK_1)
    options = ["--preset", "tiny", "--runs", str(tmp_path), "--batch_size", "2", "--num_steps", "2"]
    options += ["--iterations", "3", "--checkpoint_every", "1"]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    command = [sys.executable, *launch, str(tmp_path / "kill_rank_1.py"), *options]
    with open(tmp_path / "out", "w") as out:
        process = subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stdout=out, stderr=subprocess.STDOUT)
        process.wait(timeout=300)
    shown = (tmp_path / "out").read_text()
    assert process.returncode == 0, shown[-3000:]
    assert f"a restart of this launch goes on in {tmp_path / 'tiny-1'}" in shown
    assert sorted(path.name for path in tmp_path.glob("tiny-*")) == ["tiny-1"]
    assert [line["iteration"] for line in checkpoint.read_log(tmp_path / "tiny-1")] == [0, 1, 2, 3]
    assert not list(tmp_path.glob(".launch-*"))


def test_each_restart_has_names_of_its_own_in_the_launchers_store(monkeypatch):
    """So that no rank finds the address of one that has died, which happens once in some restarts, by their timing."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    launcher = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "RANK": "0", "WORLD_SIZE": "1"}
    launcher |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "GROUP_WORLD_SIZE": "1"}
    for name, value in launcher.items():
        monkeypatch.setenv(name, value)
    names = []
    for restart in ("0", "1"):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", restart)
        train.join_ranks("gloo", timedelta(seconds=60))
        dist.destroy_process_group()
        names.append(store.num_keys())
    assert names[1] == 2 * names[0] > 0


# ---------------------------------------------------------------------------------------------- numbers of ranks
RESHARD = """
import sys
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
import checkpoint, ranks, train
from config import Config
from test_checkpoint import progress_of
train.setup_ranks(Config(model="toy"))
module, x, pulls = ranks.full_rank_batch()
if dist.is_initialized():
    for layer in module.blocks:
        fully_shard(layer)
    fully_shard(module)
optimizers = train.make_optimizers(module, Config(optimizer="muon", learning_rate=1e-2))
anchor = train.Anchor(module, 2)
if sys.argv[2] == "step":
    ranks.backward(module, x, pulls)
    for optimizer in optimizers:
        optimizer.step()
else:
    checkpoint.load(checkpoint.choose(sys.argv[1]), module, optimizers, anchor)
checkpoint.save(sys.argv[3] + "/checkpoints", module, optimizers, anchor, progress_of(1))
if dist.is_initialized():
    dist.destroy_process_group()
"""


def whole_tensors(run):
    """{name: tensor} of a checkpoint, put together from the parts of all ranks."""
    tensors, parts_of = {}, {}
    for path in sorted((run / "checkpoints" / "iteration-000001").glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            places = json.loads(file.metadata()["DCP_SHARDING_INFO"])
            for name in file.keys():
                parts_of.setdefault(name, []).append((places[name]["saved_offsets"], file.get_tensor(name)))
    for name, parts in parts_of.items():
        parts.sort(key=lambda part: part[0])
        tensors[name] = torch.cat([part for _, part in parts]) if parts[0][1].ndim else parts[0][1]
    return tensors


def test_any_number_of_ranks_reads_a_checkpoint_bit_for_bit(tmp_path):
    """2 ranks save; 3 read that and save; 1 reads that and saves. Rows: 32, 48 and 33, so that shards are uneven."""
    (tmp_path / "reshard.py").write_text(RESHARD)
    environment = {**ENVIRONMENT, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    runs = [str(tmp_path / name) for name in ("two", "three", "one")]
    for count, what, source, target in ((2, "step", "-", runs[0]), (3, "load", *runs[:2]), (1, "load", *runs[1:])):
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"] if count > 1 else []
        command = [sys.executable, *launcher, str(tmp_path / "reshard.py"), source, what, target]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr[-3000:]
    two, three, one = (whole_tensors(tmp_path / name) for name in ("two", "three", "one"))
    assert len(list((tmp_path / "three" / "checkpoints" / "iteration-000001").glob("shard-*"))) == 3
    assert two.keys() == three.keys() == one.keys()
    assert any("momentum_buffer" in name for name in one) and any("exp_avg_sq" in name for name in one)
    assert all(torch.equal(two[name], one[name]) and torch.equal(two[name], three[name]) for name in one)
    assert one["module.blocks.2.weight"].shape == (33, 48)
