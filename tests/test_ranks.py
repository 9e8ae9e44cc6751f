"""Two and four FSDP2 ranks against one, on the real classes with tiny random weights: full, LoRA, Muon, bf16, resumed,
ranks that hold a whole model each, ranks that share a video's tokens.

All comparisons are of runs with two optimizer steps per iteration at a learning rate so high that every compared number
stands far above its tolerance. The rewards do not depend on rounding: see ranks.py. A tolerance is relative to the
largest value that the compared number takes in the run.
"""

import json
import shutil

import forked
import pytest
import torch
from diffusers import HunyuanVideo15Transformer3DModel
from test_full_run import make_videos_as_told

import ranks
import train
from engine.build import write_small_models
from grpo import OneRank
from prompts import STARTER_TRAIN, read_prompts
from tiny.hunyuan import build_tiny_hunyuan, tiny_transformer

COMPARED = ("policy_loss", "kl_velocity", "kl_position", "ratio_mean", "ratio_min", "grad_norm")

TWO = ["--iterations", "2"]
LORA = ["--lora_rank", "4", "--learning_rate", "3e-2"]
MUON = ["--optimizer", "muon", "--weight_decay", "0.01"]
# Three prompts of four samples, six samples to a rank, in micro-batches of three: aaa abb, bbc ccc. The passes must not
# depend on which prompts a micro-batch holds, else the ranks wait for each other for ever. And at once all that saves
# passes or memory, and a sample without a reward.
SPANNING, SPANNING_SAMPLES = ["--micro_batch", "3", "--max_failed_rewards", "0.3"], 12
SPANNING += ["--guidance_gradient", "conditional", "--kl_steps", "1", "--checkpointing", "attention"]
SPANNING += ["--anchor_offload", "--stepwise_kl", "rollout_phase"]
SHARED = ["--context_parallel", "2"]
BF16 = ["--compute_dtype", "bfloat16", *TWO]


