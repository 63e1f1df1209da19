"""`Llama`: a model with its tokenizer, built from a checkpoint folder, that completes and chats."""

import contextlib
import logging
import time
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict, overload

import torch

from llama import parallel
from llama.chat_format import ChatFormat, Dialog, Llama2ChatFormat, Message
from llama.checkpoints import doctor, hub, hugging_face
from llama.checkpoints.folder import BUNDLED, find_tokenizer, open_checkpoint
from llama.checkpoints.load import load_weights
from llama.checkpoints.verify import kind_of
from llama.engine.engine import Engine
from llama.engine.request import Event, Request
from llama.errors import GenerationError
from llama.fast.cpu.transformer import FastTransformer
from llama.fast.gpu import device_weights
from llama.fast.mode import CacheWidth, Mode, cache_dtype, check_mode, check_proposing, drawback
from llama.fast.quantize import Width
from llama.model import Transformer
from llama.sampling import SamplingParams, sample_top_p
from llama.tokenizer import TextDecoder, Tokenizer

__all__ = ["ChatPrediction", "CompletionPrediction", "Dialog", "Llama", "Message", "sample_top_p"]

log = logging.getLogger("llama")


class CompletionPrediction(TypedDict):
    """A completion; with logprobs also its tokens as text, and the logprob of each."""

    generation: str
    tokens: NotRequired[list[str]]
    logprobs: NotRequired[list[float]]


class ChatPrediction(TypedDict):
    """The assistant's message; with logprobs also its tokens as text, and the logprob of each."""

    generation: Message
    tokens: NotRequired[list[str]]
    logprobs: NotRequired[list[float]]


