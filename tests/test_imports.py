"""The rooms of the house and the direction of their imports: downwards, and never in a circle."""

import ast
import sys
from pathlib import Path

import pytest

import train

ROOT = Path(train.__file__).parent
EQUATIONS = ("sde", "equalizer", "rewards", "trust_region")
# From the ground up. A file may import its own room, and rooms of lower floors.
FLOORS = (("equations", "prompts"), ("grpo",), ("toy", "video"), ("tiny",), ("engine",), ("train",), ("paper",))
FLOOR_OF = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}


def room_of(module):
    """The room of a dotted name; None of a library."""
    first = module.partition(".")[0]
    room = "equations" if first in EQUATIONS else first
    return room if room in FLOOR_OF else None


def modules():
    """{dotted name: source} of all code of the project but its tests."""
    files = [*ROOT.glob("*.py"), *(file for room in FLOOR_OF for file in (ROOT / room).glob("*.py"))]
    found = {}
    for file in files:
        name = ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        found[name] = file.read_text(encoding="utf-8")
    return found


def imports(source, known):
    """The modules that a source names in its imports, also within functions."""
    named = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            named |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            within = {f"{node.module}.{alias.name}" for alias in node.names}
            named |= within & known or {node.module}
    return named


def broken_rules(sources):
    """One line for each import that the rules forbid."""
    problems = []
    arrows = {name: imports(source, sources.keys()) for name, source in sources.items()}
    for name, targets in arrows.items():
        room = room_of(name)
        if room is None:
            problems.append(f"{name}.py belongs to no room of the house")
            continue
        for target in sorted(targets):
            other = room_of(target)
            if other is not None and other != room and FLOOR_OF[other] >= FLOOR_OF[room]:
                problems.append(f"{name} imports {target}: {room} may import only what lies below it")
            library = target.partition(".")[0]
            foreign = other is None and library != "torch" and library not in sys.stdlib_module_names
            if room in ("equations", "grpo") and foreign:
                problems.append(f"{name} imports {target}: the paper's rooms need torch alone")
    return problems + circles(arrows)


def circles(arrows):
    """One line for each circle of files that import each other."""
    problems, done = [], set()

    def follow(name, path):
        if name in path:
            problems.append(f"a circle: {' → '.join([*path[path.index(name) :], name])}")
        elif name not in done:
            for target in sorted(arrows.get(name, ())):
                follow(target, [*path, name])
            done.add(name)

    for name in arrows:
        follow(name, [])
    return problems


def test_imports_run_downwards_and_in_no_circle():
    assert broken_rules(modules()) == []


@pytest.mark.parametrize(
    "name, line, problem",
    [
        ("sde", "from grpo import clock", "sde imports grpo: equations may import only what lies below it"),
        ("grpo", "import engine.folder", "grpo imports engine.folder: grpo may import only"),
        ("toy.world", "from engine import draws", "toy.world imports engine.draws: toy may import only"),
        ("video.mp4", "def f():\n    from engine.watch import enter", "video.mp4 imports engine.watch: video may"),
        ("engine.plan", "import train", "engine.plan imports train: engine may import only"),
        ("rewards", "import numpy", "rewards imports numpy: the paper's rooms need torch alone"),
        ("engine.draws", "import engine.ranks", "a circle: "),
        ("another", "", "another.py belongs to no room of the house"),
    ],
)
def test_an_arrow_that_runs_up_is_named(name, line, problem):
    sources = modules()
    sources[name] = f"{line}\n{sources.get(name, '')}"
    if problem == "a circle: ":
        sources["engine.ranks"] += "\nimport engine.draws\n"
    assert any(found.startswith(problem) for found in broken_rules(sources))


def test_the_top_level_holds_the_six_files():
    assert sorted(file.stem for file in ROOT.glob("*.py")) == sorted([*EQUATIONS, "grpo", "train"])
