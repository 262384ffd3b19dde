"""A linear layer of int8 rows and int8 weights: int32 sums on the tensor cores, scales, bias and GELU in the epilogue.

Tiles come through TMA descriptors where the GPU has them (sm_90 and later), else through pointers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from lingbot_kernels.triton._rows import INTERPRETED, round_to

ALIGNMENT = 16  # bytes, of the rows that TMA reads
MULTIPROCESSORS = 132  # of the H100 that the configurations were measured on
LARGEST_K = 131071  # 128 * 128 * K must stay below 2**31
OUT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

CUBE: tl.constexpr = tl.constexpr(0.044715)
TO_POWER: tl.constexpr = tl.constexpr(-2 * math.sqrt(2 / math.pi) * math.log2(math.e))


@triton.jit
def gelu_tanh(x):
    """0.5 x (1 + tanh(u)) = x / (1 + exp(-2u)), u = sqrt(2 / pi) (x + 0.044715 x^3): nothing cancels where x < 0."""
    power = x * (TO_POWER + TO_POWER * CUBE * x * x)  # -2u, to the base of two
    if INTERPRETED:
        return x / (1 + tl.exp2(power))
    else:  # the GPU's own power and reciprocal, 2 ulp each: a division takes as many instructions as all the rest
        share = tl.inline_asm_elementwise(
            """
            {
            .reg .f32 a;
            ex2.approx.ftz.f32 a, $1;
            add.f32 a, a, 0f3F800000;
            rcp.approx.ftz.f32 $0, a;
            }
            """,
            "=f,f",
            [power],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
        return x * share


@triton.jit
def load_tile(
    source,
    row0,
    k0,
    rows,
    stride,
    DEPTH: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TMA: tl.constexpr,
):
    """[BLOCK, BLOCK_K] of source [rows, DEPTH] from (row0, k0) on; beyond the depth zeros, beyond the rows anything."""
    if TMA:
        return source.load([row0, k0])
    else:
        row = (row0 + tl.arange(0, BLOCK)) % rows  # a row that exists: its sums are not stored
        k = k0 + tl.arange(0, BLOCK_K)
        pointers = source + row.to(tl.int64)[:, None] * stride + k[None, :]
        if DEPTH % BLOCK_K == 0:
            return tl.load(pointers)
        else:
            return tl.load(pointers, mask=k[None, :] < DEPTH, other=0)


@triton.jit
def tile_of(index, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """(row, column) of tile `index`, GROUP_M rows of tiles at a time, so that tiles in flight share operands in L2."""
    group_size = GROUP_M * tiles_n
    first_m = index // group_size * GROUP_M
    size_m = min(tiles_m - first_m, GROUP_M)
    within = index % group_size
    return first_m + within % size_m, within // size_m


@triton.jit(do_not_specialize=["rows"])
def int8_linear_kernel(
    x,
    x_scale_ptr,
    w,
    w_scale_ptr,
    bias_ptr,
    y_ptr,
    rows,
    columns,
    x_stride,
    w_stride,
    y_stride,
    DEPTH: tl.constexpr,
    GELU: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    TMA: tl.constexpr,
):
    """y[m, n] = activation((sum_k x[m, k] w[n, k]) * (x_scale[m] * w_scale[n]) + bias[n]), rounded once

    x int8 [rows, DEPTH], w int8 [columns, DEPTH], TMA descriptors with TMA, else pointers; sums int32; scales float32;
    bias [columns] or None. Programs: one a tile of BLOCK_M x BLOCK_N.
    """
    tile_m, tile_n = tile_of(tl.program_id(0), tl.cdiv(rows, BLOCK_M), tl.cdiv(columns, BLOCK_N), GROUP_M)
    m0, n0 = tile_m * BLOCK_M, tile_n * BLOCK_N
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for k0 in range(0, DEPTH, BLOCK_K):
        a = load_tile(x, m0, k0, rows, x_stride, DEPTH, BLOCK_M, BLOCK_K, TMA)
        b = load_tile(w, n0, k0, columns, w_stride, DEPTH, BLOCK_N, BLOCK_K, TMA)
        sums = tl.dot(a, b.T, sums, out_dtype=tl.int32)
    m, n = m0 + tl.arange(0, BLOCK_M), n0 + tl.arange(0, BLOCK_N)
    x_scale = tl.load(x_scale_ptr + m, mask=m < rows, other=0.0)
    w_scale = tl.load(w_scale_ptr + n, mask=n < columns, other=0.0)
    value = sums.to(tl.float32) * (x_scale[:, None] * w_scale[None, :])
    if bias_ptr is not None:
        value += tl.load(bias_ptr + n, mask=n < columns, other=0.0).to(tl.float32)[None, :]
    if GELU:
        value = gelu_tanh(value)
    result = round_to(value, y_ptr.dtype.element_ty)
    pointers = y_ptr + m.to(tl.int64)[:, None] * y_stride + n[None, :]
    tl.store(pointers, result, mask=(m < rows)[:, None] & (n < columns)[None, :])


@dataclass(frozen=True)
class LinearConfig:
    """Tile, warps, pipeline stages and order of a launch.

    group_m: rows of tiles that are gone through together. tma: operands come through descriptors.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    group_m: int = 8
    tma: bool = True

    @property
    def shared_bytes(self) -> int:
        """Shared memory that the pipeline takes."""
        return self.num_stages * (self.block_m + self.block_n) * self.block_k


