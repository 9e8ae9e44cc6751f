"""The README's commands, settings and glossary against the code."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import train
from config import parse

ROOT = Path(train.__file__).parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def section(title):
    return README.split(f"\n## {title}\n")[1].split("\n## ")[0]


def test_options_and_files_named_in_the_readme_exist(capsys):
    with pytest.raises(SystemExit):
        train.main(["--help"])
    known = set(re.findall(r"--[\w-]+", capsys.readouterr().out)) | {
        "--local-dir",
        "--nnodes",
        "--nproc-per-node",
        "--max-restarts",
        "--nodes",
        "--ntasks-per-node",
        "--gpus-per-node",
        "--rdzv-backend",
        "--rdzv-endpoint",
        "--json",
    }
    assert set(re.findall(r"(?<![\w-])--[a-z][\w-]+", README)) <= known
    for name in re.findall(r"`((?:\w+/)?\w+\.py)`", README):
        places = [ROOT / folder / name for folder in ("", "toy", "paper", "tiny")]
        assert any(place.exists() for place in places), name
    for name in re.findall(r"\]\((?!http)([^)#]+)", README):
        assert (ROOT / name).exists(), name


def test_presets_in_commands_parse():
    for command in re.findall(r"^(?:.*&& \.venv/bin/)?python train\.py(.*)$", README, re.M):
        arguments = command.split("#")[0].split()
        if "--resume" not in arguments:
            train.parse([*arguments, "--dry-run"])


def shown(value):
    """A setting as the README writes it."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def test_the_table_of_settings_holds_what_the_presets_do():
    compared = 0
    for row in section("Settings: the paper, its released code, ours").splitlines():
        cells = row.split("|")
        if not row.startswith("| `"):
            continue
        names = re.findall(r"`(\w+)`", cells[1])
        for preset, cell in (("paper", cells[4]), ("release", cells[5])):
            config, _ = parse(["--preset", preset, "--dry-run"])
            assert re.findall(r"`([^`]+)`", cell) == [shown(getattr(config, name)) for name in names], (preset, names)
            compared += len(names)
    assert compared > 60


def test_every_logged_metric_is_explained_once(tmp_path):
    train.main(
        ["--runs", str(tmp_path), "--name", "run", "--iterations", "1", "--batch_size", "16", "--micro_batch", "16"]
    )
    settings = (tmp_path / "run" / "config.json").read_text()
    (tmp_path / "run" / "config.json").write_text(settings.replace('"eta": 0.5', '"eta": 0.6'))
    train.main(["--resume", str(tmp_path / "run"), "--iterations", "2", "--allow", "eta"])
    logged = {
        name for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines() for name in json.loads(line)
    }
    rows = [row.split("|")[1] for row in section("Metrics").splitlines() if row.startswith("| `")]
    explained = [name for row in rows for name in re.findall(r"`(\w+)`", row)]
    assert logged <= set(explained) and len(explained) == len(set(explained))
    video_model = {"eval_Overall", "eval_CLIPScore", "eval_PickScore", "tflops", "peak_gpu_gib"}
    assert set(explained) - logged == video_model


def test_test_command_is_what_ci_runs():
    assert re.search(r"^python3 -m venv \.venv && .*\.venv/bin/python -m pytest$", README, re.M)
    assert "grep -m1 'python -m pytest$' README.md" in (ROOT / ".ci" / "run").read_text()


def test_the_toy_runs_without_the_full_runs_packages():
    hidden = "import sys; sys.modules.update(diffusers=None, transformers=None, peft=None)"
    code = f"{hidden}\nimport train, toy.model, toy.walk"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_nothing_is_left_to_fill_in():
    for name in ("README.md", "RESULTS.md", "EQUATIONS.md"):
        assert not re.search(r"@\w+@", (ROOT / name).read_text(encoding="utf-8")), name
