"""The commands, settings, metrics and links of the pages against the code."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train
from engine.config import Config, parse
from engine.plan import checkpoint_bytes, gpu_hours, peak_memory
from grpo import collect, update
from sde import SDE, sigma_schedule

ROOT = Path(train.__file__).parent
PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in (*ROOT.glob("*.md"), ROOT / "engine" / "RUNNING.md", ROOT / "paper" / "APPENDIX.md")
}
README = PAGES["README.md"]
USED = README + PAGES["engine/RUNNING.md"]  # what a reader types


def section(page, title):
    return PAGES[page].split(f"\n## {title}\n")[1].split("\n## ")[0]


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
        "--count",
        "--signals-to-handle",
    }
    assert set(re.findall(r"(?<![\w-])--[a-z][\w-]+", USED)) <= known
    for name in set(re.findall(r"`((?:\w+/)?\w+\.py)`", USED)) - {"my_reward.py"}:  # the reader's own
        places = [ROOT / folder / name for folder in ("", "toy", "paper", "tiny", "video", "engine")]
        assert any(place.exists() for place in places), name


def anchors(text):
    """GitHub's names of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page):
    for target, _, anchor in (link.partition("#") for link in re.findall(r"\]\((?!http)([^)]+)\)", PAGES[page])):
        place = (ROOT / page).parent / target if target else ROOT / page
        assert place.exists(), target
        if anchor:
            assert anchor in anchors(place.read_text(encoding="utf-8")), (target, anchor)


def test_every_test_that_a_page_names_is_there():
    tests = "".join(path.read_text(encoding="utf-8") for path in ROOT.glob("tests/*.py"))
    defined = set(re.findall(r"def (test_\w+)", tests))
    for page, text in PAGES.items():
        assert set(re.findall(r"\b(test_\w+)`", text)) <= defined, page


def test_the_first_two_pages_are_short():
    lines = README.splitlines()
    assert len(lines) <= 170 and max(map(len, lines)) <= 160
    assert len(PAGES["RESULTS.md"].split()) <= 4500


def python_block(word):
    """The one block of Python that holds a word."""
    (code,) = [code for code in re.findall(r"^```python\n(.*?)^```$", USED, flags=re.M | re.S) if word in code]
    return code


def test_the_size_of_the_core_is_what_is_said():
    """To within one in twenty."""
    equations, algorithm = map(
        int, re.search(r"four files of (\d+) lines,\s+the algorithm in one of (\d+)", README).groups()
    )
    lines = {name: len((ROOT / f"{name}.py").read_text(encoding="utf-8").splitlines()) for name in CORE}
    assert sum(lines[name] for name in CORE[:4]) == pytest.approx(equations, rel=0.05)
    assert lines["grpo"] == pytest.approx(algorithm, rel=0.05)


CORE = ("sde", "equalizer", "rewards", "trust_region", "grpo")


def test_a_policy_of_ones_own_trains():
    """The README's, by the algorithm itself: an update moves its weights."""
    names = {}
    exec(python_block("class LinearPolicy"), names)
    policy, config = names["LinearPolicy"](), Config(group_size=4, batch_size=8, micro_batch=4, kl_mode="none")
    noise = [torch.Generator().manual_seed(place) for place in range(8)]

    def reward(x, prompts):
        return {"VQ": -x.square().mean(1), "MQ": x[:, 0], "TA": -x[:, 1]}

    sde = SDE("sage_grpo", 0.5, sigma_schedule(4))
    batch = collect(policy, reward, ["a"] * 4 + ["bcd"] * 4, sde, noise, config)
    before = policy.module.weight.detach().clone()
    optimizer = torch.optim.AdamW(policy.module.parameters(), lr=1e-3)
    metrics, made = update(policy, batch, config, [optimizer], None, noise, 0, 0)
    assert made == 1 and metrics["ratio_mean"] == pytest.approx(1) and not torch.equal(before, policy.module.weight)
    assert policy.passes == 4 + 4 * 2


def test_presets_in_commands_parse():
    for command in re.findall(r"^(?:.*&& \.venv/bin/)?python train\.py(.*)$", USED, re.M):
        arguments = command.split("#")[0].split()
        if "--resume" not in arguments:
            parse([*arguments, "--dry-run"])


def shown(value):
    """A setting as the pages write it."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def test_the_table_of_settings_holds_what_the_presets_do():
    compared = 0
    for row in section("EQUATIONS.md", "Settings: the paper, its released code, ours").splitlines():
        cells = re.split(r"(?<!\\)\|", row)
        if not row.startswith("| `"):
            continue
        names = re.findall(r"`(\w+)`", cells[1])
        for preset, cell in (("paper", cells[4]), ("release", cells[5]), ("toy", cells[6])):
            config, _ = parse(["--preset", preset, "--dry-run"])
            values = re.findall(r"`([^`]+)`|(–)", cell)
            assert len(values) == len(names) or cell == " – ", (preset, names)
            for name, (value, unused) in zip(names, values, strict=False):
                assert unused or value == shown(getattr(config, name)), (preset, name)
                compared += not unused
    assert compared > 90


def test_the_table_of_gpus_holds_what_is_planned():
    table = section("engine/RUNNING.md", "GPUs and machines").splitlines()
    rows = [row.split("|")[1:-1] for row in table if "GPU" not in row]
    rows = [[cell.strip() for cell in cells] for cells in rows if len(cells) == 6 and cells[0].strip().isdigit()]
    assert len(rows) == 6
    for gpus, command, _, hours, gib, disk in rows:
        (options,) = re.findall(r"`python train\.py (.*?)`", command) or ["--preset paper --replicate 8"]
        config, _ = parse([*options.split(), "--dry-run", "--gpus", gpus])
        assert float(gib) == pytest.approx(sum(peak_memory(config, int(gpus) // config.replicate).values()), abs=0.6)
        assert float(disk) == pytest.approx(3 * checkpoint_bytes(config) / 1e9, abs=1)
        (planned,) = re.findall(r"^[\d.]+", hours)
        assert float(planned) == pytest.approx(sum(gpu_hours(config, int(gpus)).values()), abs=0.06)


def test_every_logged_metric_is_explained_once(tmp_path):
    short = ["--iterations", "1", "--batch_size", "16", "--micro_batch", "16", "--eval_steps", "1"]
    train.main(["--runs", str(tmp_path), "--name", "run", *short])
    settings = (tmp_path / "run" / "config.json").read_text()
    (tmp_path / "run" / "config.json").write_text(settings.replace('"eta": 0.5', '"eta": 0.6'))
    train.main(["--resume", str(tmp_path / "run"), "--iterations", "2", "--allow", "eta"])
    logged = {
        name for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines() for name in json.loads(line)
    }
    rows = [row.split("|")[1] for row in section("engine/RUNNING.md", "Metrics").splitlines() if row.startswith("| `")]
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
    for name, text in PAGES.items():
        assert not re.search(r"@\w+@", text), name
