"""llama bench: how fast a model runs on this machine."""

import json

from llama.commands.flags import as_text


@as_text
def bench(
    ckpt_dir: str | None = None,
    tokenizer_path: str | None = None,
    prefill: int = 512,
    decode: int = 32,
    rounds: int = 3,
    mode: str = "fast",
    quantize: str | None = None,
    kv_cache: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    out: str | None = None,
) -> None:
    """Measure how fast a model runs on this machine: loading, the first token, prefill, and
    decoding of one, four and eight prompts at a time. Memory is shown too, and the share of the
    read bandwidth that decoding reaches. That bandwidth is its limit.

    Example: llama bench Llama3.2-1B --quantize int8

    The figures are medians of the rounds after a first, untimed one. Under torchrun the ranks share
    the model.

    Args:
        ckpt_dir: a checkpoint folder; by default the bundled model.
        tokenizer_path: tokenizer.model; by default the one in ckpt_dir.
        prefill: tokens of the long prompt.
        decode: tokens decoded for each prompt.
        rounds: of every measurement.
        mode: fast or reference.
        quantize: int8 or int4, on a newer GPU also fp8, with mode fast.
        kv_cache: int8, with mode fast.
        device: cpu or cuda; by default the best there is.
        dtype: float32, bfloat16 or float16; by default as in Llama.build.
        out: file for the figures as JSON.
    """
    from llama.commands.measure import measure, report
    from llama.files import atomic_file

    figures = measure(
        ckpt_dir and str(ckpt_dir), prefill, decode, rounds, tokenizer_path=tokenizer_path,
        mode=mode, quantize=quantize, kv_cache=kv_cache, device=device, dtype=dtype,
    )  # fmt: skip
    if figures is None:
        return
    print(report(figures))
    if out is not None:
        with atomic_file(str(out)) as file:
            file.write((json.dumps(figures, indent=2) + "\n").encode())
