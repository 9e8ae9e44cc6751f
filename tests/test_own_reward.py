"""A reward of the user's own: the README's example trains toy and miniature; what is wrong is said at the start."""

import sys

import forked
import pytest
from test_readme import python_block

import train
from engine.folder import read_log
from engine.scoring import load_reward

NAME = "calm_and_bright"
WEIGHTS = ["--reward_weights", "calm=1,bright=0.5"]
TOY = ["--iterations", "1", "--batch_size", "16", "--micro_batch", "16", "--num_steps", "3", "--eval_steps", "1"]
MINI = ["--preset", "mini", "--iterations", "1", "--batch_size", "4", "--micro_batch", "2", "--group_size", "4"]
MINI += ["--num_steps", "2", "--eval_steps", "1"]


@pytest.fixture
def file(tmp_path):
    code = python_block(NAME)
    assert len(code.splitlines()) <= 10
    (tmp_path / "my_reward.py").write_text(code, encoding="utf-8")
    return tmp_path / "my_reward.py"


def test_it_may_import_what_lies_beside_it(tmp_path):
    (tmp_path / "helper_of_a_reward.py").write_text("VALUE = 3", encoding="utf-8")
    (tmp_path / "r.py").write_text("import helper_of_a_reward as h\ndef f(*_): return h.VALUE\n", encoding="utf-8")
    before = list(sys.path)
    assert load_reward(f"{tmp_path / 'r.py'}:f")() == 3 and sys.path == before
    (tmp_path / "s.py").write_text("import sys\nsys.path.insert(0, 'own')\ndef f(*_): return 4\n", encoding="utf-8")
    assert load_reward(f"{tmp_path / 's.py'}:f")() == 4 and sys.path == ["own", *before]
    sys.path.remove("own")


def check_log(run):
    for line in read_log(run)[1:]:
        assert line["reward_mean"] == pytest.approx(line["calm_mean"] + 0.5 * line["bright_mean"])
        assert line["calm_mean"] < 0 < line["bright_mean"] < 1 and line["reward_failed"] == 0
        assert line["eval_reward"] == pytest.approx(line["eval_calm"] + 0.5 * line["eval_bright"])


def test_it_trains_the_toy_and_may_not_change_unseen(file, tmp_path, capsys):
    options = ["--runs", str(tmp_path), "--name", "own", "--reward", f"{file}:{NAME}", *WEIGHTS, *TOY]
    train.main(options)
    check_log(tmp_path / "own")
    file.write_text(file.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    with pytest.raises(SystemExit):
        train.main(["--resume", str(tmp_path / "own"), "--iterations", "2"])
    assert "reward 'a file and function of SHA-256" in capsys.readouterr().err
    train.main(["--resume", str(tmp_path / "own"), "--iterations", "2", "--allow", "reward"])
    assert "reward" in read_log(tmp_path / "own")[-1]["allowed"]


def test_it_trains_the_miniature_on_two_ranks(file, tmp_path):
    (tmp_path / "one.txt").write_text("a small red blob moves left slowly\n", encoding="utf-8")
    prompts = ["--prompts", str(tmp_path / "one.txt"), "--eval_prompts", str(tmp_path / "one.txt")]
    own = ["--runs", str(tmp_path), "--name", "own", "--reward", f"{file}:{NAME}", *WEIGHTS, *prompts]
    forked.finish(forked.start(2, tmp_path / "shown", train.main, [*MINI, *own]))
    check_log(tmp_path / "own")


@pytest.mark.parametrize(
    "code, name, weights, rule",
    [
        (None, NAME, "calm=1", "reward must name a file that is there"),
        ("", NAME, "calm=1", "must define a function calm_and_bright: got None"),
        ("x = 1", "x", "calm=1", "must define a function x: got 1"),
        ("def f(:", "f", "calm=1", "must run: it raised SyntaxError"),
        ("import sys; sys.frozen_", "f", "calm=1", "must run: it raised AttributeError"),
        ("def f(videos, prompts): return 0.5", "f", "calm=1", "it must return a dict of names and tensors: got float"),
        (
            "def f(videos, prompts): return {'calm': videos[:, 0]}",
            "f",
            "calm=1",
            "calm must be a dense tensor of floats",
        ),
        (
            "def f(videos, prompts): return {'calm': videos.float()}",
            "f",
            "calm=1",
            "calm must have one score per video",
        ),
        (  # of one video this would pass
            "def f(videos, prompts): return {'calm': videos.float().mean().view(1)}",
            "f",
            "calm=1",
            "calm must have one score per video, shape [2]: got [1]",
        ),
        ("GOOD", "f", "calm=1,calm=2", "reward_weights must name each score once: got calm twice in 'calm=1,calm=2'"),
        ("def f(videos, prompts): 1 / 0", "f", "calm=1", "it raised ZeroDivisionError"),
        ("GOOD", "f", "clam=1", "reward_weights must be of scores that the reward returns, calm: got clam"),
        ("GOOD", "f", "B", "got MQ, TA, VQ; such as --reward_weights calm=1"),
        ("GOOD", "", "calm=1", "reward must name a function in a file, FILE.py:NAME"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_loaded(code, name, weights, rule, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train, "start", lambda *arguments: pytest.fail("the run began"))
    if code is not None:
        good = "def f(videos, prompts): return {'calm': videos.float().flatten(1).mean(1)}"
        (tmp_path / "own.py").write_text(code.replace("GOOD", good), encoding="utf-8")
    with pytest.raises(SystemExit):
        train.main(["--runs", str(tmp_path), "--reward", f"{tmp_path}/own.py:{name}", "--reward_weights", weights])
    assert rule in capsys.readouterr().err.splitlines()[-1]


def test_a_weight_of_a_score_that_no_reward_returns(capsys):
    with pytest.raises(SystemExit):
        train.main(["--reward_weights", "VQ=1,colour=1"])
    assert "scores that the reward returns, VQ, MQ, TA, distance: got colour" in capsys.readouterr().err
