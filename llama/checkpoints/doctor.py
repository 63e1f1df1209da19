"""The checks of a checkpoint before it is loaded: memory, tokenizer, kind of model and device.

Each check raises a LlamaError for what cannot work, and otherwise returns a Finding. `Llama.build`
and `llama doctor` use the same checks.
"""

import contextlib
import logging
import platform
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from llama import parallel
from llama.checkpoints import hub
from llama.checkpoints.chat_form import CHAT, chat_warning, read_form
from llama.checkpoints.folder import (
    adapter_warning,
    find_adapter,
    find_tokenizer,
    open_checkpoint,
)
from llama.checkpoints.generation_config import GENERATION_CONFIG, read_sampling, read_stop_tokens
from llama.checkpoints.load import parse_dtype
from llama.checkpoints.setup import Setup
from llama.checkpoints.shards import Checkpoint
from llama.checkpoints.verify import kind_of, title_of
from llama.config import PRESETS, ModelArgs
from llama.errors import (
    ConfigError,
    LlamaError,
    OutOfMemory,
    is_out_of_memory,
    require_number,
)
from llama.fast.mode import CacheWidth, Mode, check_draft, check_proposing
from llama.fast.quantize import Width
from llama.gguf_file import is_gguf
from llama.memory import available_memory, size
from llama.tokenizer import Tokenizer

log = logging.getLogger("llama")

OK, WARNING, PROBLEM = "ok", "warning", "problem"


@dataclass(frozen=True)
class Finding:
    """What one check found."""

    about: str
    text: str
    level: str = OK


# ---- memory -----------------------------------------------------------------------------------


def check_memory(setup: Setup, available: float) -> Finding:
    """Check that weights and KV cache fit. Raises a ConfigError that names smaller options."""
    own, mapped = setup.weight_bytes()
    needed = setup.needed_bytes()
    weights = f"{size(own + mapped)} of weights"
    if mapped:
        weights += f" ({size(mapped)} of them mapped from the file)"
    ranks = f" for each of {setup.ranks_per_device} ranks" if setup.ranks_per_device > 1 else ""
    text = f"{weights} and {size(setup.cache_bytes)} of KV cache{ranks}"
    free = f"{size(available)} free on {setup.device}"
    if needed > available:
        fitting = ", ".join(_options_that_fit(setup, available))
        advice = (
            f"each of these alone would fit: {fitting}"
            if fitting
            else "no smaller KV cache would fit"
        )
        raise ConfigError(f"not enough memory: {text}, but {free}; {advice}")
    if needed + mapped * min(setup.ranks_per_device, setup.mp_size) > available:
        slow = "fits only from disk, slowly: weights are read from it again at each use"
        return Finding("memory", f"{slow}; {text}, {free}", WARNING)
    return Finding("memory", f"{text}; {free}")


