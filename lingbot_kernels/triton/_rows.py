"""What the kernels share: pairs of values packed in words, rows held in registers as chunks, and ring slots.

A row of D values is a tuple of chunks. A chunk is a power-of-two tensor of which every thread holds one 16-byte vector,
so that rows like 5120 = 5 x 1024 leave no lane idle. Kernels that rotate pairs see a row as D / 2 words, one a pair
(32 bits for bf16 and f16, 64 for float32): a thread then holds both values of a pair and nothing is shuffled.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from triton import knobs

from lingbot_kernels.ring import slot
from lingbot_kernels.triton._launch import launch

VECTOR_BYTES = 16
MAX_DIM = 16384
LONG_ROW = 4096  # values: from here on a row fills several warps
FEW_ROWS = 2376  # 18 rows a multiprocessor of an H100: about one wave, whose length the latency of one row decides
FEW_ROWS_WARPS = 8
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# The interpreter truncates float32 -> bfloat16 and has no inline assembly: it rounds in integers instead.
INTERPRETED: tl.constexpr = tl.constexpr(knobs.runtime.interpret)


@triton.jit
def round_to(x, dtype: tl.constexpr):
    """float32 x rounded to `dtype`, nearest even."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return x.to(dtype)


@triton.jit
def unpack(word, dtype: tl.constexpr):
    """The pair (low, high) of a word, as float32."""
    if dtype == tl.float32:
        low = (word & 0xFFFFFFFF).to(tl.uint32).to(tl.float32, bitcast=True)
        return low, (word >> 32).to(tl.uint32).to(tl.float32, bitcast=True)
    elif dtype == tl.bfloat16:
        return (word << 16).to(tl.float32, bitcast=True), (word & 0xFFFF0000).to(tl.float32, bitcast=True)
    else:
        low = (word & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True)
        return low.to(tl.float32), (word >> 16).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def pack(low, high, dtype: tl.constexpr):
    """The word of two float32 values, each rounded to `dtype`, nearest even."""
    if dtype == tl.float32:
        low_bits = low.to(tl.uint32, bitcast=True).to(tl.uint64)
        return low_bits | (high.to(tl.uint32, bitcast=True).to(tl.uint64) << 32)
    elif INTERPRETED:
        low_bits = round_to(low, dtype).to(tl.uint16, bitcast=True).to(tl.uint32)
        return low_bits | (round_to(high, dtype).to(tl.uint16, bitcast=True).to(tl.uint32) << 16)
    elif dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [low, high], dtype=tl.uint32, is_pure=True, pack=1
        )
    else:
        return tl.inline_asm_elementwise(
            "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,f,f", [low, high], dtype=tl.uint32, is_pure=True, pack=1
        )


@triton.jit
def as_words(ptr):
    """A pointer to 16-bit or 32-bit values as a pointer to words of two."""
    if ptr.dtype.element_ty == tl.float32:
        return ptr.to(tl.pointer_type(tl.uint64))
    else:
        return ptr.to(tl.pointer_type(tl.uint32))


@triton.jit
def load_chunk(ptr, i: tl.constexpr, LENGTH: tl.constexpr, CHUNK: tl.constexpr, EVICT: tl.constexpr = ""):
    """Chunk i of a row of LENGTH elements (values or words); zeros beyond its end."""
    index = i * CHUNK + tl.arange(0, CHUNK)
    if (i + 1) * CHUNK <= LENGTH:
        return tl.load(ptr + index, eviction_policy=EVICT)
    else:
        return tl.load(ptr + index, mask=index < LENGTH, other=0, eviction_policy=EVICT)


@triton.jit
def store_chunk(ptr, value, i: tl.constexpr, LENGTH: tl.constexpr, CHUNK: tl.constexpr, MODIFIER: tl.constexpr = ""):
    """Chunk i of a row of LENGTH elements, written."""
    index = i * CHUNK + tl.arange(0, CHUNK)
    if (i + 1) * CHUNK <= LENGTH:
        tl.store(ptr + index, value, cache_modifier=MODIFIER)
    else:
        tl.store(ptr + index, value, mask=index < LENGTH, cache_modifier=MODIFIER)


