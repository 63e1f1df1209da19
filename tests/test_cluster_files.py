"""The Slurm script and the Kubernetes manifest of docs/scale.md pass their linters, and what they
start exists."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from pages import ROOT
from torch.distributed.run import get_args_parser

from llama.__main__ import COMMANDS
from llama.commands.command_line import checked

SCRIPT = ROOT / "docs" / "scale" / "slurm.sh"
MANIFEST = ROOT / "docs" / "scale" / "job.yaml"
KUBERNETES = ["1.29", "1.37"]  # versions whose schemas are compared
# Options of sbatch that the script may use, and what their values look like.
SBATCH = {
    "job-name": r"\w+", "nodes": r"\d+", "ntasks-per-node": "1", "gpus-per-node": r"\d+",
    "cpus-per-task": r"\d+", "time": r"\d\d:\d\d:\d\d", "requeue": None, "open-mode": "append",
}  # fmt: skip


def check_torchrun(words: list[str]) -> Any:
    """Raise for a mistake in the flags of torchrun or of the command of `llama` that it starts.
    Returns the parsed flags of torchrun."""
    flags = get_args_parser().parse_args(words)
    assert flags.module
    assert flags.training_script == "llama"
    name, *rest = flags.training_script_args
    module = __import__(f"llama.commands.{COMMANDS[name][0]}", fromlist=[name])
    checked(getattr(module, name), rest, f"llama {name}")
    return flags


def test_slurm_script_passes_its_linters() -> None:
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)
    shellcheck = Path(sys.executable).parent / "shellcheck"
    subprocess.run([shellcheck, "--severity=style", str(SCRIPT)], check=True)


def test_slurm_options_are_before_the_first_command() -> None:
    """Slurm ignores those after it."""
    lines = SCRIPT.read_text(encoding="utf-8").splitlines()
    head = lines[: next(i for i, line in enumerate(lines) if line and line[0] != "#")]
    options = [line.removeprefix("#SBATCH --").partition("=") for line in head if "#SBATCH" in line]
    assert len(options) == sum("#SBATCH" in line for line in lines) == len(SBATCH)
    for name, _, value in options:
        assert re.fullmatch(SBATCH[name] or "", value), name


def test_slurm_script_starts_a_torchrun_on_each_node(tmp_path: Path) -> None:
    """`srun` and `scontrol` are stand-ins, which print what they are called with."""
    for name, line in {
        "scontrol": 'printf "node7\\nnode9\\n"',
        "srun": 'printf "%s\\n" "$@"',
    }.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / name).chmod(0o755)
    given = {"JOB_NODELIST": "node[7,9]", "JOB_NUM_NODES": "2", "GPUS_ON_NODE": "4", "JOB_ID": "12"}
    environment = {f"SLURM_{name}": value for name, value in given.items()}
    command = shlex.split("batch 'my prompts.jsonl' results.jsonl --max_batch_size=4")
    done = subprocess.run(
        ["bash", str(SCRIPT), *command], check=True, capture_output=True, text=True,
        env=environment | {"PATH": f"{tmp_path}:{os.environ['PATH']}"},
    )  # fmt: skip
    option, program, *words = done.stdout.splitlines()
    assert (option, program) == ("--kill-on-bad-exit=1", "torchrun")
    flags = check_torchrun(words)
    assert (flags.nnodes, flags.nproc_per_node, flags.rdzv_id) == ("2", "4", "12")
    assert flags.rdzv_endpoint == "node7:29400"
    assert flags.training_script_args == command


@pytest.fixture
def resources() -> dict[str, Any]:
    """The resources of the manifest, by kind."""
    found = yaml.safe_load_all(MANIFEST.read_text(encoding="utf-8"))
    return {resource["kind"]: resource for resource in found}


@pytest.mark.parametrize("version", KUBERNETES)
def test_manifest_follows_the_schema(version: str, resources: dict[str, Any]) -> None:
    assert resources.keys() == {"Service", "Job"}
    for resource in resources.values():
        kubernetes_validate.validate(resource, version, strict=True)


def test_the_pods_find_the_first_one(resources: dict[str, Any]) -> None:
    service, job = resources["Service"], resources["Job"]
    name, pod = job["metadata"]["name"], job["spec"]["template"]["spec"]
    assert service["spec"]["selector"] == {"job-name": name}
    assert service["metadata"]["name"] == pod["subdomain"]
    (container,) = pod["containers"]
    program, *words = container["command"]
    assert program == "torchrun"
    words = [word.replace("$(JOB_COMPLETION_INDEX)", "1") for word in words]
    flags = check_torchrun(words)
    assert flags.nnodes == str(job["spec"]["completions"]) == str(job["spec"]["parallelism"])
    assert flags.nproc_per_node == str(container["resources"]["limits"]["nvidia.com/gpu"])
    assert flags.master_addr == f"{name}-0.{pod['subdomain']}"
    mounts = {mount["name"] for mount in container["volumeMounts"]}
    assert mounts == {volume["name"] for volume in pod["volumes"]}
