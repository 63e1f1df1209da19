"""The GPU kernels: compared with float64 in Triton's interpreter, and compiled without a GPU.

The interpreter cannot multiply bfloat16, so only `make test-gpu` tests that dtype.
"""

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llama.cache import LayerCache, quantize
from llama.fast.gpu.device_weights import Matrix, narrowed
from llama.model import RMSNorm, apply_rotary_emb, precompute_freqs_cis

pytest.importorskip("triton", reason="Triton is for Linux")
from llama.fast.gpu.kernels.launch import CHUNK, Kernels

CPU = torch.device("cpu")
WIDTHS = ["wide", "int8", "fp8", "int4"]
DTYPES = {torch.float32: 1e-5, torch.float16: 1e-2}
HEADS, KV_HEADS, HEAD_DIM = 6, 2, 16


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """New memory is filled with NaN or the largest integer, so that unwritten results are
    noticed."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def kernels() -> Kernels:
    return Kernels(HEADS, CPU)


def matrix_of(width: str, n: int, k: int, dtype: torch.dtype) -> tuple[Matrix, Tensor]:
    """A random matrix in this width, and its values in float64."""
    weight = torch.randn(n, k) / math.sqrt(k)
    if width == "wide":
        return Matrix(weight.to(dtype), weight, width), weight.to(dtype).double()
    matrix = narrowed(weight, width, n)
    # In int4, the kernel rounds the product of weight and scale to its dtype.
    return matrix, matrix.widened(dtype if width == "int4" else torch.float32).double()


def assert_near(got: Tensor, want: Tensor, dtype: torch.dtype) -> None:
    assert got.shape == want.shape
    assert float((got - want).abs().max() / want.std()) < DTYPES[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize(
    ("n_tokens", "n", "k"),
    [(1, 32, 32), (3, 80, 96), (16, 100, 640), (17, 33, 160), (70, 40, 96)],
)
def test_project(
    kernels: Kernels, n_tokens: int, n: int, k: int, width: str, dtype: torch.dtype
) -> None:
    matrix, numbers = matrix_of(width, n, k, dtype)
    x, residual = torch.randn(n_tokens, k).to(dtype), torch.randn(n_tokens, n).to(dtype)
    product = x.double() @ numbers.T
    assert_near(kernels.project(x, matrix), product, dtype)
    assert_near(kernels.project(x, matrix, residual=residual), product + residual, dtype)
    assert kernels.project(x, matrix, dtype=torch.float32).dtype == torch.float32
    assert not kernels._counters.any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize(("n_tokens", "n", "k"), [(1, 32, 32), (5, 88, 640), (40, 24, 96)])
def test_swiglu(
    kernels: Kernels, n_tokens: int, n: int, k: int, width: str, dtype: torch.dtype
) -> None:
    matrix, numbers = matrix_of(width, 2 * n, k, dtype)
    x = torch.randn(n_tokens, k).to(dtype)
    gate, up = (x.double() @ numbers.T).chunk(2, -1)
    assert_near(kernels.swiglu(x, matrix), F.silu(gate) * up, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_is_the_models(kernels: Kernels, dtype: torch.dtype) -> None:
    norm = RMSNorm(72).to(dtype)
    with torch.no_grad():
        norm.weight.normal_()
    x = torch.randn(3, 5, 72).to(dtype)
    assert_near(kernels.norm(x, norm), norm(x).detach(), dtype)


@pytest.mark.parametrize("is_int8", [False, True])
@pytest.mark.parametrize("width", WIDTHS)
def test_queries_are_rotated_and_keys_and_values_stored(
    kernels: Kernels, width: str, is_int8: bool
) -> None:
    bsz, seqlen, k = 2, 3, 96
    dtype = torch.float32
    matrix, numbers = matrix_of(width, (HEADS + 2 * KV_HEADS) * HEAD_DIM, k, dtype)
    x, positions = torch.randn(bsz, seqlen, k), torch.tensor([[5, 6, 7], [30, 31, 32]])
    table = precompute_freqs_cis(HEAD_DIM, 64)
    shape = bsz, 40, KV_HEADS, HEAD_DIM
    cache = LayerCache.zeros(shape, torch.int8 if is_int8 else dtype, CPU)
    own = LayerCache.zeros(shape, dtype, CPU)
    q = kernels.qkv(x, matrix, table, positions, cache)
    product = (x.double() @ numbers.T).float().view(bsz, seqlen, -1, HEAD_DIM)
    xq, xk, xv = product.split([HEADS, KV_HEADS, KV_HEADS], 2)
    xq, xk = apply_rotary_emb(xq, xk, table[positions])
    own.update(positions, xk, xv)
    assert_near(q, xq, dtype)
    for got, want, scale in ((cache.k, own.k, cache.k_scale), (cache.v, own.v, cache.v_scale)):
        if scale is None:
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
            continue
        steps, scales = quantize(want)
        torch.testing.assert_close(scale, scales, rtol=1e-4, atol=1e-6)
        assert int((got.int() - steps.int()).abs().max()) <= 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_int8", [False, True])
@pytest.mark.parametrize("head_dim", [16, 24])
@pytest.mark.parametrize("seqlen", [1, 3, 30])
def test_attention(
    kernels: Kernels, seqlen: int, head_dim: int, is_int8: bool, dtype: torch.dtype
) -> None:
    """Rows that end at the edges of chunks. Keys after a row's last key are not read."""
    starts = torch.tensor([0, CHUNK - seqlen, CHUNK, 2 * CHUNK + 5])
    positions = starts[:, None] + torch.arange(seqlen)
    n_keys = 2 * CHUNK + 40
    q = torch.randn(4, seqlen, HEADS, head_dim).to(dtype)
    k, v = torch.randn(2, 4, n_keys, KV_HEADS, head_dim).to(dtype)
    cache = LayerCache(k, v)
    if is_int8:
        k8, k_scale = quantize(k)
        v8, v_scale = quantize(v)
        cache = LayerCache(k8, v8, k_scale, v_scale)
        k, v = k8 * k_scale[..., None], v8 * v_scale[..., None]
    hidden = torch.arange(n_keys) > positions[:, -1:]
    if not is_int8:
        cache.k[hidden], cache.v[hidden] = math.nan, math.nan
    mask = (torch.arange(n_keys) <= positions[..., None])[:, None]
    rows = [x.double().transpose(1, 2) for x in (q, k.nan_to_num(), v.nan_to_num())]
    want = F.scaled_dot_product_attention(*rows, mask, enable_gqa=True).transpose(1, 2)
    assert_near(kernels.attention(q, positions, cache), want, dtype)


def test_rows_do_not_depend_on_their_company(kernels: Kernels) -> None:
    matrix, _ = matrix_of("wide", 48, 640, torch.float32)
    x = torch.randn(16, 640)
    together = kernels.project(x, matrix)
    alone = torch.cat([kernels.project(row[None], matrix) for row in x])
    assert torch.equal(together, alone)


COMPILE = """
import sys, torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from llama import ModelArgs, Transformer
from llama.fast.gpu import device_weights
from llama.fast.gpu.kernels import launch
from llama.fast.gpu.transformer import GpuTransformer

capability = int(sys.argv[1])
names = {torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int8: "*i8", torch.uint8: "*u8",
         torch.int32: "*i32", torch.int64: "*i64"}

def compile(self, kernel, grid, *args, **options):
    values = dict(zip(kernel.arg_names, args)) | options
    signature, constants, attributes = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        value = values[name]
        if kernel.params[i].is_constexpr:
            signature[name], constants[(i,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name], attributes[(i,)] = names[value.dtype], [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32"
    source = ASTSource(kernel, signature, constants, attributes)
    done = triton.compile(source, target=GPUTarget("cuda", capability, 32),
                          options={"num_warps": options.get("num_warps", 4)})
    assert done.asm["cubin"], kernel
    print(kernel.__name__)

launch.Kernels._launch = compile
for width in sys.argv[2:]:
    args = ModelArgs(dim=512, n_layers=1, n_heads=4, n_kv_heads=2, vocab_size=64, multiple_of=64,
                     max_seq_len=512)
    model = Transformer(args).bfloat16()
    if width != "wide":
        device_weights.narrow(model, width, torch.device("cpu"))
    net = GpuTransformer(model)
    net.kernels = launch.Kernels(net.n_heads, net.device)
    net.kernels.compile = lambda work: None
    cache = net.make_cache(1, 512, torch.int8 if width == "int8" else None)
    with torch.inference_mode():
        net.logits(net.features(torch.zeros(1, 1, dtype=torch.long), torch.zeros(1).long(), cache))
"""


@pytest.mark.parametrize(("capability", "widths"), [(80, "wide int8 int4"), (90, "wide fp8 int4")])
def test_kernels_compile_for_gpus(capability: int, widths: str, tmp_path: Path) -> None:
    """Triton's compiler and NVIDIA's assembler need no GPU."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    command = [sys.executable, "-c", COMPILE, str(capability), *widths.split()]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    compiled: Any = set(run.stdout.split())
    assert compiled == {"rms_norm", "qkv", "attend", "combine", "project", "swiglu"}
