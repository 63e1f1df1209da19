"""The oracles, with which `llama parity` compares: Meta's llama-models, and transformers.

An oracle is another implementation, whose results are the expected ones. Only this file imports
these packages. The extra [parity] installs them.
"""

import importlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from fairscale.nn.model_parallel.layers import ParallelEmbedding
from torch import Tensor, nn

from llama import parallel
from llama.checkpoints.hugging_face import (
    ROTATED,
    hugging_face_name,
    make_config,
    to_hugging_face_rows,
    to_meta_rows,
)
from llama.checkpoints.setup import Setup
from llama.checkpoints.shards import find_shards, read_shard
from llama.config import ModelArgs, RopeScaling
from llama.errors import ConfigError
from llama.gguf_file import is_gguf

# Where an oracle's weights come from, from the most independent source to the least.
OWN_FILES = "the folder's files, read by its own code"
META_FILES = "Meta's files, one for each rank"
META_RESHARDED = "Meta's files, resharded by Meta's own code"
OURS = "llama-reference, which had read the folder"


class Oracle(ABC):
    """Another implementation with the same weights. Its modules are found by Meta's names.

    package: its name on PyPI.
    limit: the largest difference of the logits in ulps that is expected, by dtype. 0: every tensor
        must be bit-equal.
    rope_factor: the only factor of scaled RoPE that it computes. None: any.
    """

    package: ClassVar[str]
    limit: ClassVar[Mapping[torch.dtype, float]]
    rope_factor: ClassVar[float | None] = None

    @staticmethod
    @abstractmethod
    def check(setup: Setup) -> None:
        """Raise ConfigError if the oracle cannot run this model."""

    @staticmethod
    @abstractmethod
    def weights_from(setup: Setup) -> str:
        """Where its weights come from: one of the constants above."""

    @abstractmethod
    def __init__(self, setup: Setup, ours: Mapping[str, Tensor]) -> None:
        """Load this rank's part of the model.

        ours: our own loaded tensors by name, on the CPU. Used only if `weights_from` is OURS.
        """

    @abstractmethod
    def module(self, name: str) -> nn.Module:
        """The module that Meta calls `name`."""

    def in_metas_order(self, name: str, output: Tensor) -> Tensor:
        """The output (S, features) of the module `name`, with its features in Meta's order."""
        return output

    @abstractmethod
    def forward(self, tokens: Tensor) -> None:
        """Compute the logits of a whole prompt (1, S)."""

    @abstractmethod
    def decode(self, prompt_tokens: list[int], n: int) -> list[int]:
        """The n likeliest next tokens, one after the other, with a KV cache. Stop tokens do not
        end the text."""


# ---- Meta's llama-models ------------------------------------------------------------------------


def import_llama_models() -> SimpleNamespace:
    """Meta's modules: args, model and checkpoint."""
    names = {"args": "llama3.args", "model": "llama3.model", "checkpoint": "checkpoint"}
    return SimpleNamespace(
        **{key: _import("llama-models", f"llama_models.{name}") for key, name in names.items()}
    )


