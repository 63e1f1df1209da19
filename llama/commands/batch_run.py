"""Run a batch job: read a file of prompts and dialogs, and write the results in the same order."""

import json
import reprlib
from collections import deque
from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any

import numpy as np
from tqdm import tqdm

from llama import parallel
from llama.chat_forms import FormatName
from llama.commands.batch_files import FAILED, PENDING, BatchFiles, Part
from llama.engine.request import Request
from llama.errors import DataError, GenerationError, LlamaError
from llama.fast.mode import CacheWidth, Mode
from llama.fast.quantize import Width
from llama.generation import Llama
from llama.sampling import SamplingParams
from llama.slow_ranks import SlowRanks

# Lines in flight for each row of the cache. Results are written in the order of the input, so a
# finished line may have to wait for an earlier line. With 16 lines a row, the engine has other
# lines to compute meanwhile.
IN_FLIGHT_PER_ROW = 16


def run_batch(
    input: str,
    output: str,
    options: Mapping[str, Any],
    *,
    seed: int = 1,
    ckpt_dir: str | None = None,
    tokenizer_path: str | None = None,
    max_seq_len: int | None = None,
    max_batch_size: int = 16,
    model_parallel_size: int | None = None,
    mode: Mode = "fast",
    quantize: Width | None = None,
    kv_cache: CacheWidth | None = None,
    device: str | None = None,
    dtype: str | None = None,
    draft: str | None = None,
    lookup: bool = False,
    format: FormatName | None = None,
    adapter: str | None = None,
    adapters: Mapping[str, str] | None = None,
    force: bool = False,
) -> tuple[int, int]:
    """Continue every prompt and answer every dialog of a JSONL file. Lines that an earlier run has
    finished are not computed again.

    Args:
        input: a line is {"prompt": text} or {"messages": dialog}. It may also have "id" or
            "custom_id", which are copied, "continue_final_message" and sampling options. A line of
            OpenAI's Batch API has "url" and "body", and gets a result in that form. Blank lines do
            not count.
        output: gets a line for each line of the input: index, id, and text or message, or error.
        options: sampling options for lines that do not have them.
        seed: a line without a seed gets one that is computed from this number and its index. So its
            result does not depend on other lines, on the number of ranks, or on whether the job was
            interrupted and started again.
        force: remove existing results and start again.

    `Llama.build` explains the other arguments. If there are more ranks than model_parallel_size,
    each group of model_parallel_size ranks has its own model and computes a part of the lines.

    Returns the number of lines and the number of failed lines, on every rank.
    Raises a LlamaError for a mistake that concerns all lines. A mistake in one line is written as
    the result of that line.
    """
    _sampling_params(options, {"seed": seed}, 0)  # raises now for a mistake in the options
    target = parallel.local_device(device)
    parallel.initialize(model_parallel_size, target)
    group, n_groups = parallel.dp_rank(), parallel.dp_size()
    slow_ranks = SlowRanks()
    files = BatchFiles(input, output)
    with parallel.failing_together(target):
        if parallel.is_main_rank():
            model: dict[str, Any] = dict(
                ckpt_dir=ckpt_dir, tokenizer_path=tokenizer_path, dtype=dtype
            )
            model |= dict(mode=mode, quantize=quantize, kv_cache=kv_cache)
            model |= dict(format=format) if format is not None else {}
            model |= dict(adapter=adapter) if adapter is not None else {}
            model |= dict(adapters=adapters) if adapters else {}
            files.prepare(model | {"max_seq_len": max_seq_len, "seed": seed, **options}, force)
    with parallel.failing_together(target):
        part = files.open_part(group, n_groups) if parallel.mp_rank() == 0 else None
        states = files.states()
    n_failed = 0
    if PENDING in states:
        llama = Llama.build(
            ckpt_dir, tokenizer_path, max_seq_len, max_batch_size, model_parallel_size, seed,
            mode=mode, quantize=quantize, kv_cache=kv_cache, device=device, dtype=dtype,
            draft=draft, lookup=lookup, format=format, adapter=adapter,
            adapters=adapters,
        )  # fmt: skip
        lines = files.pending(states, group, n_groups)
        tasks = (Task(llama, index, line, options, seed) for index, line in lines)
        with llama.runner.leading(), _progress_bar(states, group, n_groups) as bar:
            if part is not None:
                window = IN_FLIGHT_PER_ROW * max_batch_size
                n_failed = _run_tasks(llama, tasks, part, window, bar)
    if part is not None:
        part.close()
    n_failed = slow_ranks.sum(n_failed) + states.count(FAILED)
    if parallel.is_main_rank():
        files.merge(len(states))
    return len(states), n_failed


