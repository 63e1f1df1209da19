"""llama perplexity, evaluate: score a text, and run tasks of the lm-evaluation-harness."""

from collections.abc import Sequence

from llama.commands.flags import as_text
from llama.errors import ConfigError, DataError, require_number
from llama.terminal_text import say


@as_text
def perplexity(
    file: str,
    ckpt_dir: str | None = None,
    tokenizer_path: str | None = None,
    window: int | None = None,
    mode: str = "reference",
    quantize: str | None = None,
    kv_cache: str | None = None,
    adapter: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
) -> None:
    """Score a text: nats a token, perplexity, and bits a byte.

    Reads:
        FILE: UTF-8 text, such as
            Once upon a time there was a fox.

    Writes:
        Standard output: four lines, such as
            perplexity      12.345

    Examples:
        llama perplexity tale.txt
        llama perplexity tale.txt --ckpt_dir Llama3.2-1B --window 1024

    Args:
        file: any UTF-8 text.
        ckpt_dir: a checkpoint folder, GGUF file or id on the Hub; by default the bundled model.
        tokenizer_path: tokenizer.model or tokenizer.json; by default the one in ckpt_dir.
        window (tokens): the text is scored in windows of this many tokens, each after bos; by
            default 512, or the context if smaller.
        mode: reference or fast.
        quantize: round the weights to int8 or int4, on a newer GPU also fp8; mode fast; by default
            as the folder is saved.
        kv_cache: int8, to round keys and values; mode fast; by default not rounded.
        adapter: folder of a LoRA adapter of this model in PEFT's format, or its id on the Hub.
        device: cuda, mps or cpu; by default the first of these that is available.
        dtype: float32, bfloat16 or float16; by default as in Llama.build.
    """
    from llama.checkpoints.folder import BUNDLED, find_folder, read_args
    from llama.evaluation.perplexity import WINDOW, score
    from llama.files import read_text
    from llama.generation import Llama
    from llama.parallel import is_main_rank

    text = read_text(str(file))
    if not text:
        raise DataError(f"{file} is empty: there is nothing to score")
    if window is not None:
        require_number("window", window, whole=True)
        context = read_args(find_folder(ckpt_dir or BUNDLED)).context
        if window > context:
            raise ConfigError(f"window is {window}, but the model's context is {context} tokens")
    max_seq_len = window if isinstance(window, int) and window > WINDOW else None
    llama = Llama.build(
        ckpt_dir, tokenizer_path, max_seq_len, max_batch_size=1,
        mode=mode, quantize=quantize, kv_cache=kv_cache,  # type: ignore[arg-type]
        device=device, dtype=dtype, adapter=adapter,
    )  # fmt: skip
    result = score(llama, [text], window)
    if is_main_rank():
        print(f"tokens          {result.tokens:,} in {result.bytes:,} bytes")
        print(f"nats a token    {result.nats_per_token:.4f}")
        print(f"perplexity      {result.perplexity:.3f}")
        print(f"bits a byte     {result.bits_per_byte:.4f}")


@as_text
def evaluate(
    tasks: str | Sequence[str],
    ckpt_dir: str | None = None,
    tokenizer_path: str | None = None,
    adapter: str | None = None,
    include_path: str | None = None,
    limit: float | None = None,
    num_fewshot: int | None = None,
    out: str | None = None,
    force: bool = False,
    max_seq_len: int | None = None,
    batch_size: int = 4,
    device: str | None = None,
    dtype: str | None = None,
) -> None:
    """Run tasks of the lm-evaluation-harness (extra [eval]) and show its table of results.

    The harness downloads the data of its tasks from the Hugging Face Hub. A context longer than
    max_seq_len loses its beginning. No chat format is applied.

    Reads:
        TASKS: their data, from the Hub or its cache.
        INCLUDE_PATH: YAML files of your own tasks, if the flag is given. A line of one:
            task: my_task

    Writes:
        Standard output: a table with a line for each task and metric.
        OUT: the results as JSON, if the flag is given.

    Examples:
        llama evaluate arc_easy --limit 100
        llama evaluate hellaswag,arc_easy --ckpt_dir Meta-Llama-3-8B --num_fewshot 5 --out r.json

    Args:
        tasks: names of tasks, groups or tags, separated by commas.
        ckpt_dir: a checkpoint folder, GGUF file or id on the Hub; by default the bundled model.
        tokenizer_path: tokenizer.model or tokenizer.json; by default the one in ckpt_dir.
        adapter: folder of a LoRA adapter of this model in PEFT's format, or its id on the Hub.
        include_path: a folder with your own tasks, as YAML files; they may run Python code.
        limit (documents): most documents of a task; below 1, the fraction of its documents.
        num_fewshot (examples): examples in front of each question; by default as the task says.
        out: a file, to which the results are written as JSON.
        force: replace OUT if it exists.
        max_seq_len (tokens): most tokens of prompt and answer together; by default as in
            Llama.build.
        batch_size (prompts): prompts that are computed together.
        device: cuda, mps or cpu; by default the first of these that is available.
        dtype: float32, bfloat16 or float16; by default as in Llama.build.
    """
    from llama.evaluation.harness import evaluate as run
    from llama.files import check_can_write

    if out is not None:
        check_can_write(out, force)
    names = tasks.split(",") if isinstance(tasks, str) else list(map(str, tasks))
    table = run(
        names, include_path, limit, num_fewshot, out and str(out), ckpt_dir=ckpt_dir,
        batch_size=batch_size, tokenizer_path=tokenizer_path, max_seq_len=max_seq_len,
        device=device, dtype=dtype, adapter=adapter,
    )  # fmt: skip
    if table:
        say(table)
