"""A long run of the toy at a small batch: does memory grow, and does a line of the log cost more at the end?

    python tests/soak.py --iterations 2000        (about three minutes on one core)

Prints the slope of the resident memory and what a line of the log costs at both ends of the run. Evaluations are
left out: they read the whole log for the curves, so that they need some 30 MiB for each 1,000 lines while they draw.
Linux only: it reads the memory from /proc.
"""

import argparse
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

import train  # noqa: E402
from engine.folder import Log  # noqa: E402

SMALL = ["--batch_size", "8", "--micro_batch", "8", "--group_size", "4", "--num_steps", "4", "--eval_steps", "4"]
SMALL += ["--checkpoint_every", "50", "--eval_every", "1000000"]
WARM_UP = 0.1  # share of the iterations before memory is fitted


def resident_mib():
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    return pages * resource.getpagesize() / 2**20


def watch_the_log(seconds, memory):
    """Note the time of each line of the log, and the memory after it."""
    append = Log.append

    def noted(log, line):
        started = time.perf_counter()
        append(log, line)
        seconds.append(time.perf_counter() - started)
        memory.append(resident_mib())

    Log.append = noted


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, default=2000)
    count = parser.parse_args().iterations
    seconds, memory = [], []
    watch_the_log(seconds, memory)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        train.main(["--runs", folder, "--iterations", str(count), *SMALL])
    took = time.perf_counter() - started
    warm = int(WARM_UP * count)
    slope = np.polyfit(np.arange(warm, len(memory)), memory[warm:], 1)[0]
    tenth = count // 10
    first, last = statistics.median(seconds[1 : tenth + 1]), statistics.median(seconds[-tenth:])
    print(f"{count} iterations in {took:.0f} s")
    print(f"memory {memory[warm]:.0f} MiB after {warm} iterations, {memory[-1]:.0f} at the end: {1000 * slope:+.2f} MiB"
          " per 1,000 iterations")  # fmt: skip
    print(f"a line of the log: {1e6 * first:.0f} µs in the first tenth, {1e6 * last:.0f} µs in the last")


if __name__ == "__main__":
    main()
