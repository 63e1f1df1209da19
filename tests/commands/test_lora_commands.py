"""LoRA on the command line: fine-tune the bundled model, stop, go on, and use the adapter."""

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.ranks import free_port

from llama import Llama
from llama.checkpoints.convert import convert
from llama.checkpoints.folder import BUNDLED, run_checkpoints

QUESTION = "Tell me a tale of a fox."
ANSWER = "There was once a fox who had lost his tail, and he was ashamed."
FLAGS = ("--batch=2", "--seq_len=64", "--learning_rate=0.005", "--device=cpu")


@pytest.fixture
def dialogs(tmp_path: Path) -> Path:
    messages = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]
    path = tmp_path / "dialogs.jsonl"
    path.write_text((json.dumps({"messages": messages}) + "\n") * 20)
    return path


@pytest.fixture
def show(exit_code: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a command line in this process. Returns its standard output and error."""

    def show(*arguments: object) -> str:
        code = exit_code(*arguments)
        shown = "".join(capsys.readouterr())
        assert code == 0, shown
        return shown

    return show


def losses(shown: str) -> list[float]:
    """The loss of each step. The bar may show a step twice, first with the loss before it."""
    found = re.findall(r"(\d+)/\d+ \[[^\]]*loss (\d+\.\d+)", shown)
    return list({int(step): float(loss) for step, loss in found}.values())


def test_an_adapter_of_the_bundled_model(
    dialogs: Path, show: Callable[..., str], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    flags = ("--data", dialogs, "--out_dir", out, "--lora_r=8", "--steps=25", *FLAGS)
    shown = show("finetune", *flags)
    assert losses(shown)[-1] < 0.2 * losses(shown)[0]
    adapted = Llama.build(adapter=out)
    dialog: Any = [{"role": "user", "content": QUESTION}]
    (answer,) = adapted.chat_completion([dialog], temperature=0)
    assert answer["generation"]["content"] == ANSWER
    # PEFT opens the folder, with the same logits.
    from peft import PeftModel
    from transformers import LlamaForCausalLM

    base = convert(BUNDLED, tmp_path / "hf", "hf", dtype="float32")
    newest = run_checkpoints(out)[-1]
    theirs = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), newest)
    tokens = torch.tensor([adapted.encode_dialog(dialog)])
    with torch.inference_mode():
        ours, expected = adapted.model(tokens, 0), theirs(tokens).logits
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)


def start(*arguments: object, ranks: int = 1) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m"]
    if ranks > 1:
        command += ["torch.distributed.run", "--nproc_per_node", str(ranks), "--master_port",
                    str(free_port()), "-m"]  # fmt: skip
    command += ["llama", *map(str, arguments)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=BUNDLED.parent.parent)


@pytest.mark.parametrize("more", [("--lora_dropout=0.2",), ("--quantize=int4",)])
def test_a_run_goes_on_after_a_kill(
    more: tuple[str, ...], dialogs: Path, show: Callable[..., str], tmp_path: Path
) -> None:
    common = ["finetune", "--data", dialogs, "--lora_r=4", "--steps=8", "--checkpoint_every=2",
              "--checkpoint_activations", *FLAGS, *more]  # fmt: skip
    show(*common, "--out_dir", tmp_path / "unbroken")
    process = start(*common, "--out_dir", tmp_path / "killed")
    while not run_checkpoints(tmp_path / "killed"):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert "Continuing after step" in show(*common, "--out_dir", tmp_path / "killed")
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        found, expected = (
            (tmp_path / name / "step_00000008" / file).read_bytes()
            for name in ("killed", "unbroken")
        )
        assert found == expected


def test_a_base_that_is_saved_quantized(
    dialogs: Path, show: Callable[..., str], tmp_path: Path
) -> None:
    saved = convert(BUNDLED, tmp_path / "int8", quantize="int8")
    common = ["finetune", "--data", dialogs, "--lora_r=4", "--steps=4", *FLAGS]
    first = losses(show(*common, "--out_dir", tmp_path / "first", "--ckpt_dir", saved))
    # The embedding is bfloat16 here, and float32 in the bundled model on a CPU.
    second = losses(show(*common, "--out_dir", tmp_path / "second", "--quantize=int8"))
    assert first == pytest.approx(second, abs=0.02)


def test_ranks_that_share_a_model(dialogs: Path, show: Callable[..., str], tmp_path: Path) -> None:
    common = ["finetune", "--data", dialogs, "--lora_r=4", "--steps=4", *FLAGS]
    alone = losses(show(*common, "--out_dir", tmp_path / "alone"))
    process = start(*common, "--out_dir", tmp_path / "two", "--model_parallel_size=2", ranks=2)
    _, shown = process.communicate()
    assert process.returncode == 0
    assert losses(shown)[-1] == pytest.approx(alone[-1], abs=0.002)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--lora_r=0"], "lora_r is 0: it must be a whole number, 1 or more"),
        (["--lora_r=4", "--lora_targets=wq,q_proj"], "lora_targets is 'wq,q_proj': it must be"),
        (["--lora_r=4", "--lora_dropout=1"], "lora_dropout is 1.0: it must be"),
        (["--lora_r=4", "--lora_alpha=-1"], "lora_alpha is -1.0: it must be above 0"),
        (
            ["--lora_r=4", "--train=norms"],
            "lora_r trains changes of the model in ckpt_dir: leave out",
        ),
        (["--lora_r=4", "--adapter=other"], "lora_r trains changes of the model in ckpt_dir"),
        (["--lora_r=4", "--quantize=fp8"], "quantize is 'fp8': it must be int8 or int4"),
        (["--quantize=int8"], "quantize is for LoRA: give lora_r too"),
        (["--lora_alpha=8"], "lora_alpha is for LoRA: give lora_r too"),
        (["--adapter=nowhere"], "no such folder: nowhere"),
    ],
)
def test_mistakes(
    flags: list[str], message: str, dialogs: Path, fail: Callable[..., str], tmp_path: Path
) -> None:
    words = ["finetune", "--data", dialogs, "--out_dir", tmp_path / "run", *FLAGS, *flags]
    assert fail(*words).startswith(f"error: {message}")


def test_more_ranks_than_key_value_heads(dialogs: Path, tmp_path: Path) -> None:
    process = start("finetune", "--data", dialogs, "--out_dir", tmp_path / "run", "--lora_r=4",
                    "--model_parallel_size=4", *FLAGS, ranks=4)  # fmt: skip
    _, shown = process.communicate()
    assert process.returncode != 0
    assert "model_parallel_size is 4: for LoRA it must be at most 2, the number of" in shown


def test_inspect_tells_the_memory(show: Callable[..., str]) -> None:
    shown = show("inspect", "llama-3.1-8b", "--train", "--lora_r=16", "--quantize=int4",
                "--checkpoint_activations", "--lora_targets=wq,wv")  # fmt: skip
    assert re.search(r"weights in int4, frozen +4\.\d\d GiB", shown)
    assert re.search(r"peak +[56]\.\d\d GiB", shown)
