"""torch.compile over a block's ops: no graph break, the same bits, and no copy of a cache in the generated graph."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import same_bits
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._inductor.utils import run_and_get_code

from lingbot_kernels import ops

pytestmark = [
    pytest.mark.unpoisoned,
    pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`:UserWarning"),
]

TOKENS, HEADS, HEAD_DIM, CAPACITY = 5, 3, 16, 13
DIM = HEADS * HEAD_DIM


def block(
    x: Tensor, w: dict[str, Tensor], table: Tensor, k_cache: Tensor, v_cache: Tensor, cursor: Tensor, start: int
) -> Tensor:
    """A block's ops in its order, the ring's position once by an int and once by a cursor, then the write-only half."""
    y = ops.layer_norm_modulate(x, w["shift"], w["scale"], 1e-6)
    q, k, v = torch.nn.functional.linear(y, w["qkv"]).chunk(3, dim=-1)
    norms = (w["norm"], w["norm"])
    q = ops.qk_norm_rope_kv_write(q, k, v, *norms, table, k_cache, v_cache, ops.RingPosition(start, 2), 1e-6)
    attended = ops.windowed_attention(q, k_cache, v_cache, CAPACITY)
    x, y = ops.gated_residual_camera_norm(x, attended, w["gate"], None, None, w["norm"], w["norm"], 1e-6)
    y = ops.rms_norm(y, w["norm"], 1e-6)
    x, y = ops.residual_norm_modulate(x, y, w["shift"], w["scale"], 1e-6)
    x = ops.gated_residual(x, ops.linear_gelu(y, w["square"], w["norm"]), w["gate"])
    ring = ops.RingPosition(0, 2, cursor)
    ops.k_norm_rope_kv_write(k, v, w["norm"], table, k_cache, v_cache, ring, 1e-6)
    packed = ops.qk_norm_rope_pack(None, k, v, None, w["norm"], table, 1, 1e-6)
    ops.qkv_unpack_kv_write(packed[0], k_cache, v_cache, ring)
    return x + ops.windowed_attention(x, k_cache, v_cache, CAPACITY)


def block_arguments(dtype: torch.dtype = torch.float32) -> list[Any]:
    torch.manual_seed(0)
    weights = {name: torch.randn(DIM) for name in ("shift", "scale", "gate")}
    weights["norm"] = torch.randn(DIM).to(dtype)
    weights["qkv"], weights["square"] = torch.randn(3 * DIM, DIM).to(dtype), torch.randn(DIM, DIM).to(dtype)
    caches = torch.randn(2, 1, CAPACITY, HEADS, HEAD_DIM).to(dtype)
    table = ops.rope_cos_sin(TOKENS, 20, 6, 3, HEAD_DIM, 1e4, "cpu")
    cursor = torch.tensor([10], dtype=torch.int32)
    return [torch.randn(1, TOKENS, DIM).to(dtype), weights, table, caches[0].clone(), caches[1].clone(), cursor, 9]


def run_both(compiled: Callable[..., Tensor], dtype: torch.dtype = torch.float32, start: int = 9) -> None:
    plain, own = block_arguments(dtype), block_arguments(dtype)
    plain[-1] = own[-1] = start
    with torch.no_grad():
        want, got = block(*plain), compiled(*own)
    assert (got - want).abs().max() <= (1e-5 if dtype == torch.float32 else 2e-2) * want.abs().max()
    for before, after in zip(plain[3:5], own[3:5], strict=True):
        assert same_bits(after, before)


@pytest.fixture(autouse=True)
def fresh_dynamo() -> None:
    torch._dynamo.reset()


@pytest.mark.parametrize("dynamic", [None, True])
def test_a_block_is_one_graph_with_the_same_bits(dynamic: bool | None) -> None:
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    compiled = torch.compile(block, fullgraph=True, dynamic=dynamic, backend=aot_autograd(fw_compiler=keep))
    run_both(compiled)
    assert len(graphs) == 1
    # An op that writes its argument appears inside a functionalised call, as the first argument.
    nodes = [node for node in graphs[0].graph.nodes if node.op == "call_function"]
    called = {str(target) for node in nodes for target in (node.target, *node.args[:1])}
    pushes = {"qk_norm_rope_push", "qk_norm_rope_quantize_push", "attention_output_push"}  # write other ranks' memory
    decoder = {"frame_norm_silu", "frame_pixels"}
    # Merging is a part of windowed_attention.
    elsewhere = {"rope_cos_sin", "merge_segments", *pushes, *decoder, *EIGHT_BIT, *INT8_RING}
    registered = set(ops.__all__) & set(vars(torch.ops.lingbot_kernels)) - elsewhere
    assert len(registered) == 10
    assert {f"lingbot_kernels.{op}.default" for op in registered} <= called


EIGHT_BIT = {
    "rotate_quantize", "layer_norm_modulate_quantize", "residual_norm_modulate_quantize",
    "gated_residual_camera_norm_quantize", "int8_linear",
}  # fmt: skip


def quantising_passes(x: Tensor, delta: Tensor, w: dict[str, Tensor], signs: Tensor) -> list[Tensor]:
    """Every pass whose row leaves as codes, each on what the one before left of the stream, and a product of codes."""
    first = ops.layer_norm_modulate_quantize(x, w["shift"], w["scale"], 1e-6, signs)
    x, *second = ops.gated_residual_camera_norm_quantize(
        x, delta, w["gate"], None, None, w["norm"], w["norm"], 1e-6, signs
    )
    x, *third = ops.residual_norm_modulate_quantize(x, delta, w["shift"], w["scale"], 1e-6, None, signs, False)
    y = ops.int8_linear(*first, signs.view(4, -1).repeat(1, 4), w["gate"][:4].abs(), None, "gelu_tanh")
    return [x, *first, *second, *third, *ops.rotate_quantize(delta, signs), y]


@pytest.mark.parametrize("dynamic", [None, True])
def test_the_quantising_passes_are_one_graph_with_the_same_bits(dynamic: bool | None) -> None:
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    x, weights, *_ = block_arguments()
    signs = torch.tensor([1, -1], dtype=torch.int8).repeat(64)
    compiled = torch.compile(quantising_passes, fullgraph=True, dynamic=dynamic, backend=aot_autograd(fw_compiler=keep))
    with torch.no_grad():
        want, got = (f(x, x.flip(1), weights, signs) for f in (quantising_passes, compiled))
    assert len(want) == len(got) == 10
    for a, b in zip(want, got, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)
    assert len(graphs) == 1
    called = {str(node.target) for node in graphs[0].graph.nodes if node.op == "call_function"}
    assert {f"lingbot_kernels.{op}.default" for op in EIGHT_BIT} <= called


INT8_RING = {"qk_norm_rope_quantize_kv_write", "k_norm_rope_quantize_kv_write", "int8_attention"}


def int8_ring_pass(qkv: Tensor, weight: Tensor, table: Tensor, ring: dict[str, Tensor], cursor: Tensor) -> list[Tensor]:
    """A chunk's write to an int8 ring by an int, attention over it, and the write-only half by a cursor."""
    q, k, v = qkv.chunk(3, dim=-1)
    held = ring["k_cache"], ring["k_scale"], ring["v_cache"]
    where = ops.RingPosition(9, 2)
    codes, scale = ops.qk_norm_rope_quantize_kv_write(q, k, v, weight, weight, table, *held, where, 1e-6)
    out, lse = ops.int8_attention(codes, scale, *held, CAPACITY)
    ops.k_norm_rope_quantize_kv_write(v, k, weight, table, *held, ops.RingPosition(0, 2, cursor), 1e-6)
    return [codes, scale, out, lse, *ops.int8_attention(codes, scale, *held, CAPACITY)]


