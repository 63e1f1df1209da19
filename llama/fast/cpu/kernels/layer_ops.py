"""Tasks of a layer besides its matrix products: norm, RoPE, storing in the KV cache, attention.

Shapes: n tokens, each with a row and a position of the cache; H query heads, K key/value heads,
hd head_dim, D dim. Numbers are float32; the cache may be int8. The result of a token does not
depend on the other tokens, to the last bit.
"""

import functools
from collections.abc import Callable

import numpy as np
from numba import carray, njit

from llama.fast.cpu.kernels.activations import step_of
from llama.fast.cpu.kernels.attention import add_values, score_keys
from llama.fast.cpu.kernels.compile import VERSION, compile_task
from llama.fast.cpu.kernels.exponential import exp
from llama.fast.cpu.kernels.instructions import fetch_add, pointer
from llama.fast.cpu.kernels.job import N

# Fields of the job of add_and_norm.
DIM, H, DELTA, WEIGHT, EPS, OUT, BIAS = range(2, 9)
# Fields of the job of store and of attend.
LAYER, GROUP, KV_HEADS, HEAD_DIM, QKV, ROTATIONS, CACHE, SCORES, HEADS = range(2, 11)
LENGTH = 11

# Fields of CACHE, which all layers share: tokens in a row; the address of the array of the rows'
# first positions; the cache's strides in elements; the addresses of keys and values; the addresses
# of their scales, or 0 unless the cache is int8. Each head has one scale at each position.
(
    SEQLEN, STARTS, TO_LAYER, TO_ROW, TO_POSITION, TO_HEAD, KEYS, VALUES, KEY_SCALES, VALUE_SCALES,
) = range(10)  # fmt: skip
CACHE_LENGTH = 10

TOKENS = 8  # neighbours in a row; a thread reads a block of keys for all of them, then the next
BLOCK = 64  # keys of one pass of the online softmax
PREFETCH = 16  # positions ahead; the processor itself does not prefetch from page to page
STATS = 2  # after a block's scores: the running maximum, and the running sum of the weights
LEAST = np.float32(-3e38)  # start of the running maximum

# Fast-math flags. The compiler may reorder sums, the same way in each run. NaN stays NaN.
SUMS = {"reassoc", "contract", "nsz"}

Task = Callable[[int], None]


@functools.cache
def add_and_norm() -> Task:
    """h += delta, where its address is not 0; out = h / rms(h) * weight. All (n, D).

    BIAS is the address of a bias of delta (D), or 0. EPS holds the bits of a float32.
    """
    version = VERSION

    def task(address):  # type: ignore[no-untyped-def]
        version  # noqa: B018
        job = carray(address, LENGTH)
        n, dim = job[N], job[DIM]
        eps = np.int32(job[EPS]).view(np.float32)
        weight = carray(pointer(job[WEIGHT], np.float32), dim)
        while True:
            token = fetch_add(address)
            if token >= n:
                break
            row = 4 * token * dim
            h = carray(pointer(job[H] + row, np.float32), dim)
            out = carray(pointer(job[OUT] + row, np.float32), dim)
            if job[DELTA] != 0:
                delta = carray(pointer(job[DELTA] + row, np.float32), dim)
                for i in range(dim):
                    h[i] += delta[i]
            if job[BIAS] != 0:
                bias = carray(pointer(job[BIAS], np.float32), dim)
                for i in range(dim):
                    h[i] += bias[i]
            squares = np.float32(0)
            for i in range(dim):
                squares += h[i] * h[i]
            scale = np.float32(1) / np.sqrt(squares / np.float32(dim) + eps)
            for i in range(dim):
                out[i] = h[i] * scale * weight[i]

    return compile_task(task, SUMS)


@njit(error_model="numpy")
def locate(job, token):  # type: ignore[no-untyped-def]
    """A token's position, and the offset in the cache of its layer and row, in elements."""
    cache = carray(pointer(job[CACHE], np.int64), CACHE_LENGTH)
    row, step = token // cache[SEQLEN], token % cache[SEQLEN]
    start = carray(pointer(cache[STARTS], np.int64), row + 1)[row]
    return start + step, job[LAYER] * cache[TO_LAYER] + row * cache[TO_ROW]