class Llama:
    """Text completion and chat on one model.

    Attributes: `model` (Transformer), `tokenizer` (Tokenizer), `formatter` (its chat
    format), `engine` (Engine, which both ways of generating go through).
    """

    @staticmethod
    def build(
        ckpt_dir: str | Path | None = None,
        tokenizer_path: str | Path | None = None,
        max_seq_len: int | None = None,
        max_batch_size: int = 4,
        model_parallel_size: int | None = None,
        seed: int = 1,
        *,
        mode: Mode = "reference",
        quantize: Width | None = None,
        kv_cache: CacheWidth | None = None,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        rope_factor: float | None = None,
        draft: str | Path | None = None,
        lookup: bool = False,
    ) -> "Llama":
        """Load a checkpoint folder, Meta's or Hugging Face's, on any number of ranks that divides.

        Args:
            ckpt_dir: folder with `params.json` and `consolidated.NN.pth`, with `config.json` and
                `.safetensors`, or with an `original/` folder that holds the former; or the id of
                a repository on the Hugging Face Hub, `owner/name@revision`; None: the small model
                that comes with the package.
            tokenizer_path: the tokenizer's file; None: `tokenizer.model` in the folder, or else
                `tokenizer.json`.
            max_seq_len: tokens of prompt and answer together, at most the model's context; None:
                2048, or the context where that is smaller.
            max_batch_size: prompts at a time; the KV cache is made for that many, more wait.
            model_parallel_size: ranks that share the model; None: all that torchrun started.
            seed: of the random numbers that sampling draws.
            mode: "reference" gives one prompt alone exactly Meta's numbers; "fast" may differ in
                the last bits, reuses what earlier prompts left in the cache, and on a CPU
                computes with kernels, which the extra `[fast]` brings, on a GPU in CUDA graphs.
            quantize: "int8" or "int4", on newer GPUs also "fp8": round the matrices while loading;
                mode fast on a CPU or a CUDA GPU. None: not, or as a folder that `convert` has
                quantized.
            kv_cache: "int8": keep keys and values in a quarter of float32's memory; mode fast.
            device: None: this rank's GPU, else MPS, else the CPU.
            dtype: of the weights and the cache; None: bfloat16 on a GPU (half where that is
                missing), the checkpoint's own elsewhere, which for the package's small model
                counts as float32, because every CPU is fast in it.
            rope_factor: of scaled RoPE; None: as published, 32 for Llama 3.2 and 8 for the others.
                Meta's own code computes with 8 always.
            draft: folder or id of a smaller model with the same vocabulary, which proposes tokens
                that this one checks several at a time; mode fast. Greedy texts stay the same, the
                samples of a seed are others of the same distribution.
            lookup: without a draft model, propose what followed the last tokens where they stood
                before; mode fast. No text changes; those that repeat themselves come sooner.

        Raises a LlamaError (a ValueError) that names what does not fit.
        """
        check_proposing(mode, draft is not None, lookup)
        start = time.perf_counter()
        target = parallel.local_device(device)
        parallel.initialize(model_parallel_size, target)
        if ckpt_dir is None:
            ckpt_dir = BUNDLED
            dtype = torch.float32 if dtype is None and target.type == "cpu" else dtype
        with parallel.failing_together(target):
            folder = hub.local_folder(ckpt_dir)
            draft_folder = None if draft is None else hub.local_folder(draft)
        # All ranks look at their memory before the first takes of it.
        with parallel.failing_together(target):
            opened = open_checkpoint(folder, rope_factor)
            tokenizer = _open_tokenizer(tokenizer_path, opened.folder, folder)
            setup = doctor.Setup.make(
                opened, parallel.mp_size(), parallel.local_size(), max_seq_len, max_batch_size,
                target, dtype, mode, quantize, kv_cache,
            )  # fmt: skip
            doctor.require(setup, tokenizer)
            draft_setup = draft_folder and doctor.require_draft(draft_folder, setup, tokenizer)
        with parallel.failing_together(target):
            llama = Llama(
                _load(setup), tokenizer, seed, mode, quantize=setup.quantize, kv_cache=kv_cache,
                draft=_load(draft_setup) if draft_setup else None, lookup=lookup,
            )  # fmt: skip
        llama._is_base = kind_of(opened.folder) == "base"
        if parallel.is_main_rank():
            log.info("Loaded %s in %.2f seconds", ckpt_dir, time.perf_counter() - start)
            if reason := drawback(mode, setup.quantize, target, setup.dtype):
                log.info(reason)
        return llama

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        seed: int = 1,
        mode: Mode = "reference",
        max_batch_size: int | None = None,  # None: the model's
        quantize: Width | None = None,
        kv_cache: CacheWidth | None = None,
        draft: Transformer | None = None,
        lookup: bool = False,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.mode = mode
        self._is_base = False  # and nobody was told that such a model cannot chat
        rows = model.params.max_batch_size if max_batch_size is None else max_batch_size
        weight = model.norm.weight
        is_fast = check_mode(mode, quantize, weight.device, weight.dtype)
        on_gpu = mode == "fast" and weight.device.type == "cuda"

        def network(model: Transformer) -> Transformer | FastTransformer:
            if on_gpu and quantize is not None:
                device_weights.narrow(model, quantize, weight.device)
            return FastTransformer(model, quantize) if is_fast else model

        self.engine = Engine(
            network(model), rows, model.params.max_seq_len, tokenizer, seed,
            cache_dtype=cache_dtype(mode, kv_cache),
            draft=draft and network(draft), lookup=lookup, static=on_gpu,
        )  # fmt: skip
        self._generator = torch.Generator(model.device).manual_seed(seed)
        self._inboxes: dict[Request, deque[Event]] = {}  # of the streams that are open

    @cached_property
    def formatter(self) -> ChatFormat | Llama2ChatFormat:
        return self.tokenizer.chat_format()  # which a vocabulary for text alone may lack

    # ---- generation ---------------------------------------------------------------------------

    def generate(
        self,
        prompt_tokens: Sequence[Sequence[int]],
        max_gen_len: int | None,
        temperature: float = 0.6,
        top_p: float = 0.9,
        logprobs: bool = False,
        echo: bool = False,
        **options: Any,
    ) -> tuple[list[list[int]], list[list[float]] | None]:
        """Continue each prompt until a stop token or `max_gen_len` tokens.

        Args:
            prompt_tokens: the prompts' token ids; each row ends on its own, and those above
                max_batch_size wait for their turn.
            max_gen_len: tokens generated at most, None: as many as the cache has room for; 0 with
                logprobs and echo scores the prompts.
            temperature: 0 takes the likeliest token; above, the logits are divided by it.
            top_p: share of the probability that sampling draws from.
            logprobs: also give the natural logarithm of each token's probability, 0.0 for the
                very first of a prompt, which nothing predicts.
            echo: put the prompt before what was generated.
            options: whatever else `SamplingParams` has: seed, stop, top_k, min_p, penalties, n …

        Returns the tokens of each row, without the stop token, and their logprobs or None; with n
        above 1, a prompt's rows follow each other.
        Raises GenerationError where prompts or options are out of their limits.
        """
        options |= dict(temperature=temperature, top_p=top_p, max_gen_len=max_gen_len)
        options |= dict(prompt_logprobs=True) if echo and logprobs else {}
        params = SamplingParams.of(options)
        requests = self.complete(prompt_tokens, params)
        tokens = [_echoed(echo, r.prompt_tokens, r.tokens) for r in requests]
        scores = [_echoed(echo, r.prompt_logprobs, r.logprobs) for r in requests]
        return tokens, scores if logprobs else None

    @overload
    def text_completion(
        self, prompts: Sequence[str], temperature: float = ..., top_p: float = ...,
        max_gen_len: int | None = ..., logprobs: bool = ..., echo: bool = ...,
        *, stream: Literal[False] = ..., **options: Any,
    ) -> list[CompletionPrediction]: ...  # fmt: skip

    @overload
    def text_completion(
        self, prompts: Sequence[str], temperature: float = ..., top_p: float = ...,
        max_gen_len: int | None = ..., logprobs: bool = ..., echo: bool = ...,
        *, stream: Literal[True], **options: Any,
    ) -> Generator[Event, None, None]: ...  # fmt: skip

    def text_completion(
        self,
        prompts: Sequence[str],
        temperature: float = 0.6,
        top_p: float = 0.9,
        max_gen_len: int | None = None,
        logprobs: bool = False,
        echo: bool = False,
        *,
        stream: bool = False,
        **options: Any,
    ) -> list[CompletionPrediction] | Generator[Event, None, None]:
        """Continue each text. The arguments are those of `generate`; max_gen_len None: until a
        stop token or the end of the cache. stream: give what `stream` gives, of these prompts,
        without an echo."""
        if isinstance(prompts, str):
            raise GenerationError("prompts is one string: give a list of strings")
        if stream and echo:
            raise GenerationError("a stream has no echo: its events are of what is generated")
        prompt_tokens = [self.encode_prompt(text) for text in prompts]
        options |= dict(temperature=temperature, top_p=top_p, max_gen_len=max_gen_len)
        options |= dict(prompt_logprobs=True) if echo and logprobs else {}
        params = SamplingParams.of(options)
        if stream:
            return self._stream(prompt_tokens, params)
        predictions: list[CompletionPrediction] = []
        for request in self.complete(prompt_tokens, params):
            tokens = _echoed(echo, request.prompt_tokens, request.tokens)
            text = self.tokenizer.decode(tokens)  # with an echo, one character may be of both
            n_cut = len(self.tokenizer.decode(request.tokens)) - len(request.text)  # a stop string
            prediction = CompletionPrediction(generation=text[: len(text) - n_cut])
            if logprobs:
                prediction["tokens"] = self.token_texts(tokens)
                prediction["logprobs"] = _echoed(echo, request.prompt_logprobs, request.logprobs)
            predictions.append(prediction)
        return predictions

    def chat_completion(
        self,
        dialogs: Sequence[Dialog],
        temperature: float = 0.6,
        top_p: float = 0.9,
        max_gen_len: int | None = None,
        logprobs: bool = False,
        **options: Any,
    ) -> list[ChatPrediction]:
        """Answer each dialog, in the tokenizer's chat format, with the assistant's next message.
        The arguments are those of `text_completion`."""
        prompt_tokens = [self.encode_dialog(dialog) for dialog in dialogs]
        options |= dict(temperature=temperature, top_p=top_p, max_gen_len=max_gen_len)
        params = SamplingParams.of(options)
        predictions: list[ChatPrediction] = []
        for request in self.complete(prompt_tokens, params):
            message = self.formatter.decode_message(request.tokens, request.stop_token)
            message["content"] = request.text  # which a stop string may have cut
            prediction = ChatPrediction(generation=message)
            if logprobs:
                prediction["tokens"] = self.token_texts(request.tokens)
                prediction["logprobs"] = request.logprobs
            predictions.append(prediction)
        return predictions

    def stream(
        self,
        prompts: str | Sequence[int] | Dialog | Sequence[str | Sequence[int] | Dialog],
        *,
        is_private: bool = False,
        **options: Any,
    ) -> Generator[Event, None, None]:
        """Continue a text, token ids or a dialog, or several of them, and give each token as it
        comes: events with row, token, text, logprob, top_logprobs and finish_reason.

        The texts of a row, joined, are what the calls without a stream return. A stream that is
        closed early cancels its rows. Under torchrun the events come on the first rank of a model;
        the others go through the loop without any, so no call without a stream can come in between.

        Args:
            is_private: leave nothing in the cache that another call could go on from.
            options: those of `SamplingParams`.
        """
        several = prompts if _is_several(prompts) else [prompts]
        prompt_tokens = [self.encode_prompt(prompt) for prompt in several]
        return self._stream(prompt_tokens, SamplingParams.of(options), is_private)

    def score(self, prompts: Sequence[str | Sequence[int]]) -> list[list[float]]:
        """The natural logarithm of each prompt token's probability, 0.0 for a prompt's first.

        Computed in chunks, so that memory does not grow with a prompt's length.
        """
        if isinstance(prompts, str):
            raise GenerationError("prompts is one string: give a list of strings")
        prompt_tokens = [self.encode_prompt(prompt) for prompt in prompts]
        params = SamplingParams(max_gen_len=0, prompt_logprobs=True)
        requests = self.complete(prompt_tokens, params, is_exact=False)
        return [request.prompt_logprobs for request in requests]

    def encode_prompt(self, prompt: Any) -> list[int]:
        """Token ids of a text, after a <|begin_of_text|>, of a dialog, or as they are."""
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt, bos=True, eos=False)
        if isinstance(prompt, Sequence) and prompt and isinstance(prompt[0], Mapping):
            return self.encode_dialog(prompt)
        return prompt

    def encode_dialog(self, dialog: Dialog) -> list[int]:
        """Token ids of a dialog and the header of the answer to come, in the chat format."""
        if self._is_base:
            self._is_base = False
            if parallel.is_main_rank():
                log.warning(doctor.CHAT["base"])
        return self.formatter.encode_dialog_prompt(dialog)

    def token_texts(self, tokens: list[int]) -> list[str]:
        """The text that each token completes; joined they are the whole text."""
        decoder = TextDecoder(self.tokenizer)
        texts = [decoder.push(token) for token in tokens]
        if texts:
            texts[-1] += decoder.flush()
        return texts

    # ---- the engine's callers -----------------------------------------------------------------

    def _submit(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        is_exact: bool,
        is_private: bool = False,
    ) -> list[Request]:
        """A request for each row; one row alone draws from the generator that `build` seeded."""
        if not prompts:
            raise GenerationError("no prompts: give at least one")
        is_alone = len(prompts) * params.n == 1
        generator = self._generator if is_alone and params.seed is None else None
        requests: list[Request] = []
        try:
            for prompt in prompts:
                for one in params.samples():
                    row = len(requests)
                    requests.append(
                        self.engine.submit(prompt, one, row, generator, is_private, is_exact)
                    )
        except GenerationError:
            for request in requests:
                self.engine.cancel(request)
            raise
        return requests

    def complete(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        is_exact: bool | None = None,
    ) -> list[Request]:
        """Run a request for each row to its end and return them, the same on every rank.

        is_exact: see `Engine.submit`; None: as the mode says.
        """
        if is_exact is None:
            is_exact = self._is_exact(prompts, params)
        if self._inboxes and parallel.mp_size() > 1:  # the other ranks still follow the stream
            raise GenerationError("a stream is open: with several ranks, end or close it first")
        requests = self._submit(prompts, params, is_exact)
        with self.lead(requests) as is_first:
            while is_first and any(request.finish_reason is None for request in requests):
                self._step()
        for request in requests:
            request.share(self.model.device)
            if request.error is not None:
                raise request.error
        return requests

    def _stream(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams, is_private: bool = False
    ) -> Generator[Event, None, None]:
        for row, prompt in enumerate(prompts):
            self.engine.check(prompt, params, row)  # now, not with the first event
        return self._events(prompts, params, is_private)

    def _events(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams, is_private: bool
    ) -> Generator[Event, None, None]:
        """Submit when the first event is asked for, and cancel what is left at the end."""
        requests = self._submit(prompts, params, self._is_exact(prompts, params), is_private)
        inbox: deque[Event] = deque()
        self._inboxes |= dict.fromkeys(requests, inbox)
        try:
            with self.lead(requests) as is_first:
                open_rows = len(requests) if is_first else 0
                while open_rows:
                    if not inbox:
                        self._step()
                        continue
                    event = inbox.popleft()
                    if event.request.error is not None:
                        raise event.request.error
                    open_rows -= event.finish_reason is not None
                    yield event
        finally:
            for request in requests:
                del self._inboxes[request]

    def _is_exact(self, prompts: Sequence[Sequence[int]], params: SamplingParams) -> bool:
        """Whether Meta's own forwards are promised."""
        return self.mode == "reference" and len(prompts) * params.n == 1

    def _step(self) -> None:
        for event in self.engine.step():
            if event.request in self._inboxes:
                self._inboxes[event.request].append(event)

    @contextlib.contextmanager
    def lead(self, requests: list[Request]) -> Iterator[bool]:
        """True on the rank that steps; the others have followed it to its end, and it lets them go
        whatever happens. What is not done then is cancelled."""
        if parallel.mp_rank() > 0:
            self.engine.follow()
            yield False
            return
        failed = True
        try:
            yield True
            failed = False
        except GeneratorExit:  # a stream that is closed early is no failure
            failed = False
            raise
        finally:
            for request in requests:
                self.engine.cancel(request)
            self.engine.dismiss(failed)


