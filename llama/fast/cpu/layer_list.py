"""Turn a model's layers into a list of compiled tasks, and run it for each step."""

import threading
from collections.abc import Sequence
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from fairscale.nn.model_parallel.layers import VocabParallelEmbedding
from torch import Tensor

from llama.adapters import RowAdapters
from llama.cache import KVCache
from llama.errors import GenerationError
from llama.fast.cpu.kernels import job, layer_ops, pool
from llama.fast.cpu.kernels.buffer import float_buffer, int8_buffer
from llama.fast.cpu.kernels.exchange import Exchange
from llama.fast.cpu.kernels.isa import ISAS, instruction_sets
from llama.fast.cpu.kernels.product import Product
from llama.fast.cpu.kernels.task_list import Task, TaskList
from llama.fast.cpu.row_changes import ProductChanges, tokens_by_number
from llama.fast.quantize import GROUP
from llama.model import RMSNorm, Transformer, TransformerBlock


class LayerList:
    """The network except its output matrix, for up to `max_tokens` tokens at a time.

    It is made once for a model. It holds the addresses of the weights, the buffers of all
    intermediate results, and the list of tasks.

    layers: the four products of each layer: wq, wk and wv; wo; w1 and w3 with SwiGLU; w2.
    exchange: sums the partial results of the ranks.
    adapters: LoRA changes that some rows of a call may have. None: there are none.
    """

    def __init__(
        self,
        model: Transformer,
        layers: Sequence[Sequence[Product]],
        exchange: Exchange,
        max_tokens: int,
        adapters: RowAdapters | None = None,
    ) -> None:
        blocks = [cast(TransformerBlock, block) for block in model.layers]
        attention = blocks[0].attention
        self.model = model
        self.max_tokens = max_tokens
        self._adapters = adapters
        self._exchange = exchange
        self._kv_heads, self._head_dim = attention.n_local_kv_heads, attention.head_dim
        heads, dim = attention.n_local_heads, model.params.dim
        products = [product for layer in layers for product in layer]
        widest = max(product.features for product in products)
        most_bytes = max(product.prepared_bytes for product in products)

        self._h = float_buffer(max_tokens, dim)
        self._normed = float_buffer(max_tokens, dim)
        self._prepared = int8_buffer(max_tokens, most_bytes)
        self._steps = float_buffer(max_tokens, widest // GROUP, 2)
        self._qkv = float_buffer(max_tokens, layers[0][0].rows)
        self._scores = float_buffer(max_tokens, heads, layer_ops.BLOCK + layer_ops.STATS)
        self._heads = float_buffer(max_tokens, heads * self._head_dim)
        self._hidden = float_buffer(2 * max_tokens, layers[0][-1].features)
        self._delta = float_buffer(max_tokens, dim)
        self._rotations = torch.view_as_real(model.freqs_cis)
        self._vectors: list[Tensor] = []  # kept alive, because tasks hold their addresses
        self._starts = np.zeros(max_tokens, np.int64)
        self._cache = np.zeros(layer_ops.CACHE_LENGTH, np.int64)
        self._cache[layer_ops.STARTS] = self._starts.ctypes.data

        self._tasks: list[Task] = []
        self._jobs: list[list[int]] = []
        self._products: list[int] = []  # indices of the tasks that are products
        # The changes of each product by the index of the task after it, with the product's inputs
        # and results.
        self._changes: dict[int, tuple[ProductChanges, Tensor, Tensor]] = {}
        all_reduces = []  # indices of the tasks that an all-reduce precedes
        bias = None  # of the row-parallel layer before the norm; added once, after the all-reduce
        for number, (block, layer) in enumerate(zip(blocks, layers, strict=True)):
            qkv, wo, gate_and_up, down = layer
            self._add_norm(block.attention_norm, bias, is_first=number == 0)
            self._add_product(qkv, self._normed, self._qkv)
            self._add_changes(number, qkv, self._normed, self._qkv, ("wq", "wk", "wv"))
            self._add_attention(number)
            self._add_product(wo, self._heads, self._delta)
            self._add_changes(number, wo, self._heads, self._delta, ("wo",))
            all_reduces.append(len(self._tasks))
            self._add_norm(block.ffn_norm, block.attention.wo.bias)
            self._add_product(gate_and_up, self._normed, self._hidden)
            self._add_changes(number, gate_and_up, self._normed, self._hidden, ("w1", "w3"))
            self._add_product(down, self._hidden, self._delta)
            self._add_changes(number, down, self._hidden, self._delta, ("w2",))
            all_reduces.append(len(self._tasks))
            bias = block.feed_forward.w2.bias
        self._add_norm(model.norm, bias)
        self._list = TaskList(self._tasks, self._jobs)
        self._all_reduces = set() if exchange.is_alone else set(all_reduces)
        self._lock = threading.Lock()  # the buffers serve one call at a time

    def _add(self, task: Task, fields: dict[int, int]) -> None:
        self._tasks.append(task)
        self._jobs.append([fields.get(i, 0) for i in range(max(fields) + 1)])

    def _add_norm(self, norm: RMSNorm, bias: Tensor | None, is_first: bool = False) -> None:
        fields = {
            layer_ops.DIM: norm.weight.numel(),
            layer_ops.H: self._h.data_ptr(),
            layer_ops.DELTA: 0 if is_first else self._delta.data_ptr(),
            layer_ops.BIAS: 0 if bias is None else self._address(bias),
            layer_ops.WEIGHT: self._address(norm.weight),
            layer_ops.EPS: int(np.float32(norm.eps).view(np.int32)),
            layer_ops.OUT: self._normed.data_ptr(),
        }
        self._add(layer_ops.add_and_norm(), fields)

    def _address(self, vector: Tensor) -> int:
        """The address of the vector in float32. `_vectors` keeps the tensor alive."""
        self._vectors.append(vector.detach().float())
        return self._vectors[-1].data_ptr()

    def _add_product(self, product: Product, x: Tensor, out: Tensor) -> None:
        fields = dict(enumerate(product.job)) | {job.X: x.data_ptr()}
        fields[job.STEPS] = self._steps.data_ptr()
        if product.preparing is not None:
            self._add(product.preparing, fields | {job.OUT: self._prepared.data_ptr()})
            fields[job.X] = self._prepared.data_ptr()
        fields[job.OUT] = out.data_ptr()
        self._products.append(len(self._tasks))
        self._add(product.task, fields)

    def _add_changes(
        self, layer: int, product: Product, x: Tensor, out: Tensor, names: Sequence[str]
    ) -> None:
        """Remember the changes of the product that was added last."""
        if self._adapters is not None:
            part = "feed_forward" if names[0] in ("w1", "w2") else "attention"
            found = [self._adapters.of_module(f"layers.{layer}.{part}.{name}") for name in names]
            if any(found):
                self._changes[len(self._tasks)] = ProductChanges(product, found), x, out

    def _add_attention(self, layer: int) -> None:
        fields = {
            layer_ops.LAYER: layer,
            layer_ops.GROUP: self._scores.shape[1] // self._kv_heads,
            layer_ops.KV_HEADS: self._kv_heads,
            layer_ops.HEAD_DIM: self._head_dim,
            layer_ops.QKV: self._qkv.data_ptr(),
            layer_ops.ROTATIONS: self._rotations.data_ptr(),
            layer_ops.CACHE: self._cache.ctypes.data,
            layer_ops.SCORES: self._scores.data_ptr(),
            layer_ops.HEADS: self._heads.data_ptr(),
        }
        self._add(layer_ops.store(), fields)
        self._add(layer_ops.attend(self._head_dim, ISAS[instruction_sets()[0]].lanes), fields)

    def __call__(
        self,
        tokens: Tensor,
        start_pos: int | Tensor,
        cache: KVCache,
        numbers: Sequence[int] = (),
    ) -> Tensor:
        """Ids (B, S), at most `max_tokens` -> float32 (B, S, D); see `Transformer.features`.

        Row r of the tokens uses row r of the cache, and has the adapter numbers[r], or none if that
        is 0.
        Raises GenerationError for an id outside the vocabulary and for tokens that do not fit the
        cache.
        """
        n, (bsz, seqlen) = tokens.numel(), tokens.shape
        starts = [start_pos] * bsz if isinstance(start_pos, int) else start_pos.tolist()
        self._check(tokens.flatten().tolist(), starts, seqlen, cache)
        out = float_buffer(bsz, seqlen, self._h.shape[1])
        with self._lock:
            self._starts[:bsz] = starts
            self._set_cache(cache, seqlen)
            self._embed(tokens.flatten())
            jobs = self._list.jobs
            jobs[:, layer_ops.N] = n
            jobs[-1, layer_ops.OUT] = out.data_ptr()
            jobs[self._products, job.THREADS] = pool.threads()
            chosen = tokens_by_number(numbers, seqlen)
            first = 0
            for last in sorted({*self._all_reduces, *(self._changes if chosen else ()), len(jobs)}):
                self._list.run(first, last)
                if chosen and last in self._changes:
                    changes, x, results = self._changes[last]
                    changes.add(x, results, n, chosen)
                if last in self._all_reduces:
                    self._exchange.sum(self._delta[:n])
                first = last
        return out

    def _embed(self, tokens: Tensor) -> None:
        """Write the embedding of ids (n) to the first n rows of h."""
        embedding, h = self.model.tok_embeddings, self._h[: len(tokens)]
        is_vocab_parallel = isinstance(embedding, VocabParallelEmbedding)
        if self._exchange.is_alone or not is_vocab_parallel:  # this rank has a row for every id
            h.copy_(self._exchange.join(F.embedding(tokens, embedding.weight).float()))
            return
        first = embedding.vocab_start_index
        is_here = (first <= tokens) & (tokens < embedding.vocab_end_index)
        embedded = F.embedding((tokens - first) * is_here, embedding.weight)
        h.copy_(embedded.masked_fill(~is_here[:, None], 0))
        self._exchange.sum(h)

    def _set_cache(self, cache: KVCache, seqlen: int) -> None:
        self._cache[layer_ops.SEQLEN] = seqlen
        self._cache[layer_ops.TO_LAYER : layer_ops.KEYS] = cache.k.stride()[:4]
        held = (cache.k, cache.v, cache.k_scale, cache.v_scale)
        self._cache[layer_ops.KEYS :] = [0 if t is None else t.data_ptr() for t in held]

    def _check(self, ids: list[int], starts: list[int], seqlen: int, cache: KVCache) -> None:
        """Check every limit here, because the tasks check none and would write out of bounds."""
        vocab_size = self.model.vocab_size
        if len(starts) > cache.max_batch_size:
            raise GenerationError(
                f"a batch of {len(starts)} rows, but the KV cache has {cache.max_batch_size}"
            )
        if min(ids) < 0 or max(ids) >= vocab_size:
            raise GenerationError(
                f"token ids from {min(ids)} to {max(ids)}, but vocab_size is {vocab_size}"
            )
        positions = min(cache.max_seq_len, self.model.params.max_seq_len)
        if min(starts) < 0 or max(starts) + seqlen > positions:
            raise GenerationError(
                f"tokens at positions {min(starts)} to {max(starts) + seqlen - 1}, but the limit "
                f"is {positions}"
            )
