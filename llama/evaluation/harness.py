"""The adapter to EleutherAI's lm-evaluation-harness (extra `[eval]`): its tasks on a `Llama`.

The harness makes three kinds of requests: the logprob of a continuation of a context, the logprob
of a whole text, and a generated text that ends before a stop string.
https://github.com/EleutherAI/lm-evaluation-harness
"""

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby, islice
from pathlib import Path
from typing import Any

from tqdm import tqdm

from llama import parallel
from llama.checkpoints.folder import BUNDLED, find_folder
from llama.checkpoints.load import parse_dtype
from llama.engine.request import Request
from llama.errors import ConfigError, DataError, GenerationError, require_number
from llama.files import atomic_file
from llama.generation import Llama
from llama.sampling import SamplingParams

try:
    import lm_eval.evaluator
    import lm_eval.models  # registers the harness's own models; ours is added below
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

# The harness asks git for the commit of the current folder, which is not part of its results here.
# Outside a repository git would print an error.
lm_eval.evaluator.get_git_commit_hash = lambda: None

MAX_GEN_LEN = 256  # tokens, if a task sets no limit
SUBMITTED_AT_ONCE = 256  # prompts


@register_model("llama-reference")
class LlamaLM(TemplateLM):
    """A `Llama` with the harness's model interface.

    Under torchrun every rank runs the same tasks on its part of the model.

    Args:
        ckpt_dir: as in `Llama.build`.
        batch_size: the most prompts that are computed together, `max_batch_size` of `Llama.build`.
        options: other arguments of `Llama.build`.
    """

    def __init__(
        self, ckpt_dir: str | Path | None = None, batch_size: int = 4, **options: Any
    ) -> None:
        super().__init__()
        self.llama = Llama.build(ckpt_dir, max_batch_size=batch_size, **options)
        self.max_length = self.llama.model.params.max_seq_len
        self._ckpt_dir = ckpt_dir

    def get_model_info(self) -> dict[str, Any]:
        """The description of the model in the harness's results."""
        return {"ckpt_dir": str(self._ckpt_dir or "bundled"), "max_length": self.max_length}

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self.llama.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """The token that the harness uses as an empty context."""
        return self.llama.tokenizer.start_id

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Encode a text. bos comes first unless add_special_tokens is False."""
        return self.llama.tokenizer.encode(string, bos=add_special_tokens is not False, eos=False)

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        """Score continuations of contexts.

        A request is (texts, ids of the context, ids of the continuation). Returns two values for
        each request: the sum of the logprobs of the continuation, in nats, and whether greedy
        decoding would generate the continuation. A context that is too long loses its beginning.
        Raises GenerationError for a continuation that is too long for max_seq_len.
        """
        longest = self.max_length + 1  # the last token is predicted, but never fed to the model
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
        """The sum of the logprobs of all tokens of each text, in nats.

        The context of the first token is bos, or eos if the vocabulary has no bos. A text longer
        than max_seq_len is split into windows. The context of a window is the token before it. The
        last window may have fewer tokens, and then has a longer context.
        """
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
        """Generate a text after each context, up to a stop string. The stop string is left out.

        A context that is too long loses its beginning. Raises GenerationError for an unknown option
        of a task, and if max_gen_toks leaves no room for a context.
        """
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
        """Run all prompts and yield their requests, in order, when they are finished. A prompt of
        more than `longest` tokens loses its beginning."""
        is_main = parallel.is_main_rank()
        if is_main and (n_cut := sum(len(prompt) > longest for prompt in prompts)):
            log.warning("%d of %d prompts are cut to %d tokens", n_cut, len(prompts), longest)
        with tqdm(total=len(prompts), unit="prompt", delay=2, disable=not is_main) as bar:
            for start in range(0, len(prompts), SUBMITTED_AT_ONCE):
                submitted = [
                    prompt[-longest:] for prompt in prompts[start : start + SUBMITTED_AT_ONCE]
                ]
                yield from self.llama.runner.complete(submitted, params, is_exact=False)
                bar.update(len(submitted))


def _sampling_params(gen_kwargs: Mapping[str, Any]) -> SamplingParams:
    """Convert a task's generation_kwargs to SamplingParams. Raises GenerationError for an unknown
    option."""
    options = dict(normalize_gen_kwargs(dict(gen_kwargs), MAX_GEN_LEN))
    del options["do_sample"]  # if it is False, normalize_gen_kwargs has set the temperature to 0
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
    """Run tasks of the harness. Returns its table of results on the main rank, "" on the others.

    Args:
        tasks: names of tasks, groups or tags; * stands for any characters.
        include_path: a folder with more tasks, as YAML files. They may name Python code to be run.
        limit: the most documents of a task; below 1, the fraction of its documents.
        num_fewshot: examples in front of each question; None: the task's own number.
        out: a file, to which the results are written as JSON.
        options: arguments of `LlamaLM`.

    Raises DataError for an unknown task or folder, or data that cannot be read, and ConfigError for
    a number out of its range.
    """
    if limit is not None and not (isinstance(limit, int | float) and limit > 0):
        raise ConfigError(f"limit is {limit!r}: it must be a number above 0")
    if num_fewshot is not None and not (isinstance(num_fewshot, int) and num_fewshot >= 0):
        raise ConfigError(f"num_fewshot is {num_fewshot!r}: it must be a whole number, 0 or above")
    if not all(tasks):
        raise DataError(f"tasks is {','.join(tasks)!r}: a name is empty")
    # These are checked before the index of tasks is made, which takes ten seconds.
    require_number("batch_size", options.get("batch_size", 4), whole=True)
    if options.get("max_seq_len") is not None:
        require_number("max_seq_len", options["max_seq_len"], whole=True)
    if options.get("dtype") is not None:
        parse_dtype(options["dtype"])
    find_folder(options.get("ckpt_dir") or BUNDLED)
    for folder in (include_path, out and Path(out).parent):
        if folder is not None and not Path(folder).is_dir():
            raise DataError(f"no such folder: {folder}")
    if out is not None and Path(out).is_dir():  # checked before the tasks, which may take hours
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
    """The harness's index of tasks.

    Indexing the harness's own tasks takes ten seconds or more. It is skipped if the folder has all
    of the tasks.
    """
    if include_path is not None:
        of_folder = TaskManager(include_path=include_path, include_defaults=False)
        # A group or tag may include tasks of the harness. all_subtasks has no groups and no tags.
        if set(tasks) <= set(of_folder.all_subtasks):
            return of_folder
    return TaskManager(include_path=include_path)
