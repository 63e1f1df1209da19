"""llama batch: run a file of prompts."""

import json
import sys
from itertools import islice
from typing import Any

from llama.commands.flags import REPORTING, SAMPLING, takes
from llama.terminal_text import say

REASONS = 3  # errors that are shown; all of them are in the output


@takes(SAMPLING, REPORTING)
def batch(
    input: str,
    output: str,
    ckpt_dir: str | None = None,
    tokenizer_path: str | None = None,
    max_seq_len: int | None = None,
    max_batch_size: int = 16,
    model_parallel_size: int | None = None,
    seed: int = 1,
    mode: str = "fast",
    quantize: str | None = None,
    kv_cache: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    draft: str | None = None,
    lookup: bool = False,
    format: str | None = None,
    adapter: str | None = None,
    adapters: str | None = None,
    force: bool = False,
    **sampling: Any,
) -> None:
    """Run a file of prompts and dialogs. After a stop or a kill the same command continues the job.

    A sampling flag is the default for lines that do not have that option. In this command --stop
    is a list: '["…"]'.

    Reads:
        INPUT: JSON, a prompt or a dialog a line, such as
            {"prompt": "Once upon a time", "max_gen_len": 50}
            {"messages": [{"role": "user", "content": "Who are you?"}], "id": "q1"}
        A line may also have "custom_id", and any of the sampling options. If the messages end with
        the beginning of the assistant's answer, "continue_final_message": true continues it. A line
        of OpenAI's Batch API, with "custom_id", "method", "url" and "body", is read too.

    Writes:
        OUTPUT: a line for each line of INPUT, in the same order, such as
            {"index": 0, "prompt_tokens": 5, "text": "…", "finish_reason": "stop",
             "generated_tokens": 12}
        A dialog gets "message" instead of "text", and a line that failed gets "error". A line of
        OpenAI's Batch API gets a result in the form of that API.
        OUTPUT.job.json: the input and the options of the job.

    Examples:
        llama batch prompts.jsonl results.jsonl --max_gen_len 64
        llama batch prompts.jsonl answers.jsonl --ckpt_dir Llama3.2-1B-Instruct --temperature 0

    Exit codes:
        1: a line of INPUT failed

    Args:
        input: the JSONL file to read.
        output: the JSONL file to write.
        ckpt_dir: a checkpoint folder, GGUF file or id on the Hub; by default the bundled model.
        tokenizer_path: tokenizer.model or tokenizer.json; by default the one in ckpt_dir.
        max_seq_len (tokens): most tokens of prompt and answer together; by default as in
            Llama.build.
        max_batch_size (lines): lines that are computed together.
        model_parallel_size (ranks): ranks that share a model; if torchrun started more, the lines
            are divided among several models; by default all ranks share one model.
        seed: a line without a seed gets one that is computed from this number and its index.
        mode: fast or reference.
        quantize: round the weights to int8 or int4, on a newer GPU also fp8; mode fast; by default
            as the folder is saved.
        kv_cache: int8, to round keys and values; mode fast; by default not rounded.
        device: cuda, mps or cpu; by default the first of these that is available.
        dtype: float32, bfloat16 or float16; by default as in Llama.build.
        draft: folder of a smaller model that proposes tokens; sampled texts then differ from those
            without it; mode fast.
        lookup: find the last tokens earlier in the text, propose what followed them there; on a CPU
            the results stay the same; mode fast.
        format: chat format: llama3, llama2, chatml or zephyr; by default the folder's, else the
            vocabulary's.
        adapter: folder of a LoRA adapter of this model in PEFT's format, or its id on the Hub.
        adapters: NAME=FOLDER,NAME=FOLDER, such adapters for lines that have "adapter": "NAME".
        force: delete the results in OUTPUT and start again.
    """
    from llama.commands.batch_run import run_batch
    from llama.commands.terminal import read_adapters
    from llama.parallel import is_main_rank

    n_lines, n_failed = run_batch(
        str(input), str(output), sampling, seed=seed, ckpt_dir=ckpt_dir and str(ckpt_dir),
        tokenizer_path=tokenizer_path and str(tokenizer_path), max_seq_len=max_seq_len,
        max_batch_size=max_batch_size, model_parallel_size=model_parallel_size, mode=mode,  # type: ignore[arg-type]
        quantize=quantize, kv_cache=kv_cache, draft=draft, lookup=lookup,  # type: ignore[arg-type]
        device=device, dtype=dtype, format=format, adapter=adapter and str(adapter),  # type: ignore[arg-type]
        adapters=read_adapters(adapters), force=force,
    )  # fmt: skip
    if is_main_rank():
        say(f"{n_lines:,} lines in {output}, {n_failed:,} of them failed")
        for reason in _first_errors(str(output)) if n_failed else ():
            say(str(reason), to_stderr=True)
        if n_failed:  # on the main rank only, since torchrun stops the others when a rank fails
            sys.exit(1)


def _first_errors(output: str) -> list[str]:
    """The first failed lines of the output, each with its index and the reason."""
    with open(output, encoding="utf-8") as file:
        results = (json.loads(line) for line in file)
        failed = (result for result in results if result.get("error") is not None)
        return [f"index {result['index']}: {_reason(result)}" for result in islice(failed, REASONS)]


def _reason(result: dict[str, Any]) -> Any:
    """The message of an error. A line of OpenAI's Batch API has it inside an object."""
    error = result["error"]
    return error.get("message", error) if isinstance(error, dict) else error
