"""EQUATIONS.md against the code, the tests and the symbols of sde.py; the walk, and that it notices a wrong formula.

Each check is a function of the text that returns the faults it found, so that it can be shown to find one.
"""

import ast
import importlib
import re
from pathlib import Path

import mutants
import pytest

import equalizer
import grpo
import rewards
import sde
import trust_region
from paper import annotate
from toy import walk

ROOT = Path(sde.__file__).parent
TEXT = (ROOT / "EQUATIONS.md").read_text(encoding="utf-8")
ROOMS = (sde, equalizer, rewards, trust_region, grpo)  # the modules that hold the paper's equations


# ---------------------------------------------------------------------------------------------- reading the page
def sections(text):
    """{number: body} of the sections "### Eq. n · title"; a body ends at the next heading."""
    found = {}
    for part in re.split(r"^#{2,} ", text, flags=re.M):
        heading = re.match(r"Eq\. (\d+) · ", part)
        if heading:
            found[int(heading[1])] = part
    return found


def code_links(text):
    """(file in the words, function, file of the link) of each link like [sde.py: SDE.transition](sde.py)."""
    return re.findall(r"\[([\w/]+\.py): ([\w.]+)\]\(([^)]+)\)", text)


def named_tests(text):
    """(file, function) of each test like `tests/test_sde.py::test_name`."""
    return re.findall(r"`(tests/\w+\.py)::(\w+)`", text)


def linked_functions(text):
    """{"sde.score", …}"""
    return {f"{Path(file).stem}.{name}" for file, name, _ in code_links(text)}


def documented_equations():
    """{("sde.score", 16), …}: every function of the rooms whose docstring begins with "Eq. n" or "A_i of Eq. n"."""
    found = set()
    for room in ROOMS:
        tree = ast.parse(Path(room.__file__).read_text(encoding="utf-8"))
        for prefix, body in named_bodies(tree, room.__name__):
            for node in body:
                if not isinstance(node, ast.FunctionDef):
                    continue
                number = re.match(r"(?:\S+ of )?Eq\. (\d+)\b", ast.get_docstring(node) or "")
                if number:
                    found.add((f"{prefix}.{node.name}", int(number[1])))
    return found


def named_bodies(tree, name):
    """(dotted name, statements) of a module and of each of its classes."""
    bodies = [(name, tree.body)]
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            bodies.append((f"{name}.{node.name}", node.body))
    return bodies


# ---------------------------------------------------------------------------------------------- checks
def missing_sections(text):
    return sorted(set(range(1, 17)) - sections(text).keys())


def sections_without_formula_code_or_test(text):
    faults = []
    for number, body in sections(text).items():
        if "```math" not in body or not code_links(body) or not named_tests(body):
            faults.append(number)
    return faults


def missing_functions(text):
    faults = []
    for file, name, target in code_links(text):
        found = importlib.import_module(Path(file).stem)
        for part in name.split("."):
            found = getattr(found, part, None)
        if found is None or file != target:
            faults.append(f"{file}: {name}")
    return faults


def missing_tests(text):
    faults = []
    for file, name in named_tests(text):
        tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        if name not in functions:
            faults.append(f"{file}::{name}")
    return faults


def functions_without_link(text):
    by_number = sections(text)
    faults = []
    for name, number in sorted(documented_equations()):
        if name not in linked_functions(by_number.get(number, "")):
            faults.append(f"{name}, Eq. {number}")
    return faults


def unbalanced_formulas(text):
    faults = []
    for formula in re.findall(r"^```math\n(.*?)^```$", text, flags=re.M | re.S):
        bare = re.sub(r"\\[{}]", "", formula)
        braces = bare.count("{") == bare.count("}")
        pairs = formula.count(r"\left") - formula.count(r"\leftarrow") == formula.count(r"\right")
        if not (braces and pairs):
            faults.append(formula)
    return faults


