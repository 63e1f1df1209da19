"""Decode attention over the KV cache, split by keys; Dao et al. 2023, flash decoding.

A program takes one chunk of CHUNK positions of a key/value head, and BLOCK_Q queries of the heads
that share it. It keeps a running maximum and sum (online softmax, Milakov & Gimelshein 2018,
arxiv.org/abs/1805.02867). `combine` joins the chunks of a query in their order. Chunks begin at
multiples of CHUNK whatever the length is, and lengths are read on the device. So one launch serves
all lengths, and a query's sums do not depend on the queries beside it.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["tokens_a_row"])
def attend(
    partial, maxima, sums, q, keys, values, key_scales, value_scales, positions,
    stride_row, stride_position, stride_scale_row, scale, n_kv_heads, tokens_a_row, n_chunks,
    N_REP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_T: tl.constexpr, CHUNK: tl.constexpr, IS_INT8: tl.constexpr,
):  # fmt: skip
    """Attention of some queries to one chunk of keys.

    q (rows, S, H, hd). keys and values: cache rows (rows, T, K, hd), as int8 with scales (rows, T,
    K). positions (rows, S) of the queries. partial float32 (rows, S, H, chunks, hd), maxima and
    sums float32 (rows, S, H, chunks).
    """
    row = tl.program_id(0) // n_kv_heads
    kv_head = tl.program_id(0) % n_kv_heads
    chunk = tl.program_id(1)
    # Queries are numbered token by token: all query heads of the first token come first.
    queries = tl.program_id(2) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    is_query = queries < tokens_a_row * N_REP
    token = row * tokens_a_row + queries // N_REP
    position = tl.load(positions + token, mask=is_query, other=-1)
    n_keys = tl.max(position, 0) + 1
    start = chunk * CHUNK
    if start >= n_keys:
        return
    head = token * n_kv_heads * N_REP + kv_head * N_REP + queries % N_REP
    d = tl.arange(0, BLOCK_D)
    is_d = (d < HEAD_DIM)[None, :]
    at = q + head[:, None] * HEAD_DIM + d[None, :]
    query = tl.load(at, mask=is_query[:, None] & is_d, other=0)  # (BLOCK_Q, hd)

    row_start = row.to(tl.int64) * stride_row + kv_head * HEAD_DIM
    highest = tl.full((BLOCK_Q,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_Q,), tl.float32)
    out = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
    for t0 in range(start, tl.minimum(start + CHUNK, n_keys), BLOCK_T):
        t = t0 + tl.arange(0, BLOCK_T)
        is_key = t < n_keys
        place = row_start + t.to(tl.int64)[:, None] * stride_position + d[None, :]
        mask = is_key[:, None] & is_d
        key = tl.load(keys + place, mask=mask, other=0).to(query.dtype)  # (BLOCK_T, hd)
        value = tl.load(values + place, mask=mask, other=0).to(query.dtype)
        scores = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
        if IS_INT8:
            scale_place = row.to(tl.int64) * stride_scale_row + t * n_kv_heads + kv_head
            scores *= tl.load(key_scales + scale_place, mask=is_key, other=0)[None, :]
        scores = tl.where(t[None, :] <= position[:, None], scores, float("-inf"))
        above = tl.maximum(highest, tl.max(scores, 1))
        # A query may see no key of this chunk. Then its maximum stays minus infinity.
        base = tl.where(above == float("-inf"), 0.0, above)
        weights = tl.exp(scores - base[:, None])
        kept = tl.exp(highest - base)
        total = total * kept + tl.sum(weights, 1)
        if IS_INT8:
            weights *= tl.load(value_scales + scale_place, mask=is_key, other=0)[None, :]
        out = tl.dot(weights.to(query.dtype), value, out * kept[:, None], input_precision="ieee")
        highest = above
    at = head * n_chunks + chunk
    tl.store(maxima + at, highest, mask=is_query)
    tl.store(sums + at, total, mask=is_query)
    at = partial + at.to(tl.int64)[:, None] * HEAD_DIM + d[None, :]
    tl.store(at, out, mask=is_query[:, None] & is_d)


@triton.jit
def combine(
    out, partial, maxima, sums, positions, n_heads, n_chunks,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Join the chunks of one query: out (rows, S, H, hd)."""
    head = tl.program_id(0)
    n_used = tl.load(positions + head // n_heads) // CHUNK + 1
    d = tl.arange(0, BLOCK_D)
    is_d = (d < HEAD_DIM)[None, :]
    highest = tl.full((), float("-inf"), tl.float32)
    total = tl.zeros((), tl.float32)
    joined = tl.zeros((BLOCK_D,), tl.float32)
    for first in range(0, n_used, BLOCK_C):
        chunks = first + tl.arange(0, BLOCK_C)
        is_used = chunks < n_used
        place = head * n_chunks + chunks
        tops = tl.load(maxima + place, mask=is_used, other=float("-inf"))
        parts = tl.load(sums + place, mask=is_used, other=0)
        outs_at = partial + place.to(tl.int64)[:, None] * HEAD_DIM + d[None, :]
        outs = tl.load(outs_at, mask=is_used[:, None] & is_d, other=0)  # (BLOCK_C, hd)
        above = tl.maximum(highest, tl.max(tops, 0))
        kept, weights = tl.exp(highest - above), tl.exp(tops - above)
        total = total * kept + tl.sum(parts * weights, 0)
        joined = joined * kept + tl.sum(outs * weights[:, None], 0)
        highest = above
    at = out + head.to(tl.int64) * HEAD_DIM + d
    tl.store(at, (joined / total).to(out.dtype.element_ty), mask=d < HEAD_DIM)
