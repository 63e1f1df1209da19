"""The tests run on the CPU, on a machine with or without a GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llama.parallel import local_device


@pytest.mark.skipif("LLAMA_TEST_GPU" in os.environ, reason="`make test-gpu` shows the GPU")
def test_no_gpu_is_visible() -> None:
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""
    assert not torch.cuda.is_available()
    assert local_device().type == "cpu"


def test_a_gpu_in_the_environment_is_hidden() -> None:
    """CUDA_VISIBLE_DEVICES of the parent process has no effect on the tests and their children."""
    root = Path(__file__).parent.parent
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "0,1"}
    environment.pop("LLAMA_TEST_GPU", None)
    test = "tests/test_machine.py::test_no_gpu_is_visible"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", test]
    run = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout
