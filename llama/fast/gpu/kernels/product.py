"""Products of few tokens with weight matrices, where a decode step spends its time.

A step reads every weight once and computes little with it, so the kernels are made to read at the
memory's full speed. A program computes BLOCK_N features of BLOCK_M tokens. It loads weights as they
are stored and widens them in registers. The weights are the left operand of the matrix units, so a
token's sums are formed in the same order whatever BLOCK_M is and whatever tokens stand beside it.

Three kernels differ in what they do with finished sums. `project` may add a residual. `swiglu`
joins a gate and an up projection. `qkv` rotates queries and keys and stores keys and values in the
cache. If a matrix has too few rows to fill the GPU, several programs share the columns of a tile
(SPLITS). The program that finishes last adds their sums, always in the order of the columns.

Widths of a weight (N, K): "wide", the dtype of the activations; "int8" and "fp8", bytes of int8 or
e4m3 numbers, and a scale for each row; "int4", four bits for each weight, and a scale for each 32
weights of a row (see `device_weights`).
"""

import triton
import triton.language as tl

GROUP = tl.constexpr(32)  # int4 weights that share a scale
HALF = tl.constexpr(16)  # bytes that hold these weights
COUNTS = ["n_tokens", "tokens_a_row"]  # one compiled kernel serves all values of these
USE_PTX = tl.constexpr(not triton.knobs.runtime.interpret)  # the interpreter has no PTX


@triton.jit
def _multiply(
    sums, x, weight, scales, tokens, features, k0, n_tokens, n_features, K,
    WIDTH: tl.constexpr, BLOCK_K: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Add the products of BLOCK_K columns, from k0 on, to sums (BLOCK_N, BLOCK_M)."""
    is_feature = features < n_features
    if WIDTH == "int4":
        # A byte holds the weights j and j + 16 of its group. So there are two products of half the
        # length, one for the low bits and one for the high bits.
        groups = k0 // GROUP + tl.arange(0, BLOCK_K // GROUP)
        is_group = is_feature[:, None] & (groups < K // GROUP)[None, :]
        at = features[:, None] * (K // GROUP) + groups[None, :]
        steps = tl.load(scales + at, mask=is_group, other=0)[:, :, None]
        at = at[:, :, None] * HALF + tl.arange(0, HALF)[None, None, :]
        pairs = tl.load(weight + at, mask=is_group[:, :, None], other=0)  # (BLOCK_N, groups, 16)
        columns = tl.arange(0, BLOCK_K // 2)
        ks = k0 + columns // HALF * GROUP + columns % HALF
        low = _inputs(x, tokens, ks, n_tokens, K, EVEN)
        high = _inputs(x, tokens, ks + HALF, n_tokens, K, EVEN)
        shape: tl.constexpr = (pairs.shape[0], BLOCK_K // 2)
        tile = tl.reshape(_widen_int4(pairs, steps, False, low.dtype), shape)
        sums = tl.dot(tile, low, sums, input_precision="ieee")
        tile = tl.reshape(_widen_int4(pairs, steps, True, low.dtype), shape)
        return tl.dot(tile, high, sums, input_precision="ieee")
    ks = k0 + tl.arange(0, BLOCK_K)
    mask = is_feature[:, None]
    if not EVEN:
        mask = mask & (ks < K)[None, :]
    tile = tl.load(weight + features.to(tl.int64)[:, None] * K + ks[None, :], mask=mask, other=0)
    inputs = _inputs(x, tokens, ks, n_tokens, K, EVEN)
    tile = _widen_fp8(tile, inputs.dtype) if WIDTH == "fp8" else tile.to(inputs.dtype)
    return tl.dot(tile, inputs, sums, input_precision="ieee")


@triton.jit
def _widen_fp8(bytes_, dtype: tl.constexpr):
    """e4m3 numbers, given as bytes, in another dtype."""
    if USE_PTX and dtype == tl.bfloat16:
        # Sign, exponent and mantissa move to where bfloat16 has them. The exponents' biases, 7 and
        # 127, differ by 120: a product with 2**120 makes up for it, also for subnormal numbers.
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 t, u, bias, zero;
            mov.b32 bias, 0x7B807B80;
            mov.b32 zero, 0x80008000;
            prmt.b32 t, $2, 0, 0x1404;
            shr.b32 u, t, 4;
            and.b32 u, u, 0x07F007F0;
            lop3.b32 t, t, 0x80008000, u, 0xEA;
            fma.rn.bf16x2 $0, t, bias, zero;
            prmt.b32 t, $2, 0, 0x3424;
            shr.b32 u, t, 4;
            and.b32 u, u, 0x07F007F0;
            lop3.b32 t, t, 0x80008000, u, 0xEA;
            fma.rn.bf16x2 $1, t, bias, zero;
            }""",
            "=r,=r,r", [bytes_], tl.bfloat16, is_pure=True, pack=4,
        )  # fmt: skip
    return bytes_.to(tl.float8e4nv, bitcast=True).to(dtype)


