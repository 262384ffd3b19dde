"""The recipe for foreign engines: every table format and cache layout gives what the foreign formulation gives."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from lingbot_kernels import ops, reference
from lingbot_kernels.integrations import functional as F
from lingbot_kernels.ring import KVRing

B, HEADS, HEAD_DIM, FRAME, WIDTH = 2, 3, 16, 6, 3
D = HEADS * HEAD_DIM
EPS = 1e-6


def float64_table(tokens: int, start: int = 0) -> torch.Tensor:
    return reference.rope_cos_sin(tokens, start, FRAME, WIDTH, HEAD_DIM, 1e4, "cpu", dtype=torch.float64)


def formats(table: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same rotation in each format, made from a float64 cos‖sin table."""
    cos, sin = table.chunk(2, dim=1)
    angles = torch.atan2(sin, cos)
    twice = [x.repeat_interleave(2, dim=1) for x in (cos, sin)]
    return {
        "cos_sin": F.rope_from_cos_sin(table),
        "cos_sin with ones": F.rope_from_cos_sin(table.float()[None, :, None]),
        "halves": F.rope_from_halves(cos.float(), sin.float()),
        "interleaved": F.rope_from_interleaved(*(x[None, :, None] for x in twice)),
        "interleaved [1, 1, S, D]": F.rope_from_interleaved(*(x[None, None] for x in twice)),
        "complex128": F.rope_from_complex(torch.complex(cos, sin)),
        "complex64": F.rope_from_complex(torch.complex(cos.float(), sin.float())[:, None]),
        "float64 angles": F.rope_from_angles(angles),
        "float32 angles": F.rope_from_angles(angles.float()),
    }


@pytest.mark.parametrize("tokens", [1, 7, 36])
def test_every_format_becomes_the_same_table(tokens):
    table = float64_table(tokens)
    for name, got in formats(table).items():
        assert got.shape == (tokens, HEAD_DIM) and got.dtype == torch.float32 and got.is_contiguous(), name
        # Angles up to pi in float32 are good to 1.2e-7; everything else is one rounding.
        tolerance = 3e-7 if name == "float32 angles" else 0
        torch.testing.assert_close(got, table.float(), rtol=0, atol=tolerance, msg=name)


def test_a_table_that_is_right_already_is_handed_on():
    table = float64_table(5).float()
    assert F.rope_from_cos_sin(table[None]).data_ptr() == table.data_ptr()


BAD_TABLES = [
    (lambda: F.rope_from_cos_sin(torch.ones(4, 8, dtype=torch.bfloat16)), TypeError, "table: got torch.bfloat16"),
    (lambda: F.rope_from_cos_sin(torch.ones(4, 7)), ValueError, "7 columns"),
    (lambda: F.rope_from_cos_sin(torch.ones(2, 4, 8)), ValueError, r"\[2, 4, 8\]"),
    (lambda: F.rope_from_halves(torch.ones(4, 8), torch.ones(3, 8)), ValueError, "cos, sin: got"),
    (lambda: F.rope_from_interleaved(torch.ones(4, 7), torch.ones(4, 7)), ValueError, "even head_dim"),
    (lambda: F.rope_from_complex(torch.ones(4, 8)), TypeError, "complex64 or complex128"),
    (lambda: F.rope_from_angles(torch.ones(4, 8, dtype=torch.float16)), TypeError, "angles: got torch.float16"),
    (lambda: F.rope_from_angles([1.0]), TypeError, "angles"),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD_TABLES)
def test_bad_tables_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


