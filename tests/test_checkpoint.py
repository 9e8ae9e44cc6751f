"""The run folder: killed saves, damaged and hostile checkpoints, changed settings, full disks, the log, restarts."""

import ast
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
from dataclasses import asdict, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import forked
import numpy as np
import pytest
import test_rank_failures
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.distributed.fsdp import fully_shard
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

import faults
import ranks
import train
from engine import checkpoint, folder, pictures
from engine.build import write_small_models
from engine.checkpoint import listed
from engine.config import Config, allowed_changes, input_digests, parse, prompt_digests
from engine.folder import LOG, Log, locked, read_log
from engine.ranks import FolderError, join_ranks
from grpo import OneRank
from toy.world import PROMPTS
from trust_region import Anchor
from video import kernels

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
    counters = {"iteration": iteration, "optimizer_steps_made": 0, "ranks": 1, "log_first": 0}
    settings = {"line": {}, "log_waiting": [], "settings": asdict(Config()), "controller": {}}
    return {**counters, **settings, "prompt_digests": {}, "file_digests": {}}


def stamp(path):
    """Give a checkpoint the checksums of what it holds now, as a stranger would."""
    files = [file for file in path.iterdir() if file.name != "checksums.json"]
    (path / "checksums.json").write_text(json.dumps(checkpoint._digests(files)), encoding="utf-8")


# ---------------------------------------------------------------------------------------------- saves and kills
SAVER = """
import os, sys, torch
from engine import checkpoint
from test_checkpoint import progress_of
from trust_region import Anchor
from video import kernels
def save_for_ever(run):
    module = torch.nn.Linear(600, 600)
    optimizers, anchor = [torch.optim.AdamW(module.parameters())], Anchor(module, 2)
    module(torch.ones(1, 600)).sum().backward()
    optimizers[0].step()
    for iteration in range(1, 10**6):
        with torch.no_grad():
            module.weight.fill_(iteration)
        checkpoint.save(run + "/checkpoints", module, optimizers, anchor, progress_of(iteration))
        print("saved", iteration, flush=True)
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        save_for_ever(line.strip())
    print("process", child, flush=True)
    os.waitpid(child, 0)
    print("ended", child, flush=True)
"""


@pytest.fixture(scope="module")
def saver():
    """A process that has imported what it needs, and forks one that saves for ever for each folder it is told."""
    environment = {**ENVIRONMENT, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", SAVER], cwd=ROOT, env=environment, **pipes) as process:
        yield process
        process.stdin.close()


@pytest.mark.parametrize("moment", range(6))
def test_a_killed_save_leaves_a_resumable_run(tmp_path, saver, moment):
    """kill -9 at six moments of a loop that does nothing but save: the newest checkpoint is whole and current."""
    print(tmp_path, file=saver.stdin, flush=True)
    said = [saver.stdout.readline().split() for _ in range(3)]  # its number and two saves, in any order
    (child,) = [int(number) for word, number in said if word == "process"]
    time.sleep(0.007 * moment)
    os.kill(child, signal.SIGKILL)
    while said[-1][0] != "ended":
        said.append(saver.stdout.readline().split())
    announced = max(int(number) for word, number in said if word == "saved")
    module = torch.nn.Linear(600, 600)
    optimizers, anchor = [torch.optim.AdamW(module.parameters())], Anchor(module, 2)
    chosen = checkpoint.choose(tmp_path)
    checkpoint.load(chosen, module, optimizers, anchor)
    iteration = chosen.progress["iteration"]
    assert iteration in (announced, announced + 1)  # killed between the rename and the announcement: one more
    assert (module.weight == iteration).all()
    folder = tmp_path / "checkpoints"
    checkpoint.save(folder, module, optimizers, anchor, progress_of(iteration + 1))
    assert not list(folder.glob("tmp-*")) and len(listed(folder)) == 2


def test_a_save_that_was_killed_is_not_read(tmp_path):
    (tmp_path / "checkpoints" / "tmp-iteration-000009").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="must hold a complete checkpoint"):
        checkpoint.find(tmp_path)


def test_a_save_makes_no_run_folder(tmp_path):
    module = torch.nn.Linear(3, 3)
    optimizers = [torch.optim.AdamW(module.parameters())]
    with pytest.raises(FolderError, match="could not be written: .*No such file.*are there: none"):
        checkpoint.save(tmp_path / "gone" / "checkpoints", module, optimizers, None, progress_of(1))
    assert not (tmp_path / "gone").exists()