class LlamaModels(Oracle):
    """Meta's `Transformer`. Its output is bit-equal to ours in reference mode."""

    package = "llama-models"
    limit = dict.fromkeys((torch.float32, torch.bfloat16, torch.float16), 0.0)
    rope_factor = RopeScaling().factor

    @staticmethod
    def check(setup: Setup) -> None:
        args = setup.opened.args
        obstacles = {
            "has biases": args.has_biases,
            f"has heads of {args.head_dim} features": args.head_width is not None,
            "has RoPE scaled by other constants": args.rope_scaling not in (None, RopeScaling()),
        }
        for obstacle, is_found in obstacles.items():
            if is_found:
                raise ConfigError(
                    f"llama-models cannot run this model, which {obstacle}: take --against "
                    "transformers"
                )

    @staticmethod
    def weights_from(setup: Setup) -> str:
        opened, n = setup.opened, setup.mp_size
        n_shards = len(opened.shards)
        is_metas = not opened.is_hugging_face and not is_gguf(opened.folder)
        if not is_metas or n > opened.args.local_kv_heads(1):
            return OURS
        if n_shards == n:
            return META_FILES
        # Meta's code splits an embedding by vocabulary only.
        is_possible = max(n, n_shards) % min(n, n_shards) == 0
        return META_RESHARDED if is_possible and not opened.args.embedding_shard_dim else OURS

    def __init__(self, setup: Setup, ours: Mapping[str, Tensor]) -> None:
        self._metas = import_llama_models()
        self._device = setup.device
        args = setup.opened.args
        with parallel.on_meta_device():
            self._model = self._metas.model.Transformer(self._args(args, setup.mp_size))
            if args.embedding_shard_dim and setup.mp_size > 1:  # as in Meta's code of Llama 2
                self._model.tok_embeddings = ParallelEmbedding(args.vocab_size, args.dim)
        state = self._state(setup) or ours
        is_ours = state is ours
        if not is_ours:
            self._model.to(setup.dtype).to_empty(device=setup.device)
        self._model.load_state_dict(state, strict=True, assign=is_ours)
        self._model.to(setup.device)
        self._make_buffers(setup.dtype)

    def _args(self, args: ModelArgs, mp_size: int) -> Any:
        """Meta's ModelArgs of the same shape."""
        names = "dim n_layers n_heads vocab_size norm_eps rope_theta use_scaled_rope max_seq_len"
        return self._metas.args.ModelArgs(
            **{name: getattr(args, name) for name in names.split()},
            **args.metas_width(),
            # With more ranks than key/value heads, each head is on several ranks.
            n_kv_heads=max(args.local_kv_heads(1), mp_size),
            max_batch_size=1,
        )

    def _state(self, setup: Setup) -> dict[str, Tensor] | None:
        """This rank's tensors from Meta's files. None: the tensors are ours."""
        source, code = self.weights_from(setup), self._metas.checkpoint
        if source == OURS:
            return None
        paths = find_shards(setup.opened.folder)
        rank, n, n_shards = parallel.mp_rank(), setup.mp_size, len(paths)
        shards = [read_shard(paths[i]) for i in code.map_mp_rank(n_shards, n, rank)]
        if source == META_FILES:
            return shards[0]
        n_parts = max(n // n_shards, 1)
        state: dict[str, Tensor] = code.reshard_mp(shards, n_parts, rank % n_parts)
        return state

    def _make_buffers(self, dtype: torch.dtype) -> None:
        """Make the table of RoPE and the caches anew on the model's device. They are not in the
        state dict, and Meta's constructor has made them on the meta device."""
        args = self._model.params
        with self._device:
            self._model.freqs_cis = self._metas.model.precompute_freqs_cis(
                args.dim // args.n_heads, args.max_seq_len * 2, args.rope_theta,
                args.use_scaled_rope,
            )  # fmt: skip
            for layer in self._model.layers:
                shape = layer.attention.cache_k.shape
                layer.attention.cache_k = torch.zeros(shape, dtype=dtype)
                layer.attention.cache_v = torch.zeros(shape, dtype=dtype)

    def module(self, name: str) -> nn.Module:
        return self._model.get_submodule(name)

    def forward(self, tokens: Tensor) -> None:
        self._model(tokens, 0)

    def decode(self, prompt_tokens: list[int], n: int) -> list[int]:
        tokens, position = list(prompt_tokens), 0
        for _ in range(n):
            new = torch.tensor([tokens[position:]], device=self._device)
            logits = self._model(new, position)
            position = len(tokens)
            tokens.append(int(logits[0, -1].argmax()))
        return tokens[len(prompt_tokens) :]


# ---- transformers -------------------------------------------------------------------------------


class Transformers(Oracle):
    """`LlamaForCausalLM` with its attention in plain operations ("eager").

    It rotates the halves of a head instead of neighbours, and rounds at other places. So its output
    is not bit-equal to ours.
    """

    package = "transformers"
    limit: ClassVar = {torch.float32: 128.0, torch.bfloat16: 16.0, torch.float16: 16.0}

    @staticmethod
    def check(setup: Setup) -> None:
        if setup.mp_size > 1:
            raise ConfigError(
                f"transformers is compared on one rank, and {setup.mp_size} are started: start "
                "without torchrun, or take --against llama-models"
            )

    @staticmethod
    def weights_from(setup: Setup) -> str:
        return OWN_FILES if setup.opened.is_hugging_face else OURS

    def __init__(self, setup: Setup, ours: Mapping[str, Tensor]) -> None:
        transformers = _import("transformers", "transformers")
        args = setup.opened.args
        self._head_dim, self._device = args.head_dim, setup.device
        source: dict[str, Any] = dict(pretrained_model_name_or_path=setup.opened.folder)
        if self.weights_from(setup) == OURS:
            state = {}
            for name, weight in ours.items():
                is_rotated = name.endswith(ROTATED)
                rows = to_hugging_face_rows(weight, args.head_dim) if is_rotated else weight
                state[hugging_face_name(name)] = rows
            config = transformers.LlamaConfig(**make_config(args, setup.dtype))
            source = dict(pretrained_model_name_or_path=None, config=config, state_dict=state)
        self._model = transformers.LlamaForCausalLM.from_pretrained(
            **source, dtype=setup.dtype, attn_implementation="eager", local_files_only=True
        ).to(setup.device)
        # The folder's options of generation may have stop tokens, or penalties that change tokens.
        self._model.generation_config = transformers.GenerationConfig()

    def module(self, name: str) -> nn.Module:
        is_layer = name.removeprefix("layers.").isdecimal()
        theirs = f"model.{name}" if is_layer else hugging_face_name(f"{name}.weight")
        return self._model.get_submodule(theirs.removesuffix(".weight"))

    def in_metas_order(self, name: str, output: Tensor) -> Tensor:
        if f"{name}.weight".endswith(ROTATED):
            return to_meta_rows(output.T.contiguous(), self._head_dim).T
        return output

    def forward(self, tokens: Tensor) -> None:
        self._model(tokens)

    def decode(self, prompt_tokens: list[int], n: int) -> list[int]:
        tokens = torch.tensor([prompt_tokens], device=self._device)
        found = self._model.generate(
            tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=n, do_sample=False
        )
        new: list[int] = found[0, len(prompt_tokens) :].tolist()
        return new


# ---- the table ----------------------------------------------------------------------------------

ORACLES: dict[str, type[Oracle]] = {"llama-models": LlamaModels, "transformers": Transformers}


def find_oracle(name: str) -> type[Oracle]:
    """The oracle with this name. Raises ConfigError for another name or a missing package."""
    if name not in ORACLES:
        raise ConfigError(f"against is {name!r}: it must be one of {', '.join(ORACLES)}")
    oracle = ORACLES[name]
    _import(oracle.package, oracle.package.replace("-", "_"))
    return oracle


def _import(package: str, module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"{package} is missing or incomplete ({error}): pip install 'llama-reference[parity]'"
        ) from error
