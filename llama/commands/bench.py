"""llama bench: measure how fast a model runs on this machine."""

import json

from llama.commands.flags import as_text
from llama.terminal_text import say


@as_text
def bench(
    model: str | None = None,
    *,
    ckpt_dir: str | None = None,
    tokenizer_path: str | None = None,
    prefill: int = 512,
    decode: int = 32,
    rounds: int = 3,
    mode: str = "fast",
    quantize: str | None = None,
    kv_cache: str | None = None,
    adapter: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    out: str | None = None,
    force: bool = False,
) -> None:
    """Measure how fast a model runs on this machine.

    The report has the time of loading, the time until the first token, the speed of prefill and of
    decoding one, four and eight prompts at a time, and the memory used. Memory bandwidth limits
    decoding, so the report compares the bytes that a step reads with the measured bandwidth.

    The figures are medians over rounds. A first round warms up and does not count. Under torchrun
    the ranks share the model.

    Reads:
        MODEL: the model. The prompts are random token ids.

    Writes:
        Standard output: the report.
        OUT: the same figures as JSON, if the flag is given; "load_s" is the time of loading in
        seconds.

    Examples:
        llama bench --rounds 1
        llama bench Llama3.2-1B --quantize int8 --out bench.json

    Args:
        model: a checkpoint folder, GGUF file or id on the Hub; by default --ckpt_dir.
        ckpt_dir: the same; by default the bundled model.
        tokenizer_path: tokenizer.model or tokenizer.json; by default the one in ckpt_dir.
        prefill (tokens): tokens of the prompt that is prefilled.
        decode (tokens): tokens decoded for each prompt.
        rounds (rounds): how often everything is measured.
        mode: fast or reference.
        quantize: round the weights to int8 or int4, on a newer GPU also fp8; mode fast; by default
            as the folder is saved.
        kv_cache: int8, to round keys and values; mode fast; by default not rounded.
        adapter: folder of a LoRA adapter of this model in PEFT's format, or its id on the Hub.
        device: cuda, mps or cpu; by default the first of these that is available.
        dtype: float32, bfloat16 or float16; by default as in Llama.build.
        out: a file, to which the figures are written as JSON.
        force: replace OUT if it exists.
    """
    from llama.commands.measure import measure, report
    from llama.commands.terminal import name_model
    from llama.files import atomic_file, check_can_write

    if out is not None:
        check_can_write(out, force)
    named = {} if ckpt_dir is None else {"ckpt_dir": ckpt_dir}
    name_model(model, named)
    figures = measure(
        named.get("ckpt_dir"), prefill, decode, rounds, tokenizer_path=tokenizer_path,
        mode=mode, quantize=quantize, kv_cache=kv_cache, device=device, dtype=dtype,
        adapter=adapter,
    )  # fmt: skip
    if figures is None:
        return
    say(report(figures))
    if out is not None:
        with atomic_file(str(out)) as file:
            file.write((json.dumps(figures, indent=2) + "\n").encode())