@pytest.mark.parametrize("name", ["module.bias", "optimizer.bias.exp_avg_sq", "anchor.bias"])
def test_what_is_not_finite_is_not_saved(tmp_path, name):
    module = torch.nn.Linear(3, 3)
    optimizers, anchor = [torch.optim.AdamW(module.parameters())], Anchor(module, 2)
    module(torch.ones(1, 3)).sum().backward()
    optimizers[0].step()
    checkpoint.save(tmp_path, module, optimizers, anchor, progress_of(1))
    state, _ = checkpoint._state(module, optimizers, anchor)
    with torch.no_grad():
        checkpoint._flat(state)[name][1] = torch.nan  # the state shares its memory with what is trained
    for iteration in (2, 3):
        with pytest.raises(FloatingPointError, match=f"must be finite: got NaN or infinity in {name} of rank 0"):
            checkpoint.save(tmp_path, module, optimizers, anchor, progress_of(iteration))
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
    assert [path.name for path in listed(run / "checkpoints")] == ["iteration-000002", "iteration-000003"]


def test_stray_names_are_ignored(run):
    folder = run / "checkpoints"
    shutil.copytree(folder / "iteration-000003", folder / "iteration-4.bak")
    (folder / "iteration-xyz").mkdir()
    (folder / "foo").write_text("", encoding="utf-8")
    train.main(["--resume", str(run), "--iterations", "4"])
    assert (folder / "iteration-4.bak").is_dir() and (folder / "foo").exists()


def test_a_linked_checkpoint_and_a_stray_file_are_no_obstacle(run, tmp_path):
    folder = run / "checkpoints"
    shutil.move(folder / "iteration-000002", tmp_path / "elsewhere")
    (folder / "iteration-000002").symlink_to(tmp_path / "elsewhere")
    (folder / "tmp-iteration-000004").write_text("", encoding="utf-8")
    train.main(["--resume", str(run), "--iterations", "6"])
    assert [path.name for path in listed(folder)] == ["iteration-000005", "iteration-000006"]
    assert list((tmp_path / "elsewhere").iterdir())  # what was linked is not ours to delete


def test_one_launch_at_a_time(run, capsys):
    with locked(run):
        assert "one launch at a time may train in a run folder" in refused(capsys, "--resume", run, "--iterations", 4)
    train.main(["--resume", str(run), "--iterations", "4"])


# ---------------------------------------------------------------------------------------------- moved folders
def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("what", ["moved", "removed", "replaced"])
def test_a_run_whose_folder_is_gone_ends_and_makes_nothing_anew(tmp_path, monkeypatch, capsys, what):
    """In its third iteration; replaced: another run of the same name then stands there, whose files stay its own."""
    collect, iterations = train.collect, []
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    command = ["--runs", str(tmp_path), "--name", "run", "--iterations", "5", *SMALL, "--eval_every", "1"]
    monkeypatch.setattr(pictures, "report", lambda *arguments: None)

    def collect_and_move(*arguments):
        iterations.append(1)
        if len(iterations) == 3:
            run.rename(elsewhere)
        if len(iterations) == 3 and what == "removed":
            shutil.rmtree(elsewhere)
        if len(iterations) == 3 and what == "replaced":
            train.main([*command, "--seed", "1"])
            others.update(contents(run))
        return collect(*arguments)

    others = {}
    monkeypatch.setattr(train, "collect", collect_and_move)
    message = refused(capsys, *command)
    assert f"the one that was {run} has been moved, removed or replaced" in message
    assert (contents(run) if run.exists() else {}) == others
    assert bool(others) == (what == "replaced")
    if what == "removed":
        return
    assert [line["iteration"] for line in read_log(elsewhere)] == [0, 1, 2]
    monkeypatch.setattr(train, "collect", collect)
    train.main(["--resume", str(elsewhere), "--iterations", "4"])  # as the message says
    assert [line["iteration"] for line in read_log(elsewhere)] == [0, 1, 2, 3, 4]


def two_ranks(what, place):
    """A rank of two, whose run folder is replaced, or of which one is killed once, right after its second save."""
    collect, save, rollouts = train.collect, checkpoint.save, []

    def collect_and_move(*arguments):
        rollouts.append(1)
        if what == "moved" and len(rollouts) == 2 and os.environ["RANK"] == "0":
            (place / "run").rename(place / "elsewhere")
            shutil.copytree(place / "elsewhere", place / "run")
        return collect(*arguments)

    def save_and_die(*arguments):
        final = save(*arguments)
        started_once = os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0"
        if what == "killed" and started_once and os.environ["RANK"] == "1" and final.name == "iteration-000002":
            os.kill(os.getpid(), signal.SIGKILL)
        return final

    train.collect, checkpoint.save = collect_and_move, save_and_die
    test_rank_failures.Config = partial(Config, checkpoint_every=1)
    test_rank_failures.SimpleNamespace = partial(SimpleNamespace, origin=None, allow=[])
    test_rank_failures.script("none", str(place), "600")


