"""The adapter to EleutherAI's lm-evaluation-harness (extra `[eval]`): its tasks on a `Llama`.

The harness asks a model for three things: the logprob of a continuation, the logprob of a whole
text, and generated text up to a stop string. https://github.com/EleutherAI/lm-evaluation-harness
"""

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby, islice
from pathlib import Path
from typing import Any

from tqdm import tqdm

from llama import parallel
from llama.engine.request import Request
from llama.errors import ConfigError, DataError, GenerationError
from llama.files import atomic_file
from llama.generation import Llama
from llama.sampling import SamplingParams

try:
    import lm_eval.models  # registers the harness's own models
    from datasets.exceptions import DatasetsError
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import (
        get_rolling_token_windows,
        handle_non_serializable,
        make_disjoint_window,
        make_table,
    )
except ImportError as error:
    raise ConfigError(
        "tasks are run by the lm-evaluation-harness: pip install 'llama-reference[eval]'"
    ) from error

log = logging.getLogger("llama")

MAX_GEN_LEN = 256  # tokens, by default
QUEUED = 256  # prompts that are submitted at a time


@register_model("llama-reference")
class LlamaLM(TemplateLM):
    """A `Llama` with the harness's interface of a model.

    Under torchrun every rank runs the same tasks on its part of the model.

    Args:
        ckpt_dir: as in `Llama.build`.
        batch_size: `max_batch_size` of `Llama.build`.
        options: the other options of `Llama.build`.
    """

    def __init__(
        self, ckpt_dir: str | Path | None = None, batch_size: int = 4, **options: Any
    ) -> None:
        super().__init__()
        self.llama = Llama.build(ckpt_dir, max_batch_size=batch_size, **options)
        self.max_length = self.llama.model.params.max_seq_len
        self._ckpt_dir = ckpt_dir

    def get_model_info(self) -> dict[str, Any]:
        """The model's entry in the results."""
        return {"ckpt_dir": str(self._ckpt_dir or "bundled"), "max_length": self.max_length}

    @property
    def eot_token_id(self) -> int:
        return self.llama.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """The token of an empty context."""
        return self.llama.tokenizer.start_id

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        return self.llama.tokenizer.encode(string, bos=add_special_tokens is not False, eos=False)

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        """For each (texts, context, continuation): the sum of the continuation's logprobs, and
        whether each of its tokens is the likeliest. Of a text that is too long the beginning is cut
        off."""
        longest = self.max_length + 1  # the last token is only predicted
        lengths = [len(continuation) for _, _, continuation in requests]
        if max(lengths, default=0) >= longest:
            raise GenerationError(
                f"a continuation has {max(lengths)} tokens, but max_seq_len is {self.max_length}"
            )
        prompts = [context + continuation for _, context, continuation in requests]
        params = SamplingParams(max_gen_len=0, prompt_logprobs=True)
        answers: list[tuple[float, bool]] = []
        for request, length in zip(self._complete(prompts, longest, params), lengths, strict=True):
            start = len(request.prompt_tokens) - length
            logprobs, is_greedy = request.prompt_logprobs, request.prompt_is_greedy
            answers.append((sum(logprobs[start:]), all(is_greedy[start:])))
        return answers

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """The sum of the logprobs of all tokens of each text. The first token follows bos.

        A text longer than max_seq_len is cut into windows. A window follows the token before it,
        and the last window follows as many tokens as fit."""
        windows = []
        for (text,) in (request.args for request in requests):
            rolling = get_rolling_token_windows(
                self.tok_encode(text, add_special_tokens=False),
                self.prefix_token_id,
                self.max_length,
                context_len=1,
            )
            windows.append([((text, ""), *make_disjoint_window(window)) for window in rolling])
        answers = iter(self._loglikelihood_tokens([w for of_text in windows for w in of_text]))
        return [sum(logprob for logprob, _ in islice(answers, len(w))) for w in windows]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Continue each context up to the first of its stop strings. Of a context that is too long
        the beginning is cut off."""
        texts: list[str] = []
        for options, same in groupby((r.args for r in requests), key=lambda args: args[1]):
            params = _sampling_params(options)
            assert params.max_gen_len is not None
            room = self.max_length - params.max_gen_len
            if room < 1:
                raise GenerationError(
                    f"max_gen_toks is {params.max_gen_len}, which leaves no room for a context: "
                    f"max_seq_len is {self.max_length}"
                )
            prompts = [self.tok_encode(context) for context, _ in same]
            texts += [request.text for request in self._complete(prompts, room, params)]
        return texts

    def _complete(
        self, prompts: Sequence[list[int]], longest: int, params: SamplingParams
    ) -> Iterator[Request]:
        """Run the last `longest` tokens of each prompt."""
        is_main = parallel.is_main_rank()
        if is_main and (n_cut := sum(len(prompt) > longest for prompt in prompts)):
            log.warning("%d of %d prompts are cut to %d tokens", n_cut, len(prompts), longest)
        with tqdm(total=len(prompts), unit="prompt", delay=2, disable=not is_main) as bar:
            for start in range(0, len(prompts), QUEUED):
                queued = [prompt[-longest:] for prompt in prompts[start : start + QUEUED]]
                yield from self.llama.runner.complete(queued, params, is_exact=False)
                bar.update(len(queued))


def _sampling_params(gen_kwargs: Mapping[str, Any]) -> SamplingParams:
    """A task's generation_kwargs as options of ours. Raises GenerationError for an unknown one."""
    options = dict(normalize_gen_kwargs(dict(gen_kwargs), MAX_GEN_LEN))
    del options["do_sample"]  # the temperature says the same
    options |= {
        "stop": [text for text in options.pop("until") if text],
        "max_gen_len": options.pop("max_gen_toks"),
        "temperature": options.pop("temperature", 0.0),
        "top_p": options.pop("top_p", 1.0),
    }
    return SamplingParams.of(options)


