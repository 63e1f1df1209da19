"""Batch jobs: a file of prompts and dialogs in, a file of results in the same order out."""

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
from llama.commands.batch_files import BatchFiles, Part
from llama.engine.request import Request
from llama.errors import DataError, GenerationError
from llama.fast.mode import CacheWidth, Mode
from llama.fast.quantize import Width
from llama.generation import Llama
from llama.sampling import SamplingParams

# Lines in flight for each row of the cache. Results are written in the order of the input, so some
# finished lines wait for an earlier one. The others keep the engine full meanwhile.
WINDOW = 16


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
    force: bool = False,
) -> tuple[int, int]:
    """Continue every prompt and answer every dialog of a JSONL file; go on where a run was stopped.

    Args:
        input: a line is {"prompt": text} or {"messages": dialog}, with "id" or "custom_id"
            (anything, copied), "continue_final_message" and sampling options of its own where
            wanted; blank lines do not count.
        output: a line for each: index, id, text or message, and more; or index, id and error.
        options: sampling options of lines that do not say otherwise.
        seed: a line without a seed has one made of this and its index, so that its result does not
            depend on other lines, on stops or on the number of ranks.
        force: start again, and replace the output.

    The other arguments are those of `Llama.build`. With more ranks than model_parallel_size each
    group of as many takes its share of the lines.

    Returns the number of lines and of those that failed, on every rank.
    Raises a LlamaError where no line could be run, before the model is loaded if it can be known.
    """
    _sampling_params(options, {"seed": seed}, 0)  # a wrong option fails here, not in every line
    target = parallel.local_device(device)
    parallel.initialize(model_parallel_size, target)
    group, n_groups = parallel.dp_rank(), parallel.dp_size()
    everyone = parallel.make_group_without_timeout()
    files = BatchFiles(input, output)
    with parallel.failing_together(target):
        if parallel.is_main_rank():
            model = dict(ckpt_dir=ckpt_dir, tokenizer_path=tokenizer_path, dtype=dtype)
            model |= dict(mode=mode, quantize=quantize, kv_cache=kv_cache)
            model |= dict(format=format) if format is not None else {}
            files.prepare(model | {"max_seq_len": max_seq_len, "seed": seed, **options}, force)
    with parallel.failing_together(target):
        part = files.open_part(group, n_groups) if parallel.mp_rank() == 0 else None
        done = files.done()
    failed = 0
    if not all(done):
        llama = Llama.build(
            ckpt_dir, tokenizer_path, max_seq_len, max_batch_size, model_parallel_size, seed,
            mode=mode, quantize=quantize, kv_cache=kv_cache, device=device, dtype=dtype,
            draft=draft, lookup=lookup, format=format,
        )  # fmt: skip
        todo = files.todo(done, group, n_groups)
        tasks = (Task(llama, index, line, options, seed) for index, line in todo)
        with llama.runner.leading(), _bar(done, group, n_groups) as bar:
            if part is not None:
                failed = _run(llama, tasks, part, WINDOW * max_batch_size, bar)
    if part is not None:
        part.close()
    failed = parallel.sum_without_timeout(failed, everyone) + done.count(2)
    if parallel.is_main_rank():
        files.merge(len(done))
    return len(done), failed


class Task:
    """A line of the input as requests to the engine. A line with a mistake is done at once."""

    def __init__(
        self, llama: Llama, index: int, line: bytes, options: Mapping[str, Any], seed: int
    ) -> None:
        self._llama = llama
        self._head: dict[str, Any] = {"index": index}
        self._is_dialog = False
        self._beginning = ""  # of the answer, where the final message is continued
        self._requests: list[Request] = []
        self._error: Exception | None = None
        try:
            self._submit(_read(line), options, _seed_of_line(seed, index))
        except (ValueError, RecursionError) as error:  # a LlamaError, or text that is no JSON
            self._error = error

    def _submit(self, line: dict[str, Any], options: Mapping[str, Any], seed: int) -> None:
        for name in ("id", "custom_id"):
            if name in line:
                self._head[name] = line.pop(name)
        self._is_dialog = "messages" in line
        if self._is_dialog == ("prompt" in line):
            raise DataError('a line has either a "prompt" or "messages"')
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
        """The line of the output."""
        errors = [request.error for request in self._requests if request.error is not None]
        for error in [self._error, *errors]:
            if error is not None:
                return {**self._head, "error": str(error)}
        outputs = [self._output(request) for request in self._requests]
        head = {**self._head, "prompt_tokens": len(self._requests[0].prompt_tokens)}
        return {**head, **outputs[0]} if len(outputs) == 1 else {**head, "outputs": outputs}

    def _output(self, request: Request) -> dict[str, Any]:
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


def _run(llama: Llama, tasks: Iterable[Task], part: Part, window: int, bar: "tqdm[Any]") -> int:
    """Write the results of all tasks, in their order; returns how many are errors."""
    n_tokens = failed = 0
    tasks = iter(tasks)
    under_way = deque(islice(tasks, window))
    while under_way:
        # Step even without work, because the other ranks of the model wait for a plan.
        n_tokens += sum(event.token is not None for event in llama.engine.step())
        n_results = 0
        while under_way and under_way[0].is_done:
            result = under_way.popleft().result()
            part.write(result)
            failed += "error" in result
            n_results += 1
        under_way.extend(islice(tasks, window - len(under_way)))
        seconds = bar.format_dict["elapsed"]
        bar.set_postfix_str(f"{n_tokens / max(seconds, 1e-9):,.0f} tokens/s", refresh=False)
        bar.update(n_results)
    return failed


def _bar(done: bytearray, group: int, n_groups: int) -> "tqdm[Any]":
    """A progress bar over the lines of the first group, on the main rank."""
    own = done[group::n_groups]
    return tqdm(
        total=len(own),
        initial=len(own) - own.count(0),
        desc="Lines" if n_groups == 1 else f"Lines of 1 of {n_groups} groups",
        unit="line",
        smoothing=0,  # many lines may end at once
        miniters=0,  # the speed changes also where no line ends
        disable=not parallel.is_main_rank(),
    )


def _read(line: bytes) -> dict[str, Any]:
    try:
        record = json.loads(line.decode())
    except (ValueError, RecursionError) as error:
        raise DataError(f"not JSON: {error}") from error
    if not isinstance(record, dict):
        raise DataError("not an object with keys")
    return record


def _seed_of_line(seed: int, index: int) -> int:
    mixed = np.random.SeedSequence([seed, index]).generate_state(1, np.uint64)
    return int(mixed[0] >> np.uint64(1))


def _sampling_params(
    defaults: Mapping[str, Any], options: Mapping[str, Any], seed: int
) -> SamplingParams:
    """The options over the defaults; `seed` where neither has a seed."""
    merged = {**defaults, **options}
    if merged.get("seed") is None:
        merged["seed"] = seed
    if isinstance(bias := merged.get("logit_bias"), dict):  # keys of JSON are strings
        try:
            merged["logit_bias"] = {int(token): value for token, value in bias.items()}
        except ValueError as error:
            raise GenerationError(f"logit_bias is {bias}: its keys must be token ids") from error
    return SamplingParams.of(merged)