def test_two_ranks_end_when_their_folder_is_replaced(tmp_path):
    """The copy that stands there then has a lock of the same name and bytes."""
    codes = forked.exit_codes(forked.start(2, tmp_path / "shown", two_ranks, "moved", tmp_path))
    shown = (tmp_path / "shown").read_text(encoding="utf-8")
    assert 0 not in codes and shown.count("has been moved, removed or replaced") == 1, shown
    assert contents(tmp_path / "run") == contents(tmp_path / "elsewhere")
    assert [line["iteration"] for line in read_log(tmp_path / "run")] == [0, 1]


# ---------------------------------------------------------------------------------------------- hostile files
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


def test_counters_that_cannot_be_are_refused(run, capsys):
    path = run / "checkpoints" / "iteration-000003"
    progress = json.loads((path / "progress.json").read_text(encoding="utf-8"))
    for changed, message in (
        ({"log_first": -1}, "must hold counters from 0 on: got -1"),
        ({"anchor_refreshed_at": None}, "must say when this run's anchor was refreshed"),
    ):
        (path / "progress.json").write_text(json.dumps(progress | changed), encoding="utf-8")
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
    whole = json.loads((template / "checkpoints" / "iteration-000003" / "progress.json").read_text(encoding="utf-8"))
    name = data.draw(st.sampled_from([*whole, "more"]))
    text = data.draw(st.binary(max_size=30) | st.just(json.dumps(whole | {name: data.draw(JSON)}).encode()))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "iteration-000003"
        path.mkdir()
        (path / "progress.json").write_bytes(text)
        stamp(path)
        try:
            progress = checkpoint.on_first_rank(checkpoint.verify, path)
            allowed_changes(Config(iterations=3), 1, progress, [])
        except FolderError:
            return
        assert progress["iteration"] == 3 and progress["optimizer_steps_made"] >= 0


@hypothesis_settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_log_is_as_it_was_or_refused(data):
    lines = b'{"iteration": 0}\n{"iteration": 1}\n'
    cut = st.integers(0, len(lines) - 1).map(lambda length: lines[:length])
    text = data.draw(st.binary(max_size=40) | st.binary(max_size=9).map(lambda more: lines + more) | cut)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "metrics.jsonl").write_bytes(text)
        try:
            log = Log(folder, progress_of(2))
        except FolderError:
            assert not text.startswith(lines)
            return
        log.append({"iteration": 2})
        assert [line["iteration"] for line in read_log(folder)] == [0, 1, 2]


# ---------------------------------------------------------------------------------------------- settings
def test_a_change_of_the_algorithm_must_be_allowed_and_is_logged(run, capsys):
    config = json.loads((run / "config.json").read_text(encoding="utf-8"))
    changed = {"eta": 0.7, "seed": 3, "keep_checkpoints": 5, "micro_batch": 2}
    (run / "config.json").write_text(json.dumps(config | changed), encoding="utf-8")
    message = refused(capsys, "--resume", run, "--iterations", 4)
    assert "got eta 0.5 → 0.7, seed 0 → 3." in message and "with --allow eta,seed;" in message
    assert "got seed 0 → 3" in refused(capsys, "--resume", run, "--iterations", 4, "--allow", "eta")
    assert "--allow takes names of settings" in refused(capsys, "--resume", run, "--allow", "etaa")
    train.main(["--resume", str(run), "--iterations", "5", "--allow", "eta,seed"])
    log = read_log(run)
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
        assert allowed_changes(config, ranks, progress, []) == {}
        return
    with pytest.raises(FolderError, match="batch_size '8 on all ranks'"):
        allowed_changes(config, ranks, progress, [])
    assert list(allowed_changes(config, ranks, progress, ["batch_size"])) == ["batch_size"]


