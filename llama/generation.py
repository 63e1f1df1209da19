"""`Llama`: a model with its tokenizer, built from a checkpoint folder, that completes and chats."""

import logging
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NotRequired, SupportsIndex, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor

from llama import checkpoint, hugging_face, parallel, sampling
from llama.chat_format import Dialog, Message
from llama.errors import CheckpointError, ConfigError, GenerationError
from llama.model import Transformer
from llama.sampling import sample_top_p
from llama.tokenizer import TextDecoder, Tokenizer

__all__ = ["ChatPrediction", "CompletionPrediction", "Dialog", "Llama", "Message", "sample_top_p"]

log = logging.getLogger("llama")

# Marks the places of a batch that hold no token yet. The model never sees it.
EMPTY = -1


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


@dataclass
class _Row:
    """What was generated for one prompt."""

    tokens: list[int]
    logprobs: list[float]
    stop_token: int | None  # the one that ended it, which is not among the tokens


class Llama:
    """Text completion and chat on one model.

    Attributes: `model` (Transformer), `tokenizer` (Tokenizer), `formatter` (its chat format).
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
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        rope_factor: float | None = None,
    ) -> "Llama":
        """Load a checkpoint folder, Meta's or Hugging Face's, on any number of ranks that divides.

        Args:
            ckpt_dir: folder with `params.json` and `consolidated.NN.pth`, with `config.json` and
                `.safetensors`, or with an `original/` folder that holds the former; None: the
                small model that comes with the package.
            tokenizer_path: the tokenizer's file; None: `tokenizer.model` in the folder.
            max_seq_len: tokens of prompt and answer together, at most the model's context; None:
                2048, or the context where that is smaller.
            max_batch_size: prompts at a time; the KV cache is made for that many.
            model_parallel_size: ranks that share the model; None: all that torchrun started.
            seed: of the random numbers that sampling draws.
            device: None: this rank's GPU, else MPS, else the CPU.
            dtype: of the weights and the cache; None: bfloat16 on a GPU (half where that is
                missing), the checkpoint's own elsewhere, which for the package's small model
                counts as float32, because every CPU is fast in it.
            rope_factor: of scaled RoPE; None: as published, 32 for Llama 3.2 and 8 for the others.
                Meta's own code computes with 8 always.

        Raises a LlamaError (a ValueError) that names what does not fit.
        """
        start = time.perf_counter()
        target = parallel.local_device(device)
        parallel.initialize(model_parallel_size, target)
        if ckpt_dir is None:
            ckpt_dir = checkpoint.BUNDLED
            dtype = torch.float32 if dtype is None and target.type == "cpu" else dtype
        error: Exception | None = None
        try:
            llama = Llama._build_rank(
                Path(ckpt_dir), tokenizer_path, max_seq_len, max_batch_size, seed,
                target, _dtype(dtype, target), rope_factor,
            )  # fmt: skip
        except Exception as caught:  # of whatever kind: the other ranks must hear of it
            error = caught
        parallel.raise_together(error, target)
        if parallel.is_main_rank():
            log.info("Loaded %s in %.2f seconds", ckpt_dir, time.perf_counter() - start)
        return llama

    @staticmethod
    def _build_rank(
        ckpt_dir: Path,
        tokenizer_path: str | Path | None,
        max_seq_len: int | None,
        max_batch_size: int,
        seed: int,
        device: torch.device,
        dtype: torch.dtype | None,
        rope_factor: float | None,
    ) -> "Llama":
        opened = checkpoint.open_checkpoint(ckpt_dir, rope_factor)
        args, folder = opened.args, opened.folder
        tokenizer = Tokenizer(_find_tokenizer(tokenizer_path, folder, ckpt_dir))
        if stop_tokens := hugging_face.read_stop_tokens(folder):
            tokenizer.stop_tokens = stop_tokens
        if args.vocab_size == -1:
            args.vocab_size = tokenizer.n_words
        elif args.vocab_size < tokenizer.n_words:
            raise ConfigError(
                f"the model's vocab_size {args.vocab_size} is smaller than the tokenizer's "
                f"{tokenizer.n_words} tokens ({tokenizer.model_path})"
            )
        elif args.vocab_size > tokenizer.n_words and parallel.is_main_rank():
            log.warning(
                "the model's vocab_size %d is larger than the tokenizer's %d tokens",
                args.vocab_size,
                tokenizer.n_words,
            )
        args.max_batch_size = max_batch_size
        args.max_seq_len = min(2048, args.context) if max_seq_len is None else max_seq_len
        args.check()
        if args.max_seq_len > args.context:
            raise ConfigError(
                f"max_seq_len {args.max_seq_len} is above the model's context, {args.context}"
            )
        args.check_split(parallel.mp_size())
        # More ranks than key/value heads: each head is there more than once.
        n_kv_heads = max(args.local_kv_heads(1), parallel.mp_size())
        checkpoint.check_complete(opened)  # before a model is made of sizes that no file has
        with torch.device("meta"):
            model = Transformer(replace(args, n_kv_heads=n_kv_heads))
        checkpoint.load(model, opened, device, dtype)
        return Llama(model, tokenizer, seed)

    def __init__(self, model: Transformer, tokenizer: Tokenizer, seed: int = 1) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.formatter = tokenizer.chat_format()
        self._device = next(model.parameters()).device
        self._generator = torch.Generator(self._device).manual_seed(seed)

    # ---- generation ---------------------------------------------------------------------------

    def generate(
        self,
        prompt_tokens: Sequence[Sequence[int]],
        max_gen_len: int,
        temperature: float = 0.6,
        top_p: float = 0.9,
        logprobs: bool = False,
        echo: bool = False,
    ) -> tuple[list[list[int]], list[list[float]] | None]:
        """Continue each prompt until a stop token or `max_gen_len` tokens.

        Args:
            prompt_tokens: the prompts' token ids; each row ends on its own.
            max_gen_len: tokens generated at most; 0 with logprobs and echo scores the prompts.
            temperature: 0 takes the likeliest token; above, the logits are divided by it.
            top_p: share of the probability that sampling draws from.
            logprobs: also give the natural logarithm of each token's probability, 0.0 for the
                very first of a prompt, which nothing predicts.
            echo: put the prompt before what was generated.

        Returns the tokens of each row, without the stop token, and their logprobs or None.
        Raises GenerationError where prompts or options are out of their limits.
        """
        rows = self._generate(prompt_tokens, max_gen_len, temperature, top_p, logprobs, echo)
        tokens = [row.tokens for row in rows]
        return tokens, [row.logprobs for row in rows] if logprobs else None

    def text_completion(
        self,
        prompts: Sequence[str],
        temperature: float = 0.6,
        top_p: float = 0.9,
        max_gen_len: int | None = None,
        logprobs: bool = False,
        echo: bool = False,
    ) -> list[CompletionPrediction]:
        """Continue each text. The arguments are those of `generate`; max_gen_len None: until a
        stop token or the end of the cache."""
        if isinstance(prompts, str):
            raise GenerationError("prompts is one string: give a list of strings")
        prompt_tokens = [self.tokenizer.encode(text, bos=True, eos=False) for text in prompts]
        rows = self._generate(prompt_tokens, max_gen_len, temperature, top_p, logprobs, echo)
        predictions: list[CompletionPrediction] = []
        for row in rows:
            prediction = CompletionPrediction(generation=self.tokenizer.decode(row.tokens))
            if logprobs:
                prediction["tokens"] = self._token_texts(row.tokens)
                prediction["logprobs"] = row.logprobs
            predictions.append(prediction)
        return predictions

    def chat_completion(
        self,
        dialogs: Sequence[Dialog],
        temperature: float = 0.6,
        top_p: float = 0.9,
        max_gen_len: int | None = None,
        logprobs: bool = False,
    ) -> list[ChatPrediction]:
        """Answer each dialog, in the tokenizer's chat format, with the assistant's next message."""
        prompt_tokens = [self.formatter.encode_dialog_prompt(dialog) for dialog in dialogs]
        rows = self._generate(prompt_tokens, max_gen_len, temperature, top_p, logprobs, echo=False)
        predictions: list[ChatPrediction] = []
        for row in rows:
            message = self.formatter.decode_message(row.tokens, row.stop_token)
            prediction = ChatPrediction(generation=message)
            if logprobs:
                prediction["tokens"] = self._token_texts(row.tokens)
                prediction["logprobs"] = row.logprobs
            predictions.append(prediction)
        return predictions

    def _token_texts(self, tokens: list[int]) -> list[str]:
        """The text that each token completes; joined they are the whole text."""
        decoder = TextDecoder(self.tokenizer)
        texts = [decoder.push(token) for token in tokens]
        if texts:
            texts[-1] += decoder.flush()
        return texts

    @torch.inference_mode()
    def _generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_gen_len: int | None,
        temperature: float,
        top_p: float,
        logprobs: bool,
        echo: bool,
    ) -> list[_Row]:
        """Meta's loop: the part that all prompts have goes through the model at once, then one
        position at a time; a longer prompt's own tokens take the place of generated ones."""
        max_seq_len = self.model.params.max_seq_len
        if max_gen_len is None:
            max_gen_len = max_seq_len - 1
        self._check(prompts, max_gen_len)
        sampling.check_sampling(temperature, top_p)

        lengths = [len(prompt) for prompt in prompts]
        total_len = min(max_seq_len, max(lengths) + max_gen_len)
        tokens = torch.full((len(prompts), total_len), EMPTY, device=self._device)
        for row, prompt in enumerate(prompts):
            tokens[row, : len(prompt)] = torch.tensor(prompt, device=self._device)
        is_prompt = tokens != EMPTY
        scores = torch.zeros(tokens.shape, device=self._device)
        stop_tokens = torch.tensor(list(self.tokenizer.stop_tokens), device=self._device)
        row_ends = torch.tensor(lengths, device=self._device) + max_gen_len
        done = torch.zeros(len(prompts), dtype=torch.bool, device=self._device)

        prev_pos = 0
        for cur_pos in range(min(lengths), total_len):
            logits = self.model(tokens[:, prev_pos:cur_pos], prev_pos)
            chosen = sampling.next_token(logits[:, -1], temperature, top_p, self._generator)
            chosen = parallel.broadcast_from_first(chosen)
            chosen = torch.where(is_prompt[:, cur_pos], tokens[:, cur_pos], chosen)
            tokens[:, cur_pos] = chosen
            if logprobs:
                targets = slice(prev_pos + 1, cur_pos + 1)
                scores[:, targets] = _logprobs(logits, tokens[:, targets])
            done |= torch.isin(chosen, stop_tokens) & ~is_prompt[:, cur_pos]
            done |= cur_pos + 1 >= row_ends
            prev_pos = cur_pos
            if done.all():
                break
        if logprobs and 1 < total_len == min(lengths):  # nothing to generate: score the prompts
            scores[:, 1:] = _logprobs(self.model(tokens[:, :-1], 0), tokens[:, 1:])

        rows = []
        for ids, values, length in zip(tokens.tolist(), scores.tolist(), lengths, strict=True):
            end = min(length + max_gen_len, total_len)
            stop = next(
                (i for i in range(length, end) if ids[i] in self.tokenizer.stop_tokens), None
            )
            kept = slice(0 if echo else length, end if stop is None else stop)
            rows.append(_Row(ids[kept], values[kept], None if stop is None else ids[stop]))
        return rows

    def _check(self, prompts: Sequence[Sequence[int]], max_gen_len: int) -> None:
        params = self.model.params
        if not prompts:
            raise GenerationError("no prompts: give at least one")
        if len(prompts) > params.max_batch_size:
            raise GenerationError(
                f"{len(prompts)} prompts, but max_batch_size is {params.max_batch_size}"
            )
        if not isinstance(max_gen_len, int) or max_gen_len < 0:
            raise GenerationError(f"max_gen_len is {max_gen_len!r}: it must be 0 or above")
        for row, prompt in enumerate(prompts):
            if not isinstance(prompt, Sequence):
                raise GenerationError(f"prompt {row} is {prompt!r}, not a list of token ids")
            if not prompt:
                raise GenerationError(f"prompt {row} is empty: it needs at least one token")
            if len(prompt) > params.max_seq_len:
                raise GenerationError(
                    f"prompt {row} has {len(prompt)} tokens, but max_seq_len is "
                    f"{params.max_seq_len}"
                )
            for token in prompt:
                if not isinstance(token, SupportsIndex):
                    raise GenerationError(f"prompt {row} has {token!r}, which is no token id")
                if not 0 <= token < params.vocab_size:
                    raise GenerationError(
                        f"prompt {row} has token id {token}, but vocab_size is {params.vocab_size}"
                    )


def _logprobs(logits: Tensor, targets: Tensor) -> Tensor:
    """Log-probability of each target: logits (B, S, V), targets (B, S) -> (B, S); 0 for EMPTY."""
    return -F.cross_entropy(logits.transpose(1, 2), targets, reduction="none", ignore_index=EMPTY)


def _dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype | None:
    """The weights' dtype, None for the checkpoint's own."""
    if dtype is None and device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    return None if dtype is None else checkpoint.parse_dtype(dtype)


def _find_tokenizer(path: str | Path | None, folder: Path, ckpt_dir: Path) -> Path:
    if path is not None:
        return Path(path)
    # Hugging Face's repositories have it in `original/`; Meta's Llama 2 downloads beside the
    # models' folders.
    for place in (folder, ckpt_dir, ckpt_dir / "original", ckpt_dir.parent):
        if os.path.lexists(place / "tokenizer.model"):
            return place / "tokenizer.model"
    raise CheckpointError(f"{folder} has no tokenizer.model: name one with tokenizer_path")
