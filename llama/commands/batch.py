"""llama batch: run a file of prompts."""

import sys
from typing import Any

from llama.commands.flags import REPORTING, SAMPLING, takes


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
    force: bool = False,
    **sampling: Any,
) -> None:
    """Run a file of prompts and dialogs. The same command goes on after a stop or a kill.

    Example: llama batch prompts.jsonl results.jsonl --ckpt_dir Llama3.2-1B-Instruct

    A line of INPUT is {"prompt": "…"} or {"messages": [{"role": "user", "content": "…"}]}, with
    "id" or "custom_id" and any of the sampling options where wanted. "continue_final_message": true
    continues messages that end with the beginning of the assistant's answer. OUTPUT has a line for
    each, in this order: index, id, text (or message), finish_reason, generated_tokens …, or error;
    then the command ends with exit code 1. OUTPUT.job.json says what it was made from.

    The sampling flags are for lines that do not name their own. Here --stop is a list: '["…"]'.

    Args:
        input: the JSONL file to read.
        output: the JSONL file to write.
        ckpt_dir: a checkpoint folder; by default the bundled model.
        tokenizer_path: tokenizer.model; by default the one in ckpt_dir.
        max_seq_len: tokens of prompt and answer together; by default as in Llama.build.
        max_batch_size: lines that are computed together.
        model_parallel_size: ranks that share a model; with fewer than torchrun started, each such
            group takes its share of the lines; by default all that torchrun started.
        seed: a line without a seed of its own has one made of this and its index.
        mode: fast or reference.
        quantize: int8 or int4, on a newer GPU also fp8: round the weights (mode fast).
        kv_cache: int8: keys and values in less memory (mode fast).
        device: cpu or cuda; by default the best there is.
        dtype: float32, bfloat16 or float16; by default as in Llama.build.
        draft: folder of a smaller model that proposes tokens; a seed then gives other samples.
        lookup: propose what followed in the text so far; the results stay the same.
        format: chat format: llama3, llama2, chatml or zephyr; by default the folder's, else the
            vocabulary's.
        force: start again, and replace OUTPUT.
    """
    from llama.commands.batch_run import run_batch
    from llama.parallel import is_main_rank

    n_lines, n_failed = run_batch(
        str(input), str(output), sampling, seed=seed, ckpt_dir=ckpt_dir and str(ckpt_dir),
        tokenizer_path=tokenizer_path and str(tokenizer_path), max_seq_len=max_seq_len,
        max_batch_size=max_batch_size, model_parallel_size=model_parallel_size, mode=mode,  # type: ignore[arg-type]
        quantize=quantize, kv_cache=kv_cache, draft=draft, lookup=lookup,  # type: ignore[arg-type]
        device=device, dtype=dtype, format=format, force=force,  # type: ignore[arg-type]
    )  # fmt: skip
    if is_main_rank():
        print(f"{n_lines:,} lines in {output}, {n_failed:,} of them failed")
        if n_failed:  # on one rank: at the first that ends so, torchrun stops the others
            sys.exit(1)