def test_a_prompt_file_may_move_but_not_change(tmp_path):
    for name, text in {"old.txt": "a cat\na dog\n", "moved.txt": "a cat\na dog\n", "new.txt": "a cat\na god\n"}.items():
        (tmp_path / name).write_text(text, encoding="utf-8")

    old = Config(model="tiny", prompts=str(tmp_path / "old.txt"), eval_prompts=str(tmp_path / "old.txt"))
    progress = progress_of(1) | {"settings": asdict(old), "prompt_digests": prompt_digests(old)}
    for name in ("prompts", "eval_prompts"):
        moved, new = (replace(old, **{name: str(tmp_path / file)}) for file in ("moved.txt", "new.txt"))
        assert allowed_changes(moved, 1, progress, []) == {}
        with pytest.raises(FolderError, match=f"{name} 'prompts of SHA-256 .* with --allow {name};"):
            allowed_changes(new, 1, progress, [])
        assert list(allowed_changes(new, 1, progress, [name])) == [name]


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
    assert "only apply to a resumed run" in refused(capsys, "--allow", "eta")
    config = json.loads((run / "config.json").read_text(encoding="utf-8"))
    for settings, message in (
        (json.dumps(config | {"warp": 9}), "settings that this version does not know: warp"),
        (json.dumps(config | {"iterations": 2}), "must be at least the 3 that the run has already made: got 2"),
        (json.dumps(config | {"eta": "high"}), "eta must be of type float: got 'high'"),
        (json.dumps(config | {"eta": float("nan")}), "NaN is not JSON"),
        (json.dumps(config | {"name": "\ud800"}), "surrogates not allowed"),
        ("{", "config.json must be JSON: "),
        ("[]", "must be a JSON object: got []; put back what the run wrote"),
        ("[" * 100_000, "recursion"),
    ):
        (run / "config.json").write_text(settings, encoding="utf-8")
        assert message in refused(capsys, "--resume", run)


def test_settings_that_change_the_tensors_are_never_offered(run, capsys):
    config = json.loads((run / "config.json").read_text(encoding="utf-8"))
    for changed in ({"optimizer": "muon"}, {"lora_rank": 2}, {"kl_mode": "stepwise"}, {"beta_pos": 0.0}):
        (run / "config.json").write_text(json.dumps(config | {"eta": 0.7} | changed), encoding="utf-8")
        (name,) = changed
        for extra in ([], ["--allow", f"eta,{name}"]):
            message = refused(capsys, "--resume", run, *extra)
            assert f"{name} {config[name]!r} → {changed[name]!r}. Restore it in config.json, or write" in message
            assert "add --allow" not in message and "with --allow" not in message


def test_text_files_are_utf8_in_any_locale(tmp_path):
    """Two resumes under an ASCII locale of a run whose settings hold other letters."""
    train.main(["--runs", str(tmp_path), "--name", "läuf", "--iterations", "1", *SMALL])
    (tmp_path / "link").symlink_to("läuf")
    script = "import sys, train\nfor count in '23':\n    train.main(['--resume', sys.argv[1], '--iterations', count])"
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "utf-8"}
    command = [sys.executable, "-c", script, str(tmp_path / "link")]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT | locale, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    config = json.loads((tmp_path / "läuf" / "config.json").read_text(encoding="utf-8"))
    assert config["name"] == "läuf" and config["iterations"] == 3
    assert [line["iteration"] for line in read_log(tmp_path / "läuf")] == [0, 1, 2, 3]


def test_every_text_file_is_opened_with_its_encoding():
    """In all rooms and the tests' own helpers: what the locale would decide differs between machines."""
    rooms = ["", "engine", "video", "toy", "tiny", "paper", "prompts"]
    files = [path for room in rooms for path in (ROOT / room).glob("*.py")]
    files += [ROOT / "tests" / f"{name}.py" for name in ("conftest", "faults", "mutants", "ranks", "soak")]
    for path in files:
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(call, ast.Call):
                continue
            name = getattr(call.func, "attr", getattr(call.func, "id", ""))
            modes = [ast.unparse(value) for value in call.args[1:]]
            opens = isinstance(call.func, ast.Name) and name == "open" and not any("b" in mode for mode in modes)
            if opens or name in ("read_text", "write_text"):
                assert "encoding" in [word.arg for word in call.keywords], f"{path}, line {call.lineno}"


# ---------------------------------------------------------------------------------------------- the model's files
MODEL = ["--preset", "paper", "--iterations", "1", "--lora_rank", "1", "--compute_dtype", "float32", "--frames", "5"]
MODEL += ["--height", "32", "--width", "32", "--eval_height", "32", "--eval_width", "32", "--vae_dtype", "float32"]
MODEL += ["--batch_size", "2", "--group_size", "2", "--num_steps", "2", "--eval_steps", "1", "--micro_batch", "1"]
UMASK = 0o027