@njit(error_model="numpy")
def store_head(address, head_dim, cached, scales, at):  # type: ignore[no-untyped-def]
    """Store a head in the cache: as float32, or as int8 and its scale."""
    x = carray(pointer(address, np.float32), head_dim)
    if scales == 0:
        plain = carray(pointer(cached + 4 * at, np.float32), head_dim)
        for i in range(head_dim):
            plain[i] = x[i]
        return
    step = step_of(carray(pointer(address, np.int32), head_dim))
    carray(pointer(scales + 4 * (at // head_dim), np.float32), 1)[0] = step
    rounded = carray(pointer(cached + at, np.int8), head_dim)
    for i in range(head_dim):
        steps = np.rint(x[i] / step) if step > np.float32(0) else np.float32(0)
        rounded[i] = np.int8(np.int32(max(np.float32(-127), min(steps, np.float32(127)))))


@functools.cache
def store() -> Task:
    """Rotate queries and keys of qkv (n, H + 2 K, hd) in place, by RoPE, and store keys and values
    in the cache.

    rotations: (positions, hd / 2, 2), cosines and sines.
    """
    version = VERSION

    def task(address):  # type: ignore[no-untyped-def]
        version  # noqa: B018
        job = carray(address, LENGTH)
        n, group, kv_heads, head_dim = job[N], job[GROUP], job[KV_HEADS], job[HEAD_DIM]
        heads, width = group * kv_heads, 4 * head_dim
        cache = carray(pointer(job[CACHE], np.int64), CACHE_LENGTH)
        while True:
            token = fetch_add(address)
            if token >= n:
                break
            position, row = locate(job, token)
            turns = carray(
                pointer(job[ROTATIONS] + position * width, np.float32), (head_dim // 2, 2)
            )
            queries = job[QKV] + token * (heads + 2 * kv_heads) * width
            keys, values = queries + heads * width, queries + (heads + kv_heads) * width
            for head in range(heads + kv_heads):
                pairs = carray(pointer(queries + head * width, np.float32), (head_dim // 2, 2))
                for j in range(head_dim // 2):
                    x, y = pairs[j, 0], pairs[j, 1]
                    pairs[j, 0] = x * turns[j, 0] - y * turns[j, 1]
                    pairs[j, 1] = x * turns[j, 1] + y * turns[j, 0]
            for head in range(kv_heads):
                at = row + position * cache[TO_POSITION] + head * cache[TO_HEAD]
                store_head(keys + head * width, head_dim, cache[KEYS], cache[KEY_SCALES], at)
                store_head(values + head * width, head_dim, cache[VALUES], cache[VALUE_SCALES], at)

    return compile_task(task)


@njit(error_model="numpy")
def scale_by(numbers, count, scales, first, step):  # type: ignore[no-untyped-def]
    """numbers[i] *= scales[first + i * step]; `scales` is an address."""
    factors = carray(pointer(scales + 4 * first, np.float32), count * step)
    for i in range(count):
        numbers[i] *= factors[i * step]


@njit(error_model="numpy")
def results_of(job, token, head, head_dim):  # type: ignore[no-untyped-def]
    """For the query heads that share a key/value head: the sums of the values (group, hd), and the
    scores of a block (group, BLOCK + STATS)."""
    group = job[GROUP]
    first = (token * job[KV_HEADS] + head) * group
    sums = pointer(job[HEADS] + 4 * first * head_dim, np.float32)
    scores = pointer(job[SCORES] + 4 * first * (BLOCK + STATS), np.float32)
    return carray(sums, (group, head_dim)), carray(scores, (group, BLOCK + STATS))


@njit(error_model="numpy", fastmath=SUMS)
def weigh(scores, sums, count, score_scale):  # type: ignore[no-untyped-def]
    """Turn a query's scores of a block into weights. Its sums so far are scaled down if the block
    has a larger score than all blocks before. Unused places get tiny weights."""
    for i in range(count, BLOCK):
        scores[i] = LEAST
    before = most = scores[BLOCK]
    for i in range(BLOCK):
        scores[i] *= score_scale
        most = max(most, scores[i])
    total = np.float32(0)
    for i in range(BLOCK):
        weight = exp(scores[i] - most)
        scores[i] = weight
        total += weight
    if most > before:
        shrink = exp(before - most)
        scores[BLOCK] = most
        scores[BLOCK + 1] *= shrink
        for d in range(len(sums)):
            sums[d] *= shrink
    scores[BLOCK + 1] += total


@functools.cache
def attend(head_dim: int, lanes: int) -> Task:
    """Attention of each token's heads over its row of the cache up to its own position.

    scores: a buffer (n, H, BLOCK + STATS). heads: the result (n, H, hd). lanes: of a vector. The
    keys are read in blocks, for all query heads that share them and for some tokens of a row. The
    softmax is online: a block with a larger score scales the sums so far down. Milakov & Gimelshein
    2018, arxiv.org/abs/1805.02867.
    """
    version = VERSION
    score_scale = np.float32(1 / np.sqrt(head_dim))

    def task(address):  # type: ignore[no-untyped-def]
        version  # noqa: B018
        job = carray(address, LENGTH)
        group, kv_heads = job[GROUP], job[KV_HEADS]
        cache = carray(pointer(job[CACHE], np.int64), CACHE_LENGTH)
        seqlen, is_rounded = cache[SEQLEN], cache[KEY_SCALES] != 0
        size = 1 if is_rounded else 4
        step, scale_step = size * cache[TO_POSITION], cache[TO_POSITION] // head_dim
        width, to_row = 4 * head_dim, 4 * (BLOCK + STATS)
        parts = (seqlen + TOKENS - 1) // TOKENS  # of a row
        all_parts = job[N] // seqlen * parts
        while True:
            chunk = fetch_add(address)
            if chunk >= all_parts * kv_heads:
                break
            # Neighbouring chunks may read the same keys.
            part, head = chunk % all_parts, chunk // all_parts
            first = part // parts * seqlen + part % parts * TOKENS
            tokens = range(first, first + min(TOKENS, seqlen - part % parts * TOKENS))
            position, at = locate(job, first)
            at += head * cache[TO_HEAD]
            for token in tokens:
                out, scores = results_of(job, token, head, head_dim)
                out[:] = np.float32(0)
                scores[:, BLOCK], scores[:, BLOCK + 1] = LEAST, np.float32(0)
            for begin in range(0, position + len(tokens), BLOCK):
                keys = cache[KEYS] + size * at + begin * step
                values = cache[VALUES] + size * at + begin * step
                scale_at = at // head_dim + begin * scale_step
                for token in tokens:
                    count = min(BLOCK, position + token - first + 1 - begin)
                    if count <= 0:
                        continue
                    ahead = PREFETCH * step if token == first else 0
                    queries = job[QKV] + width * (token * (group + 2) * kv_heads + head * group)
                    out, scores = results_of(job, token, head, head_dim)
                    rows = scores.ctypes.data
                    if is_rounded:
                        score_keys(
                            "int8", head_dim, lanes, group, queries, count, keys, step, ahead, rows,
                            to_row,
                        )  # fmt: skip
                    else:
                        score_keys(
                            "float32", head_dim, lanes, group, queries, count, keys, step, ahead,
                            rows, to_row,
                        )  # fmt: skip
                    for h in range(group):
                        weights, sums = rows + h * to_row, out.ctypes.data + h * width
                        if is_rounded:
                            scale_by(scores[h], count, cache[KEY_SCALES], scale_at, scale_step)
                            weigh(scores[h], out[h], count, score_scale)
                            scale_by(scores[h], count, cache[VALUE_SCALES], scale_at, scale_step)
                            add_values(
                                "int8", head_dim, lanes, weights, count, values, step, ahead, sums
                            )
                        else:
                            weigh(scores[h], out[h], count, score_scale)
                            add_values(
                                "float32", head_dim, lanes, weights, count, values, step, ahead,
                                sums,
                            )  # fmt: skip
            for token in tokens:
                out, scores = results_of(job, token, head, head_dim)
                for h in range(group):
                    inverse = np.float32(1) / scores[h, BLOCK + 1]
                    for d in range(head_dim):
                        out[h, d] *= inverse

    return compile_task(task, SUMS)