def _echoed(echo: bool, of_prompt: list[Any], generated: list[Any]) -> list[Any]:
    return of_prompt + generated if echo else generated


def _is_several(prompts: Any) -> bool:
    """Whether it is a list of prompts: of texts, of lists of ids, or of dialogs."""
    is_list = isinstance(prompts, Sequence) and not isinstance(prompts, str) and len(prompts) > 0
    return is_list and isinstance(prompts[0], Sequence)


def _open_tokenizer(path: str | Path | None, folder: Path, ckpt_dir: Path) -> Tokenizer:
    tokenizer = Tokenizer(path or find_tokenizer(folder, ckpt_dir))
    if stop_tokens := hugging_face.read_stop_tokens(folder):
        tokenizer.stop_tokens = stop_tokens
    return tokenizer


def _load(setup: doctor.Setup) -> Transformer:
    """This rank's part of the model, on its device."""
    args = setup.opened.args
    # More ranks than key/value heads: each head is there more than once.
    n_kv_heads = max(args.local_kv_heads(1), setup.mp_size)
    with torch.device("meta"):
        model = Transformer(replace(args, n_kv_heads=n_kv_heads))
    if setup.quantize is None or setup.device.type != "cuda":
        load_weights(model, setup.opened, setup.device, setup.dtype, setup.quantize)
        return model
    # Rounded one by one, the matrices need never all be on the GPU as they were.
    saved = setup.opened.quantization
    load_weights(model, setup.opened, torch.device("cpu"), setup.dtype, saved)
    device_weights.narrow(model, setup.quantize, setup.device)
    return model.to(setup.device)