@triton.jit
def _widen_int4(pairs, steps, HIGH: tl.constexpr, dtype: tl.constexpr):
    """(the low or the HIGH four bits of each byte, minus 8) * steps -> (N, groups, 16).

    pairs: bytes (N, groups, 16). steps: bfloat16 (N, groups, 1).
    """
    if USE_PTX and dtype == tl.bfloat16:
        # For n < 128, the bits 0x4300 + n are the bfloat16 number 128 + n. Subtracting 136 gives
        # n - 8.
        tail: tl.constexpr = """
            and.b32 t, t, 0x0F0F0F0F;
            prmt.b32 u, t, 0x43434343, 0x4140;
            fma.rn.bf16x2 u, u, one, bias;
            fma.rn.bf16x2 $0, u, $3, zero;
            prmt.b32 u, t, 0x43434343, 0x4342;
            fma.rn.bf16x2 u, u, one, bias;
            fma.rn.bf16x2 $1, u, $4, zero;
            }"""
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 t, u, one, bias, zero;
            mov.b32 one, 0x3F803F80;
            mov.b32 bias, 0xC308C308;
            mov.b32 zero, 0x80008000;
            shr.b32 t, $2, """ + ("4;" if HIGH else "0;") + tail,
            "=r,=r,r,r,r", [pairs, steps], tl.bfloat16, is_pure=True, pack=4,
        )  # fmt: skip
    nibbles = pairs >> 4 if HIGH else pairs & 15
    return ((nibbles.to(tl.float32) - 8) * steps.to(tl.float32)).to(dtype)


@triton.jit
def _inputs(x, tokens, ks, n_tokens, K, EVEN: tl.constexpr):
    """The columns ks of the tokens, (BLOCK_K, BLOCK_M)."""
    mask = (tokens < n_tokens)[None, :]
    if not EVEN:
        mask = mask & (ks < K)[:, None]
    return tl.load(x + tokens[None, :] * K + ks[:, None], mask=mask, other=0)


@triton.jit
def _sums(
    x, weight, scales, partial, counters, tokens, features, n_tokens, n_features, K,
    WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    EVEN: tl.constexpr, STAGES: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """The sums (BLOCK_N, BLOCK_M), and whether they are finished. If several programs share a
    tile, only the last of them has finished sums.

    partial: float32 scratch memory, with one tile for each program. counters: int32 zeros, one for
    each tile of features and tokens; they are zeros again at the end.
    """
    sums = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    split = tl.program_id(2)
    share = tl.cdiv(tl.cdiv(K, BLOCK_K), SPLITS) * BLOCK_K
    end = tl.minimum(K, (split + 1) * share)
    for k0 in tl.range(split * share, end, BLOCK_K, num_stages=STAGES):
        sums = _multiply(
            sums, x, weight, scales, tokens, features, k0, n_tokens, n_features, K,
            WIDTH, BLOCK_K, EVEN,
        )  # fmt: skip
    is_mine = True
    if SPLITS > 1:
        tile = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
        size: tl.constexpr = BLOCK_N * BLOCK_M
        at = tl.arange(0, BLOCK_N)[:, None] * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
        at = partial + tile * SPLITS * size + at
        tl.store(at + split * size, sums)
        tl.debug_barrier()  # all threads must have stored before the counter increases
        is_mine = tl.atomic_add(counters + tile, 1, sem="acq_rel") == SPLITS - 1
        if is_mine:
            sums = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
            for i in tl.static_range(SPLITS):
                sums += tl.load(at + i * size, cache_modifier=".cg")
            tl.store(counters + tile, 0)
    if WIDTH == "int8" or WIDTH == "fp8":
        sums *= tl.load(scales + features, mask=features < n_features, other=0)[:, None]
    return sums, is_mine


@triton.jit(do_not_specialize=COUNTS)
def project(
    out, x, weight, scales, residual, partial, counters, n_tokens, n_features, K,
    HAS_RESIDUAL: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    EVEN: tl.constexpr, STAGES: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """out (M, N) = x (M, K) @ weight (N, K).T, plus residual (M, N)."""
    features = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    tokens = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    sums, is_mine = _sums(
        x, weight, scales, partial, counters, tokens, features, n_tokens, n_features, K,
        WIDTH, BLOCK_M, BLOCK_N, BLOCK_K, EVEN, STAGES, SPLITS,
    )  # fmt: skip
    if not is_mine:
        return
    mask = (features < n_features)[:, None] & (tokens < n_tokens)[None, :]
    at = tokens[None, :] * n_features + features[:, None]
    sums = sums.to(out.dtype.element_ty)
    if HAS_RESIDUAL:
        sums += tl.load(residual + at, mask=mask, other=0)
    tl.store(out + at, sums, mask=mask)


@triton.jit(do_not_specialize=COUNTS)
def swiglu(
    out, x, weight, scales, partial, counters, n_tokens, n_features, K,
    WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    EVEN: tl.constexpr, STAGES: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """out (M, N) = silu(gate) * up, where weight (2 N, K) holds the gate's rows, then the up's.

    A tile holds BLOCK_N / 2 rows of the gate and the same rows of the up projection.
    """
    HALF_N: tl.constexpr = BLOCK_N // 2
    features = tl.program_id(0) * HALF_N + tl.arange(0, HALF_N)
    tokens = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    tile = tl.arange(0, BLOCK_N)
    rows = tl.program_id(0) * HALF_N + tile % HALF_N
    rows = tl.where(rows < n_features, rows + tile // HALF_N * n_features, 2 * n_features)
    sums, is_mine = _sums(
        x, weight, scales, partial, counters, tokens, rows, n_tokens, 2 * n_features, K,
        WIDTH, BLOCK_M, BLOCK_N, BLOCK_K, EVEN, STAGES, SPLITS,
    )  # fmt: skip
    if not is_mine:
        return
    gate, up = tl.split(tl.permute(tl.reshape(sums, (2, HALF_N, BLOCK_M)), (1, 2, 0)))
    mask = (features < n_features)[:, None] & (tokens < n_tokens)[None, :]
    at = tokens[None, :] * n_features + features[:, None]
    tl.store(out + at, (gate * tl.sigmoid(gate) * up).to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=COUNTS)
def qkv(
    q, keys, values, x, weight, scales, partial, counters, rotations, positions,
    n_tokens, K, stride_row, stride_position, n_heads, n_kv_heads, head_dim, tokens_a_row,
    WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    EVEN: tl.constexpr, STAGES: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Store rotated queries in q (M, H, hd), rotated keys and the values in their cache rows.

    weight ((H + 2 K) hd, K): rows of the queries, the keys, the values. rotations: float32
    (positions, hd / 2, 2), cosines and sines. Token m stands in row m // tokens_a_row of the cache
    at positions[m].
    """
    n_features = (n_heads + 2 * n_kv_heads) * head_dim
    features = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    tokens = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    sums, is_mine = _sums(
        x, weight, scales, partial, counters, tokens, features, n_tokens, n_features, K,
        WIDTH, BLOCK_M, BLOCK_N, BLOCK_K, EVEN, STAGES, SPLITS,
    )  # fmt: skip
    if not is_mine:
        return
    PAIRS: tl.constexpr = BLOCK_N // 2
    first, second = tl.split(tl.permute(tl.reshape(sums, (PAIRS, 2, BLOCK_M)), (0, 2, 1)))
    feature = tl.program_id(0) * BLOCK_N + 2 * tl.arange(0, PAIRS)
    _store_heads(
        q, keys, values, first, second, feature, tokens, rotations, positions, n_tokens,
        stride_row, stride_position, n_heads, n_kv_heads, head_dim, tokens_a_row,
    )  # fmt: skip