@pytest.mark.parametrize("dynamic", [None, True])
def test_attention_over_an_int8_ring_is_one_graph_with_the_same_bits(dynamic: bool | None) -> None:
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    torch.manual_seed(0)
    heads, head_dim = 2, 64
    qkv, weight = torch.randn(1, TOKENS, 3 * heads * head_dim).bfloat16(), torch.randn(heads * head_dim).bfloat16()
    table = ops.rope_cos_sin(TOKENS, 20, 6, 3, head_dim, 1e4, "cpu")
    ring = {
        "k_cache": torch.randint(-127, 128, (1, CAPACITY, heads, head_dim), dtype=torch.int8),
        "k_scale": torch.rand(1, heads, CAPACITY).transpose(1, 2) / 50,
        "v_cache": torch.randn(1, CAPACITY, heads, head_dim).bfloat16(),
    }
    own = {name: x.clone() for name, x in ring.items()}
    compiled = torch.compile(int8_ring_pass, fullgraph=True, dynamic=dynamic, backend=aot_autograd(fw_compiler=keep))
    cursor = torch.tensor([3], dtype=torch.int32)
    with torch.no_grad():
        want = int8_ring_pass(qkv, weight, table, ring, cursor)
        got = compiled(qkv, weight, table, own, cursor)
    assert all(same_bits(a, b) for a, b in zip(want, got, strict=True))
    assert all(same_bits(own[name], x) for name, x in ring.items())
    assert len(graphs) == 1
    nodes = [node for node in graphs[0].graph.nodes if node.op == "call_function"]
    called = {str(target) for node in nodes for target in (node.target, *node.args[:1])}
    assert {f"lingbot_kernels.{op}.default" for op in INT8_RING} <= called


