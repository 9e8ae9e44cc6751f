"""The command line, the run folder, resuming bit for bit, stopping."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

import checkpoint
import train

ROOT = Path(train.__file__).parent
SMALL = ["--batch_size", "8", "--micro_batch", "8", "--group_size", "4", "--num_steps", "4", "--eval_steps", "2"]
SMALL += ["--eval_noises", "1", "--anchor_every", "5", "--checkpoint_every", "2", "--eval_every", "3", "--kl_switch", "2"]


def lines_of(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.endswith("_seconds")} for line in lines]


def weights_of(run):
    """Every tensor of the newest checkpoint: weights, optimizer moments and anchor."""
    path = checkpoint.latest(run)
    metadata = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    state = {n: torch.empty(m.size, dtype=m.properties.dtype) for n, m in metadata.items() if hasattr(m, "properties")}
    dcp.load(state, checkpoint_id=path)
    return state


# anchor_every 3: the anchor is the policy when the run stops, so going on must know when it was refreshed
@pytest.mark.parametrize("extra", [[], ["--kl_mode", "fixed"], ["--anchor_every", "3"]])
def test_resume_is_bit_for_bit(tmp_path, extra):
    common = ["--runs", str(tmp_path), *SMALL, *extra]
    train.main([*common, "--name", "whole", "--updates", "5"])
    train.main([*common, "--name", "parts", "--updates", "3"])
    train.main(["--resume", str(tmp_path / "parts"), "--updates", "5"])
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    a, b = weights_of(whole), weights_of(parts)
    assert a.keys() == b.keys() and any(name.startswith("anchor.") for name in a) and any("exp_avg" in n for n in a)
    assert all(torch.equal(a[name], b[name]) for name in a)
    # the run that was cut in two evaluated at its own end, too; all else is equal
    same = [{k: v for k, v in line.items() if not k.startswith("eval_")} for line in lines_of(parts)]
    assert same == [{k: v for k, v in line.items() if not k.startswith("eval_")} for line in lines_of(whole)]


def test_run_folder_holds_what_is_promised(tmp_path, capsys):
    train.main(["--runs", str(tmp_path), *SMALL, "--updates", "3"])
    run = tmp_path / "toy-1"
    for name in ("config.json", "metrics.jsonl", "curves.png", "samples_before.npy", "samples_before_after.gif"):
        assert (run / name).stat().st_size > 0
    assert [p.name for p in checkpoint.complete(run / "checkpoints")] == ["update-000002", "update-000003"]
    shown = capsys.readouterr().out
    assert "before    after 3  change" in shown and "reward" in shown and "TA" in shown
    train.main(["--runs", str(tmp_path), *SMALL, "--updates", "1"])
    assert (tmp_path / "toy-2").is_dir()
    with pytest.raises(SystemExit, match="exists; continue it with --resume"):
        train.main(["--runs", str(tmp_path), *SMALL, "--name", "toy-1"])


def test_a_log_beyond_the_checkpoint_is_cut_on_resume(tmp_path):
    train.main(["--runs", str(tmp_path), *SMALL, "--name", "run", "--updates", "2"])
    before = lines_of(tmp_path / "run")
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:  # as after a kill between two checkpoints
        file.write(json.dumps({"update": 3, "reward_mean": 9.0}) + "\n")
    train.main(["--resume", str(tmp_path / "run"), "--updates", "3"])
    after = lines_of(tmp_path / "run")
    assert after[: len(before)] == before and len(after) == len(before) + 1 and after[-1]["reward_mean"] != 9.0

    log = tmp_path / "run" / "metrics.jsonl"
    whole = log.read_text()
    log.write_text(whole + '{"update": 4, "rew')  # cut short, but beyond the checkpoint: nothing is lost
    assert checkpoint.read_log(tmp_path / "run", 3) == [json.loads(line) for line in whole.splitlines()]
    log.write_text(whole[:-10])
    with pytest.raises(ValueError, match="must hold a line for each update up to the checkpoint's, 3: got 3 whole lines"):
        train.main(["--resume", str(tmp_path / "run"), "--updates", "4"])


def test_an_evaluation_that_fails_loses_nothing_and_is_made_on_resume(tmp_path, monkeypatch):
    common = ["--runs", str(tmp_path), *SMALL, "--eval_every", "2"]
    train.main([*common, "--name", "whole", "--updates", "3"])
    evaluate = train.evaluate

    def fails_at_2(*arguments):
        if checkpoint.complete(tmp_path / "cut" / "checkpoints"):
            raise OSError("disk full")
        return evaluate(*arguments)

    monkeypatch.setattr(train, "evaluate", fails_at_2)
    with pytest.raises(OSError, match="disk full"):
        train.main([*common, "--name", "cut", "--updates", "3"])
    monkeypatch.setattr(train, "evaluate", evaluate)
    assert checkpoint.latest(tmp_path / "cut").name == "update-000002"
    train.main(["--resume", str(tmp_path / "cut")])
    assert lines_of(tmp_path / "cut") == lines_of(tmp_path / "whole")


def test_several_gpus_are_all_taken_and_given_time_to_save(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.delenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", raising=False)
    started = []
    monkeypatch.setattr(train.os, "execv", lambda program, command: started.append(command))
    monkeypatch.setattr(sys, "argv", ["train.py", "--preset", "paper"])
    train.launch_on_all_gpus(train.Config(model="toy"))
    assert not started
    train.launch_on_all_gpus(train.Config(model="a/b"))
    assert "--nproc-per-node=4" in started[0] and started[0][-3:] == ["train.py", "--preset", "paper"]
    assert int(train.os.environ["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) >= 3600


def test_an_interrupted_run_saves_and_says_how_to_go_on(tmp_path):
    command = [sys.executable, "train.py", "--runs", str(tmp_path), "--name", "cut", *SMALL, "--updates", "10000"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    log = tmp_path / "cut" / "metrics.jsonl"
    deadline = time.time() + 90
    while not (log.exists() and len(log.read_text().splitlines()) > 2):
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    shown, _ = process.communicate(timeout=60)
    done = lines_of(tmp_path / "cut")[-1]["update"]
    assert process.returncode == 0 and f"go on with: python train.py --resume {tmp_path / 'cut'}" in shown
    assert checkpoint.latest(tmp_path / "cut").name == f"update-{done:06d}"
    train.main(["--resume", str(tmp_path / "cut"), "--updates", str(done + 1)])
    assert lines_of(tmp_path / "cut")[-1]["update"] == done + 1


def test_dry_run_prints_the_arithmetic_and_touches_nothing(tmp_path, capsys):
    train.main(["--dry-run", "--runs", str(tmp_path / "none")])
    shown = capsys.readouterr().out
    assert "128 = 8 prompts × 16" in shown and "9 of 10" in shown and '"learning_rate": 0.0002' in shown
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    "options, message",
    [
        (["--etaa", "0.5"], "unrecognized arguments: --etaa"),
        (["--sde", "cps"], "unrecognized arguments"),  # no abbreviations either
        (["--sde_type", "ddpm"], "invalid choice: 'ddpm'"),
        (["--eta", "1.5", "--sde_type", "cps"], "eta must lie in [0, 1] for cps"),
        (["--eta", "0"], "eta must be positive"),
        (["--num_steps", "0"], "num_steps must be at least 1"),
        (["--num_steps", "1"], "a rollout needs a stochastic step: got none of 1"),
        (["--group_size", "1"], "group_size must be at least 2, for samples to be compared with: got 1"),
        (["--gpus", "8"], "--gpus and --gpu_memory_gb plan a run that is not started: add --dry-run"),
        (["--group_size", "6"], "group_size must divide batch_size × ranks: got 6 and 128 × 1"),
        (["--accumulation", "2"], "accumulation must divide the micro-batches"),
        (["--learning_rate", "-1"], "learning_rate must be positive"),
        (["--updates", "0"], "updates must be at least 1"),
        (["--max_failed_rewards", "1"], "max_failed_rewards is a share in [0, 1)"),
        (["--resume", "nowhere"], "--resume must name a run folder with a config.json: got nowhere"),
    ],
)
def test_settings_are_refused_before_any_work(options, message, capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(options)
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_a_resumed_run_keeps_its_settings(tmp_path, capsys):
    train.main(["--runs", str(tmp_path), *SMALL, "--name", "run", "--updates", "1"])
    run = tmp_path / "run"
    with pytest.raises(SystemExit):
        train.main(["--resume", str(run), "--eta", "0.7"])
    assert "only --updates may change: got eta" in capsys.readouterr().err
    config = json.loads((run / "config.json").read_text())
    train.main(["--resume", str(run), "--updates", "2"])
    for settings, message in (
        (json.dumps(config | {"warp": 9}), "settings that this version does not know: warp"),
        (json.dumps(config), "updates must be at least those that the run has made: got 1, it has made 2"),
        (json.dumps(config | {"updates": 2, "eta": "high"}), "eta must be of type float: got 'high'"),
        ("{", "config.json must be the JSON that the run wrote"),
    ):
        (run / "config.json").write_text(settings)
        with pytest.raises(SystemExit):
            train.main(["--resume", str(run)])
        assert message in capsys.readouterr().err


def test_a_run_that_was_killed_before_its_pictures_makes_them_on_resume(tmp_path):
    train.main(["--runs", str(tmp_path), *SMALL, "--name", "run", "--updates", "1"])
    for name in ("samples_after.npy", "samples_before_after.gif"):
        (tmp_path / "run" / name).unlink()
    train.main(["--resume", str(tmp_path / "run")])
    assert (tmp_path / "run" / "samples_after.npy").exists() and (tmp_path / "run" / "samples_before_after.gif").exists()


def test_a_save_that_was_killed_is_not_read(tmp_path):
    (tmp_path / "checkpoints" / "tmp-update-000009").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="must hold a complete checkpoint"):
        checkpoint.latest(tmp_path)


def test_help_explains_every_setting(capsys):
    with pytest.raises(SystemExit):
        train.main(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "η, exploration scale; at most 1 for cps [released code: 0.5] (default 0.5)" in shown and "[paper: 1e-4]" in shown
    assert "no weight decay [paper: 1e-5] (default 1e-05; toy 0.0002; tiny 0.0001)" in shown


def test_draws_do_not_repeat():
    first = train.draw_prompts(list("abcdef"), 4, 0, 0) + train.draw_prompts(list("abcdef"), 4, 0, 1)
    assert sorted(first[:6]) == list("abcdef")
    a, b, c = (torch.randn(3, generator=train.generator(*key)) for key in ((0, "noise", 1), (0, "noise", 1), (0, "noise", 2)))
    assert torch.equal(a, b) and not torch.equal(a, c)