class Task:
    """The requests of one line of the input. A line that cannot be submitted is done at once, and
    its result is the error."""

    def __init__(
        self, llama: Llama, index: int, line: bytes, options: Mapping[str, Any], seed: int
    ) -> None:
        self._llama = llama
        self._head: dict[str, Any] = {"index": index}
        self._is_dialog = False
        self._beginning = ""  # of the answer, if the line continues its final message
        self._requests: list[Request] = []
        self._api: Any = None  # the module for lines in the form of OpenAI's Batch API
        self._call: Any = None  # the BatchCall of such a line
        self._error: Exception | None = None
        try:
            self._submit(_read(line), options, _seed_of_line(seed, index))
        except (LlamaError, ValueError, RecursionError) as error:  # also text that is no JSON
            self._error = error

    def _submit(self, line: dict[str, Any], options: Mapping[str, Any], seed: int) -> None:
        """Submit one request for each sample of the line."""
        for name in ("id", "custom_id"):
            if name in line:
                self._head[name] = line.pop(name)
        if "url" in line:
            self._api = import_api()
            self._call = self._api.BatchCall(self._llama, line, seed)
            self._requests = self._call.submit(self._head["index"])
            return
        self._is_dialog = "messages" in line
        if self._is_dialog == ("prompt" in line):
            raise DataError('a line must have either "prompt" or "messages"')
        prompt: Any = line.pop("messages" if self._is_dialog else "prompt")
        if self._is_dialog and not isinstance(prompt, list):
            raise DataError(f'"messages" must be a list, not {reprlib.repr(prompt)}')
        if not self._is_dialog and not isinstance(prompt, str):
            raise DataError(f'"prompt" must be a text, not {reprlib.repr(prompt)}')
        continues = line.pop("continue_final_message", False)
        if not isinstance(continues, bool):
            raise DataError(f'"continue_final_message" must be true or false, not {continues!r}')
        llama = self._llama
        encode = llama.encode_dialog if self._is_dialog else llama.encode_prompt
        tokens = encode(prompt, continues)
        if continues:
            self._beginning = prompt[-1]["content"]
        for params in _sampling_params(options, line, seed).samples():
            request = llama.engine.submit(
                tokens,
                params,
                row=self._head["index"],
                is_continued=continues or (not self._is_dialog and prompt != ""),
            )
            self._requests.append(request)

    @property
    def is_done(self) -> bool:
        return all(request.finish_reason is not None for request in self._requests)

    def result(self) -> dict[str, Any]:
        """The result of the line: its output or outputs, or the first error."""
        errors = [request.error for request in self._requests if request.error is not None]
        for error in [self._error, *errors]:
            if error is not None:
                result = {"error": str(error)} if self._api is None else self._api.failure(error)
                return {**self._head, **result}
        if self._call is not None:
            return {**self._head, **self._call.result(self._requests)}
        outputs = [self._output(request) for request in self._requests]
        head = {**self._head, "prompt_tokens": len(self._requests[0].prompt_tokens)}
        return {**head, **outputs[0]} if len(outputs) == 1 else {**head, "outputs": outputs}

    def _output(self, request: Request) -> dict[str, Any]:
        """The result of one sample."""
        output: dict[str, Any] = {"text": request.text}
        if self._is_dialog:
            formatter = self._llama.formatter
            message = formatter.decode_message(request.tokens, request.stop_token)
            output = {"message": {**message, "content": self._beginning + request.text}}
        output |= {
            "finish_reason": request.finish_reason,
            "generated_tokens": len(request.tokens),
        }
        if request.params.logprobs is not None:
            output |= {
                "tokens": self._llama.tokenizer.token_texts(request.tokens),
                "logprobs": request.logprobs,
                "top_logprobs": request.top_logprobs,
            }
        if request.params.prompt_logprobs:
            output["prompt_logprobs"] = request.prompt_logprobs
        return output


