"""Random single faults on a run folder, each followed by a resume:

    python tests/faults.py --count 300 --seed 0        (about four minutes on one core)

A fault may end in two ways: the resume gives, bit for bit, what the undamaged folder gives; or it is refused with one
message and exit code 2. Where the refusal names a whole checkpoint to go on from, that command must then give the right
result. Four endings must not occur: `silent` (another result without an error), `traceback`, `lost` (a checkpoint that
was whole is gone or not named), `code ran` (a pickle that was dropped in was opened).
"""

import argparse
import collections
import contextlib
import io
import json
import os
import pickle
import random
import re
import shutil
import sys
import tempfile
import time
import traceback
from pathlib import Path

import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parent.parent))

import train  # noqa: E402
from engine import checkpoint, pictures  # noqa: E402
from engine.checkpoint import listed  # noqa: E402
from engine.folder import LOCK, LOG, read_log  # noqa: E402
from video.json_file import read_json  # noqa: E402

# An evaluation takes its 64 prompts in batches of batch_size: small ones would be most of a run's time.
SMALL = ["--batch_size", "16", "--micro_batch", "16", "--group_size", "2", "--num_steps", "2", "--eval_steps", "1"]
SMALL += ["--optimizer_steps", "1", "--checkpoint_every", "1", "--keep_checkpoints", "100", "--eval_every", "100"]
SMALL += ["--eval_noises", "1"]
BEFORE, AFTER = 3, 4  # iterations of the run that is damaged, and of the one that goes on
GOOD, BAD = ("right result", "refused", "refused, then --from"), ("silent", "traceback", "lost", "code ran")