@lru_cache(maxsize=256)
def launch_config(rows: int, columns: int, depth: int, capability: tuple[int, int], out_size: int = 2) -> LinearConfig:
    """Configuration for rows x columns sums of `depth` products on a GPU of this compute capability.

    Measured on an H100. One wide tile a multiprocessor is the most efficient where it is large or deep enough to hide
    filling the pipeline and the epilogue; else two smaller ones hide each other's. out_size: bytes of a result; a
    float32 tile of 256 columns would spill on its way to memory.
    """
    if capability[0] in (9, 10):  # 227 KB of shared memory a multiprocessor
        tiles = -(-rows // 128) * -(-columns // 128)
        if tiles <= MULTIPROCESSORS:
            return LinearConfig(64, 128, 128, 4, 4)
        if out_size == 4:
            return LinearConfig(128, 128, 128, 8, 4)
        deep = depth >= 8192
        if depth >= 4096 and columns >= 4096 and (rows >= 4096 or (deep and tiles >= 5 * MULTIPROCESSORS)):
            return LinearConfig(128, 256, 128, 8, 4, group_m=16)
        if deep and tiles < 3 * MULTIPROCESSORS:
            return LinearConfig(128, 128, 256, 8, 3)
        return LinearConfig(128, 128, 128, 4, 3)
    if capability == (8, 0) and out_size == 2:  # 163 KB
        return LinearConfig(128, 256, 64, 8, 4, tma=False)
    return LinearConfig(128, 128, 128, 8, 3, tma=False)  # 99 KB; sm_120 has TMA, but spills with it


def why_not(x: torch.Tensor, w: torch.Tensor, out_dtype: torch.dtype) -> str | None:
    """Why this kernel can't serve these tensors, or None."""
    if out_dtype not in OUT_DTYPES:
        return f"out_dtype is {out_dtype}, must be bfloat16, float16 or float32"
    return None


def described(x: torch.Tensor) -> bool:
    """Whether TMA can read the rows of x [rows, columns]: both addresses and steps multiples of 16 bytes."""
    return x.data_ptr() % ALIGNMENT == 0 and x.stride(0) * x.element_size() % ALIGNMENT == 0


def int8_linear(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    w: torch.Tensor,
    w_scale: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str | None,
    y: torch.Tensor,
    *,
    config: LinearConfig | None = None,
) -> None:
    """Fill y [B, S, N], contiguous, from x int8 [B, S, K] and w int8 [N, K], inner strides 1, rows anywhere.

    x_scale float32 [B, S], contiguous; w_scale float32 [N]; bias [N] or None; activation None or "gelu_tanh".
    """
    batch, tokens, depth = x.shape
    columns = w.shape[0]
    if batch > 1 and x.stride(0) != tokens * x.stride(1):  # a batch's rows don't follow the one before
        for one, scale, out in zip(x.split(1), x_scale.split(1), y.split(1), strict=True):
            int8_linear(one, scale, w, w_scale, bias, activation, out, config=config)
        return
    rows = batch * tokens
    if not rows or not columns:
        return
    x = x.as_strided((rows, depth), (x.stride(1), 1))
    y = y.view(rows, columns)
    if config is None:
        config = launch_config(rows, columns, depth, capability(x.device), y.element_size())
    tma = config.tma and described(x) and described(w)
    int8_linear_kernel[(triton.cdiv(rows, config.block_m) * triton.cdiv(columns, config.block_n),)](
        TensorDescriptor(x, [rows, depth], [x.stride(0), 1], [config.block_m, config.block_k]) if tma else x,
        x_scale,
        TensorDescriptor(w, [columns, depth], [w.stride(0), 1], [config.block_n, config.block_k]) if tma else w,
        w_scale,
        bias,
        y,
        rows,
        columns,
        x.stride(0),
        w.stride(0),
        columns,
        DEPTH=depth,
        GELU=activation == "gelu_tanh",
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        GROUP_M=config.group_m,
        TMA=tma,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


@lru_cache(maxsize=64)
def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of a CUDA device; that of the smallest GPU served for a CPU, where kernels are interpreted."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (8, 6)