@pytest.fixture(scope="module")
def of_model(tmp_path_factory):
    """A folder with a model, its rewards, and a run of one iteration from them, all written under another umask."""
    place = tmp_path_factory.mktemp("of-model")
    (place / "prompts.txt").write_text("a cat\n", encoding="utf-8")
    before = os.umask(UMASK)
    try:
        write_small_models("tiny", place / "files", OneRank())
        files = {"model": "model", "videoalign": "videoalign", "videoalign_repo": "videoalign_repo"}
        options = [word for name, file in files.items() for word in (f"--{name}", str(place / "files" / file))]
        for name in ("prompts", "eval_prompts"):
            options += [f"--{name}", str(place / "prompts.txt")]
        train.main([*MODEL, *options, "--runs", str(place), "--name", "run"])
        train.main(["--resume", str(place / "run"), "--export", str(place / "exported")])
    finally:
        os.umask(before)
    return place


@pytest.fixture
def copy(of_model, tmp_path):
    """A copy of that folder, with its files' times, whose run reads the copied files: they have moved."""
    place = shutil.copytree(of_model, tmp_path / "copy")
    path = place / "run" / "config.json"
    path.write_text(path.read_text(encoding="utf-8").replace(str(of_model), str(place)), encoding="utf-8")
    return place


def test_files_have_the_mode_that_the_umask_gives(of_model):
    files = [path for path in of_model.rglob("*") if path.is_file() and path.name != "prompts.txt"]
    kinds = {path.suffix for path in files}
    assert {".safetensors", ".json", ".jsonl", ".mp4", ".png", ".npy", ".pth"} <= kinds
    assert {folder.name for folder in of_model.iterdir()} >= {"prompt_cache", "exported", "run", "files"}
    for path in files:
        assert path.stat().st_mode & 0o777 == 0o666 & ~UMASK, path


def append_to(path):
    with open(path, "ab") as file:
        file.write(b" ")


def test_files_that_have_moved_are_the_same(copy):
    train.main(["--resume", str(copy / "run"), "--iterations", "2"])
    assert "allowed" not in read_log(copy / "run")[-1]


def test_another_kernel_of_attention_is_logged(copy, monkeypatch):
    """--attention auto may choose another one where a run goes on; the first line that it makes says so."""
    monkeypatch.setattr(kernels, "choose", lambda *where: "math")
    train.main(["--resume", str(copy / "run"), "--iterations", "2"])
    assert read_log(copy / "run")[-1]["allowed"] == {"attention": ["flash", "math"]}


@pytest.mark.parametrize(
    "file",
    [
        "model/vae/config.json",
        "model/scheduler/scheduler_config.json",
        "videoalign/model_config.json",
        "videoalign_repo/prompt_template.py",
    ],
)
def test_files_that_have_changed_are_named(copy, capsys, file):
    append_to(copy / "files" / file)
    setting, _, named = file.partition("/")
    message = refused(capsys, "--resume", copy / "run", "--iterations", 2)
    assert f"got {setting} '{named}: SHA-256 " in message and f"with --allow {setting}; the log" in message
    assert named in refused(capsys, "--resume", copy / "run", "--iterations", 2, "--allow", "pick_score")
    if setting == "model":
        command = ["--resume", copy / "run", "--export", copy / "again"]
        assert f"an export needs the model that the run started with: got {named}: " in refused(capsys, *command)
        assert not (copy / "again").exists()
        train.main([*map(str, command), "--allow", "model"])
    if file != "model/vae/config.json":
        return
    resume = ["--resume", str(copy / "run"), "--iterations", "2"]
    codes = forked.exit_codes(forked.start(2, copy / "shown", train.main, resume))
    shown = (copy / "shown").read_text(encoding="utf-8")
    assert 0 not in codes and shown.count(f"model '{named}: SHA-256 ") == 1, shown
    train.main([*resume, "--allow", setting])
    old, new = read_log(copy / "run")[-1]["allowed"][setting]
    assert old.startswith(f"{named}: SHA-256") and new.startswith(f"{named}: SHA-256") and old != new
    train.main(["--resume", str(copy / "run"), "--iterations", "3"])  # now they are the run's own


