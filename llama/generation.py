"""`Llama`: a model with its tokenizer, built from a checkpoint. It completes texts and chats.

The file is longer than others because it holds every public call, with its signature and docstring.
"""

import logging
import time
from collections.abc import Generator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, overload

import torch

from llama import parallel
from llama.adapters import RowAdapters

from llama.chat_format import (  # isort: skip
    B_INST, B_SYS, E_INST, E_SYS, SPECIAL_TAGS, UNSAFE_ERROR,
    Dialog, Message, Role,
)  # fmt: skip
from llama.chat_forms import AnyFormat, FormatName
from llama.checkpoints.build import load_adapters, load_model, open_model
from llama.checkpoints.chat_form import chat_warning
from llama.checkpoints.doctor import naming_sizes
from llama.checkpoints.folder import BUNDLED
from llama.checkpoints.generation_config import read_sampling
from llama.engine.build import make_engine
from llama.engine.grammar import call_processor
from llama.engine.request import Event
from llama.engine.runner import Runner
from llama.errors import DialogError, GenerationError
from llama.fast.mode import CacheWidth, Mode, check_invariant, check_proposing, drawback
from llama.fast.quantize import Width
from llama.infilling import InfillingFormat, InfillingPrediction, infilling
from llama.model import Transformer
from llama.predictions import (
    ChatPrediction,
    CompletionPrediction,
    answer,
    completion,
    echoed,
)  # fmt: skip
from llama.prompts import as_ids, check_is_list, is_dialog, is_prompt_list
from llama.sampling import LogitsProcessor, SamplingParams, sample_top_p
from llama.tokenizer import Tokenizer
from llama.tools import Tool, ToolChoice, check_choice, check_tools

# Every public name of Meta's `generation.py`, of Llama 2 and 3.
__all__ = [
    "B_INST", "B_SYS", "E_INST", "E_SYS", "SPECIAL_TAGS", "UNSAFE_ERROR",
    "ChatPrediction", "CompletionPrediction", "Dialog", "Llama", "Message", "Role", "sample_top_p",
]  # fmt: skip

log = logging.getLogger("llama")


