"""No memory is left: at load, in prefill, in decode. One line says so and names sizes that fit."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.fault_plan import RESULTS, Trials
from helpers.short_of_memory import can_limit

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="the limits are Linux's"
)
TESTS = Path(__file__).parent.parent
LIMITS = ["AS", "DATA", "cgroup"] if RESULTS else ["DATA"]
# What the message of each phase says.
EXPECTED = {
    "load with 0": ("CheckpointError", r"no memory to read .*consolidated.00.pth, a file of .*"),
    "load with": ("ConfigError", r"not enough memory: .* fit: max_seq_len \d+, max_batch_size \d+"),
    "load by": ("code 2", r"error: not enough memory: .* fit: max_seq_len \d+, max_batch_size \d+"),
    "prefill with": (
        "OutOfMemory",
        r"a prompt of 500 tokens needs about .* are free on cpu: \d+ tokens would fit, .*",
    ),
    "prefill of": ("OutOfMemory", r"memory ran out at 90 tokens with 1 of 8 rows in use, .*"),
    "decode": (
        "OutOfMemory",
        r"memory ran out at \d+ tokens with 8 of 8 rows .* max_batch_size .*",
    ),
}


@pytest.mark.fault(17)
@pytest.mark.parametrize("limit", LIMITS)
def test_memory_runs_out(trials: Trials, limit: str, tmp_path: Path) -> None:
    if not can_limit(limit):
        pytest.skip("only root can make control groups, of version 1")
    done = subprocess.run(
        [sys.executable, "-m", "helpers.short_of_memory", limit],
        cwd=tmp_path, capture_output=True, text=True, timeout=300,
        env={"PATH": "", "PYTHONPATH": f"{TESTS.parent}:{TESTS}:{TESTS.parent / 'benchmarks'}"},
    )  # fmt: skip
    with trials.trial(f"{limit}: the process"):
        assert done.returncode == 0, done.stderr[-2000:]
    for line in done.stdout.splitlines():
        name, kind, message = json.loads(line)
        with trials.trial(f"{limit}: {name}"):
            expected, pattern = next(
                found for start, found in EXPECTED.items() if name.startswith(start)
            )
            assert kind == expected, message
            assert re.fullmatch(pattern, message), message
