"""What a launch tells its ranks: the same everywhere, or the first difference is named; and torchrun's variables.

This file is also the script of two ranks, `test_agreement.py FOLDER COPY`. The second one runs the code in COPY, and in
each round begins train.py with something else than the first.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from forked import free_port

ROOT = Path(__file__).parent.parent
REWARD = "def f(videos, prompts): return {'calm': videos.float().flatten(1).mean(1)}\ng = f\n"
# {what differs: (the first rank's options, the second's)}
ROUNDS = {
    "seed": (["--seed", "1"], ["--seed", "2"]),
    "eta": (["--eta", "0.5"], ["--eta", "0.6"]),
    "num_steps": (["--num_steps", "4"], ["--num_steps", "5"]),
    "context_parallel": ([], ["--batch_size", "4", "--context_parallel", "2"]),
    "runs": ([], ["--runs", "others"]),
    "prompts": (["--prompts", "prompts-0.txt"], ["--prompts", "prompts-1.txt"]),
    "reward": (["--reward", "reward-0.py:f"], ["--reward", "reward-1.py:f"]),
    "reward's function": (["--reward", "reward-0.py:f"], ["--reward", "reward-0.py:g"]),
    "code": ([], []),
}


# ------------------------------------------------------------------------------------------------ the script
def script(folder, copy):
    rank = int(os.environ["RANK"])
    sys.path.insert(0, copy if rank else str(ROOT))
    import train

    assert Path(train.__file__).parent == Path(copy if rank else ROOT)
    os.chdir(folder)
    train.build = lambda *arguments: sys.exit("weights were about to be loaded")
    for name, options in ROUNDS.items():
        weights = ["--reward_weights", "calm=1"] if "reward" in name else []
        try:
            train.main(["--preset", "tiny", "--runs", "runs", *weights, *options[rank]])
        except SystemExit as end:
            Path(f"end-{name}-{rank}").write_text(str(end.code))


# ------------------------------------------------------------------------------------------------ the tests
@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """What two such ranks print, without a torchrun. The second one's code differs in a comment of engine/draws.py."""
    folder = tmp_path_factory.mktemp("agreement")
    (folder / "prompts-0.txt").write_text("a cat\n")
    (folder / "prompts-1.txt").write_text("a dog\n")
    (folder / "reward-0.py").write_text(REWARD)
    (folder / "reward-1.py").write_text(f"{REWARD}# another\n")
    copy = folder / "copy"
    for source in [*ROOT.glob("*.py"), *(ROOT / "prompts").glob("*.*")]:
        (copy / source.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, copy / source.relative_to(ROOT))
    for room in ("engine", "tiny", "toy", "video"):
        shutil.copytree(ROOT / room, copy / room, ignore=shutil.ignore_patterns("__pycache__"))
    with open(copy / "engine" / "draws.py", "a") as file:
        file.write("# another version\n")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = [sys.executable, __file__, str(folder), str(copy)]
    with open(folder / "shown", "w", encoding="utf-8") as shown:
        ranks = [
            subprocess.Popen(command, env=environment | {"RANK": str(rank)}, stdout=shown, stderr=shown)
            for rank in (0, 1)
        ]
        ends = [rank.wait(timeout=300) for rank in ranks]
    printed = (folder / "shown").read_text(encoding="utf-8")
    assert ends == [0, 0], printed[-3000:]
    return folder, printed


def test_the_first_difference_between_ranks_is_named_once(shown):
    _, stderr = shown
    errors = [line for line in stderr.splitlines() if "error: " in line]
    assert len(errors) == len(ROUNDS), stderr
    for error in errors:
        assert error.startswith("train.py: error: all ranks must have the same settings, files and code: got ")
        assert error.endswith("; start them with one command, from copies that are alike")
    got = [error.partition("code: got ")[2].partition(";")[0] for error in errors]
    assert got[:5] == [
        "seed 1 on rank 0 and 2 on rank 1",
        "eta 0.5 on rank 0 and 0.6 on rank 1",
        "num_steps 4 on rank 0 and 5 on rank 1",
        "context_parallel 1 on rank 0 and 2 on rank 1",
        "runs 'runs' on rank 0 and 'others' on rank 1",
    ]
    for error, name in zip(got[5:], ("prompts", "reward", "reward", "engine/draws.py"), strict=True):
        assert error.startswith(f"{name} 'SHA-256 ") and " on rank 0 and 'SHA-256 " in error


def test_every_rank_ends_with_the_code_of_a_wrong_setting_and_leaves_no_run(shown):
    folder, _ = shown
    for name in ROUNDS:
        assert [(folder / f"end-{name}-{rank}").read_text() for rank in (0, 1)] == ["2", "2"]
    assert not (folder / "runs").exists()


LAUNCH = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "a",
          "MASTER_PORT": "1234"}  # fmt: skip


@pytest.mark.parametrize(
    "variables, rule",
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE 2 needs RANK, MASTER_ADDR, MASTER_PORT, too: got none"),
        ({**LAUNCH, "MASTER_PORT": ""}, "MASTER_PORT must be a whole number from 1 on: got ''"),
        ({**LAUNCH, "MASTER_ADDR": ""}, "WORLD_SIZE 2 needs MASTER_ADDR, too: got none"),
        ({"WORLD_SIZE": "abc"}, "WORLD_SIZE must be a whole number from 1 on: got 'abc'"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE must be a whole number from 1 on: got '0'"),
        ({"LOCAL_RANK": "x"}, "LOCAL_RANK must be a whole number from 0 on: got 'x'"),
        ({"LOCAL_RANK": "-1"}, "LOCAL_RANK must be a whole number from 0 on: got '-1'"),
        ({"LOCAL_RANK": "1"}, "LOCAL_RANK must be less than LOCAL_WORLD_SIZE, which is 1 unless it is set: got 1 and"),
        ({**LAUNCH, "RANK": "2"}, "RANK must be less than WORLD_SIZE, which is 1 unless it is set: got 2 and 2"),
    ],
)
def test_a_variable_that_torchrun_cannot_have_set_is_named(variables, rule, monkeypatch):
    import train

    for name in LAUNCH:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(train, "parse", lambda arguments: pytest.fail("it went on"))
    with pytest.raises(ValueError) as raised:
        train.main([])
    assert str(raised.value).startswith(rule) and "start with torchrun" in str(raised.value)


def test_what_torchrun_sets_passes(monkeypatch):
    from engine.ranks import check_launch_variables

    for name, value in LAUNCH.items():
        monkeypatch.setenv(name, value)
    check_launch_variables()
    for name in LAUNCH:
        monkeypatch.delenv(name)
    check_launch_variables()


def test_on_the_command_line_it_is_one_line():
    done = subprocess.run(
        [sys.executable, "train.py"], cwd=ROOT, env={**os.environ, "LOCAL_RANK": "x"}, capture_output=True, text=True
    )
    assert done.returncode == 1 and done.stderr.split("\n")[1].startswith("error: LOCAL_RANK must be")
    assert len(done.stderr.splitlines()) == 2 and done.stdout == ""  # the first one is empty


if __name__ == "__main__":
    script(*sys.argv[1:])