class Llama:
    """Text completion and chat on one model. `Llama.build` loads one from a checkpoint.

    A Llama may be called from any thread. Calls that come together run together.

    Args:
        model: the transformer, on its device.
        tokenizer: its tokenizer.
        max_batch_size: rows of the KV cache. None: max_batch_size of the model's ModelArgs.
        seed, mode, quantize, kv_cache, lookup, invariant: as for `build`.
        draft: a smaller model that proposes tokens.
        adapters: LoRA changes of the model, which calls may name.

    Attributes:
        model: the `Transformer`.
        tokenizer: the `Tokenizer`.
        engine: the `Engine`, the token loop.
        runner: steps the engine for all callers.
        suggested_sampling: the temperature and top_p in the folder's generation_config.json.

    Raises a LlamaError (a ValueError) that names what does not fit.
    """

    @staticmethod
    @torch.inference_mode(False)  # weights made in inference mode could never take gradients
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
        invariant: bool = False,
        format: FormatName | None = None,
        adapter: str | Path | None = None,
        adapters: Mapping[str, str | Path] | None = None,
    ) -> "Llama":
        """Load a checkpoint on any number of ranks that its shape can be split over.

        Args:
            ckpt_dir: a folder with `params.json` and `consolidated.NN.pth`, with `config.json` and
                `.safetensors`, or with Meta's files in `original/`; or a GGUF file (extra
                `[gguf]`); or an id on the Hugging Face Hub, `owner/name@revision`. None: the
                bundled model.
            tokenizer_path: the tokenizer's file. None: the GGUF file, or `tokenizer.model` in the
                folder, else `tokenizer.json`.
            max_seq_len: tokens of prompt and answer together, at most the model's context. None:
                2048, or the context where that is smaller.
            max_batch_size: rows of the KV cache. More prompts wait for a free row.
            model_parallel_size: ranks that share the model. None: all that torchrun started.
            seed: seed of the random numbers for sampling.
            mode: "reference": a prompt that runs alone gets exactly Meta's numbers. "fast": the
                last bits may differ; common prefixes of prompts are reused; a CPU computes with
                compiled kernels (extra `[fast]`), a GPU with CUDA graphs.
            quantize: quantize the matrices to "int8", "int4" or, on newer GPUs, "fp8" while
                loading. Mode fast only, on a CPU or a CUDA GPU. None: as the folder is saved.
            kv_cache: "int8": store keys and values in about a quarter of float32's memory. Mode
                fast only.
            device: where the model runs. None: this rank's GPU, else MPS, else the CPU.
            dtype: dtype of weights and KV cache. None: on a CUDA GPU bfloat16, or float16 where the
                GPU has no bfloat16; elsewhere the checkpoint's dtype, but float32 for the bundled
                model on a CPU, and bfloat16 for a quantized GGUF file.
            rope_factor: factor of scaled RoPE. None: the published factor, 32 for Llama 3.2 and 8
                for the others. Meta's code always uses 8.
            draft: folder or id of a smaller model with the same vocabulary, which proposes tokens.
                Mode fast only. Greedy output does not change. Sampled output keeps its
                distribution, but a seed gives a different sample than without a draft.
            lookup: find an earlier occurrence of the last tokens in the text, and propose the
                tokens that followed there. Mode fast only. The output does not change on a CPU,
                or on a GPU with `invariant`.
            invariant: a token's logits are the same, to the last bit, whatever is computed beside
                it. Mode fast only. On a CPU that always holds; on a GPU prompts take longer.
            format: chat format, "llama3", "llama2", "chatml" or "zephyr". None: the format of the
                folder's chat template, else the one that models with this kind of tokenizer use.
            adapter: folder or id of a LoRA adapter in PEFT's format, which was trained on this
                model. It is merged into the weights while they are loaded.
            adapters: folders or ids of LoRA adapters, by names of your choice. They stay beside the
                weights: a call may name one by its option `adapter`, and runs in one batch with
                other calls. On a GPU in mode reference only.

        Raises a LlamaError (a ValueError) that names what does not fit.
        """
        check_proposing(mode, draft is not None, lookup)
        check_invariant(mode, invariant)
        start = time.perf_counter()
        opened = open_model(
            ckpt_dir, tokenizer_path, max_seq_len, max_batch_size, model_parallel_size,
            mode, quantize, kv_cache, device, dtype, rope_factor, draft, format, adapter,
        )  # fmt: skip
        setup, tokenizer, draft_setup = opened
        assert tokenizer is not None
        with parallel.failing_together(setup.device), naming_sizes(setup):
            beside = load_adapters(setup, adapters)
            llama = Llama(
                load_model(setup), tokenizer, seed, mode, quantize=setup.quantize,
                kv_cache=kv_cache, draft=load_model(draft_setup) if draft_setup else None,
                lookup=lookup, invariant=invariant, adapters=beside,
            )  # fmt: skip
        setups = [setup] if draft_setup is None else [setup, draft_setup]
        mapped = [each.opened.files for each in setups if each.weight_bytes()[1] > 0]
        llama.engine.worker.files = mapped
        llama.suggested_sampling = read_sampling(setup.opened.folder)
        llama._chat_warning = chat_warning(setup.opened.folder, format)
        if parallel.is_main_rank():
            log.info("Loaded %s in %.2f seconds", ckpt_dir or BUNDLED, time.perf_counter() - start)
            has_biases = llama.model.params.has_biases
            if reason := drawback(mode, setup.quantize, setup.device, setup.dtype, has_biases):
                log.info(reason)
        return llama

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        seed: int = 1,
        mode: Mode = "reference",
        max_batch_size: int | None = None,
        quantize: Width | None = None,
        kv_cache: CacheWidth | None = None,
        draft: Transformer | None = None,
        lookup: bool = False,
        invariant: bool = False,
        adapters: RowAdapters | None = None,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.mode = mode
        self.suggested_sampling: dict[str, float] = {}
        self._chat_warning: str | None = None  # logged with the first dialog
        self.engine = make_engine(
            model, tokenizer, seed, mode, max_batch_size, quantize, kv_cache, draft, lookup,
            invariant, adapters,
        )  # fmt: skip
        self.runner = Runner(self.engine, seed, is_reference=mode == "reference")

    def __reduce__(self) -> Any:  # copy and pickle call it
        raise TypeError(
            "a Llama can be neither copied nor pickled, because its engine holds locks: copy "
            "llama.model, and make another one by Llama(model, tokenizer)"
        )

    @cached_property
    def formatter(self) -> AnyFormat:
        """The tokenizer's chat format. Raises DialogError if the vocabulary lacks its markers."""
        return self.tokenizer.chat_format()

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
            prompt_tokens: token ids of each prompt: lists, or tensors or arrays of one dimension,
                or one tensor or array of two. Prompts beyond max_batch_size wait for a row.
            max_gen_len: most tokens to generate. None: as many as the KV cache has room for. 0,
                together with logprobs and echo: score the prompts and generate nothing.
            temperature: divides the logits; 0 takes the likeliest token.
            top_p: draw from the smallest set of likeliest tokens with a total probability above it.
            logprobs: also return the natural logarithm of each token's probability. It is 0.0 for
                a prompt's first token.
            echo: put the prompt before the generated tokens.
            options: any other field of `SamplingParams`: seed, stop, top_k, min_p, penalties, n.

        Returns:
            The tokens of each row, without the stop token, and their logprobs or None. With n above
            1, each prompt has n consecutive rows.

        Raises:
            GenerationError: prompts or options are out of their limits.
        """
        options |= dict(temperature=temperature, top_p=top_p, max_gen_len=max_gen_len)
        options |= dict(prompt_logprobs=True) if echo and logprobs else {}
        params = SamplingParams.of(options)
        prompts = as_ids(prompt_tokens)
        check_is_list(prompts)
        requests = self.runner.complete(prompts, params)
        tokens = [echoed(echo, r.prompt_tokens, r.tokens) for r in requests]
        scores = [echoed(echo, r.prompt_logprobs, r.logprobs) for r in requests]
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
        """Continue each text.

        Args:
            prompts: the texts. bos is put before each.
            temperature, top_p, max_gen_len, echo, options: as for `generate`.
            logprobs: also report the text and the logprob of each token.
            stream: return the events of `Llama.stream`; not with echo.

        Returns:
            A prediction for each prompt, or with n above 1 for each of its n samples; or events.

        Raises:
            GenerationError: prompts or options are out of their limits.
        """
        if stream and echo:
            raise GenerationError("a stream has no echo: its events are generated tokens only")
        prompt_tokens = self._encode_all(prompts)
        options |= dict(temperature=temperature, top_p=top_p, max_gen_len=max_gen_len)
        options |= dict(prompt_logprobs=True) if echo and logprobs else {}
        params = SamplingParams.of(options)
        if stream:
            return self.runner.stream(
                prompt_tokens, params, is_continued=[prompt != "" for prompt in prompts]
            )
        return [
            completion(request, self.tokenizer, echo, logprobs)
            for request in self.runner.complete(prompt_tokens, params)
        ]

    def chat_completion(
        self,
        dialogs: Sequence[Dialog],
        temperature: float = 0.6,
        top_p: float = 0.9,
        max_gen_len: int | None = None,
        logprobs: bool = False,
        *,
        continue_final_message: bool = False,
        tools: Sequence[Tool] = (),
        tool_choice: ToolChoice = "auto",
        date: str | None = None,
        **options: Any,
    ) -> list[ChatPrediction]:
        """Answer each dialog with the assistant's next message, in the tokenizer's chat format.

        Args:
            dialogs: a list of messages each, the last one from the user or, with a tool's output,
                from ipython.
            temperature, top_p, max_gen_len, options: as for `generate`.
            logprobs: also report the text and the logprob of each token.
            continue_final_message: the last message is the beginning of the assistant's answer. The
                result's content is that beginning and its continuation; tokens and logprobs are of
                the continuation only.
            tools: functions that the model may call, as {"type": "function", "function": {"name":
                …, "description": …, "parameters": a JSON schema}}, and built-in tools of Llama 3.1,
                as {"type": "brave_search"}. An answer that calls a tool has `tool_calls` and no
                content.
            tool_choice: "auto"; "none": tools are left out; "required": the answer must be a call;
                or the name of the tool that it must call (extra `[json]`).
            date: today's date as "26 Jul 2024", for the system message. If it is given, the prompt
                is the one that the chat template in Meta's Hugging Face folders produces.

        Returns:
            A prediction for each dialog, or with n above 1 for each of its n samples.

        Raises:
            DialogError: a dialog or a tool is malformed, or the chat format is not known.
            GenerationError: dialogs or options are out of their limits.
        """
        tools = self._offered(tools, tool_choice, continue_final_message)
        check_is_list(dialogs)
        prompt_tokens = [
            self.encode_dialog(dialog, continue_final_message, tools, date) for dialog in dialogs
        ]
        options |= self._forced(tools, tool_choice, prompt_tokens)
        options |= dict(temperature=temperature, top_p=top_p, max_gen_len=max_gen_len)
        params = SamplingParams.of(options)
        requests = self.runner.complete(prompt_tokens, params, is_continued=continue_final_message)
        beginnings = [
            dialog[-1]["content"] if continue_final_message else ""
            for dialog in dialogs
            for _ in range(params.n)
        ]
        return [
            answer(request, self.formatter, beginning, logprobs, tools)
            for request, beginning in zip(requests, beginnings, strict=True)
        ]

    def infilling(
        self,
        prefixes: Sequence[str],
        suffixes: Sequence[str],
        temperature: float = 0.6,
        top_p: float = 0.9,
        max_gen_len: int | None = None,
        logprobs: bool = False,
        suffix_first: bool = False,
        **options: Any,
    ) -> list[InfillingPrediction]:
        """Generate the text between each prefix and its suffix, with Code Llama.

        Args:
            prefixes, suffixes: texts, as many of each.
            temperature, top_p, max_gen_len, options: as for `generate`.
            logprobs: also report the text and the logprob of each token.
            suffix_first: the prompt has the suffix before the prefix.

        Raises:
            GenerationError: the vocabulary lacks the infilling tokens, a text contains one, or
                texts or options are out of their limits.
        """
        if isinstance(prefixes, str) or isinstance(suffixes, str):
            raise GenerationError("prefixes and suffixes must be lists of strings, not strings")
        if len(prefixes) != len(suffixes):
            raise GenerationError(f"{len(prefixes)} prefixes, but {len(suffixes)} suffixes")
        prompt_format = InfillingFormat(self.tokenizer)
        pairs = list(zip(prefixes, suffixes, strict=True))
        prompt_tokens = [prompt_format.encode_prompt(*pair, suffix_first) for pair in pairs]
        options |= dict(temperature=temperature, top_p=top_p, max_gen_len=max_gen_len)
        params = SamplingParams.of({"stop_tokens": prompt_format.stop_tokens} | options)
        requests = self.runner.complete(prompt_tokens, params, is_continued=True)
        return [
            infilling(request, self.tokenizer, *pairs[request.row // params.n], logprobs)
            for request in requests
        ]

    text_infilling = infilling  # its name in Meta's codellama

    def stream(
        self,
        prompts: str | Sequence[int] | Dialog | Sequence[str | Sequence[int] | Dialog],
        *,
        is_private: bool = False,
        continue_final_message: bool = False,
        tools: Sequence[Tool] = (),
        tool_choice: ToolChoice = "auto",
        date: str | None = None,
        **options: Any,
    ) -> Generator[Event, None, None]:
        """Continue a text, token ids or a dialog, or a list of them. Yields one `Event` per token.

        The joined texts of a row can be appended directly to a text prompt. With a SentencePiece
        tokenizer they therefore keep the leading space, which `text_completion` drops. Closing the
        stream cancels its requests.
        Under torchrun only the first rank of a model gets events. The other ranks must iterate over
        the stream too: they compute until it ends. No other call may start before that.

        Args:
            prompts: a text, token ids or a dialog, or a list of them.
            is_private: no KV cache prefix is reused, neither by this call nor from it.
            continue_final_message: a dialog ends with the beginning of the assistant's answer, and
                the events continue it.
            tools, tool_choice, date: see `chat_completion`. A `tool_calls.CallReader` reads the
                calls from the events' texts.
            options: the fields of `SamplingParams`.

        Raises:
            GenerationError, DialogError: prompts or options are out of their limits. It is raised
                by the call itself, before the first event.
        """
        prompts = as_ids(prompts)
        prompt_list = prompts if is_prompt_list(prompts) else [prompts]
        tools = self._offered(tools, tool_choice, continue_final_message)
        prompt_tokens = [
            self.encode_prompt(p, continue_final_message, tools, date) for p in prompt_list
        ]
        options |= self._forced(tools, tool_choice, prompt_tokens)
        params = SamplingParams.of(options)
        is_continued = [
            prompt != "" and (continue_final_message or not is_dialog(prompt))
            for prompt in prompt_list
        ]
        return self.runner.stream(prompt_tokens, params, is_private, is_continued)

    def score(self, prompts: Sequence[str | Sequence[int]]) -> list[list[float]]:
        """The natural logarithm of each prompt token's probability; 0.0 for a prompt's first token.

        A prompt is computed in prefill chunks, so that memory does not grow with its length.

        Args:
            prompts: texts, before which bos is put, or token ids.

        Raises:
            GenerationError: a prompt is empty or longer than max_seq_len.
        """
        prompt_tokens = self._encode_all(prompts)
        params = SamplingParams(max_gen_len=0, prompt_logprobs=True)
        requests = self.runner.complete(prompt_tokens, params, is_exact=False)
        return [request.prompt_logprobs for request in requests]

    def encode_prompt(
        self,
        prompt: Any,
        continue_final_message: bool = False,
        tools: Sequence[Tool] = (),
        date: str | None = None,
    ) -> list[int]:
        """Token ids of a prompt.

        Args:
            prompt: a text, before which bos is put; a dialog; or token ids, which are returned
                unchanged.
            continue_final_message, tools, date: for a dialog only; see `chat_completion`.

        Raises:
            GenerationError: one of these is given without a dialog.
            DialogError: the dialog or a tool is malformed.
        """
        if is_dialog(prompt):
            return self.encode_dialog(prompt, continue_final_message, tools, date)
        for name, value in {"continue_final_message": continue_final_message, "tools": tools,
                            "date": date}.items():  # fmt: skip
            if value:
                raise GenerationError(f"{name} needs a dialog, not a text or token ids")
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt, bos=True, eos=False)
        return as_ids(prompt)

    def _encode_all(self, prompts: Sequence[Any]) -> list[list[int]]:
        check_is_list(prompts)
        return [self.encode_prompt(prompt) for prompt in prompts]

    def encode_dialog(
        self,
        dialog: Dialog,
        continue_final_message: bool = False,
        tools: Sequence[Tool] = (),
        date: str | None = None,
    ) -> list[int]:
        """Token ids of a dialog and of the next answer's header, in the tokenizer's chat format.

        Args:
            dialog: its messages.
            continue_final_message, tools, date: see `chat_completion`.

        Raises:
            DialogError: the dialog or a tool is malformed, or the chat format is not known.
        """
        if self._chat_warning is not None:
            if parallel.is_main_rank():
                log.warning(self._chat_warning)
            self._chat_warning = None
        return self.formatter.encode_dialog_prompt(dialog, continue_final_message, tools, date)

    def _offered(
        self, tools: Sequence[Tool], tool_choice: ToolChoice, continue_final_message: bool
    ) -> Sequence[Tool]:
        """The tools that the prompt describes: no tools if tool_choice is "none"."""
        check_tools(tools)
        check_choice(tools, tool_choice)
        offered = () if tool_choice == "none" else tools
        if offered and continue_final_message:
            raise DialogError("continue_final_message cannot be combined with tools")
        return offered

    def _forced(
        self, tools: Sequence[Tool], tool_choice: ToolChoice, prompts: Sequence[list[int]]
    ) -> dict[str, LogitsProcessor]:
        """The logits_processor option that forces each answer to be a tool call. Empty if
        tool_choice does not force one."""
        processor = call_processor(self.tokenizer, tools, tool_choice, prompts)
        return {} if processor is None else {"logits_processor": processor}