def letters_of_the_table(text):
    """Every letter of the first column of the symbol table, in order."""
    table = text.split("\n## Symbols\n")[1].split("\n## ")[0]
    letters = []
    for row in re.findall(r"^\| (`.*?) \|", table, flags=re.M):
        letters += re.findall(r"`([^`]+)`", row)
    return letters


def letters_of_sde():
    """The letters that the docstring of sde.py defines, at the start of its indented lines."""
    letters = []
    for entry in re.findall(r"^    (\S+(?:, \S+)*)  ", sde.__doc__, flags=re.M):
        letters += entry.replace("sigma", "σ").split(", ")
    return letters


CHECKS = (
    missing_sections,
    sections_without_formula_code_or_test,
    missing_functions,
    missing_tests,
    functions_without_link,
    unbalanced_formulas,
)


@pytest.mark.parametrize("check", CHECKS)
def test_the_page_has_no_fault(check):
    assert check(TEXT) == []


@pytest.mark.parametrize(
    "check, before, after",
    [
        (missing_sections, "### Eq. 9 ·", "### Equation nine ·"),
        (sections_without_formula_code_or_test, "[equalizer.py: gradient_norms](equalizer.py)", "gradient_norms"),
        (missing_functions, "sde.py: SDE.transition]", "sde.py: SDE.transitions]"),
        (missing_functions, "[sde.py: score](sde.py)", "[sde.py: score](grpo.py)"),
        (missing_tests, "::test_variance_is_additive`", "::test_variance_is_addictive`"),
        (functions_without_link, "[sde.py: predict_noise](sde.py)", "predict_noise"),
        (functions_without_link, "[trust_region.py: dual_kl](trust_region.py), ", ""),
        (unbalanced_formulas, r"\frac{dx}{d\sigma}", r"\frac{dx}{d\sigma"),
    ],
)
def test_each_check_finds_a_fault(check, before, after):
    assert before in TEXT
    assert check(TEXT.replace(before, after)) != []


def test_what_is_read_is_not_empty():
    assert len(code_links(TEXT)) > 25 and len(named_tests(TEXT)) > 25
    assert {number for _, number in documented_equations()} >= {2, 3, 4, 5, 7, 9, 10, 11, 12, 14, 15, 16}


def test_symbols_are_those_of_sde_and_each_stands_once():
    letters = letters_of_the_table(TEXT)
    assert len(letters) == len(set(letters))
    assert len(letters_of_sde()) > 20
    assert set(letters_of_sde()) <= set(letters)


# ---------------------------------------------------------------------------------------------- code on the page
def test_the_code_on_the_page_is_that_of_the_source():
    blocks = {f"{block['file']}: {block['name']}" for block in annotate.BLOCK.finditer(TEXT)}
    assert len(blocks) > 20 and annotate.stale_blocks(TEXT) == []
    for name, number in documented_equations():
        file, _, function = name.partition(".")
        assert f"{file}.py: {function}" in blocks, f"Eq. {number} shows no code of {name}"


def test_a_stale_block_is_named_and_renewed():
    stale = TEXT.replace("    return x - sigma * v\n", "    return x - (1 - sigma) * v\n")
    assert annotate.stale_blocks(stale) == ["sde.py: predict_x0"]
    assert annotate.annotated(stale) == TEXT


def test_the_numbers_on_the_page_are_those_of_the_walk(capsys):
    assert walk.main([]) == 0
    printed = capsys.readouterr().out
    lines = re.findall(r"^- \*\*Check\*\* (.*)$", TEXT, flags=re.M)
    numbers = [number for line in lines for number in re.findall(r"\d+\.\d{2,}", line)]
    assert len(lines) >= 10 and len(numbers) >= 12
    assert [number for number in numbers if number not in printed] == []