def test_inductor_writes_the_caches_in_place() -> None:
    """Functionalisation turns the write into a copy and back; the generated code must have undone it: it allocates no
    buffer of a cache's size, and calls the ops on the caches themselves.
    """
    compiled = torch.compile(block, fullgraph=True, backend="inductor")
    own = block_arguments()
    with torch.no_grad():
        _, (code,) = run_and_get_code(compiled, *own)
    for op in ("qk_norm_rope_kv_write", "k_norm_rope_kv_write", "qkv_unpack_kv_write"):
        assert code.count(f"torch.ops.lingbot_kernels.{op}.default(") == 1
    allocations = [line for line in code.splitlines() if "empty_strided" in line and " = " in line]
    assert allocations
    cache = f"{CAPACITY}, {HEADS}, {HEAD_DIM}"
    assert not [line for line in allocations if cache in line]
    assert "clone" not in code and "copy_" not in code.split("def call")[1]
    run_both(compiled)


def test_the_attention_library_is_chosen_while_tracing(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU that has no flash-attn-4, whose import then fails."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setitem(sys.modules, "flash_attn.cute", None)
    attention = importlib.import_module("lingbot_kernels.ops.windowed_attention")
    attention._flash_attention_4.cache_clear()

    def name(x: Tensor) -> Tensor:
        return x + len(attention.resolve_library.__wrapped__("auto", "cuda", torch.bfloat16, 128))

    try:
        got = torch.compile(name, fullgraph=True, backend="eager")(torch.zeros(1))
    finally:
        attention._flash_attention_4.cache_clear()
    assert got.item() == len("cudnn" if torch.backends.cudnn.is_available() else "sdpa")


def test_a_ring_position_by_cursor_needs_no_new_graph() -> None:
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def write(k: Tensor, weight: Tensor, table: Tensor, k_cache: Tensor, v_cache: Tensor, cursor: Tensor) -> None:
        ops.k_norm_rope_kv_write(k, k, weight, table, k_cache, v_cache, ops.RingPosition(0, 2, cursor), 1e-6)

    compiled = torch.compile(write, fullgraph=True, backend=counter)
    x, weights, table, k_cache, v_cache, cursor, _ = block_arguments()
    for start in (0, 5, 10, 12):
        cursor.fill_(start)
        compiled(x, weights["norm"], table, k_cache, v_cache, cursor)
        slots = ops.RingPosition(start, 2).slots(TOKENS, CAPACITY, "cpu")
        assert torch.equal(v_cache[:, slots].flatten(-2), x)
    assert counter.frame_count == 1


def test_bad_arguments_are_named_while_tracing() -> None:
    def short(x: Tensor, weight: Tensor) -> Tensor:
        return ops.rms_norm(x, weight[1:], 1e-6)

    with pytest.raises(Exception, match=r"weight: got shape \[47\], must be \[48\]"):
        torch.compile(short, fullgraph=True, backend="aot_eager")(torch.zeros(1, 2, 48), torch.zeros(48))