class RolledAttention:
    """What engines write by hand, in float64: norm, RoPE, roll the window behind the sink, write, attend."""

    def __init__(self, capacity: int, sink: int) -> None:
        self.capacity, self.sink = capacity, sink
        self.k = self.v = torch.empty(B, 0, HEADS, HEAD_DIM, dtype=torch.float64)

    def __call__(self, q, k, v, q_weight, k_weight, table, again):
        def normed(x, weight):
            x = x.double()
            return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * weight.double()

        def rotated(x):
            cos, sin = table.double()[:, None].chunk(2, dim=-1)
            a, b = x.unflatten(-1, (HEADS, -1, 2)).unbind(-1)
            return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2)

        tokens = k.shape[1]
        old_k, old_v = (x[:, :-tokens] if again else x for x in (self.k, self.v))
        self.k = torch.cat([old_k, rotated(normed(k, k_weight))], dim=1)
        self.v = torch.cat([old_v, v.double().unflatten(-1, (HEADS, -1))], dim=1)
        overflow = self.k.shape[1] - self.capacity
        if overflow > 0:
            self.k, self.v = (
                torch.cat([x[:, : self.sink], x[:, self.sink + overflow :]], dim=1) for x in (self.k, self.v)
            )
        queries = rotated(normed(q, q_weight))
        scores = torch.einsum("bqhd,bkhd->bhqk", queries, self.k) / math.sqrt(HEAD_DIM)
        return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), self.v).flatten(2)


def make_caches(kind: str, capacity: int) -> tuple[str, torch.Tensor, torch.Tensor]:
    if kind == "BHSD, each head apart":
        k, v = (torch.full((B, HEADS, capacity, HEAD_DIM), torch.nan) for _ in range(2))
        return "BHSD", k, v
    k, v = F.allocate_cache(B, capacity, HEADS, HEAD_DIM, dtype=torch.float32, device="cpu", layout=kind)
    return kind, k.fill_(torch.nan), v.fill_(torch.nan)


@pytest.mark.parametrize("kind", ["BSHD", "BHSD", "BHSD, each head apart"])
@pytest.mark.parametrize("split_heads", [False, True])
def test_three_calls_replace_a_rolled_cache(kind, split_heads):
    """Eight chunks, each twice (two steps), through several evictions."""
    torch.manual_seed(0)
    tokens, capacity, sink = 2 * FRAME, 7 * FRAME + 4, FRAME
    layout, k_cache, v_cache = make_caches(kind, capacity)
    ring, foreign = KVRing(capacity, sink), RolledAttention(capacity, sink)
    q_weight, k_weight = torch.rand(D) + 0.5, torch.rand(D) + 0.5
    for chunk in range(8):
        start = chunk * tokens
        table = float64_table(tokens, start)
        for step in range(2):
            qkv = torch.randn(B, tokens, 3 * D)
            q, k, v = qkv.chunk(3, dim=-1)
            want = foreign(q, k, v, q_weight, k_weight, table, again=step > 0)
            if split_heads:
                q, k, v = (x.unflatten(-1, (HEADS, HEAD_DIM)) for x in (q, k, v))
            position = F.place_chunk(ring, start, tokens)
            ready = F.norm_rope_write(
                q, k, v, q_weight, k_weight, F.rope_from_cos_sin(table), k_cache, v_cache, position, EPS, layout=layout
            )
            assert ready.shape == q.shape
            got = F.attend(ready, k_cache, v_cache, position, layout=layout)
            assert got.shape == (B, tokens, D)
            assert (got - want).norm() / want.norm() < 1e-6, (chunk, step)