@triton.jit
def load_row(ptr, LENGTH: tl.constexpr, CHUNK: tl.constexpr, EVICT: tl.constexpr = ""):
    """The chunks of a row, as a tuple."""
    chunks = ()
    for i in tl.static_range((LENGTH + CHUNK - 1) // CHUNK):
        chunks = chunks + (load_chunk(ptr, i, LENGTH, CHUNK, EVICT),)  # type: ignore[assignment]  # noqa: RUF005
    return chunks


@triton.jit
def store_row(ptr, chunks, LENGTH: tl.constexpr, CHUNK: tl.constexpr, MODIFIER: tl.constexpr = ""):
    for i in tl.static_range((LENGTH + CHUNK - 1) // CHUNK):
        store_chunk(ptr, chunks[i], i, LENGTH, CHUNK, MODIFIER)


@triton.jit
def rms_scale(words, dtype: tl.constexpr, WORDS: tl.constexpr, CHUNK: tl.constexpr, eps):
    """rsqrt(mean(x^2) + eps) of a row held as words, in float32, correctly rounded steps."""
    squares = tl.zeros([CHUNK], tl.float32)
    for i in tl.static_range((WORDS + CHUNK - 1) // CHUNK):
        low, high = unpack(words[i], dtype)
        squares += low * low + high * high
    return tl.math.div_rn(1.0, tl.sqrt_rn(tl.math.div_rn(tl.sum(squares), 2.0 * WORDS) + eps))


@triton.jit
def grouped(index, GROUP: tl.constexpr, group_stride):
    """Where word `index` of a row goes: GROUP words lie together, then it is `group_stride` words to the next."""
    if GROUP is None:
        return index
    else:
        return (index // GROUP).to(tl.int64) * group_stride + index % GROUP


@triton.jit
def difference_of_products(a, b, c, d):
    """a * b - c * d within 1.5 ulp even where the products cancel: the rounding of c * d is added back."""
    cd = c * d
    return tl.fma(a, b, -cd) + tl.fma(-c, d, cd)


@triton.jit
def norm_rope_store(
    out,
    words,
    scale,
    weight,
    cos_sin,
    dtype: tl.constexpr,
    WORDS: tl.constexpr,
    CHUNK: tl.constexpr,
    PAIRS: tl.constexpr,
    MODIFIER: tl.constexpr,
    GROUP: tl.constexpr = None,
    group_stride=0,
):
    """out = rope(T(T(x * scale) * weight)) for one row.

    words: the row x; weight, out: pointers to words; cos_sin: pointer to the token's cos‖sin, PAIRS of each.
    """
    for i in tl.static_range((WORDS + CHUNK - 1) // CHUNK):
        index = i * CHUNK + tl.arange(0, CHUNK)
        if CHUNK % PAIRS != 0 or i == 0:  # else every chunk holds whole heads, and a lane always the same pair
            pair = index % PAIRS
            cos = tl.load(cos_sin + pair)
            sin = tl.load(cos_sin + PAIRS + pair)
        weight_low, weight_high = unpack(load_chunk(weight, i, WORDS, CHUNK, "evict_last"), dtype)
        a, b = unpack(words[i], dtype)
        a, b = unpack(pack(a * scale, b * scale, dtype), dtype)
        a, b = unpack(pack(a * weight_low, b * weight_high, dtype), dtype)
        turned = difference_of_products(a, cos, b, sin), difference_of_products(a, sin, -b, cos)
        rotated = pack(turned[0], turned[1], dtype)
        target = out + grouped(index, GROUP, group_stride)
        if (i + 1) * CHUNK <= WORDS:
            tl.store(target, rotated, cache_modifier=MODIFIER)
        else:
            tl.store(target, rotated, mask=index < WORDS, cache_modifier=MODIFIER)


@triton.jit
def copy_row_store(
    out,
    words,
    WORDS: tl.constexpr,
    CHUNK: tl.constexpr,
    MODIFIER: tl.constexpr,
    GROUP: tl.constexpr = None,
    group_stride=0,
):
    """out = words, the row as it is."""
    for i in tl.static_range((WORDS + CHUNK - 1) // CHUNK):
        index = i * CHUNK + tl.arange(0, CHUNK)
        target = out + grouped(index, GROUP, group_stride)
        if (i + 1) * CHUNK <= WORDS:
            tl.store(target, words[i], cache_modifier=MODIFIER)
        else:
            tl.store(target, words[i], mask=index < WORDS, cache_modifier=MODIFIER)


@triton.jit
def write_qkv(
    q_row,
    k_row,
    v_row,
    q_weight,
    k_weight,
    cos_sin,
    q_out,
    k_out,
    v_out,
    eps,
    dtype: tl.constexpr,
    WORDS: tl.constexpr,
    CHUNK: tl.constexpr,
    PAIRS: tl.constexpr,
    SPLIT: tl.constexpr,
    EVICT: tl.constexpr,
    MODIFIER: tl.constexpr,
    GROUP: tl.constexpr = None,
    group_stride=0,
):
    """One token: q_out = rope(rms_norm(q)), k_out = rope(rms_norm(k)), v_out = v; q or v may be None; all words.

    With SPLIT this program does only one of them: program_id(0) = 0 is k, the last one v, q between.
    """
    if SPLIT:
        part = tl.program_id(0)
        if part == 0:
            k = load_row(k_row, WORDS, CHUNK, EVICT)
            k_scale = rms_scale(k, dtype, WORDS, CHUNK, eps)
            norm_rope_store(
                k_out, k, k_scale, k_weight, cos_sin, dtype, WORDS, CHUNK, PAIRS, MODIFIER, GROUP, group_stride
            )
        if q_row is not None:  # noqa: SIM102  (decided while compiling; the inner condition is not)
            if part == 1:
                q = load_row(q_row, WORDS, CHUNK, EVICT)
                q_scale = rms_scale(q, dtype, WORDS, CHUNK, eps)
                norm_rope_store(
                    q_out, q, q_scale, q_weight, cos_sin, dtype, WORDS, CHUNK, PAIRS, MODIFIER, GROUP, group_stride
                )
        if v_row is not None:  # noqa: SIM102
            if part == tl.num_programs(0) - 1:
                copy_row_store(v_out, load_row(v_row, WORDS, CHUNK, EVICT), WORDS, CHUNK, MODIFIER, GROUP, group_stride)
    else:
        # Every load is issued before the first reduction waits for one.
        k = load_row(k_row, WORDS, CHUNK, EVICT)
        if q_row is not None:
            q = load_row(q_row, WORDS, CHUNK, EVICT)
        if v_row is not None:
            v = load_row(v_row, WORDS, CHUNK, EVICT)
        k_scale = rms_scale(k, dtype, WORDS, CHUNK, eps)
        if q_row is not None:
            q_scale = rms_scale(q, dtype, WORDS, CHUNK, eps)
        if v_row is not None:
            copy_row_store(v_out, v, WORDS, CHUNK, MODIFIER, GROUP, group_stride)
        norm_rope_store(k_out, k, k_scale, k_weight, cos_sin, dtype, WORDS, CHUNK, PAIRS, MODIFIER, GROUP, group_stride)
        if q_row is not None:
            norm_rope_store(
                q_out, q, q_scale, q_weight, cos_sin, dtype, WORDS, CHUNK, PAIRS, MODIFIER, GROUP, group_stride
            )


@triton.jit
def layer_norm_stats(row, DIM: tl.constexpr, CHUNK: tl.constexpr, eps):
    """(mean, rsqrt(var + eps)) of a float32 row of DIM values held as chunks, by two passes over the registers."""
    total = tl.zeros([CHUNK], tl.float32)
    for i in tl.static_range((DIM + CHUNK - 1) // CHUNK):
        total += row[i]
    mean = tl.sum(total) / DIM
    squares = tl.zeros([CHUNK], tl.float32)
    for i in tl.static_range((DIM + CHUNK - 1) // CHUNK):
        centred = row[i] - mean
        if (i + 1) * CHUNK > DIM:
            centred = tl.where(i * CHUNK + tl.arange(0, CHUNK) < DIM, centred, 0.0)
        squares += centred * centred
    return mean, tl.math.div_rn(1.0, tl.sqrt_rn(tl.sum(squares) / DIM + eps))


@triton.jit
def gated_sum(x, delta, gate_ptr, i: tl.constexpr, DIM: tl.constexpr, CHUNK: tl.constexpr):
    """x + delta * gate of chunk i in float32; no gate: 1."""
    if gate_ptr is None:
        return x.to(tl.float32) + delta.to(tl.float32)
    else:
        return x.to(tl.float32) + delta.to(tl.float32) * load_chunk(gate_ptr, i, DIM, CHUNK, "evict_last")


@triton.jit
def moved(ptr, offset):
    """The pointer, `offset` on; None where there is none."""
    if ptr is None:
        return None
    else:
        return ptr + offset


@triton.jit
def residual_row(
    x_ptr,
    delta_ptr,
    gate_ptr,
    cam_scale_ptr,
    cam_shift_ptr,
    x_out_ptr,
    DIM: tl.constexpr,
    CHUNK: tl.constexpr,
    EVICT: tl.constexpr,
    MODIFIER: tl.constexpr,
):
    """x_out = R((1 + cam_scale) * (x + delta * gate) + cam_shift) of one row, stored; gives the rounded row in float32.

    No gate: 1; no cam_*: x_out = R(x + delta * gate). Every load is issued before the first store.
    """
    x = load_row(x_ptr, DIM, CHUNK, EVICT)
    delta = load_row(delta_ptr, DIM, CHUNK, EVICT)
    if cam_scale_ptr is not None:
        cam_scale = load_row(cam_scale_ptr, DIM, CHUNK, EVICT)
        cam_shift = load_row(cam_shift_ptr, DIM, CHUNK, EVICT)
    wide = ()
    for i in tl.static_range((DIM + CHUNK - 1) // CHUNK):
        value = gated_sum(x[i], delta[i], gate_ptr, i, DIM, CHUNK)
        if cam_scale_ptr is not None:
            value = (1 + cam_scale[i].to(tl.float32)) * value + cam_shift[i].to(tl.float32)
        x_out = round_to(value, x_out_ptr.dtype.element_ty)
        store_chunk(x_out_ptr, x_out, i, DIM, CHUNK, MODIFIER)
        wide = wide + (x_out.to(tl.float32),)  # type: ignore[assignment]  # noqa: RUF005
    return wide


@triton.jit
def modulated_chunk(row, mean, rstd, shift_ptr, scale_ptr, i: tl.constexpr, DIM: tl.constexpr, CHUNK: tl.constexpr):
    """(row - mean) * rstd * (1 + scale) + shift of chunk i, in float32; shift and scale [DIM] float32."""
    shift = load_chunk(shift_ptr, i, DIM, CHUNK, "evict_last")
    scale = load_chunk(scale_ptr, i, DIM, CHUNK, "evict_last")
    return (row[i] - mean) * rstd * (1 + scale) + shift


@triton.jit
def modulated_row(row, mean, rstd, shift_ptr, scale_ptr, DIM: tl.constexpr, CHUNK: tl.constexpr):
    """`modulated_chunk` of every chunk of a row, as a tuple."""
    y = ()
    for i in tl.static_range((DIM + CHUNK - 1) // CHUNK):
        y = y + (modulated_chunk(row, mean, rstd, shift_ptr, scale_ptr, i, DIM, CHUNK),)  # type: ignore[assignment]  # noqa: RUF005
    return y


@triton.jit
def affine_chunk(row, mean, rstd, weight_ptr, bias_ptr, i: tl.constexpr, DIM: tl.constexpr, CHUNK: tl.constexpr):
    """(row - mean) * rstd * weight + bias of chunk i, in float32; weight and bias [DIM] of any float dtype."""
    weight = load_chunk(weight_ptr, i, DIM, CHUNK, "evict_last").to(tl.float32)
    bias = load_chunk(bias_ptr, i, DIM, CHUNK, "evict_last").to(tl.float32)
    return (row[i] - mean) * rstd * weight + bias


@triton.jit
def modulate_store(
    y,
    row,
    mean,
    rstd,
    shift_ptr,
    scale_ptr,
    dtype: tl.constexpr,
    DIM: tl.constexpr,
    CHUNK: tl.constexpr,
    MODIFIER: tl.constexpr,
):
    """y = (row - mean) * rstd * (1 + scale) + shift, one rounding; shift and scale [DIM] float32."""
    for i in tl.static_range((DIM + CHUNK - 1) // CHUNK):
        value = modulated_chunk(row, mean, rstd, shift_ptr, scale_ptr, i, DIM, CHUNK)
        store_chunk(y, round_to(value, dtype), i, DIM, CHUNK, MODIFIER)


@triton.jit
def ring_start(position):
    """Position of the chunk's first token: an int argument, or read from a device cursor."""
    if position.dtype.is_ptr():
        return tl.load(position).to(tl.int32)
    else:
        return position.to(tl.int32)


@triton.jit
def ring_slot(position, sink, capacity):
    """slot(p) = p if p < sink else sink + (p - sink) % (capacity - sink), as int64."""
    return tl.where(position < sink, position, sink + (position - sink) % (capacity - sink)).to(tl.int64)


@dataclass(frozen=True)
class RowConfig:
    """How one program does a row: chunks of `chunk` elements over `num_warps` warps, `rows` rows one after the other.

    split: q, k and v go to programs of their own. streaming: rows are read and written with hints that they are not
    needed again soon.
    """

    num_warps: int
    chunk: int
    rows: int = 1
    split: bool = False
    streaming: bool = True

    @property
    def evict(self) -> str:
        """Eviction policy of the row's loads."""
        return "evict_first" if self.streaming else ""

    @property
    def modifier(self) -> str:
        """Cache modifier of the row's stores."""
        return ".cs" if self.streaming else ""

    @cached_property
    def constants(self) -> dict[str, Any]:
        """The last constexprs of every kernel of rows."""
        return {"CHUNK": self.chunk, "ROWS": self.rows, "EVICT": self.evict, "MODIFIER": self.modifier}


def launch_rows(
    kernel: Any, config: RowConfig, tensors: tuple[Any, ...], numbers: tuple[float, ...] = (), **constants: Any
) -> None:
    """Launch a pass over the rows of tensors[0] [B, S, D], contiguous, `config.rows` of them a program.

    The kernel takes the tensors, rows (B * S) and tokens (S), `numbers`, then its constexprs: `constants`, DIM, and
    those of the configuration.
    """
    batch, tokens, dim = tensors[0].shape
    rows = batch * tokens
    launch(
        kernel, (-(-rows // config.rows),), tensors, (rows, tokens), numbers,
        {**constants, "DIM": dim, **config.constants}, config.num_warps,
    )  # fmt: skip


@lru_cache(maxsize=256)
def row_config(length: int, vector: int, num_warps: int | None = None, streaming: bool = True) -> RowConfig:
    """Configuration for a row of `length` elements of which `vector` make one access of a thread.

    Takes the most warps of (8, 4, 2, 1) that still have three to eight whole chunks each, so that no lane is masked and
    a thread has several loads in flight; where no chunk size divides the row, the fewest that need at most six chunks.
    """
    if num_warps is None:
        chunks = {warps: length / (32 * warps * vector) for warps in (8, 4, 2, 1)}
        whole = [warps for warps, count in chunks.items() if count in range(3, 9)]
        few = [warps for warps, count in reversed(chunks.items()) if count <= 6]
        num_warps = (whole or few or [8])[0]
    return RowConfig(num_warps, 32 * num_warps * vector, streaming=streaming)


def word_config(dim: int, element_size: int, num_warps: int | None = None) -> RowConfig:
    """`row_config` for a row of `dim` values read as dim / 2 words."""
    return row_config(dim // 2, VECTOR_BYTES // (2 * element_size), num_warps)


def value_config(
    dim: int, element_sizes: tuple[int, ...], num_warps: int | None = None, streaming: bool = True
) -> RowConfig:
    """`row_config` for a row of `dim` values read as they are, from tensors of these element sizes.

    The widest element decides, so that a thread's share of a chunk is at most 16 bytes of any tensor.
    """
    return row_config(dim, VECTOR_BYTES // max(element_sizes), num_warps, streaming)


@lru_cache(maxsize=256)
def split_config(dim: int, element_size: int) -> RowConfig:
    """Configuration of a pass over q, k and v: long rows have programs of their own, not one that holds all three."""
    config = word_config(dim, element_size)
    return replace(config, split=True, streaming=False) if dim * element_size >= 2 * LONG_ROW else config


@lru_cache(maxsize=256)
def short_row_config(config: RowConfig, length: int) -> RowConfig:
    """`config`, but four warps at least where a row is short: some lanes idle, and its loads are spread wider."""
    if length * 4 > 3 * LONG_ROW or config.num_warps >= 4:
        return config
    return replace(config, num_warps=4, chunk=config.chunk // config.num_warps * 4)


def reduced_position(chunk_start: int, cursor: torch.Tensor | None, sink: int, capacity: int) -> int | torch.Tensor:
    """The cursor, or `chunk_start` brought below the capacity without changing any slot, so that it fits 32 bits."""
    if cursor is not None:
        return cursor
    return slot(chunk_start, sink, capacity)


def modulation_strides(**vectors: torch.Tensor | None) -> dict[str, int]:
    """NAME_STRIDE of each per-channel vector [D] or [B, D]: elements between its batches, 0 where it is shared or
    absent.
    """
    return {
        f"{name.upper()}_STRIDE": x.stride(0) if x is not None and x.dim() == 2 and x.shape[0] > 1 else 0
        for name, x in vectors.items()
    }


def why_not_rows(dim: int, **tensors: torch.Tensor | None) -> str | None:
    """Why rows of `dim` values of these tensors can't be served, or None."""
    if dim > MAX_DIM:
        return f"D is {dim}, must be at most {MAX_DIM}"
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype not in DTYPES:
            return f"{name} is {tensor.dtype}, must be float32, float16 or bfloat16"
    return None


def why_not_words(dim: int, **tensors: torch.Tensor | None) -> str | None:
    """Why rows of `dim` values of these [batch, token, ...] tensors can't be read as words of two values, or None."""
    if dim % 2:
        return f"D is {dim}, must be even"
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if tensor.data_ptr() % (2 * tensor.element_size()):
            return f"{name} starts at an odd element, must be aligned to {2 * tensor.element_size()} bytes"
        if any(stride % 2 for stride in tensor.stride()[:2]):
            return f"{name} has strides {tuple(tensor.stride())}, must be even"
    return why_not_rows(dim, **tensors)
