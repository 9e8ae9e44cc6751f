"""The README's commands and glossary against the code."""

import json
import re
from pathlib import Path

import pytest

import train

ROOT = Path(train.__file__).parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def section(title):
    return README.split(f"\n## {title}\n")[1].split("\n## ")[0]


def test_options_and_files_named_in_the_readme_exist(capsys):
    with pytest.raises(SystemExit):
        train.main(["--help"])
    known = set(re.findall(r"--[\w-]+", capsys.readouterr().out)) | {"--local-dir", "--nnodes", "--nproc-per-node", "--json", "--quick"}
    assert set(re.findall(r"(?<![\w-])--[a-z][\w-]+", README)) <= known
    for name in re.findall(r"`((?:toy/)?\w+\.py)`", README):
        assert (ROOT / name).exists() or (ROOT / "toy" / name).exists(), name


def test_presets_in_commands_parse():
    for command in re.findall(r"^(?:.*&& \.venv/bin/)?python train\.py(.*)$", README, re.M):
        arguments = command.split("#")[0].split()
        if "--resume" not in arguments:
            plan = ["--dry-run"] + (["--gpus", "8"] if "paper" in arguments and "--gpus" not in arguments else [])
            train.parse([*arguments, *plan])


def test_every_logged_metric_is_explained_once(tmp_path):
    train.main(["--runs", str(tmp_path), "--name", "run", "--updates", "1", "--batch_size", "16", "--micro_batch", "16"])
    logged = {name for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines() for name in json.loads(line)}
    rows = [row.split("|")[1] for row in section("Metrics").splitlines() if row.startswith("| `")]
    explained = [name for row in rows for name in re.findall(r"`(\w+)`", row)]
    assert logged <= set(explained) and len(explained) == len(set(explained))
    assert set(explained) - logged == {"eval_Overall", "eval_CLIPScore", "eval_PickScore"}  # the video model's own


def test_test_command_is_what_ci_runs():
    assert re.search(r"^python3 -m venv \.venv && .*\.venv/bin/python -m pytest$", README, re.M)
    assert "grep -m1 'python -m pytest$' README.md" in (ROOT / ".ci" / "run").read_text()


def test_the_toy_runs_without_the_full_runs_packages():
    code = "import sys; sys.modules.update(diffusers=None, transformers=None, peft=None); import train, toy.model, toy.gaussian"
    import subprocess
    import sys

    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