@triton.jit(do_not_specialize=COUNTS)
def rotate(
    q, keys, values, x, rotations, positions, n_tokens, stride_row, stride_position,
    n_heads, n_kv_heads, head_dim, tokens_a_row, BLOCK_M: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """Rotate and store as `qkv` does. x (M, (H + 2 K) hd) holds the products, already computed."""
    n_features = (n_heads + 2 * n_kv_heads) * head_dim
    feature = 2 * (tl.program_id(0) * PAIRS + tl.arange(0, PAIRS))
    tokens = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask = (feature < n_features)[:, None] & (tokens < n_tokens)[None, :]
    at = x + tokens.to(tl.int64)[None, :] * n_features + feature[:, None]
    first = tl.load(at, mask=mask, other=0).to(tl.float32)
    second = tl.load(at + 1, mask=mask, other=0).to(tl.float32)
    _store_heads(
        q, keys, values, first, second, feature, tokens, rotations, positions, n_tokens,
        stride_row, stride_position, n_heads, n_kv_heads, head_dim, tokens_a_row,
    )  # fmt: skip


@triton.jit
def _store_heads(
    q, keys, values, first, second, feature, tokens, rotations, positions, n_tokens,
    stride_row, stride_position, n_heads, n_kv_heads, head_dim, tokens_a_row,
):  # fmt: skip
    """Rotate the pairs of features (feature, feature + 1) of queries and keys. Store queries, keys
    and values.

    first, second: float32 (PAIRS, BLOCK_M). A pair is rotated by the angle of its position.
    """
    n_features = (n_heads + 2 * n_kv_heads) * head_dim
    head = feature // head_dim
    is_token = tokens < n_tokens
    position = tl.load(positions + tokens, mask=is_token, other=0)
    mask = (feature < n_features)[:, None] & is_token[None, :]
    is_rotated = mask & (head < n_heads + n_kv_heads)[:, None]
    angle = rotations + position[None, :] * head_dim + (feature % head_dim)[:, None]
    cosine = tl.load(angle, mask=is_rotated, other=1)
    sine = tl.load(angle + 1, mask=is_rotated, other=0)
    first, second = first * cosine - second * sine, first * sine + second * cosine

    at = q + tokens.to(tl.int64)[None, :] * (n_heads * head_dim) + feature[:, None]
    _store_pairs(at, first, second, mask & (head < n_heads)[:, None])
    place = (tokens // tokens_a_row).to(tl.int64) * stride_row + position * stride_position
    at = keys + place[None, :] + (feature - n_heads * head_dim)[:, None]
    _store_pairs(at, first, second, is_rotated & (head >= n_heads)[:, None])
    at = values + place[None, :] + (feature - (n_heads + n_kv_heads) * head_dim)[:, None]
    _store_pairs(at, first, second, mask & (head >= n_heads + n_kv_heads)[:, None])


@triton.jit
def _store_pairs(at, first, second, mask):
    tl.store(at, first.to(at.dtype.element_ty), mask=mask)
    tl.store(at + 1, second.to(at.dtype.element_ty), mask=mask)


@triton.jit
def rms_norm(out, x, weight, dim, eps, BLOCK: tl.constexpr):
    """RMSNorm of a token: x and out (M, dim). It rounds at the same places as `RMSNorm`."""
    token = tl.program_id(0)
    d = tl.arange(0, BLOCK)
    mask = d < dim
    x = tl.load(x + token * dim + d, mask=mask, other=0).to(tl.float32)
    rms = tl.rsqrt(tl.sum(x * x, 0) / dim + eps)
    gain = tl.load(weight + d, mask=mask, other=0)
    tl.store(out + token * dim + d, (x * rms).to(gain.dtype) * gain, mask=mask)


@triton.jit
def silu_times(out, x, n, BLOCK: tl.constexpr):
    """out (M, n) = silu(gate) * up, where a row of x (M, 2 n) holds the gate's features first."""
    token = tl.program_id(1).to(tl.int64)
    feature = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = feature < n
    gate = tl.load(x + token * 2 * n + feature, mask=mask, other=0).to(tl.float32)
    up = tl.load(x + token * 2 * n + n + feature, mask=mask, other=0).to(tl.float32)
    tl.store(
        out + token * n + feature, (gate * tl.sigmoid(gate) * up).to(out.dtype.element_ty), mask
    )
