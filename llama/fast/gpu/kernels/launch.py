"""Launch the kernels. Fixed rules compute the block sizes from the shapes, without tuning.

The rules were found by timing configurations on an H200. `benchmarks/gpu_kernels.py` repeats these
timings.
"""

import functools
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import triton
from torch import Tensor

from llama.cache import LayerCache, quantize
from llama.fast.gpu.device_weights import Matrix
from llama.fast.gpu.kernels import attention, product

MIN_DOT = 16  # the least side of a tile of the matrix units
CHUNK = 128  # cache positions that one program of `attend` takes
COUNTERS = 1 << 14  # most tiles of a launch in which several programs share each tile


class Kernels:
    """Calls the kernels, and holds the scratch memory that they share. Only one stream may use it
    at a time."""

    def __init__(self, n_heads: int, device: torch.device) -> None:
        self._n_heads = n_heads
        self._device = device
        self._n_processors = 132
        if device.type == "cuda":
            self._n_processors = torch.cuda.get_device_properties(device).multi_processor_count
        self._counters = torch.zeros(COUNTERS, dtype=torch.int32, device=device)
        self._rotations: tuple[Tensor, Tensor] | None = None
        self._pending: dict[Any, Callable[[], Any]] | None = None

    def compile(self, work: Callable[[], Any]) -> None:
        """Compile all kernels that `work` launches, in parallel. No kernel runs."""
        self._pending = {}
        try:
            work()
            pending = list(self._pending.values())
        finally:
            self._pending = None

        def compile_one(compile: Callable[[], Any]) -> None:
            with torch.cuda.device(self._device if self._device.type == "cuda" else -1):
                getattr(compile(), "run", None)  # reading `run` compiles the launcher, in C

        with ThreadPoolExecutor(len(pending)) as pool:
            for _ in pool.map(compile_one, pending):
                pass

    def _launch(self, kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
        if self._pending is None:
            kernel[grid](*args, **options)
            return
        dtypes = tuple(x.dtype if isinstance(x, Tensor) else x for x in args)
        key = kernel, dtypes, tuple(options.items())
        self._pending[key] = functools.partial(kernel.warmup, *args, grid=grid, **options)

    def norm(self, x: Tensor, norm: Any) -> Tensor:
        """RMSNorm: (…, D) -> (…, D)."""
        out = torch.empty_like(x)
        dim = x.shape[-1]
        block = triton.next_power_of_2(dim)
        self._launch(
            product.rms_norm,
            (x.numel() // dim,),
            out,
            x,
            norm.weight,
            dim,
            norm.eps,
            block,
            num_warps=min(16, max(1, block // 512)),
        )
        return out

    def project(
        self,
        x: Tensor,
        matrix: Matrix,
        residual: Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """x (…, K) times the matrix (N, K), plus residual (…, N): (…, N)."""
        out = x.new_empty(*x.shape[:-1], matrix.n_rows, dtype=dtype)
        grid, arguments, options = self._blocks(x, matrix, matrix.n_rows)
        add = out if residual is None else residual
        self._launch(
            product.project,
            grid,
            out,
            x,
            *arguments[:2],
            add,
            *arguments[2:],
            residual is not None,
            **options,
        )
        return out

    def swiglu(self, x: Tensor, matrix: Matrix) -> Tensor:
        """silu(x @ gate.T) * (x @ up.T): (…, K) -> (…, N / 2). The first half of the matrix's rows
        is the gate, and the second half is the up projection."""
        n = matrix.n_rows // 2
        out = x.new_empty(*x.shape[:-1], n)
        grid, arguments, options = self._blocks(x, matrix, n)
        grid = (triton.cdiv(n, options["BLOCK_N"] // 2), *grid[1:])
        self._launch(product.swiglu, grid, out, x, *arguments, **options)
        return out

    def silu_times(self, x: Tensor) -> Tensor:
        """silu of the first half of the features, times the second: (…, 2 F) -> (…, F)."""
        n, block = x.shape[-1] // 2, 1024
        out = x.new_empty(*x.shape[:-1], n)
        grid = triton.cdiv(n, block), out.numel() // n
        self._launch(product.silu_times, grid, out, x, n, block)
        return out

    def qkv(
        self, x: Tensor, matrix: Matrix, freqs_cis: Tensor, positions: Tensor, cache: LayerCache
    ) -> Tensor:
        """Rotated queries (B, S, H, hd) of x (B, S, D); keys and values go to the cache."""
        grid, arguments, options = self._blocks(x, matrix, matrix.n_rows)
        *head, n_tokens, _, k = arguments

        def launch(q: Tensor, keys: Tensor, values: Tensor, *places: int) -> None:
            self._launch(
                product.qkv, grid, q, keys, values, x, *head, self._angles(freqs_cis), positions,
                n_tokens, k, *places, **options,
            )  # fmt: skip

        return self._store(launch, x, positions, cache)

    def rotate(self, x: Tensor, freqs_cis: Tensor, positions: Tensor, cache: LayerCache) -> Tensor:
        """Rotated queries (B, S, H, hd). x (B, S, (H + 2 K) hd) is already multiplied by the joined
        matrix of queries, keys and values; keys and values go to the cache."""
        n_tokens, block_m, pairs = positions.numel(), 8, 128
        grid = triton.cdiv(x.shape[-1], 2 * pairs), triton.cdiv(n_tokens, block_m)

        def launch(q: Tensor, keys: Tensor, values: Tensor, *places: int) -> None:
            self._launch(
                product.rotate, grid, q, keys, values, x, self._angles(freqs_cis), positions,
                n_tokens, *places, BLOCK_M=block_m, PAIRS=pairs,
            )  # fmt: skip

        return self._store(launch, x, positions, cache)

    def _store(
        self, launch: Callable[..., None], x: Tensor, positions: Tensor, cache: LayerCache
    ) -> Tensor:
        """Launch a kernel that stores keys and values in the cache. If the cache is int8, the
        kernel stores them in other tensors, which are then quantized. Returns the queries."""
        bsz, seqlen = positions.shape
        n_kv_heads, head_dim = cache.k.shape[2:]
        heads = self._n_heads, n_kv_heads, head_dim
        q = x.new_empty(bsz, seqlen, self._n_heads, head_dim)
        if cache.k_scale is None:
            launch(q, cache.k, cache.v, cache.k.stride(0), cache.k.stride(1), *heads, seqlen)
            return q
        assert cache.v_scale is not None
        keys, values = x.new_empty(2, bsz, seqlen, n_kv_heads, head_dim)
        launch(q, keys, values, n_kv_heads * head_dim, 0, *heads, 1)
        index = torch.arange(bsz, device=x.device)[:, None], positions
        cache.k[index], cache.k_scale[index] = quantize(keys)
        cache.v[index], cache.v_scale[index] = quantize(values)
        return q

    def attention(self, q: Tensor, positions: Tensor, cache: LayerCache) -> Tensor:
        """Queries (B, S, H, hd) at positions (B, S) -> (B, S, H, hd)."""
        bsz, seqlen, n_heads, head_dim = q.shape
        n_kv_heads, n_chunks = cache.k.shape[2], triton.cdiv(cache.k.shape[1], CHUNK)
        n_rep = n_heads // n_kv_heads
        partial = q.new_empty(bsz, seqlen, n_heads, n_chunks, head_dim, dtype=torch.float32)
        maxima, sums = q.new_empty(2, bsz, seqlen, n_heads, n_chunks, dtype=torch.float32)
        block_q = min(32, max(MIN_DOT, triton.next_power_of_2(seqlen * n_rep)))
        block_d = max(MIN_DOT, triton.next_power_of_2(head_dim))
        is_int8 = cache.k_scale is not None
        k_scale = maxima if cache.k_scale is None else cache.k_scale
        v_scale = maxima if cache.v_scale is None else cache.v_scale
        grid = bsz * n_kv_heads, n_chunks, triton.cdiv(seqlen * n_rep, block_q)
        self._launch(
            attention.attend, grid, partial, maxima, sums, q, cache.k, cache.v, k_scale, v_scale,
            positions, cache.k.stride(0), cache.k.stride(1), k_scale.stride(0),
            1 / math.sqrt(head_dim), n_kv_heads, seqlen, n_chunks,
            n_rep, head_dim, block_d, block_q, BLOCK_T=64, CHUNK=CHUNK, IS_INT8=is_int8,
            num_warps=4, num_stages=2,
        )  # fmt: skip
        out = torch.empty_like(q)
        block_c = min(16, triton.next_power_of_2(n_chunks))
        self._launch(
            attention.combine, (bsz * seqlen * n_heads,), out, partial, maxima, sums, positions,
            n_heads, n_chunks, head_dim, block_d, CHUNK, block_c, num_warps=2,
        )  # fmt: skip
        return out

    @staticmethod
    def block_of_tokens(n_tokens: int) -> int:
        """The number of tokens that a program takes."""
        return min(64, max(MIN_DOT, triton.next_power_of_2(n_tokens)))

    def _angles(self, freqs_cis: Tensor) -> Tensor:
        """Cosines and sines, float32 (positions, hd / 2, 2)."""
        if self._rotations is None or self._rotations[0] is not freqs_cis:
            self._rotations = freqs_cis, torch.view_as_real(freqs_cis)
        return self._rotations[1]

    def _blocks(
        self, x: Tensor, matrix: Matrix, n_features: int
    ) -> tuple[tuple[int, int, int], tuple[Any, ...], dict[str, Any]]:
        """The grid, the arguments after x and the constants of a product."""
        k = matrix.n_columns
        n_tokens = x.numel() // k
        block_m = self.block_of_tokens(n_tokens)
        # Rows of weights in a tile, bytes of a row, tiles in flight, warps. The size of a tile
        # does not depend on the number of tokens. So the order of a token's sums does not either.
        if matrix.width != "wide":
            block_n, n_bytes, stages, warps = 32, 128, 4, 2
        elif matrix.n_rows >= 64 * self._n_processors:
            block_n, n_bytes, stages, warps = 64, 256, 5, 4
        else:
            block_n, n_bytes, stages, warps = 32, 512, 5, 4
        if block_m > MIN_DOT:
            stages = 3  # shared memory has no room for more
        block_k = max(MIN_DOT, n_bytes // matrix.values.element_size())
        if matrix.width == "int4":
            block_k *= 2
        block_k = min(block_k, max(2 * MIN_DOT, triton.next_power_of_2(k)))
        tiles = triton.cdiv(matrix.n_rows, block_n)
        splits = 1
        if matrix.width != "wide":
            while tiles * splits < 4 * self._n_processors and k > 2 * splits * block_k:
                splits *= 2
        columns = triton.cdiv(n_tokens, block_m)
        partial = x
        if splits > 1:
            size = tiles * columns * splits * block_n * block_m
            partial = x.new_empty(size, dtype=torch.float32)
            assert tiles * columns <= COUNTERS
        arguments = (
            matrix.values, matrix.scales, partial, self._counters, n_tokens, n_features, k,
        )  # fmt: skip
        options = dict(
            WIDTH=matrix.width, BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k,
            EVEN=k % block_k == 0, STAGES=stages, SPLITS=splits, num_warps=warps,
        )  # fmt: skip
        return (tiles, columns, splits), arguments, options
