"""Three calls on plain tensors in place of "norm, RoPE, roll the cache, write, attend" in a forward that isn't ours.

    with placed_chunk(ring, token_start, num_tokens) as position:                 # instead of rolling
        q = norm_rope_write(q, k, v, q_weight, k_weight, table, k_cache, v_cache, position, eps)
        out = attend(q, k_cache, v_cache, position)

`table` comes from one of the `rope_from_*` functions, made once per chunk, or from `ops.rope_cos_sin`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from lingbot_kernels import ops
from lingbot_kernels.ops import _check
from lingbot_kernels.ring import ChunkPosition, KVRing
from lingbot_kernels.scalars import as_count

LAYOUTS = ("BSHD", "BHSD")


def rope_from_cos_sin(table: Tensor) -> Tensor:
    """cos‖sin [S, head_dim] (as FlashInfer and vLLM keep it) -> the ops' table.

    Args:
        table: [..., S, head_dim] with leading ones; the first head_dim / 2 columns cosines, the others sines, float32
            or float64.

    Returns:
        Contiguous float32 [S, head_dim]; a view of what was given where that is it already.

    Raises:
        TypeError: a half-precision table: its rounding alone costs more than everything that follows.
        ValueError: another shape.
    """
    return _finish("table", _rows("table", table))


def rope_from_halves(cos: Tensor, sin: Tensor) -> Tensor:
    """Separate cos and sin, one value a pair: [..., S, head_dim / 2] each -> float32 [S, head_dim]."""
    return _join(_rows("cos", cos), _rows("sin", sin))


def rope_from_interleaved(cos: Tensor, sin: Tensor) -> Tensor:
    """cos and sin with each value twice in a row, [1, S, 1, head_dim] (diffusers' Wan) or [S, head_dim] -> float32
    [S, head_dim].

    The pairs are (2i, 2i + 1). A table that repeats its halves instead (cat(angles, angles), for pairs i and
    i + head_dim / 2) has the same shape and is not what the ops rotate by: hand in its first half by
    `rope_from_halves`, and permute the rows of the Q and K weights.
    """
    cos, sin = _rows("cos", cos), _rows("sin", sin)
    if cos.shape[1] % 2:
        raise ValueError(f"cos: got {cos.shape[1]} columns, must be an even head_dim")
    return _join(cos[:, 0::2], sin[:, 0::2])


def rope_from_complex(freqs: Tensor) -> Tensor:
    """cos + i sin, complex64 or complex128 [S, head_dim / 2] or [S, 1, head_dim / 2] (the official Wan) -> float32
    [S, head_dim].
    """
    if not isinstance(freqs, Tensor) or freqs.dtype not in (torch.complex64, torch.complex128):
        raise TypeError(f"freqs: got {_check.describe(freqs)}, must be complex64 or complex128")
    parts = torch.view_as_real(freqs)
    return _join(_rows("freqs", parts[..., 0]), _rows("freqs", parts[..., 1]))


def rope_from_angles(angles: Tensor) -> Tensor:
    """Angles in radians, [..., S, head_dim / 2], one a pair -> float32 [S, head_dim].

    cos and sin are taken in float64, so that the table is as good as the angles are. float32 angles of large positions
    have lost digits before they come here (at 10,000 rad, 0.0005 rad): `ops.rope_cos_sin` has no such limit.
    """
    angles = _rows("angles", angles).double()
    return _join(angles.cos(), angles.sin())


def allocate_cache(
    batch: int,
    capacity: int,
    heads: int,
    head_dim: int,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    layout: str = "BSHD",
) -> tuple[Tensor, Tensor]:
    """K and V caches that the fused write can fill, shaped [B, capacity, heads, head_dim], or, with layout "BHSD",
    [B, heads, capacity, head_dim].

    In memory a token's heads lie next to each other either way: a "BHSD" cache is a transposed view. Code that indexes
    it by head, or hands it to an attention that takes strides (SDPA does), sees no difference.

    Raises:
        ValueError: a size that isn't an int of 1 or more, by its name.
    """
    _check_layout(layout)
    sizes = {"batch": batch, "capacity": capacity, "heads": heads, "head_dim": head_dim}
    shape = [as_count(name, size, 1) for name, size in sizes.items()]
    k, v = (torch.empty(shape, dtype=dtype, device=device) for _ in range(2))
    return (k, v) if layout == "BSHD" else (k.transpose(1, 2), v.transpose(1, 2))


def token_major(cache: Tensor, layout: str = "BSHD") -> Tensor:
    """The cache as [B, capacity, heads, head_dim]: a view, whatever its layout."""
    _check_layout(layout)
    if cache.dim() != 4:
        raise ValueError(f"cache: got {_check.describe(cache)}, must have four dimensions, {layout}")
    return cache if layout == "BSHD" else cache.transpose(1, 2)


@contextlib.contextmanager
def placed_chunk(ring: KVRing, token_start: int, num_tokens: int) -> Iterator[ChunkPosition]:
    """The chunk's place in the ring, where other caches would be rolled, around a forward; every layer shares it.

    The ring takes the position once the block has succeeded. Where it raises, the ring stands where it stood, and the
    same chunk again gives the bits of a forward that never failed. Another chunk is refused where it would see slots
    that the block may have overwritten, until that chunk is done or the ring is reset.

    Args:
        ring: `KVRing(capacity, sink)`, in tokens; one a session.
        token_start: absolute index of the chunk's first token: that of the next chunk, or of the current one again.
        num_tokens: tokens of the chunk.

    Raises:
        ValueError: a gap, a step back, a chunk that is too large, or another one that must be done first; the ring is
            then as it was.
    """
    plan = ring.plan(as_count("token_start", token_start, 0), as_count("num_tokens", num_tokens, 1))
    try:
        yield ChunkPosition(ops.RingPosition(plan.first_slot, ring.sink), plan.num_visible)
    except BaseException:
        ring.failed(plan)
        raise
    ring.commit(plan)


def place_chunk(ring: KVRing, token_start: int, num_tokens: int) -> ChunkPosition:
    """The same position, taken by the ring at once: for an engine whose forward does not end within a block.

    The ring can't know whether the forward succeeds. Where it fails, the same chunk has to be placed and done again,
    with the bits of a forward that never failed, or the ring reset: the next chunk would see slots that are not
    written, and nothing refuses it. Arguments and errors are those of `placed_chunk`.
    """
    with placed_chunk(ring, token_start, num_tokens) as position:
        return position


def norm_rope_write(
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor,
    table: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    position: ChunkPosition,
    eps: float,
    *,
    layout: str = "BSHD",
    backend: str | None = None,
) -> Tensor | None:
    """Full-width RMSNorm and RoPE of Q and K; K and V to their slots of the caches. Returns Q, in the shape it came in.

    Args:
        q, k, v: [B, S, D] as projected, or [B, S, heads, head_dim] views of that; strided views of one product serve
            as they are. q (and q_weight) None: only K and V are written, and None is returned.
        q_weight, k_weight: [D].
        table: float32 [S, head_dim].
        k_cache, v_cache: [B, capacity, heads, head_dim], or [B, heads, capacity, head_dim] with layout "BHSD".
            Where a token's heads lie next to each other in memory (see `allocate_cache`), one pass does it all. Where
            each head has its own run of tokens, K and V pass through a buffer of the chunk's size and are then copied
            to their slots: right, but two passes over the chunk's K and V more.
        position: of `placed_chunk` or `place_chunk`.

    Raises:
        ValueError, TypeError: naming the argument, before anything is written.
    """
    keys, values = token_major(k_cache, layout), token_major(v_cache, layout)
    heads, head_dim = keys.shape[2:]
    queries = None if q is None else _flat(q, heads, head_dim)
    k, v = _flat(k, heads, head_dim), _flat(v, heads, head_dim)
    if (q is None) != (q_weight is None):
        raise ValueError("q, q_weight: got one of them, must be both or neither")
    if _fusable(keys) and _fusable(values):
        out = _write(queries, k, v, q_weight, k_weight, table, keys, values, position.ring, eps, backend)
    else:
        batch, num_tokens = k.shape[:2]
        _check.ring(batch, num_tokens, keys, position.ring)
        if keys.shape != values.shape or values.dtype != v.dtype or keys.dtype != k.dtype:
            raise ValueError(
                f"k_cache, v_cache: got {_check.describe(k_cache)} and {_check.describe(v_cache)}, "
                f"must be alike and {k.dtype}"
            )
        chunk_k, chunk_v = (k.new_empty(batch, num_tokens, heads, head_dim) for _ in range(2))
        start = ops.RingPosition(0)
        out = _write(queries, k, v, q_weight, k_weight, table, chunk_k, chunk_v, start, eps, backend)
        slots = position.ring.slots(num_tokens, keys.shape[1], keys.device)
        keys.index_copy_(1, slots, chunk_k)
        values.index_copy_(1, slots, chunk_v)
    return None if out is None or q is None else out.view(q.shape)


def attend(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    position: ChunkPosition,
    *,
    layout: str = "BSHD",
    backend: str | None = None,
) -> Tensor:
    """Attention of the chunk's Q over everything the ring holds, without a mask, a roll or a copy: [B, S, D].

    q [B, S, D] or [B, S, heads, head_dim]; the caches and `position` as in `norm_rope_write`. The library is the best
    one at hand, or `backend`: "fa4", "fa3", "cudnn", "sdpa" or "reference".
    """
    keys, values = token_major(k_cache, layout), token_major(v_cache, layout)
    return ops.windowed_attention(q, keys, values, position.num_visible, backend=backend)


def _write(
    q: Tensor | None, k: Tensor, v: Tensor, q_weight: Tensor | None, k_weight: Tensor, table: Tensor,
    keys: Tensor, values: Tensor, ring: ops.RingPosition, eps: float, backend: str | None,
) -> Tensor | None:  # fmt: skip
    if q is None or q_weight is None:
        ops.k_norm_rope_kv_write(k, v, k_weight, table, keys, values, ring, eps, backend=backend)
        return None
    return ops.qk_norm_rope_kv_write(q, k, v, q_weight, k_weight, table, keys, values, ring, eps, backend=backend)


def _check_layout(layout: str) -> None:
    if layout not in LAYOUTS:
        raise ValueError(f"layout: got {layout!r}, must be {' or '.join(LAYOUTS)}")


def _fusable(cache: Tensor) -> bool:
    """Whether a token's heads lie next to each other: what the fused write needs."""
    return cache.stride(3) == 1 and cache.stride(2) == cache.shape[3]


def _flat(x: Tensor, heads: int, head_dim: int) -> Tensor:
    """[B, S, heads, head_dim] as a view [B, S, D]."""
    if x.dim() != 4:
        return x
    if x.shape[2:] != (heads, head_dim):
        raise ValueError(f"q, k, v: got shape {list(x.shape)}, must be [B, S, {heads}, {head_dim}] or [B, S, D]")
    return x.flatten(2)


def _rows(name: str, x: Tensor) -> Tensor:
    """x without its dimensions of one, as [S, columns]."""
    if not isinstance(x, Tensor) or x.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{name}: got {_check.describe(x)}, must be float32 or float64")
    columns = x.shape[-1] if x.dim() else 0
    rows = [size for size in x.shape[:-1] if size != 1]
    if columns == 0 or x.dim() < 2 or len(rows) > 1:
        raise ValueError(f"{name}: got shape {list(x.shape)}, must be [S, columns], with ones at most around S")
    return x.reshape(-1, columns)


def _join(cos: Tensor, sin: Tensor) -> Tensor:
    if cos.shape != sin.shape or cos.device != sin.device:
        raise ValueError(f"cos, sin: got {_check.describe(cos)} and {_check.describe(sin)}, must be alike")
    return _finish("cos, sin", torch.cat([cos, sin], dim=1))


def _finish(name: str, table: Tensor) -> Tensor:
    if table.shape[1] % 2:
        raise ValueError(f"{name}: got {table.shape[1]} columns, must be an even head_dim")
    return table.to(torch.float32).contiguous()