def test_every_linked_function_has_a_mutant():
    """`python tests/mutants.py` breaks each of them, and shows that the tests beside it notice."""
    covered = set()
    for function, before, after, where in mutants.MUTANTS:
        source = (ROOT / function.split(":")[0]).read_text(encoding="utf-8")
        assert source.count(before) == 1 and before != after, (function, before)
        covered |= {(heading, function) for heading in mutants.watchers(function, where)}
    assert covered == mutants.linked()


def test_a_mutant_is_noticed_by_the_test_beside_it():
    (mutant,) = [mutant for mutant in mutants.MUTANTS if mutant[0] == "rewards.py: composite_reward"]
    function, before, after, where = mutant
    (tests,) = mutants.watchers(function, where).values()
    assert mutants.failing_tests("rewards.py", before, after, tests) == set(tests)


# ---------------------------------------------------------------------------------------------- the walk
@pytest.mark.parametrize("sampler", sde.SDE_TYPES)
def test_the_walk_agrees(sampler, capsys):
    assert walk.main(["--sampler", sampler, "--eta", "0.6", "--steps", "9"]) == 0
    printed = capsys.readouterr().out
    numbers = [int(number) for number in re.findall(r"^Eq\. (\d+) ", printed, flags=re.M)]
    assert numbers == [1, 2, 3, 16, 5, 6, 7, 8, 9, 4]
    assert "DISAGREES" not in printed


true_sage_variance = sde.sage_variance
true_log_prob = sde.log_prob


def erratum_score(x, v, sigma):
    return -(x - sde.predict_x0(x, v, sigma)) / sigma**2


def variance_times_delta(sigma, sigma_next, eta):
    return true_sage_variance(sigma, sigma_next, eta) * (sigma - sigma_next)


def mean_with_the_other_sign(x, v, sigma, sigma_next, variance):
    return x - (sigma - sigma_next) * v - variance / 2 * sde.score(x, v, sigma)


@pytest.mark.parametrize(
    "module, name, wrong, equations",
    [
        (sde, "score", erratum_score, {16, 7}),
        (sde, "interpolate", lambda x0, z, sigma: sigma * x0 + (1 - sigma) * z, {2}),
        (sde, "predict_x0", lambda x, v, sigma: x - (1 - sigma) * v, {3}),
        (sde, "diffusion_coefficient", lambda sigma, eta: eta, {5, 6}),
        (sde, "sage_variance", variance_times_delta, {5, 6, 7}),
        (sde, "mean_of_eq_7", mean_with_the_other_sign, {7}),
        (equalizer, "gradient_norms", lambda chain: 1 / chain.std, {8, 9}),
        (sde, "log_prob", lambda *step: 2 * true_log_prob(*step), {8, 4}),
        (grpo, "clipped_policy_loss", lambda ratio, advantages, clip_range: advantages * ratio, {4}),
    ],
)
def test_the_walk_notices_a_wrong_formula(module, name, wrong, equations, monkeypatch, capsys):
    monkeypatch.setattr(module, name, wrong)
    assert walk.main([]) == 1
    reported = {int(number) for number in re.findall(r"^Eq\. (\d+) disagrees: ", capsys.readouterr().out, flags=re.M)}
    assert equations <= reported


@pytest.mark.parametrize(
    "arguments, rule",
    [
        (["--eta", "0"], "eta must be positive"),
        (["--sampler", "cps", "--eta", "1.8"], r"eta must lie in \[0, 1\] for cps"),
        (["--steps", "2"], "steps must be at least 3"),
        (["--shift", "0"], "shift must be positive"),
        (["--shift", "100000"], "no step to show"),
        (["--sampler", "ddpm"], "invalid choice: 'ddpm'"),
    ],
)
def test_errors_of_the_walk_are_one_line(arguments, rule, capsys):
    with pytest.raises(SystemExit) as stop:
        walk.main(arguments)
    printed = capsys.readouterr()
    assert stop.value.code == 2
    assert printed.out == ""
    assert re.fullmatch(f"toy.walk: .*{rule}.*\n", printed.err)