class Payload:
    """A pickle that leaves a mark when it is opened."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


# ---------------------------------------------------------------------------------------------- faults
def flip_bytes(path, random, mark):
    data = bytearray(path.read_bytes())
    for _ in range(random.choice([1, 1, 100])):
        data[random.randrange(len(data))] ^= 1 << random.randrange(8)
    path.write_bytes(data)


def flip_a_block(path, random, mark):
    data = bytearray(path.read_bytes())
    first = random.randrange(len(data))
    data[first : first + 4000] = random.randbytes(len(data[first : first + 4000]))
    path.write_bytes(data)


def cut(path, random, mark):
    os.truncate(path, random.randrange(path.stat().st_size))


def cut_at_a_line(path, random, mark):
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[: random.randrange(len(lines))]))


def append(path, random, mark):
    with open(path, "ab") as file:
        file.write(random.choice([b"\n", b"\0" * 512, b"{}", random.randbytes(30)]))


def empty(path, random, mark):
    path.write_bytes(b"")


def remove(path, random, mark):
    path.unlink()


def rename(path, random, mark):
    path.rename(path.with_name(random.choice([f"{path.name}.bak", f"old-{path.name}", "x"])))


def swap(path, random, mark):
    others = [other for other in path.parent.iterdir() if other.is_file() and other != path]
    other = random.choice(others) if others else path
    mine, its = path.read_bytes(), other.read_bytes()
    path.write_bytes(its)
    other.write_bytes(mine)


def folder_for_file(path, random, mark):
    path.unlink()
    path.mkdir()


def dangling_link(path, random, mark):
    path.unlink()
    path.symlink_to("nowhere")


def pipe_for_file(path, random, mark):
    path.unlink()
    os.mkfifo(path)


def no_permission(path, random, mark):
    path.chmod(0)  # which root may read nonetheless


def garbage_json(path, random, mark):
    choices = ["{", "[]", "null", "NaN", '{"a": NaN}', "[" * 100_000, '"\\ud800"', "1" * 5000]
    choices += ["{}", '{"iteration": -1}', "\ufeff{}"]
    path.write_text(random.choice(choices), encoding="utf-8")


def edit_a_number(path, random, mark):
    text = path.read_text(encoding="utf-8")
    found = random.choice(list(re.finditer(r"\d", text)))
    digit = random.choice([digit for digit in "0123456789" if digit != found[0]])
    path.write_text(text[: found.start()] + digit + text[found.end() :], encoding="utf-8")


def edit_a_value(path, random, mark):
    values = json.loads(
        path.read_text(encoding="utf-8").splitlines()[0]
        if path.suffix == ".jsonl"
        else path.read_text(encoding="utf-8")
    )
    name = random.choice(list(values))
    values[name] = random.choice([None, True, "foo", -1, 0, 1e300, 10**400, [], {}, "", "../x", 0.1])
    rest = path.read_text(encoding="utf-8").splitlines()[1:] if path.suffix == ".jsonl" else []
    path.write_text("\n".join([json.dumps(values), *rest]), encoding="utf-8")


def pickle_for_file(path, random, mark):
    path.write_bytes(pickle.dumps(Payload(mark)))


def pickle_beside_file(path, random, mark):
    name = random.choice([".metadata", "__0_0.distcp", "model.pt", "weights.bin", "x.safetensors", f"{path.stem}.pkl"])
    (path.parent / name).write_bytes(pickle.dumps(Payload(mark)))


FAULTS_OF_FILES = (
    *(flip_bytes, flip_bytes, flip_a_block, cut, cut_at_a_line, append, empty, remove, rename, swap, folder_for_file),
    *(dangling_link, pipe_for_file, no_permission, pickle_for_file, pickle_beside_file),
)
FAULTS_OF_TEXTS = (garbage_json, edit_a_number, edit_a_number, edit_a_value, edit_a_value)


def remove_folder(folder, random):
    shutil.rmtree(folder)


def rename_folder(folder, random):
    names = ["iteration-000000", "iteration-000009", "iteration-4.bak", "iteration-", "tmp-iteration-000003", "foo"]
    folder.rename(folder.with_name(random.choice(names)))


def copy_folder(folder, random):
    names = ["iteration-000004", "iteration-4.bak", "iteration-xyz", "iteration-0000003", f"{folder.name}.bak"]
    shutil.copytree(folder, folder.with_name(random.choice(names)))


def swap_folders(folder, random):
    other = random.choice([path for path in folder.parent.iterdir() if path != folder])
    folder.rename(folder.with_name("between"))
    other.rename(folder)
    folder.with_name("between").rename(other)


def file_for_folder(folder, random):
    shutil.rmtree(folder)
    folder.write_text("", encoding="utf-8")


def empty_folder(folder, random):
    for path in folder.iterdir():
        path.unlink()


def stray_files(folder, random):
    for name in ("iteration-4.bak", "tmp-", "foo", "iteration-000099", ".DS_Store"):
        (folder.parent / name).write_text(random.choice(["", "x"]), encoding="utf-8")


FAULTS_OF_FOLDERS = (
    *(remove_folder, rename_folder, copy_folder, swap_folders, file_for_folder, empty_folder, stray_files),
)


def damage(run, random, mark):
    """Do one random fault; returns what was done."""
    checkpoints = listed(run / "checkpoints")
    weights = [3 if path == checkpoints[-1] else 1 for path in checkpoints]
    chosen = random.choices(checkpoints, weights)[0]
    kind = random.random()
    if kind < 0.15:
        fault = random.choice(FAULTS_OF_FOLDERS)
        fault(chosen, random)
        return f"{fault.__name__} {chosen.name}"
    in_run = [path for path in run.iterdir() if path.is_file() and path.name != LOCK]  # that one is empty
    files = in_run if kind < 0.45 else list(chosen.iterdir())
    path = random.choice(sorted(files))
    faults = FAULTS_OF_FILES + (FAULTS_OF_TEXTS if path.suffix in (".json", ".jsonl") else ())
    fault = random.choice(faults)
    fault(path, random, mark)
    return f"{fault.__name__} {path.relative_to(run)}"


# ---------------------------------------------------------------------------------------------- what comes of it
def result(run):
    """The tensors of the last checkpoint and the training's numbers of the log."""
    last = checkpoint.find(run)
    tensors = {}
    for path in sorted(last.glob("*.safetensors")):
        tensors |= load_file(path)
    lines = []
    for line in read_log(run):
        left_out = re.compile("eval_|.*_seconds$|tflops$|allowed$")
        lines.append({name: value for name, value in line.items() if not left_out.match(name)})
    return last.name, tensors, lines