def options(folder, name, world, *extra):
    """A run of one group of 4 samples per iteration, which spans both ranks: one rank takes two micro-batches of two
    samples, of two ranks each takes one."""
    samples = SPANNING_SAMPLES if "spanning" in name else 4
    return [
        *("--preset", "paper", "--model", str(folder / "model"), "--prompt_cache", str(folder / "prompts")),
        *("--videoalign", str(folder / "videoalign"), "--videoalign_repo", str(folder / "videoalign_repo")),
        *("--prompts", str(folder / "four.txt"), "--eval_prompts", str(folder / "three.txt")),
        *("--frames", "5", "--height", "64", "--width", "64", "--eval_height", "64", "--eval_width", "96"),
        *("--compute_dtype", "float32", "--vae_dtype", "float32"),
        *("--runs", str(folder), "--name", name, "--batch_size", str(samples // world), "--micro_batch", "2"),
        *("--num_steps", "2", "--optimizer_steps", "2"),
        *("--learning_rate", "3e-3", "--stepwise_kl", "closed_form", "--anchor_every", "4", "--kl_lambda", "1"),
        *("--kl_schedule", "fixed", "--iterations", "3", "--checkpoint_every", "3"),
        *("--eval_every", "100", "--eval_steps", "1"),
        *extra,
    ]


def build_models(folder):
    """What all these runs share, so that each text is encoded once; and the folder of a transformer of 330 MB, which
    lies in several files in bf16."""
    write_small_models("tiny", folder, OneRank())
    large = build_tiny_hunyuan(folder / "large")
    wide = tiny_transformer().config | {"num_attention_heads": 24, "num_layers": 18}
    shutil.rmtree(large / "transformer")
    transformer = HunyuanVideo15Transformer3DModel.from_config(wide).bfloat16()
    transformer.save_pretrained(large / "transformer", max_shard_size="60MB")


KINDS = {
    "full": [],
    "lora": LORA,
    "muon": [*MUON, *TWO],
    "failed-spanning": SPANNING,
}
# Rounding alone reaches 3e-5 (measured); Muon's Newton–Schulz iteration runs in bf16 and amplifies it to 1e-3.
TOLERANCE = {"full": 1e-3, "lora": 1e-3, "muon": 2e-2, "failed-spanning": 1e-3}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Each kind by one rank and by two; two ranks then resume their own full run; and two in bf16, where one rank
    makes a video of the three prompts again. Two ranks, and four, share the tokens of their videos."""
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "three.txt").write_text("a cat\na dog\na boat\n")
    (folder / "four.txt").write_text("\n".join(read_prompts(STARTER_TRAIN)[:4]))
    build_models(folder)
    one = [options(folder, f"{kind}-1", 1, *extra) for kind, extra in KINDS.items()]
    two = [
        ["muon-step", str(folder / "muon-step.pt")],
        ["host-memory", str(folder / "model"), str(folder / "large"), str(folder)],
        *(options(folder, f"{kind}-2", 2, *extra) for kind, extra in KINDS.items()),
        options(folder, "parts-2", 2, *TWO),
        ["--resume", str(folder / "parts-2"), "--iterations", "3"],
        options(folder, "replicated-2", 2, "--replicate", "2", *TWO),
        options(folder, "shared-lora-2", 1, *LORA, *SHARED),
        options(folder, "least-rank-2", 2, *MUON, "--lora_rank", "2", "--iterations", "1"),  # a row for each rank
        options(folder, "bf16-full", 2, *BF16),
        options(folder, "bf16-lora", 2, *LORA, *BF16),
    ]
    four = [options(folder, "shared-full-4", 2, *SHARED, *TWO)]
    pair = forked.start(2, folder / "two", ranks.main, two)
    alone = forked.start(1, folder / "one", ranks.main, one)
    forked.finish(alone)
    forked.finish(pair)
    forked.finish(forked.start(4, folder / "four", ranks.main, four))
    return folder


@pytest.fixture
def on_one_rank(monkeypatch):
    monkeypatch.setattr(train, "collect", ranks.collect_with_rewards_by_place)


def lines_of(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def training(line):
    """What a line of the log says about training, without times."""
    clocked = ("_seconds", "tflops")
    return {name: value for name, value in line.items() if not name.endswith(clocked) and not name.startswith("eval_")}


def curve(log, name):
    """A number over the iterations of a run; of a ratio its distance from 1."""
    values = [line[name] for line in log if name in line]
    return torch.tensor(values, dtype=torch.float64) - (1 if name.startswith("ratio") else 0)


def deviation(a, b, name):
    """Largest difference of two curves, relative to the largest value of the first."""
    first, second = curve(a, name), curve(b, name)
    return ((first - second).abs().max() / first.abs().max()).item()


@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_equal_one(runs, kind):
    one, two = lines_of(runs / f"{kind}-1"), lines_of(runs / f"{kind}-2")
    samples = SPANNING_SAMPLES if "spanning" in kind else 4
    assert len(one) == len(two) == (3 if kind == "muon" else 4)
    for name in COMPARED:
        assert deviation(one, two, name) < TOLERANCE[kind], name
        assert curve(one, name).abs().max() > 1e-4, name  # what was compared is not rounding
    for a, b in zip(one[1:], two[1:], strict=True):
        assert b["reward_mean"] == pytest.approx(a["reward_mean"], rel=1e-6)
        assert b["reward_failed"] == a["reward_failed"] == pytest.approx(1 / samples if "failed" in kind else 0)
        assert a["rollout_passes"] == samples * 2 * 2 == 2 * b["rollout_passes"]  # samples × steps × guidance
    # In the second iteration the anchor is neither the policy nor the rollout's policy; before the third it is
    # refreshed.
    trained, reference = samples * 2, samples * 2
    if "spanning" in kind:  # no unconditional branch until the first of two optimizer steps; the KL of one step of two
        trained, reference = samples * 3 // 2, samples
    assert [line["update_passes"] for line in two[1:]] == [trained, trained + reference, trained][: len(two) - 1]
    assert two[2]["kl_position"] != pytest.approx(two[2]["kl_velocity"], rel=1e-3)


@pytest.mark.parametrize(
    ("run", "kind"), [("replicated-2", "full"), ("shared-lora-2", "lora"), ("shared-full-4", "full")]
)
def test_other_ways_to_spread_a_model_equal_one_rank(runs, run, kind):
    """A whole model on each rank; two ranks for the tokens of each video; two such pairs."""
    several = lines_of(runs / run)
    one = lines_of(runs / f"{kind}-1")[: len(several)]
    assert len(one) == len(several) == (4 if kind == "lora" else 3)
    for name in COMPARED:  # rounding reaches 4e-5; the text's gradient not summed over the pair, 1e-3
        assert deviation(one, several, name) < 2e-4, name


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_two_ranks_in_bf16(runs, kind):
    """The paper's compute_dtype beside float32.

    Of a LoRA the gradient norm alone is compared: its gradients are small, AdamW's first steps have the size of the
    learning rate whatever the gradient, and where rounding turns a gradient's sign they go the other way.
    """
    exact, rounded = lines_of(runs / f"{kind}-2")[:3], lines_of(runs / f"bf16-{kind}")
    assert len(exact) == len(rounded) == 3
    for name in COMPARED if kind == "full" else ("grad_norm",):
        assert 0 < deviation(exact, rounded, name) < 0.15, name  # not 0: it was computed in bf16


def test_two_ranks_make_the_videos_of_three_prompts(runs):
    videos = sorted(path.name for path in (runs / "bf16-full" / "eval" / "iteration-000002").iterdir())
    assert videos == ["000.mp4", "001.mp4", "002.mp4", "contact_sheet.png"]
    assert lines_of(runs / "bf16-full")[-1]["reward_failed"] == 0


def test_two_ranks_resume_bit_for_bit(runs):
    whole, parts = lines_of(runs / "full-2"), lines_of(runs / "parts-2")
    assert [training(line) for line in whole] == [training(line) for line in parts]


@pytest.mark.parametrize("kind", ["full", "muon"])
def test_one_rank_resumes_the_checkpoint_of_two(runs, kind, on_one_rank):
    """batch_size counts samples per rank, so a run on fewer ranks needs the setting that keeps its groups whole."""
    settings = json.loads((runs / f"{kind}-2" / "config.json").read_text())
    (runs / f"{kind}-2" / "config.json").write_text(json.dumps(settings | {"batch_size": 4}))
    more = settings["iterations"] + 1
    for world in (1, 2):
        ranks.compare(["--resume", str(runs / f"{kind}-{world}"), "--iterations", str(more)])
    one, two = lines_of(runs / f"{kind}-1"), lines_of(runs / f"{kind}-2")
    assert len(one) == len(two) == 1 + more
    for name in COMPARED:
        assert deviation(one, two, name) < TOLERANCE[kind], name


def test_another_number_of_ranks_can_export(runs, tmp_path, capsys):
    """lora-2 holds two samples per rank, of a group of 4: as a run it needs two ranks, as an export any number."""
    settings = json.loads((runs / "lora-2" / "config.json").read_text())
    assert settings["batch_size"] == 2
    train.main(["--resume", str(runs / "lora-2"), "--export", str(tmp_path)])
    assert (tmp_path / "pytorch_lora_weights.safetensors").stat().st_size > 0
    assert json.loads((runs / "lora-2" / "config.json").read_text()) == settings
    assert f"transformer.load_lora_adapter('{tmp_path}', prefix=None, weight_name=" in capsys.readouterr().out
    before, after = make_videos_as_told(runs / "model", tmp_path, tmp_path)
    assert not torch.equal(before, after)  # the LoRA acts


def test_two_ranks_together_hold_a_model_once_while_they_load_it(runs):
    """In host memory, their shards among it, which are on the GPUs where there are any; and every weight is right."""
    loaded = torch.load(runs / "loaded.pt")
    folder = runs / "large" / "transformer"
    saved = HunyuanVideo15Transformer3DModel.from_pretrained(folder, dtype=torch.float32).state_dict()
    assert loaded.keys() == saved.keys() and all(torch.equal(loaded[name], saved[name]) for name in saved)
    assert len(list(folder.glob("*.safetensors"))) > 2
    size = sum(tensor.nbytes for tensor in saved.values())
    taken = [int((runs / f"memory-{rank}").read_text()) for rank in (0, 1)]
    assert size > 300e6 and 0.8 * size < sum(taken) < 1.4 * size


def test_two_ranks_take_the_muon_step_of_one(runs, tmp_path):
    """On gradients of full rank, relative to the norm of each step; Newton–Schulz rounds to bf16, to some 1%.

    The control is what a rank would get that orthogonalised its own rows alone.
    """
    ranks.muon_step(tmp_path / "one.pt")
    one, two = torch.load(tmp_path / "one.pt"), torch.load(runs / "muon-step.pt")
    module, x, pulls = ranks.full_rank_batch()
    ranks.backward(module, x, pulls)
    for name, parameter in module.named_parameters():
        if parameter.ndim != 2:
            torch.testing.assert_close(two[name], one[name], rtol=1e-3, atol=1e-6)  # AdamW's
            continue
        assert (two[name] - one[name]).norm() < 0.03 * one[name].norm()
        halves = []
        for gradient in parameter.grad.chunk(2):
            half = torch.nn.Parameter(torch.zeros_like(gradient))
            half.grad = gradient.clone()
            torch.optim.Muon([half], lr=1e-2, weight_decay=0.0, adjust_lr_fn="match_rms_adamw").step()
            halves.append(half.detach())
        assert (torch.cat(halves) - one[name]).norm() > 0.1 * one[name].norm()