def test_large_files_are_compared_without_being_read(tmp_path):
    """54 GB, of which the disk holds none; a read would take minutes."""
    (tmp_path / "vae").mkdir()
    weights = tmp_path / "vae" / "weights.safetensors"
    weights.touch()
    os.truncate(weights, 54 * 10**9)
    os.utime(weights, (10**9, 10**9))
    config = Config(model=str(tmp_path))
    progress = progress_of(1) | {"settings": asdict(config)} | input_digests(config)
    states = {"vae/weights.safetensors": "54,000,000,000 bytes of 2001-09-09T01:46:40+00:00"}
    assert progress["file_digests"]["model"] == states
    assert allowed_changes(config, 1, progress, []) == {}
    for change in (lambda: os.utime(weights, (10**9, 10**9 + 1)), lambda: os.truncate(weights, 10**9), weights.unlink):
        change()
        with pytest.raises(FolderError, match="got model 'vae/weights.safetensors: 54,000,000,000 bytes of 2001"):
            allowed_changes(config, 1, progress, [])
    assert allowed_changes(config, 1, progress, ["model"])["model"][1] == "vae/weights.safetensors: missing"


def test_a_hub_id_counts_by_its_revision(tmp_path, monkeypatch):
    """As the hub's library lays out its cache."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    cached = tmp_path / "models--some--model"
    (cached / "refs").mkdir(parents=True)
    config, revisions = Config(model="some/model"), []
    for revision in ("", "1" * 40, "2" * 40):
        if revision:
            (cached / "snapshots" / revision).mkdir(parents=True)
            (cached / "snapshots" / revision / "model_index.json").write_text("{}", encoding="utf-8")
            (cached / "refs" / "main").write_text(revision, encoding="utf-8")
        revisions.append(input_digests(config)["file_digests"]["model"]["revision"])
    assert revisions == [f"{what} of 'some/model'" for what in ("none in this machine's cache", "1" * 40, "2" * 40)]


# ---------------------------------------------------------------------------------------------- log
def test_a_log_beyond_the_checkpoint_is_cut_on_resume(run, capsys):
    before = (run / "metrics.jsonl").read_bytes()
    with open(run / "metrics.jsonl", "a", encoding="utf-8") as file:  # as after a kill between two checkpoints
        file.write(json.dumps({"iteration": 4, "reward_mean": 9.0}) + '\n{"iteration": 5, "rew')
    train.main(["--resume", str(run)])
    assert (run / "metrics.jsonl").read_bytes().startswith(before[: before.rindex(b"\n", 0, -1)])
    assert [line["iteration"] for line in read_log(run)] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "damage", [lambda log: log.replace(b'"iteration": 1', b'"iteration": 7'), lambda log: log[log.index(b"\n") + 1 :]]
)
def test_a_log_that_lacks_a_line_is_refused_or_set_aside_and_gets_no_table(run, capsys, damage):
    path = run / "metrics.jsonl"
    path.write_bytes(damage(path.read_bytes()))
    message = refused(capsys, "--resume", run, "--iterations", 4)
    assert "metrics.jsonl must hold the lines of iterations 0 to 2: that of" in message
    assert "is missing or damaged" in message and "add `--allow metrics.jsonl`" in message
    capsys.readouterr()
    train.main(["--resume", str(run), "--iterations", "4", "--allow", "metrics.jsonl"])
    shown = capsys.readouterr().out
    assert "no table of before and after: metrics.jsonl lacks the evaluation of iteration 0" in shown
    assert "change" not in shown  # no row of that table
    assert [line["iteration"] for line in read_log(run)] == [3, 4]
    assert read_log(run)[-1]["allowed"] == {"metrics.jsonl": ["damaged", "restarted"]}
    assert (run / "metrics.jsonl.set-aside-1").exists()
    train.main(["--resume", str(run), "--iterations", "5"])  # the new log is now the run's own
    assert [line["iteration"] for line in read_log(run)] == [3, 4, 5]


def test_lines_that_wait_are_saved_and_written_by_the_run_that_goes_on(tmp_path, monkeypatch, capsys):
    """The log can be read and not be written, as another account's, from iteration 2 on and in the first resume."""

    def read_only(path, mode="r", **options):
        if str(path).endswith(LOG) and mode != "rb" and listed(tmp_path / "run" / "checkpoints")[1:]:
            raise PermissionError(13, "Permission denied", str(path))
        return open(path, mode, **options)

    monkeypatch.setattr(folder, "open", read_only, raising=False)
    train.main(["--runs", str(tmp_path), "--name", "run", "--iterations", "4", *SMALL])
    assert [line["iteration"] for line in read_log(tmp_path / "run")] == [0, 1]
    shown = capsys.readouterr()
    assert "Permission denied" in shown.err
    assert "no table of before and after: metrics.jsonl lacks the evaluation of iteration 4" in shown.out
    train.main(["--resume", str(tmp_path / "run"), "--iterations", "5"])
    monkeypatch.undo()
    train.main(["--resume", str(tmp_path / "run"), "--iterations", "6"])
    assert [line["iteration"] for line in read_log(tmp_path / "run")] == [0, 1, 2, 3, 4, 5, 6]
    assert "before    after 6  change" in capsys.readouterr().out


