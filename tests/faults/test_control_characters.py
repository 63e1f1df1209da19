"""Control characters in names, texts, errors and the model's output do not reach the terminal."""

import io
import json
import logging
import os
import pty
import re
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from helpers.fault_plan import Trials
from helpers.server import running
from safetensors.torch import load_file, save_file

from llama import Llama
from llama.__main__ import main
from llama.checkpoints.convert import convert
from llama.checkpoints.folder import BUNDLED
from llama.tokenizer import Tokenizer
from llama.training.documents import write_token_files

PAYLOADS = [
    "\x1b[31mred",  # a colour
    "\x1b]0;title\x07",  # the window's title, and the bell
    "\x1b[2J\x1b[H",  # clear the screen
    "\x1bc",  # reset
    "\x9b5n",  # a report, as one character of C1
    "\x08\x08\x7fgone",
]
# What the commands themselves send: line ends, tabs, their own styles, and the bar's line up.
OWN = re.compile(r"[\n\t\r]|\x1b\[(0|2|33|35)m|\x1b\[A")
SECONDS = 60  # a hung command is killed
Words = Sequence[str]


def screen_of(words: Words, typed: str = "") -> str:
    """Run a command in a child with a terminal of its own. Returns all that the terminal got.

    typed: the child's standard input, which is no terminal.
    """
    pid, terminal = pty.fork()
    if pid == 0:
        signal.alarm(SECONDS)
        try:
            logging.root.handlers.clear()  # pytest's
            sys.stdin = io.TextIOWrapper(io.BytesIO(typed.encode()))
            sys.stdout, sys.stderr = (os.fdopen(os.dup(n), "w", buffering=1) for n in (1, 2))
            sys.argv = ["llama", *words]
            main()
        except SystemExit:
            pass
        except BaseException as error:
            print(f"CRASH {type(error).__name__}: {error!r}")
        finally:
            sys.stdout.flush()
            os._exit(0)
    received = b""
    while True:
        try:
            part = os.read(terminal, 65536)
        except OSError:  # the child has ended
            break
        received += part
    os.close(terminal)
    assert os.waitpid(pid, 0)[1] == 0
    return received.decode()


def check(screen: str, shown: str = "") -> None:
    """Nothing controls the terminal, and the text is shown."""
    rest = OWN.sub("", screen)
    assert rest.isprintable(), ascii("".join(c for c in rest if not c.isprintable()))
    assert "CRASH" not in screen, screen
    assert shown in screen, screen


def escaped(payload: str) -> str:
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in payload)


def payloads(trials: Trials) -> list[str]:
    return PAYLOADS[: trials.number(few=1, all=len(PAYLOADS))]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    assert torch.get_num_threads() == 1  # a child of a process with more threads could hang


@pytest.mark.fault(21)
def test_errors(trials: Trials) -> None:
    cases: list[Callable[[str], list[str]]] = [
        lambda p: [p],
        lambda p: ["complete", "hi", f"--{p}=1"],
        lambda p: ["complete", "hi", f"--ckpt_dir={p}"],
        lambda p: ["complete", "hi", f"--mode={p}"],
        lambda p: ["doctor", p],
        lambda p: ["inspect", p],
        lambda p: ["tokens", "hi", "--diff", p],
        lambda p: ["perplexity", p],
        lambda p: ["batch", p, "out"],
        lambda p: ["train", p],
        lambda p: ["finetune", "--data", p, "--out_dir", p],
    ]
    for payload in payloads(trials):
        for case in cases[:: trials.number(few=3, all=1)]:
            words = case(payload)
            with trials.trial(f"llama {words!r}"):
                check(screen_of(words), "error: ")


@pytest.mark.fault(21)
def test_names_of_files_and_folders(trials: Trials, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"prompt": "Once", "max_gen_len": 1}\n')
    (tmp_path / "text.txt").write_text("Once upon a time. " * 40)
    for number, payload in enumerate(payloads(trials)):
        folder = tmp_path / f"{number}{payload}"
        folder.symlink_to(BUNDLED)
        new = str(tmp_path / f"new {number}{payload}")
        cases = [
            ["inspect", str(folder)],
            ["doctor", str(folder)],
            ["complete", "Once", f"--ckpt_dir={folder}", "--max_gen_len=1"],
            ["convert", str(folder), f"{new}c"],
            ["batch", str(tmp_path / "in.jsonl"), f"{new}b", f"--ckpt_dir={folder}"],
            [
                "tokenize",
                str(tmp_path / "text.txt"),
                f"--out={new}t",
                f"--tokenizer={folder}/tokenizer.model",
            ],
        ]
        for words in cases[:: trials.number(few=2, all=1)]:
            with trials.trial(f"llama {words!r}"):
                says_name = words[0] != "doctor"
                check(screen_of(words), escaped(payload) if says_name else "all is well")