def _run_tasks(
    llama: Llama, tasks: Iterable[Task], part: Part, window: int, bar: "tqdm[Any]"
) -> int:
    """Step the engine, and write the results of all tasks in their order, with at most `window`
    tasks in flight. Returns the number of failed tasks."""
    n_tokens = n_failed = 0
    tasks = iter(tasks)
    in_flight = deque(islice(tasks, window))
    while in_flight:
        # Step even if no request is left, because the other ranks of the model wait for a plan.
        n_tokens += sum(event.token is not None for event in llama.engine.step())
        n_results = 0
        while in_flight and in_flight[0].is_done:
            result = in_flight.popleft().result()
            part.write(result)
            n_failed += result.get("error") is not None
            n_results += 1
        in_flight.extend(islice(tasks, window - len(in_flight)))
        seconds = bar.format_dict["elapsed"]
        bar.set_postfix_str(f"{n_tokens / max(seconds, 1e-9):,.0f} tokens/s", refresh=False)
        bar.update(n_results)
    return n_failed


def _progress_bar(states: bytearray, group: int, n_groups: int) -> "tqdm[Any]":
    """A progress bar over the lines of this group. Only the main rank shows its bar."""
    own = states[group::n_groups]
    return tqdm(
        total=len(own),
        initial=len(own) - own.count(PENDING),
        desc="Lines" if n_groups == 1 else f"Lines of 1 of {n_groups} groups",
        unit="line",
        smoothing=0,  # the average since the start, because lines finish at irregular times
        miniters=0,  # redraw for new tokens, even if no line has finished
        disable=not parallel.is_main_rank(),
    )


def import_api() -> Any:
    """The module that runs lines of OpenAI's Batch API. Raises DataError if the extra [serve] is
    not installed."""
    try:
        from llama.server import batch
    except ImportError as error:
        raise DataError(
            "lines with a url need pydantic: pip install 'llama-reference[serve]'"
        ) from error
    return batch


def _read(line: bytes) -> dict[str, Any]:
    """Parse a line of the input. Raises DataError unless it is a JSON object."""
    try:
        record = json.loads(line.decode())
    except (ValueError, RecursionError) as error:
        raise DataError(f"not JSON: {error}") from error
    if not isinstance(record, dict):
        raise DataError("not an object with keys")
    return record


def _seed_of_line(seed: int, index: int) -> int:
    """A seed of 63 bits. It depends only on the two numbers."""
    mixed = np.random.SeedSequence([seed, index]).generate_state(1, np.uint64)
    return int(mixed[0] >> np.uint64(1))


def _sampling_params(
    defaults: Mapping[str, Any], options: Mapping[str, Any], seed: int
) -> SamplingParams:
    """Merge the options of a line with the defaults. `seed` is used if neither has a seed."""
    merged = {**defaults, **options}
    if merged.get("seed") is None:
        merged["seed"] = seed
    if isinstance(bias := merged.get("logit_bias"), dict):  # keys of JSON are strings
        try:
            merged["logit_bias"] = {int(token): value for token, value in bias.items()}
        except ValueError as error:
            raise GenerationError(f"logit_bias is {bias}: its keys must be token ids") from error
    return SamplingParams.of(merged)