def test_the_log_is_strict_json_and_costs_the_same_at_any_length(tmp_path):
    log = Log(tmp_path)
    line = {"iteration": 1, "eval_reward": float("nan"), "kl": float("inf"), "allowed": {"eta": [0.5, float("-inf")]}}
    log.append(line)
    (read,) = read_log(tmp_path)
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
    assert log.state() == {"log_first": 0, "log_waiting": []}


def test_pictures_are_drawn_from_a_log_with_nulls(run, drawn_curves):
    log = read_log(run)
    for name in ("eval_reward", "eval_VQ"):
        log[0][name] = math.nan
    log[1]["kl_velocity"] = math.nan
    for name in ("samples_before.npy", "samples_after.npy"):
        assert np.load(run / name).shape[0] > 0
    pictures.report(run, log, Config(eval_noises=1), PROMPTS)


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


def test_the_room_that_is_needed_counts_every_part_and_the_one_being_written(tmp_path, monkeypatch):
    """Against what a checkpoint holds: with Muon and AdamW, and an anchor."""
    module = torch.nn.Sequential(torch.nn.Linear(40, 30), torch.nn.Linear(30, 20))
    matrices, others = [module[0].weight], [module[0].bias, *module[1].parameters()]
    optimizers, anchor = [torch.optim.Muon(matrices), torch.optim.AdamW(others)], Anchor(module, 2)
    module(torch.ones(1, 40)).sum().backward()
    for optimizer in optimizers:
        optimizer.step()
    path = checkpoint.save(tmp_path, module, optimizers, anchor, progress_of(1))
    (shard,) = path.glob("*.safetensors")
    size = sum(tensor.nbytes for tensor in load_file(shard).values()) - 4 * len(others)  # AdamW's counts of steps
    monkeypatch.setattr(checkpoint, "_free", lambda folder: room)
    for room, new in ((3 * size, True), (2 * size, False)):  # the second run has one of its two checkpoints
        place = tmp_path / "new" if new else tmp_path
        checkpoint.check_room(place, module, optimizers, anchor, keep=2)
        room -= 1
        with pytest.raises(FolderError, match=f"must have room for .* of {size:,} bytes"):
            checkpoint.check_room(place, module, optimizers, anchor, keep=2)


def fill(disk, leave):
    (disk / "filler").write_bytes(b"")
    free = shutil.disk_usage(disk).free
    (disk / "filler").write_bytes(bytes(max(free - leave, 0)))


def test_what_is_written_as_a_whole_keeps_what_stood_there(small_disk):
    (small_disk / "config.json").write_bytes(b"old")
    fill(small_disk, 100_000)
    with pytest.raises(OSError, match="No space left on device"):
        folder.write_whole(small_disk / "config.json", bytes(10**6))
    assert (small_disk / "config.json").read_bytes() == b"old"


def test_a_disk_that_fills_up_costs_no_checkpoint(small_disk, capsys, monkeypatch):
    """It is full when the third checkpoint is written: one message, two whole checkpoints, a log that goes on."""
    collect = train.collect

    def collect_and_fill(*arguments):
        if listed(small_disk / "run" / "checkpoints")[1:]:
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
    assert [line["iteration"] for line in read_log(small_disk / "run")] == [0, 1, 2, 3, 4]


def test_log_and_pictures_may_fail(run, capsys, monkeypatch):
    """No space for the log and the samples: warnings, and the run is saved. The line comes with the next one."""
    log = Log(run)
    shutil.rmtree(run / "tensorboard", ignore_errors=True)
    log.path.unlink()
    log.path.mkdir()
    log.append({"iteration": 0})
    assert "warning: writing" in capsys.readouterr().err
    log.path.rmdir()
    log.append({"iteration": 1})
    assert [line["iteration"] for line in read_log(run)] == [0, 1]

    def full(*arguments, **keywords):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    monkeypatch.setattr(pictures, "report", full)
    train.main(["--runs", str(run.parent), "--name", "no-pictures", "--iterations", "1", *SMALL])
    shown = capsys.readouterr().err
    assert shown.count("No space left on device") == 3 and "the run goes on" in shown
    assert checkpoint.find(run.parent / "no-pictures").name == "iteration-000001"


