"""`Llama`: a model with its tokenizer, built from a checkpoint. It completes texts and chats."""

import logging
import time
from collections.abc import Generator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict, overload

import torch

from llama import parallel
from llama.chat_format import ChatFormat, Dialog, Llama2ChatFormat, Message
from llama.checkpoints import doctor
from llama.checkpoints.build import load_model, open_model
from llama.checkpoints.folder import BUNDLED
from llama.checkpoints.verify import kind_of
from llama.engine.build import make_engine
from llama.engine.request import Event
from llama.engine.runner import Runner
from llama.errors import GenerationError
from llama.fast.mode import CacheWidth, Mode, check_proposing, drawback
from llama.fast.quantize import Width
from llama.model import Transformer
from llama.sampling import SamplingParams, sample_top_p
from llama.tokenizer import Tokenizer

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

    Attributes: `model` (Transformer), `tokenizer` (Tokenizer), `formatter` (its chat format),
    `engine` (Engine, the token loop), `runner` (Runner, which steps the engine).
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
        """Load a checkpoint on any number of ranks that its shape can be split over.

        Args:
            ckpt_dir: a folder with `params.json` and `consolidated.NN.pth`, with `config.json` and
                `.safetensors`, or with Meta's files in `original/`; or an id on the Hugging Face
                Hub, `owner/name@revision`. None: the bundled model.
            tokenizer_path: the tokenizer's file. None: `tokenizer.model` in the folder, else
                `tokenizer.json`.
            max_seq_len: tokens of prompt and answer together, at most the model's context. None:
                2048, or the context where that is smaller.
            max_batch_size: rows of the KV cache. More prompts wait for a free row.
            model_parallel_size: ranks that share the model. None: all that torchrun started.
            seed: of the random numbers that sampling draws.
            mode: "reference": a prompt that runs alone gets exactly Meta's numbers. "fast": the
                last bits may differ; common prefixes of prompts are reused; a CPU computes with
                compiled kernels (extra `[fast]`), a GPU with CUDA graphs.
            quantize: "int8", "int4" or, on newer GPUs, "fp8": round the matrices while loading;
                mode fast, on a CPU or a CUDA GPU. None: as the folder is saved.
            kv_cache: "int8": keys and values in a quarter of float32's memory; mode fast.
            device: None: this rank's GPU, else MPS, else the CPU.
            dtype: of weights and cache. None: bfloat16 on a GPU (float16 where that is missing);
                elsewhere the checkpoint's own, and float32 for the bundled model.
            rope_factor: of scaled RoPE. None: as published, 32 for Llama 3.2 and 8 for the others.
                Meta's code always computes with 8.
            draft: folder or id of a smaller model with the same vocabulary, which proposes tokens;
                mode fast. Greedy texts do not change. Samples keep their distribution, but a seed
                gives other ones.
            lookup: propose the tokens that followed the last ones earlier in the text; mode fast.
                No text changes.

        Raises a LlamaError (a ValueError) that names what does not fit.
        """
        check_proposing(mode, draft is not None, lookup)
        start = time.perf_counter()
        opened = open_model(
            ckpt_dir, tokenizer_path, max_seq_len, max_batch_size, model_parallel_size,
            mode, quantize, kv_cache, device, dtype, rope_factor, draft,
        )  # fmt: skip
        setup, tokenizer, draft_setup = opened
        assert tokenizer is not None
        with parallel.failing_together(setup.device):
            llama = Llama(
                load_model(setup), tokenizer, seed, mode, quantize=setup.quantize,
                kv_cache=kv_cache, draft=load_model(draft_setup) if draft_setup else None,
                lookup=lookup,
            )  # fmt: skip
        llama._is_base = kind_of(setup.opened.folder) == "base"
        if parallel.is_main_rank():
            log.info("Loaded %s in %.2f seconds", ckpt_dir or BUNDLED, time.perf_counter() - start)
            if reason := drawback(mode, setup.quantize, setup.device, setup.dtype):
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
        self._is_base = False  # a base model: the first dialog logs a warning
        self.engine = make_engine(
            model, tokenizer, seed, mode, max_batch_size, quantize, kv_cache, draft, lookup
        )
        self.runner = Runner(self.engine, seed, is_reference=mode == "reference")

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
            prompt_tokens: the prompts' token ids. Prompts above max_batch_size wait.
            max_gen_len: generated tokens at most. None: as many as the KV cache has room for. 0
                with logprobs and echo scores the prompts.
            temperature: divides the logits; 0 takes the likeliest token.
            top_p: draw from the likeliest tokens with this probability together.
            logprobs: also return the natural logarithm of each token's probability. It is 0.0 for
                a prompt's first token.
            echo: put the prompt before the generated tokens.
            options: any other field of `SamplingParams`: seed, stop, top_k, min_p, penalties, n.

        Returns the tokens of each row, without the stop token, and their logprobs or None. With n
        above 1, the rows of a prompt follow each other.
        Raises GenerationError where prompts or options are out of their limits.
        """
        options |= dict(temperature=temperature, top_p=top_p, max_gen_len=max_gen_len)
        options |= dict(prompt_logprobs=True) if echo and logprobs else {}
        params = SamplingParams.of(options)
        requests = self.runner.complete(prompt_tokens, params)
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
        """Continue each text. The arguments are those of `generate`. stream: return the events
        that the method `stream` gives, without an echo."""
        if stream and echo:
            raise GenerationError("a stream has no echo: its events are of what is generated")
        prompt_tokens = self._encode_all(prompts)
        options |= dict(temperature=temperature, top_p=top_p, max_gen_len=max_gen_len)
        options |= dict(prompt_logprobs=True) if echo and logprobs else {}
        params = SamplingParams.of(options)
        if stream:
            return self.runner.stream(prompt_tokens, params)
        predictions: list[CompletionPrediction] = []
        for request in self.runner.complete(prompt_tokens, params):
            tokens = _echoed(echo, request.prompt_tokens, request.tokens)
            # Decoded together, because a character may lie on both sides of the prompt's end.
            text = self.tokenizer.decode(tokens)
            n_cut = len(self.tokenizer.decode(request.tokens)) - len(request.text)  # a stop string
            prediction = CompletionPrediction(generation=text[: len(text) - n_cut])
            if logprobs:
                prediction["tokens"] = self.tokenizer.token_texts(tokens)
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
        """Answer each dialog with the assistant's next message, in the tokenizer's chat format.
        The arguments are those of `text_completion`."""
        prompt_tokens = [self.encode_dialog(dialog) for dialog in dialogs]
        options |= dict(temperature=temperature, top_p=top_p, max_gen_len=max_gen_len)
        params = SamplingParams.of(options)
        predictions: list[ChatPrediction] = []
        for request in self.runner.complete(prompt_tokens, params):
            message = self.formatter.decode_message(request.tokens, request.stop_token)
            message["content"] = request.text  # which a stop string may have cut
            prediction = ChatPrediction(generation=message)
            if logprobs:
                prediction["tokens"] = self.tokenizer.token_texts(request.tokens)
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
        """Continue a text, token ids or a dialog, or a list of them. Yields an event a token.

        An event has row, token, text, logprob, top_logprobs and finish_reason. The texts of a row,
        joined, are what the calls without a stream return. Closing the stream cancels its rows.
        Under torchrun the first rank of a model gets the events. The other ranks get none, and take
        part until the stream ends, so no other call may come in between.

        Args:
            is_private: no other call reuses what this one leaves in the KV cache.
            options: those of `SamplingParams`.
        """
        several = prompts if _is_several(prompts) else [prompts]
        prompt_tokens = [self.encode_prompt(prompt) for prompt in several]
        return self.runner.stream(prompt_tokens, SamplingParams.of(options), is_private)

    def score(self, prompts: Sequence[str | Sequence[int]]) -> list[list[float]]:
        """The natural logarithm of each prompt token's probability, 0.0 for a prompt's first.

        Computed in chunks, so that memory does not grow with a prompt's length.
        """
        prompt_tokens = self._encode_all(prompts)
        params = SamplingParams(max_gen_len=0, prompt_logprobs=True)
        requests = self.runner.complete(prompt_tokens, params, is_exact=False)
        return [request.prompt_logprobs for request in requests]

    def encode_prompt(self, prompt: Any) -> list[int]:
        """Token ids of a text, after a <|begin_of_text|>, of a dialog, or as they are."""
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt, bos=True, eos=False)
        if isinstance(prompt, Sequence) and prompt and isinstance(prompt[0], Mapping):
            return self.encode_dialog(prompt)
        return prompt

    def _encode_all(self, prompts: Sequence[Any]) -> list[list[int]]:
        if isinstance(prompts, str):
            raise GenerationError("prompts is one string: give a list of strings")
        return [self.encode_prompt(prompt) for prompt in prompts]

    def encode_dialog(self, dialog: Dialog) -> list[int]:
        """Token ids of a dialog and the header of the answer to come, in the chat format."""
        if self._is_base:
            self._is_base = False
            if parallel.is_main_rank():
                log.warning(doctor.CHAT["base"])
        return self.formatter.encode_dialog_prompt(dialog)


def _echoed(echo: bool, prompt: list[Any], generated: list[Any]) -> list[Any]:
    return prompt + generated if echo else generated


def _is_several(prompts: Any) -> bool:
    """Whether it is a list of prompts: of texts, of lists of ids, or of dialogs."""
    is_list = isinstance(prompts, Sequence) and not isinstance(prompts, str) and len(prompts) > 0
    return is_list and isinstance(prompts[0], Sequence)