@pytest.mark.fault(21)
def test_names_of_tensors(trials: Trials, tmp_path: Path) -> None:
    folder = convert(BUNDLED, tmp_path / "hf", "hf")
    path = folder / "model.safetensors"
    weights = load_file(path)
    for payload in payloads(trials):
        with trials.trial(f"{payload!r}"):
            save_file({**weights, f"model.{payload}": torch.zeros(2)}, path)
            check(screen_of(["verify", str(folder)]), escaped(payload))


@pytest.mark.fault(21)
def test_prompts(trials: Trials) -> None:
    """A terminal shows the prompt of `complete`, and `tokens` shows the tokens of a text."""
    for payload in payloads(trials):
        with trials.trial(f"complete {payload!r}"):
            check(screen_of(["complete", "--max_gen_len=1"], typed=f"Once {payload}"), "Once ")
        for options in ([], ["--flow"], ["--diff", "llama2", "--chat"]):
            with trials.trial(f"tokens {options} {payload!r}"):
                check(screen_of(["tokens", f"a {payload}", *options]))


@pytest.mark.fault(21)
def test_the_models_output(trials: Trials) -> None:
    """A bias makes the model say a control character only."""
    tokenizer = Tokenizer(BUNDLED / "tokenizer.model")
    characters = "\x1b\x07\x08\x7f\r\x0e"
    for character in characters[: trials.number(few=1, all=len(characters))]:
        (token,) = tokenizer.encode(character, bos=False, eos=False)
        options = [f"--logit_bias={{{token}: 1000.0}}", "--max_gen_len=3", "--temperature=0"]
        with trials.trial(f"complete, {character!r}"):
            check(screen_of(["complete", "Once", *options]), "3 tokens")
        with trials.trial(f"chat, {character!r}"):
            check(screen_of(["chat", *options], typed="Who are you?\n"), "3 tokens")


@pytest.mark.fault(21)
def test_commands_in_a_chat(trials: Trials) -> None:
    for payload in payloads(trials):
        with trials.trial(f"{payload!r}"):
            typed = f"/save missing/{payload}\n/{payload}\n/system {payload}\n"
            check(screen_of(["chat"], typed=typed), "error: ")


@pytest.mark.fault(21)
def test_a_training_run(trials: Trials, tmp_path: Path) -> None:
    """The name of its folder, and its sample texts."""
    tokenizer = Tokenizer(BUNDLED / "tokenizer.model")
    write_token_files(["Once upon a time. " * 99], tokenizer, f"{tmp_path}/t.bin", 10**6)
    small = "--dim=16 --n_layers=1 --n_heads=2 --seq_len=16 --batch=1 --steps=1 --sample_every=1"
    for payload in payloads(trials)[:2]:
        with trials.trial(f"{payload!r}"):
            screen = screen_of(
                [
                    "train", f"--data={tmp_path}/t*.bin", f"--tokenizer={BUNDLED}/tokenizer.model",
                    f"--out_dir={tmp_path}/{payload}", f"--sample_prompt=x{payload}",
                    *small.split(),
                ]
            )  # fmt: skip
            check(screen, f"Saved in {tmp_path}/{escaped(payload)}")


@pytest.mark.fault(21)
def test_the_servers_log(trials: Trials, capfd: pytest.CaptureFixture[str]) -> None:
    """Paths, methods and bodies of clients."""
    llama = Llama.build(device="cpu", mode="fast", max_batch_size=1)
    with running(llama, has_log=True) as (_, address):
        host, port = address.removeprefix("http://").split(":")
        for payload in payloads(trials):
            body = json.dumps({"model": payload, "prompt": payload})
            raw, quoted = payload.encode(), "".join(f"%{b:02x}" for b in payload.encode())
            post = f"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: {len(body)}\r\n"
            requests = [
                f"GET /{quoted} HTTP/1.1\r\nHost: a\r\n\r\n".encode(),
                b"GET /" + raw + b" HTTP/1.1\r\nHost: a\r\n\r\n",
                raw + b" / HTTP/1.1\r\nHost: " + raw + b"\r\n\r\n",
                f"{post}\r\n{body}".encode(),
            ]
            for request in requests:
                with trials.trial(f"{request!r}"):
                    with socket.create_connection((host, int(port)), timeout=20) as client:
                        client.sendall(request)
                        client.recv(65536)
                    written = capfd.readouterr()
                    check(written.err + written.out)
