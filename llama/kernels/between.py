"""What a decode step computes between its matrix products, as tasks like them; see `loops`.

Shapes: n tokens, each with a row and a position of the cache; H query heads, K key/value heads,
hd head_dim, D dim. All in float32. A token's result depends, to the last bit, on no other's.
"""

import functools
from collections.abc import Callable

import numpy as np
from numba import carray, njit

from llama.kernels.tile import pointer, take
from llama.kernels.exponential import exp
from llama.kernels.loops import VERSION, compile_task

TAKEN, N = 0, 1
# of add_and_norm
DIM, H, DELTA, WEIGHT, EPS, OUT = range(2, 8)
# of store and of attend
LAYER, KV_HEADS, QKV, ROTATIONS, CACHE, SCORES, HEADS = range(2, 9)
LENGTH = 9

# What the layers share: tokens a row of the cache, the address of each row's first position, the
# addresses of keys and values, and the bytes from one layer, row and position to the next.
SEQLEN, STARTS, KEYS, VALUES, LAYER_BYTES, ROW_BYTES, POSITION_BYTES = range(7)
CACHE_LENGTH = 7

BLOCK = 64  # keys scored at a time
STATS = 2  # after a block's scores: their largest so far, the sum of the weights
LEAST = np.float32(-3e38)

# Sums in the order that suits the processor, but NaN stays NaN.
SUMS = frozenset({"reassoc", "contract", "nsz"})

Task = Callable[[int], None]


@functools.cache
def add_and_norm() -> Task:
    """h += delta, where its address is not 0; out = h / rms(h) * weight. All (n, D).

    EPS holds the bits of a float32.
    """
    version = VERSION

    def task(address):  # type: ignore[no-untyped-def]
        version  # noqa: B018
        job = carray(address, LENGTH)
        n, dim = job[N], job[DIM]
        eps = np.int32(job[EPS]).view(np.float32)
        weight = carray(pointer(job[WEIGHT], np.float32), dim)
        while True:
            token = take(address)
            if token >= n:
                break
            row = 4 * token * dim
            h = carray(pointer(job[H] + row, np.float32), dim)
            out = carray(pointer(job[OUT] + row, np.float32), dim)
            if job[DELTA] != 0:
                delta = carray(pointer(job[DELTA] + row, np.float32), dim)
                for i in range(dim):
                    h[i] += delta[i]
            squares = np.float32(0)
            for i in range(dim):
                squares += h[i] * h[i]
            scale = np.float32(1) / np.sqrt(squares / np.float32(dim) + eps)
            for i in range(dim):
                out[i] = h[i] * scale * weight[i]

    return compile_task(task, SUMS)


@njit(error_model="numpy")
def place(job, token):  # type: ignore[no-untyped-def]
    """A token's position, and how far its row of the cache lies from a layer's and the first."""
    cache = carray(pointer(job[CACHE], np.int64), CACHE_LENGTH)
    row, step = token // cache[SEQLEN], token % cache[SEQLEN]
    start = carray(pointer(cache[STARTS], np.int64), row + 1)[row]
    return start + step, job[LAYER] * cache[LAYER_BYTES] + row * cache[ROW_BYTES]