@pytest.mark.parametrize("kind", ["BSHD", "BHSD", "BHSD, each head apart"])
def test_write_only_leaves_the_same_bits(kind):
    torch.manual_seed(0)
    tokens, capacity = 5, 8
    position = F.place_chunk(KVRing(capacity, 1), 0, tokens)
    q, k, v = torch.randn(B, tokens, 3 * D).chunk(3, dim=-1)
    weight, table = torch.rand(D), float64_table(tokens).float()
    layout, *full = make_caches(kind, capacity)
    _, *write_only = make_caches(kind, capacity)
    F.norm_rope_write(q, k, v, weight, weight, table, *full, position, EPS, layout=layout)
    out = F.norm_rope_write(None, k, v, None, weight, table, *write_only, position, EPS, layout=layout)
    assert out is None
    for a, b in zip(full, write_only, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    assert torch.isfinite(F.token_major(full[0], layout)[:, :tokens]).all()
    assert torch.isnan(F.token_major(full[0], layout)[:, tokens:]).all()


def test_a_bhsd_cache_is_a_view_that_the_fused_write_serves():
    k, _ = F.allocate_cache(1, 4, HEADS, HEAD_DIM, dtype=torch.float32, device="cpu", layout="BHSD")
    assert k.shape == (1, HEADS, 4, HEAD_DIM)
    assert F.token_major(k, "BHSD").is_contiguous()


def test_a_chunk_placed_at_once_is_done_again_with_the_same_bits():
    ring = KVRing(8, 1)
    positions = [F.place_chunk(ring, 4 * chunk, 4) for chunk in (0, 1, 2, 2)]
    assert positions[2] == positions[3] and ring.end == 12
    with F.placed_chunk(ring, 8, 4) as position:
        assert position == positions[2]


def test_refusals_leave_caches_and_ring_alone():
    ring = KVRing(8, 1)
    position = F.place_chunk(ring, 0, 4)
    x, weight, table = torch.randn(B, 4, D), torch.ones(D), float64_table(4).float()
    for kind in ("BSHD", "BHSD, each head apart"):
        layout, k_cache, v_cache = make_caches(kind, 8)
        bad = [
            (dict(q=None), "q, q_weight"),
            (dict(table=table[:3]), "cos_sin: got shape"),
            (dict(k=x[:, :3]), "k: got|cos_sin|v: got|q: got"),
            (dict(v=x.bfloat16()), "v: got|v_cache: got"),
            (dict(k_weight=weight[:5]), "k_weight: got shape"),
            (dict(layout="HBSD"), "layout: got 'HBSD'"),
            (dict(k=x.unflatten(-1, (HEAD_DIM, HEADS))), r"\[B, S, 3, 16\]"),
            (dict(position=F.place_chunk(KVRing(16, 1), 0, 9)), None),
        ]
        for change, message in bad:
            arguments = dict(
                q=x, k=x.clone(), v=x.clone(), q_weight=weight, k_weight=weight, table=table, k_cache=k_cache,
                v_cache=v_cache, position=position, eps=EPS, layout=layout,
            ) | change  # fmt: skip
            if message is None:
                x9 = torch.randn(B, 9, D)
                arguments |= dict(q=x9, k=x9.clone(), v=x9.clone(), table=float64_table(9).float())
                message = "capacity - sink = 7"
            with pytest.raises((ValueError, TypeError), match=message):
                F.norm_rope_write(**arguments)
            assert torch.isnan(k_cache).all() and torch.isnan(v_cache).all(), change
    with pytest.raises(ValueError, match="leaves a gap"):
        F.place_chunk(ring, 6, 4)
    assert ring.end == 4


class Stopped(Exception):
    """What a forward of `Engine` fails with."""


class Engine:
    """Two layers of attention by the three calls; a forward can be told to fail before its step number `fail`."""

    def __init__(self, capacity: int, sink: int) -> None:
        self.ring = KVRing(capacity, sink)
        self.caches = [make_caches("BSHD", capacity)[1:] for _ in range(2)]
        self.weights = [torch.rand(D, generator=torch.Generator().manual_seed(i)) + 0.5 for i in range(2)]

    def forward(self, x: torch.Tensor, start: int, fail: int | None = None) -> torch.Tensor:
        steps = iter(range(6))

        def step() -> None:
            if next(steps) == fail:
                raise Stopped

        table = float64_table(x.shape[1], start).float()
        with F.placed_chunk(self.ring, start, x.shape[1]) as position:
            for weight, caches in zip(self.weights, self.caches, strict=True):
                step()
                q = F.norm_rope_write(x, x.clone(), x.clone(), weight, weight, table, *caches, position, EPS)
                step()
                x = x + F.attend(q, *caches, position)
                step()
        return x


def engines(chunks: int) -> tuple[Engine, Engine]:
    """Two alike, after so many chunks of 4 tokens; their windows are full after three."""
    twins = Engine(13, 1), Engine(13, 1)
    for chunk in range(chunks):
        for engine in twins:
            engine.forward(inputs(chunk), 4 * chunk)
    return twins


def inputs(chunk: int, tokens: int = 4) -> torch.Tensor:
    return torch.randn(B, tokens, D, generator=torch.Generator().manual_seed(chunk))


@pytest.mark.parametrize("chunks", [0, 1, 5])
def test_a_forward_that_fails_anywhere_and_is_done_again_leaves_no_trace(chunks):
    for fail in range(6):
        failed, twin = engines(chunks)
        for again in (False, True):  # as the chunk's first forward, and as a later one
            before = failed.ring.state()
            with pytest.raises(Stopped):
                failed.forward(inputs(chunks), 4 * chunks, fail)
            assert failed.ring.state() == before, again
            assert torch.equal(*(engine.forward(inputs(chunks), 4 * chunks) for engine in (failed, twin)))
        assert torch.equal(*(engine.forward(inputs(9), 4 * (chunks + 1)) for engine in (failed, twin)))
        assert failed.ring.unfinished is None and failed.ring.state() == twin.ring.state()


def test_after_a_failed_forward_no_chunk_sees_what_it_overwrote():
    failed, _ = engines(5)
    with pytest.raises(Stopped):
        failed.forward(inputs(5), 20, fail=2)
    assert failed.ring.unfinished == (20, 4)
    for start, tokens in ((16, 4), (20, 3), (24, 4)):  # the chunk before, a shorter one, the one after
        with pytest.raises(ValueError, match=f"start: got token {start} for {tokens}, must be 20 for 4: a forward"):
            failed.forward(inputs(6, tokens), start)
    failed.ring.reset()
    assert failed.forward(inputs(0), 0).isfinite().all()


def test_a_failed_forward_that_evicted_nothing_gives_way_to_any_chunk():
    for start, tokens in ((4, 3), (0, 4)):  # a shorter chunk in its place, or the one before once more
        failed, twin = engines(1)
        with pytest.raises(Stopped):
            failed.forward(inputs(1), 4, fail=4)
        assert torch.equal(*(engine.forward(inputs(6, tokens), start) for engine in (failed, twin)))


def test_it_compiles_without_a_graph_break():
    torch.manual_seed(0)
    k_cache, v_cache = F.allocate_cache(1, 8, HEADS, HEAD_DIM, dtype=torch.float32, device="cpu")
    weight, table = torch.rand(D), ops.rope_cos_sin(4, 0, FRAME, WIDTH, HEAD_DIM, 1e4, "cpu")
    position = F.place_chunk(KVRing(8, 1), 0, 4)

    def run(qkv, k_cache, v_cache):
        q, k, v = qkv.chunk(3, dim=-1)
        q = F.norm_rope_write(q, k, v, weight, weight, table, k_cache, v_cache, position, EPS)
        return F.attend(q, k_cache, v_cache, position)

    qkv = torch.randn(1, 4, 3 * D)
    want = run(qkv, k_cache, v_cache)
    again = [x.clone().fill_(torch.nan) for x in (k_cache, v_cache)]
    got = torch.compile(run, fullgraph=True, backend="aot_eager")(qkv, *again)
    assert torch.equal(got, want)
    assert torch.equal(again[0][:, :4], k_cache[:, :4])


@pytest.mark.parametrize("name", ["batch", "capacity", "heads", "head_dim"])
@pytest.mark.parametrize("size", [0, -1, 2.0, True], ids=str)
def test_a_cache_of_no_size_is_refused_by_name(name: str, size: object) -> None:
    sizes: dict[str, Any] = {"batch": 1, "capacity": 8, "heads": 2, "head_dim": 4, name: size}
    with pytest.raises(ValueError, match=rf"^{name}: got {size}, must be an int of 1 or more"):
        F.allocate_cache(**sizes, dtype=torch.float32, device="cpu")


@pytest.mark.parametrize(("name", "value"), [("token_start", -1), ("token_start", 0.0), ("num_tokens", 0)], ids=str)
def test_a_chunk_of_no_place_is_refused_by_name_and_takes_none(name: str, value: object) -> None:
    ring = KVRing(8, 1)
    place: dict[str, Any] = {"token_start": 0, "num_tokens": 2, name: value}
    with pytest.raises(ValueError, match=rf"^{name}: got {value}, must be an int of "):
        F.place_chunk(ring, **place)
    assert ring.empty