# ---------------------------------------------------------------------------------------------- restarts
def restarted(place):
    """torchrun's agent, whose ranks are forked."""
    nodes = LaunchConfig(min_nodes=1, max_nodes=1, nproc_per_node=2, max_restarts=1, start_method="fork", run_id="x")
    nodes.rdzv_backend, nodes.rdzv_endpoint = "c10d", "127.0.0.1:0"
    elastic_launch(nodes, two_ranks)("killed", place)


def test_a_restarted_launch_goes_on_in_the_same_folder(tmp_path):
    """torchrun --max-restarts on two ranks, of which one is killed with -9 after the second checkpoint."""
    (code,) = forked.exit_codes(forked.start(1, tmp_path / "shown", restarted, tmp_path))
    shown = (tmp_path / "shown").read_text(encoding="utf-8")
    assert code == 0, shown[-3000:]
    assert f"a restart of this launch goes on in {tmp_path / 'run'}" in shown
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["run"]
    last = test_rank_failures.ITERATIONS
    assert [line["iteration"] for line in read_log(tmp_path / "run")] == list(range(last + 1))
    assert shown.count(f"iteration 1 of {last}:") == 1 and shown.count(f"iteration {last} of {last}:") == 1


def test_a_launch_that_may_restart_must_name_its_run(run, monkeypatch, capsys):
    """On any machine: the others' agents count their restarts for themselves."""
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "1")
    command = ["--runs", run.parent, "--iterations", 4, *SMALL]
    for rank in ("0", "1"):
        with monkeypatch.context() as patch:
            launcher = {"RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
            for name, value in launcher.items():
                patch.setenv(name, value)
            with pytest.raises(SystemExit):
                parse(["--preset", "tiny", "--runs", str(run.parent)])
        assert "so that a restart finds its folder: got none; add --name" in capsys.readouterr().err
    assert "--from would return to that checkpoint" in refused(capsys, "--resume", run, "--from", "iteration-000002")
    assert "exists; continue it with --resume" in refused(capsys, *command, "--name", "run")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    train.main([*map(str, command), "--name", "run"])
    assert [line["iteration"] for line in read_log(run)] == [0, 1, 2, 3, 4]
    train.main([*map(str, command), "--name", "new"])  # a restart before the folder was made
    assert [line["iteration"] for line in read_log(run.parent / "new")] == [0, 1, 2, 3, 4]


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
        join_ranks("gloo", timedelta(seconds=60))
        dist.destroy_process_group()
        names.append(store.num_keys())
    assert names[1] == 2 * names[0] > 0


# ---------------------------------------------------------------------------------------------- numbers of ranks
def reshard(source, target):
    """A rank that loads a checkpoint, or without one makes an optimizer step, and saves."""
    train.setup_ranks(Config(model="toy"), {})
    module, x, pulls = ranks.full_rank_batch()
    if dist.is_initialized():
        for layer in module.blocks:
            fully_shard(layer)
        fully_shard(module)
    optimizers = train.make_optimizers(module, Config(optimizer="muon", learning_rate=1e-2))
    anchor = Anchor(module, 2)
    if source is None:
        ranks.backward(module, x, pulls)
        for optimizer in optimizers:
            optimizer.step()
    else:
        checkpoint.load(checkpoint.choose(source), module, optimizers, anchor)
    checkpoint.save(target / "checkpoints", module, optimizers, anchor, progress_of(1))


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
    runs = {name: tmp_path / name for name in ("two", "three", "one")}
    for run in runs.values():
        run.mkdir()
    for count, source, target in ((2, None, "two"), (3, runs["two"], "three"), (1, runs["three"], "one")):
        forked.finish(forked.start(count, tmp_path / "shown", reshard, source, runs[target]))
    two, three, one = (whole_tensors(tmp_path / name) for name in ("two", "three", "one"))
    assert len(list((tmp_path / "three" / "checkpoints" / "iteration-000001").glob("shard-*"))) == 3
    assert two.keys() == three.keys() == one.keys()
    assert any("momentum_buffer" in name for name in one) and any("exp_avg_sq" in name for name in one)
    assert all(torch.equal(two[name], one[name]) and torch.equal(two[name], three[name]) for name in one)
    assert one["module.blocks.2.weight"].shape == (33, 48)