@functools.cache
def store(head_dim: int, group: int) -> Task:
    """Turn queries and keys of qkv (n, H + 2 K, hd) by their positions' angles, the queries in
    place, and put keys and values into the cache.

    rotations: (positions, hd / 2, 2), cosines and sines. group: query heads of a key head.
    """
    version = VERSION

    def task(address):  # type: ignore[no-untyped-def]
        version  # noqa: B018
        job = carray(address, LENGTH)
        n, kv_heads = job[N], job[KV_HEADS]
        heads = group * kv_heads
        cache = carray(pointer(job[CACHE], np.int64), CACHE_LENGTH)
        qkv = carray(pointer(job[QKV], np.float32), (n, heads + 2 * kv_heads, head_dim))
        while True:
            chunk = take(address)
            if chunk >= n * kv_heads:
                break
            token, head = chunk // kv_heads, chunk % kv_heads
            position, at = place(job, token)
            at += position * cache[POSITION_BYTES] + 4 * head * head_dim
            turns = carray(
                pointer(job[ROTATIONS] + 4 * position * head_dim, np.float32), (head_dim // 2, 2)
            )
            for i in range(group + 1):
                turned = heads + head if i == group else head * group + i
                for j in range(head_dim // 2):
                    x, y = qkv[token, turned, 2 * j], qkv[token, turned, 2 * j + 1]
                    qkv[token, turned, 2 * j] = x * turns[j, 0] - y * turns[j, 1]
                    qkv[token, turned, 2 * j + 1] = x * turns[j, 1] + y * turns[j, 0]
            key = carray(pointer(cache[KEYS] + at, np.float32), head_dim)
            value = carray(pointer(cache[VALUES] + at, np.float32), head_dim)
            for j in range(head_dim):
                key[j] = qkv[token, heads + head, j]
                value[j] = qkv[token, heads + kv_heads + head, j]

    return compile_task(task)


@functools.cache
def attend(head_dim: int, group: int) -> Task:
    """Attention of each token's heads over its row of the cache up to its own position.

    scores: room for (n, H, BLOCK + STATS). heads: the result (n, H, hd). The keys are read in
    blocks, once for all query heads of theirs; what is summed so far is scaled down whenever a
    block has a larger score: Milakov & Gimelshein 2018, arxiv.org/abs/1805.02867.
    """
    version = VERSION

    def task(address):  # type: ignore[no-untyped-def]
        version  # noqa: B018
        job = carray(address, LENGTH)
        n, kv_heads = job[N], job[KV_HEADS]
        heads = group * kv_heads
        cache = carray(pointer(job[CACHE], np.int64), CACHE_LENGTH)
        step = cache[POSITION_BYTES]
        scale = np.float32(1 / np.sqrt(head_dim))
        while True:
            chunk = take(address)
            if chunk >= n * kv_heads:
                break
            token, head = chunk % n, chunk // n  # neighbours may read the same keys
            position, at = place(job, token)
            at += 4 * head * head_dim
            first_head = token * heads + head * group
            queries = carray(
                pointer(
                    job[QKV]
                    + 4 * head_dim * (token * (heads + 2 * kv_heads) + head * group),
                    np.float32,
                ),
                (group, head_dim),
            )
            shape = (group, BLOCK + STATS)
            scores = carray(
                pointer(job[SCORES] + 4 * first_head * (BLOCK + STATS), np.float32), shape
            )
            out = carray(
                pointer(job[HEADS] + 4 * first_head * head_dim, np.float32), (group, head_dim)
            )
            for h in range(group):
                scores[h, BLOCK], scores[h, BLOCK + 1] = LEAST, np.float32(0)
                for d in range(head_dim):
                    out[h, d] = np.float32(0)
            for first in range(0, position + 1, BLOCK):
                count = min(BLOCK, position + 1 - first)
                keys, values = (
                    cache[KEYS] + at + first * step,
                    cache[VALUES] + at + first * step,
                )
                for i in range(count):
                    key = carray(pointer(keys + i * step, np.float32), head_dim)
                    for h in range(group):
                        product = np.float32(0)
                        for d in range(head_dim):
                            product += queries[h, d] * key[d]
                        scores[h, i] = product * scale
                for h in range(group):
                    before = scores[h, BLOCK]
                    most = before
                    for i in range(count):
                        most = max(most, scores[h, i])
                    total = np.float32(0)
                    for i in range(count):
                        weight = exp(scores[h, i] - most)
                        scores[h, i] = weight
                        total += weight
                    shrink = exp(before - most)
                    scores[h, BLOCK] = most
                    scores[h, BLOCK + 1] = scores[h, BLOCK + 1] * shrink + total
                    for d in range(head_dim):
                        out[h, d] *= shrink
                for i in range(count):
                    value = carray(pointer(values + i * step, np.float32), head_dim)
                    for h in range(group):
                        for d in range(head_dim):
                            out[h, d] += scores[h, i] * value[d]
            for h in range(group):
                inverse = np.float32(1) / scores[h, BLOCK + 1]
                for d in range(head_dim):
                    out[h, d] *= inverse

    return compile_task(task, SUMS)