def _options_that_fit(setup: Setup, available: float) -> Iterator[str]:
    """Yield changes of one option. Each of them alone would make the model fit."""
    args = setup.opened.args
    tokens = int(available / setup.ranks_per_device - setup.weight_bytes()[0]) // setup.token_bytes
    if (length := tokens // args.max_batch_size) > 0:
        yield f"max_seq_len {length}"
    if (rows := tokens // args.max_seq_len) > 0:
        yield f"max_batch_size {rows}"
    smaller = replace(setup, dtype=torch.bfloat16)
    if setup.dtype == torch.float32 and smaller.needed_bytes() <= available:
        yield "dtype bfloat16"
    for n in args.workable_sizes():
        is_cpu = setup.device.type == "cpu"
        ranks_per_device = setup.ranks_per_device * n // setup.mp_size if is_cpu else 1
        wider = replace(setup, mp_size=n, ranks_per_device=ranks_per_device)
        if n > setup.mp_size and wider.needed_bytes() <= available:
            yield f"{n} ranks"
            break


@contextlib.contextmanager
def naming_sizes(setup: Setup) -> Iterator[None]:
    """Turn an allocation that fails in the block into an error that names smaller options."""
    try:
        yield
    except Exception as error:
        if isinstance(error, LlamaError) or not is_out_of_memory(error):
            raise
        found = check_memory(setup, available_memory(setup.device))
        raise OutOfMemory(
            f"memory ran out while the model was loaded: {found.text}; a smaller max_seq_len, "
            "max_batch_size or dtype needs less"
        ) from error


def check_prompts(setup: Setup, available: float) -> Finding:
    """Check that a full batch of the longest prompts fits. If not, a smaller batch may fit."""
    args, extra = setup.opened.args, setup.prompt_bytes()
    text = (
        f"about {size(extra)} more to read {args.max_batch_size} prompts of "
        f"{args.max_seq_len:,} tokens at once"
    )
    fits = setup.needed_bytes() + extra * setup.ranks_per_device <= available
    return Finding("prompts", text, OK if fits else WARNING)


# ---- tokenizer, model, device -----------------------------------------------------------------


def check_tokenizer(args: ModelArgs, tokenizer: Tokenizer) -> Finding:
    """Check that the tokenizer fits the model. Raises ConfigError if it is another model's."""
    is_llama_2 = tokenizer.is_llama_2
    words, file = tokenizer.n_words, tokenizer.model_path
    kind = tokenizer.kind
    for name in args.published()[:1]:
        is_sentencepiece = name.startswith(("llama-1", "llama-2", "codellama"))
        if is_llama_2 != is_sentencepiece and words != PRESETS[name].vocab_size:
            raise ConfigError(f"{file} is of {kind} with {words} tokens, and is not that of {name}")
    if args.vocab_size < words:
        raise ConfigError(
            f"the model's vocab_size {args.vocab_size} is smaller than the tokenizer's "
            f"{words} tokens ({file})"
        )
    if args.vocab_size > words:
        text = f"the model's vocab_size {args.vocab_size} is larger than the tokenizer's {words}"
        return Finding("tokenizer", f"{text} tokens", WARNING)
    return Finding("tokenizer", f"{kind}, {words:,} tokens, as many as the model's")


def describe_sampling(folder: Path, tokenizer: Tokenizer) -> Finding:
    """The sampling options that the folder suggests, and the tokens that end a text."""
    suggested = [f"{name} {value}" for name, value in read_sampling(folder).items()]
    file = folder.name if is_gguf(folder) else GENERATION_CONFIG
    options = f"{', '.join(suggested)} ({file})" if suggested else "none suggested"
    ids = read_stop_tokens(folder) or tokenizer.stop_tokens
    stop = ", ".join(tokenizer.token_texts(sorted(ids)))
    return Finding("sampling", f"{options}; a text ends at {stop}")


def check_chat(folder: Path) -> Finding:
    """Whether the model was taught to chat, and the form of its dialogs."""
    warning = chat_warning(folder)
    text = CHAT[kind_of(folder)]
    if warning is None and (form := read_form(folder)) is not None:
        text += f", dialogs in the form {form.name}"
    is_unknown_form = warning not in (None, CHAT["base"])
    return Finding("chat", warning or text, WARNING if is_unknown_form else OK)


def check_adapter(opened: Checkpoint) -> Finding:
    """What a LoRA adapter changes, and whether it was trained on a model of this name."""
    adapter = opened.adapter
    if adapter is None:
        return Finding("adapter", "none")
    if (warning := adapter_warning(adapter, opened.folder)) is not None:
        return Finding("adapter", warning, WARNING)
    weights = f", and replaces {len(adapter.weights)} weights" if adapter.weights else ""
    return Finding("adapter", f"changes {len(adapter.changes)} matrices{weights}")


def check_device(setup: Setup) -> Finding:
    """The device, the dtype, and the number of ranks with their communication backend."""
    kind = setup.device.type
    dtype = str(setup.dtype).removeprefix("torch.")
    if kind == "cuda":
        name = f"{setup.device} ({torch.cuda.get_device_name(setup.device)})"
    elif kind == "cpu":
        capability = torch.backends.cpu.get_cpu_capability()
        name = f"cpu ({platform.machine()}, {capability}, {torch.get_num_threads()} threads)"
    else:
        name = kind
    ranks = "1 rank"
    if setup.mp_size > 1:
        ranks = f"{setup.mp_size} ranks over {'nccl' if kind == 'cuda' else 'gloo'}"
    text = f"{name}, {dtype}, {ranks}"
    if kind == "cuda" and setup.mp_size > torch.cuda.device_count():
        seen = f"{text}; only {torch.cuda.device_count()} GPU(s) on this machine"
        return Finding("device", seen, WARNING)
    if setup.dtype == torch.bfloat16 and kind == "cpu" and not _has_fast_bfloat16():
        text += "; this CPU has no instructions for bfloat16, float32 may be faster"
    return Finding("device", text)


def _has_fast_bfloat16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether the CPU (x86, ARM) has instructions that multiply bfloat16. True if the system is not
    Linux."""
    if not cpuinfo.exists():
        return True
    return not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(cpuinfo.read_text().split())


# ---- the report -------------------------------------------------------------------------------


def require(setup: Setup, tokenizer: Tokenizer | None) -> None:
    """Make the checks that `Llama.build` needs before it loads weights. Warnings are logged."""
    available = available_memory(setup.device)
    if tokenizer is not None:
        _warn(check_tokenizer(setup.opened.args, tokenizer))
    _warn(check_adapter(setup.opened))
    _warn(check_memory(setup, available))


def require_draft(folder: Path, setup: Setup, tokenizer: Tokenizer) -> Setup:
    """Make the checks for a draft model. Returns its setup. Warnings are logged."""
    draft_setup, found = open_draft(folder, setup, tokenizer)
    _warn(found)
    return draft_setup


def open_draft(folder: Path, setup: Setup, tokenizer: Tokenizer) -> tuple[Setup, Finding]:
    """The setup of a draft model, and whether it fits into memory beside the main model. Raises
    ConfigError if the draft model cannot run."""
    args = setup.opened.args
    try:
        opened = open_checkpoint(folder)
        draft_setup = Setup.make(
            opened, setup.mp_size, setup.ranks_per_device, args.max_seq_len, args.max_batch_size,
            setup.device, setup.dtype, "fast", setup.quantize, setup.kv_cache,
        )  # fmt: skip
        check_draft(opened.args, args.vocab_size, args.max_seq_len)
        own = Tokenizer(find_tokenizer(opened.folder, folder))
        if not own.is_like(tokenizer):
            raise ConfigError(f"its tokenizer is not the model's, {tokenizer.model_path}")
        available = available_memory(setup.device) - setup.needed_bytes()
        return draft_setup, check_memory(draft_setup, available)
    except LlamaError as error:
        raise ConfigError(f"draft model {folder}: {error}") from error


def _warn(*findings: Finding) -> None:
    for found in findings:
        if found.level == WARNING and parallel.is_main_rank():
            log.warning(found.text)


def examine(
    folder: str | Path,
    tokenizer_path: str | Path | None = None,
    max_seq_len: int | None = None,
    max_batch_size: int = 4,
    mp: int = 1,
    device: str | None = None,
    dtype: str | None = None,
    mode: Mode = "reference",
    quantize: Width | None = None,
    kv_cache: CacheWidth | None = None,
    draft: str | Path | None = None,
    adapter: str | Path | None = None,
) -> list[Finding]:
    """All findings about a folder on `mp` ranks of this machine, without starting the ranks.

    Raises a LlamaError if a folder or the device cannot be opened at all.
    """
    sizes = {"mp": mp, "max_seq_len": max_seq_len, "max_batch_size": max_batch_size}
    for name, value in sizes.items():
        if value is not None:
            require_number(name, value, whole=True)
    if dtype is not None:
        parse_dtype(dtype)
    check_proposing(mode, draft is not None, lookup=False)
    target = parallel.local_device(device)
    folder = hub.local_folder(folder)
    draft_folder = None if draft is None else hub.local_folder(draft)
    opened = open_checkpoint(folder)
    opened.set_vocab_size()
    findings = [Finding("model", title_of(opened)), check_chat(opened.folder)]
    if adapter is not None:
        opened.merge(find_adapter(adapter))
        findings.append(check_adapter(opened))
    tokenizer = None
    try:
        path = tokenizer_path or find_tokenizer(opened.folder, folder)
        tokenizer = Tokenizer(path)
        findings.append(check_tokenizer(opened.args, tokenizer))
        findings.append(describe_sampling(opened.folder, tokenizer))
    except LlamaError as error:
        findings.append(Finding("tokenizer", str(error), PROBLEM))
    try:
        setup = Setup.make(
            opened, mp, mp, max_seq_len, max_batch_size, target, dtype, mode, quantize, kv_cache
        )
    except LlamaError as error:
        return [*findings, Finding("set-up", str(error), PROBLEM)]
    available = available_memory(target)
    try:
        findings += [check_memory(setup, available), check_prompts(setup, available)]
    except LlamaError as error:
        findings.append(Finding("memory", str(error), PROBLEM))
    if draft_folder is not None and tokenizer is not None:
        try:
            found = open_draft(draft_folder, setup, tokenizer)[1]
            findings.append(replace(found, about="draft"))
        except LlamaError as error:
            findings.append(Finding("draft", str(error), PROBLEM))
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    return [*findings, check_device(setup), Finding("versions", versions)]


def report(findings: list[Finding]) -> str:
    """One line for each finding, and a last line that counts the problems and warnings."""
    lines = [f"{found.about:<9}  {found.level:<7}  {found.text}" for found in findings]
    levels = [found.level for found in findings]
    counts = [f"{levels.count(level)} {level}(s)" for level in (PROBLEM, WARNING)]
    bad = [count for count in counts if not count.startswith("0 ")]
    return "\n".join([*lines, ", ".join(bad) or "all is well"])
