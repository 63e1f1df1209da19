"""The server's memory and open files under a mixed load, for twenty seconds.

`benchmarks/soak.py` runs for five minutes by itself.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_memory_and_files_stay(tmp_path: Path) -> None:
    out = tmp_path / "soak.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "soak.py"), "--seconds", "20"]
    # Allocators still fill their pools after five seconds of warm-up.
    command += ["--clients", "4", "--growth", "0.1", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    figures = json.loads(out.read_text())
    assert figures["calls"] > 20
    assert figures["open_files_at_end"] <= figures["open_files_after_warm_up"]