def same(a, b, numbers=True):
    """Whether two results are the same bit for bit; without `numbers`, of the log's lines only their iterations."""
    tensors = a[1].keys() == b[1].keys() and all(torch.equal(a[1][name], b[1][name]) for name in a[1])
    logs = [lines if numbers else [line["iteration"] for line in lines] for _, _, lines in (a, b)]
    return a[0] == b[0] and tensors and logs[0] == logs[1]


def whole(run):
    """The checksums of all checkpoints that are whole, wherever they have been moved to."""
    found = set()
    for path in (run / "checkpoints").glob("iteration-*") if (run / "checkpoints").is_dir() else []:
        with contextlib.suppress(OSError, ValueError):
            twin = path.with_name(path.name.split(".set-aside")[0])
            if checkpoint._files_differ(path) is None and read_json(path / "progress.json"):
                saved = read_json(path / "checksums.json")
                if checkpoint._digests([path / name for name in saved]) == saved:
                    found.add((twin.name, saved["progress.json"]))
    return found


def resume(run, *extra):
    """(exit code or traceback, what was printed on stderr) of a resume in this process."""
    out, err = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            train.main(["--resume", str(run), "--iterations", str(AFTER), *extra])
    except SystemExit as stop:
        return stop.code, err.getvalue()
    except BaseException:
        return traceback.format_exc(), err.getvalue()
    return 0, err.getvalue()


def one_message(shown):
    return shown.count("error: ") == 1 and "Traceback" not in shown


def judge(run, right, mark, what):
    """(outcome, detail) of a resume of a damaged run. Training does not read the log, nobody compares its numbers."""
    good = whole(run)
    code, shown = resume(run)
    ending = ""
    advice = re.search(r"--from (iteration-\d+)", shown)
    if code == 2 and advice:
        code, second = resume(run, "--from", advice[1])
        ending = ", then --from"
        if code == 2:
            return "traceback", f"the advice was refused: {shown} {second}"
    if mark.exists():
        return "code ran", shown
    if code not in (0, 2):
        return "traceback", code
    if not good <= whole(run):
        return "lost", shown
    if code == 2 and good and "No checkpoint of this run is whole" in shown:
        return "lost", shown
    if code == 2:
        return ("refused", shown) if one_message(shown) else ("traceback", shown)
    if not same(result(run), right, numbers=LOG not in what):
        return "silent", shown
    return ("refused" + ending if ending else "right result"), shown


def prepare(folder):
    """Make the run that is damaged, and the right result of going on from it."""
    pictures.report = pictures.curves = lambda *arguments: None  # they take most of the time
    train.main(["--runs", str(folder), "--name", "run", "--iterations", str(BEFORE), *SMALL])
    shutil.copytree(folder / "run", folder / "right")
    assert resume(folder / "right")[0] == 0
    return result(folder / "right")


def run_faults(folder, count, seed, show=lambda number, what, outcome, detail: None):
    """{outcome: how often} of `count` faults, and [(fault, outcome, detail)] of the bad ones."""
    right = prepare(folder)
    outcomes, bad = collections.Counter(), []
    for number in range(count):
        damaged, mark = folder / "damaged", folder / "mark"
        shutil.copytree(folder / "run", damaged)
        what = damage(damaged, random.Random(f"{seed} {number}"), mark)
        outcome, detail = judge(damaged, right, mark, what)
        outcomes[outcome] += 1
        if outcome in BAD:
            bad.append((what, outcome, detail))
        show(number, what, outcome, detail)
        shutil.rmtree(damaged)
        if mark.exists():
            mark.rmdir()
    return outcomes, bad


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--show", action="store_true", help="print every fault with its first message")
    options = parser.parse_args()
    torch.set_num_threads(1)
    started = time.time()

    def show(number, what, outcome, detail):
        if options.show:
            print(f"{number:4} {what:70} {outcome:22} {str(detail).split('train.py: error: ')[-1][:150]!r}", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        outcomes, bad = run_faults(Path(folder), options.count, options.seed, show)
    for what, outcome, detail in bad:
        print(f"\n{outcome}: {what}\n{detail}")
    print(f"{options.count} faults, seed {options.seed}, {time.time() - started:.0f} s")
    for outcome in (*GOOD, *BAD):
        print(f"{outcome:22} {outcomes[outcome]:4}")
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
