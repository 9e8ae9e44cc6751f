"""Break each function that EQUATIONS.md links, one at a time, and show that the tests named beside it notice.

    python tests/mutants.py                  all of them, in about three minutes
    python tests/mutants.py score median     those whose line holds one of these words

Each mutant is a change of one line in a copy of the project. A section of the page that links the function must name a
test that fails.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
# A function, what stands there, what takes its place, and the sections that should notice; None: all that link it.
OBJECTIVE = "The full objective"
MUTANTS = [
    ("sde.py: interpolate", "(1 - sigma) * x0 + sigma * z", "sigma * x0 + (1 - sigma) * z", None),
    ("sde.py: predict_x0", "return x - sigma * v", "return x - (1 - sigma) * v", None),
    ("sde.py: predict_noise", "return x + (1 - sigma) * v", "return x + sigma * v", None),
    ("sde.py: score", "return -predict_noise", "return predict_noise", None),
    ("sde.py: diffusion_coefficient", "return eta * math.sqrt(sigma / (1 - sigma))", "return eta", None),
    ("sde.py: sage_variance", "(-delta + torch.log1p", "(delta + torch.log1p", None),
    ("sde.py: step_variances", "(sigma.clamp(max=SIGMA_MAX), ", "(sigma, ", "Eq. 5"),
    ("sde.py: step_variances", "variance = eta**2 * delta\n", "variance = eta * delta\n", "The other samplers"),
    ("sde.py: SDE", "self.std = self.variance.sqrt()", "self.std = self.variance.sqrt() * -sigmas.diff().sqrt()", None),
    ("sde.py: SDE.transition", "return a * x + b * v, std", "return a * x - b * v, std", None),
    ("sde.py: mean_of_eq_7", "- delta * v + variance / 2", "- delta * v - variance / 2", None),
    ("sde.py: rollout", "means.append(mean)", "means.append(x)", None),
    ("sde.py: coefficients_keeping_mean", "(sigma_next**2 - variance)", "(sigma_next**2 + variance)", None),
    ("sde.py: exact_variance", "return sigma_next**2 * -torch.expm1", "return sigma_next * -torch.expm1", None),
    ("sde.py: log_prob", ".flatten(1).mean(1)  # [B]", ".flatten(1).sum(1)  # [B]", None),
    ("equalizer.py: gradient_norms", "sde.b.abs() / std", "1 / std", None),
    ("equalizer.py: equalizer_scales", "norms[sde.stochastic].median()", "norms.median()", None),
    (
        "rewards.py: group_advantages",
        ".sum(1, keepdim=True) / count\n    centred",
        ".sum() / valid.sum()\n    centred",
        None,
    ),
    ("rewards.py: group_advantages", ".clamp(-max_advantage, max_advantage)", "", None),
    ("rewards.py: composite_reward", "sum(weight * scores[name]", "sum(scores[name]", None),
    ("grpo.py: clipped_policy_loss", "return torch.maximum(", "return torch.minimum(", None),
    ("grpo.py: micro_batch_loss", "policy_loss + lambda_kl * kl)).mean()", "policy_loss)).mean()", OBJECTIVE),
    ("grpo.py: micro_batch_loss", "policy_loss + lambda_kl * kl)", "(policy_loss + lambda_kl * kl))", OBJECTIVE),
    ("grpo.py: micro_batch_loss", "(scales * policy_loss + ", "(policy_loss + ", "Eq. 9"),
    ("grpo.py: micro_batch_loss", "(mean, mean_old, std)", "(mean, batch.means_ref[rows, steps], std)", OBJECTIVE),
    ("grpo.py: update", "if number % per_step == 0:", "if number % 2 == 0:", None),
    ("trust_region.py: gaussian_kl", "(2 * std.flatten() ** 2)", "(2 * std.flatten())", None),
    (
        "trust_region.py: stepwise_kl_closed_form",
        "gaussian_kl(mean, mean_old, std)",
        "2 * gaussian_kl(mean, mean_old, std)",
        None,
    ),
    ("trust_region.py: stepwise_kl_rollout_phase", "log_prob_old - log_prob_new", "log_prob_new - log_prob_old", None),
    ("trust_region.py: Anchor", "else shard.detach().clone()", "else shard.detach()", None),
    (
        "trust_region.py: Anchor.maybe_refresh",
        "self.refreshed_at < self.every",
        "self.refreshed_at <= self.every",
        None,
    ),
    (
        "trust_region.py: dual_kl",
        "beta_pos * kl_pos + beta_vel * kl_vel",
        "beta_vel * kl_pos + beta_pos * kl_vel",
        None,
    ),
    ("trust_region.py: kl_weights", '"dual": (beta_pos, beta_vel)', '"dual": (beta_vel, beta_pos)', None),
    ("trust_region.py: kl_coefficient", "or iteration < switch:", "or iteration <= switch:", None),
]


def sections():
    """{heading: its text} of EQUATIONS.md."""
    text = (ROOT / "EQUATIONS.md").read_text(encoding="utf-8")
    parts = re.split(r"^#{2,3} ", text, flags=re.M)[1:]
    return {part.split("\n", 1)[0]: part for part in parts}


def linked():
    """{(heading, function)} of all links like [sde.py: score](sde.py)."""
    found = set()
    for heading, body in sections().items():
        found |= {(heading, name) for name in re.findall(r"\[([\w/]+\.py: [\w.]+)\]\(", body)}
    return found


def watchers(function, where):
    """{heading: the tests that it names}, of the sections that should notice a mutant of this function."""
    chosen = {}
    for heading, body in sections().items():
        if (heading, function) in linked() and (where is None or heading.startswith(where)):
            chosen[heading] = re.findall(r"`(tests/\w+\.py::\w+)`", body)
    return chosen


def failing_tests(file, before, after, tests):
    """The names of those tests that fail when this stands in the file."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "project"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", ".venv", "runs", "figures", "__pycache__"))
        source = (copy / file).read_text(encoding="utf-8")
        (copy / file).write_text(source.replace(before, after), encoding="utf-8")
        command = [sys.executable, "-m", "pytest", "-n", "0", "-q", "--tb=no", "-rfE", "-p", "no:cacheprovider", *tests]
        shown = subprocess.run(command, cwd=copy, capture_output=True, text=True, timeout=600).stdout
    return set(re.findall(r"^(?:FAILED|ERROR) (tests/\w+\.py::\w+)", shown, flags=re.M))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*")
    words = parser.parse_args().words
    missed = 0
    for function, before, after, where in MUTANTS:
        line = f"{function}: {' '.join(before.split())} → {' '.join(after.split()) or 'nothing'}"
        if words and not any(word in line for word in words):
            continue
        by_section = watchers(function, where)
        every = sorted({test for tests in by_section.values() for test in tests})
        failed = failing_tests(function.split(":")[0], before, after, every)
        for heading, tests in by_section.items():
            noticed = [test.split("::")[1] for test in tests if test in failed]
            missed += not noticed
            print(f"{line}\n    {heading}: {', '.join(noticed) or 'NOBODY NOTICED'}", flush=True)
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()