def evaluate(
    tasks: Sequence[str],
    include_path: str | Path | None = None,
    limit: float | None = None,
    num_fewshot: int | None = None,
    out: str | Path | None = None,
    **options: Any,
) -> str:
    """Run tasks of the harness; returns its table, on the first rank.

    Args:
        tasks: names of tasks, groups or tags; * stands for any characters.
        include_path: a folder with more tasks, YAML files which may name Python code to be run.
        limit: most documents of a task; below 1: the share of them.
        num_fewshot: examples in front of each question; None: as the task says.
        out: file for the results as JSON.
        options: of `LlamaLM`.

    Raises DataError where there is no such task or folder, or a task cannot be read; ConfigError
    for a number out of its range.
    """
    if limit is not None and not (isinstance(limit, int | float) and limit > 0):
        raise ConfigError(f"limit is {limit!r}: it must be a number above 0")
    if num_fewshot is not None and not (isinstance(num_fewshot, int) and num_fewshot >= 0):
        raise ConfigError(f"num_fewshot is {num_fewshot!r}: it must be a whole number, 0 or above")
    for folder in (include_path, out and Path(out).parent):
        if folder is not None and not Path(folder).is_dir():
            raise DataError(f"no such folder: {folder}")
    if out is not None and Path(out).is_dir():  # now, not after the evaluation
        raise DataError(f"cannot write {out}: it is a folder")
    manager = _task_manager(tasks, include_path)
    for task in tasks:
        if not manager.match_tasks([task]):
            raise DataError(f"no task {task}: `lm-eval ls tasks` lists those of the harness")
    lm = LlamaLM(**options)
    try:
        results = lm_eval.simple_evaluate(
            lm, tasks=manager.match_tasks(list(tasks)), task_manager=manager, limit=limit,
            num_fewshot=num_fewshot, log_samples=False,
        )  # fmt: skip
    except (OSError, DatasetsError) as error:
        raise DataError(f"cannot read the data of the tasks: {error}") from error
    if results is None or not parallel.is_main_rank():
        return ""
    if out is not None:
        with atomic_file(out) as file:
            file.write(json.dumps(results, indent=2, default=handle_non_serializable).encode())
    table = make_table(results)
    return f"{table}\n{make_table(results, 'groups')}" if "groups" in results else table


def _task_manager(tasks: Sequence[str], include_path: str | Path | None) -> TaskManager:
    """The index of tasks. Where the folder has all of them, only the folder is read, because
    reading the harness's own tasks takes ten seconds or more."""
    if include_path is not None:
        own = TaskManager(include_path=include_path, include_defaults=False)
        if set(tasks) <= set(own.all_subtasks):  # a group may need the harness's tasks
            return own
    return TaskManager(include_path=include_path)
