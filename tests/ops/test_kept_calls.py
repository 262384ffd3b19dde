"""Calls whose signature was found valid: what they skip, what they still refuse, and that they stay few."""

from __future__ import annotations

import gc
import sys
import threading
from typing import Any

import pytest
import torch
from helpers import same_bits
from torch.utils._pytree import tree_map

from lingbot_kernels import _C, ops, reference
from lingbot_kernels.benchmarks.kernel_cases import KernelCase
from lingbot_kernels.benchmarks.problem import as_tuple
from lingbot_kernels.benchmarks.problems import problems
from lingbot_kernels.ops._dispatch import OPS
from lingbot_kernels.ops._library import KEPT_CALLS, KernelOp
from ops.op_case import CACHES, kv_arguments, run

KERNELS = [
    name
    for name in ops.__all__
    if isinstance(getattr(sys.modules.get(f"{ops.__name__}.{name}"), "_op", None), KernelOp)
]


def kernel_op(name: str) -> KernelOp:
    module = sys.modules[f"lingbot_kernels.ops.{name}"]
    return module._op  # type: ignore[no-any-return]


class Planned:
    """Counts how often an op checks its arguments."""

    def __init__(self, op: KernelOp, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count, plan = 0, op._plan
        op.forget()

        def counted(*call: Any) -> Any:
            self.count += 1
            return plan(*call)

        monkeypatch.setattr(op, "_plan", counted)


def test_the_second_call_of_a_signature_is_not_checked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    planned = Planned(kernel_op("qk_norm_rope_kv_write"), monkeypatch)
    for start in (0, 5, 11, 10**12):
        arguments = kv_arguments(torch.float32)
        arguments |= {"q": arguments["k"], "k": arguments["v"], "v": arguments["q"], "ring": ops.RingPosition(start, 2)}
        want = run(reference.qk_norm_rope_kv_write, arguments, CACHES)
        for own, exact in zip(run(ops.qk_norm_rope_kv_write, arguments, CACHES), want, strict=True):
            assert torch.equal(own.isnan(), exact.isnan())
            assert torch.allclose(own.nan_to_num(), exact.nan_to_num(), atol=1e-5)
    assert planned.count == 1


def test_arguments_that_were_one_tensor_may_be_two_in_the_next_call(monkeypatch: pytest.MonkeyPatch) -> None:
    planned = Planned(kernel_op("qk_norm_rope_kv_write"), monkeypatch)
    arguments = kv_arguments(torch.bfloat16)
    shared = arguments | {"q_weight": arguments["k_weight"], "q": arguments["k"]}
    results = [run(ops.qk_norm_rope_kv_write, case, CACHES) for case in (shared, arguments, shared)]
    kernel_op("qk_norm_rope_kv_write").forget()
    again = run(ops.qk_norm_rope_kv_write, arguments, CACHES)
    assert planned.count == 2
    assert all(same_bits(a, b) for a, b in zip(results[1], again, strict=True))
    assert not same_bits(results[0][0], results[1][0])
    assert same_bits(results[0][0], results[2][0])


def test_what_varies_is_looked_at_in_every_call() -> None:
    arguments = kv_arguments(torch.float32)
    for _ in range(2):
        run(ops.qk_norm_rope_kv_write, arguments, CACHES)
    k_cache, v_cache = torch.zeros(2, *arguments["k_cache"].shape).unbind(0)
    both = torch.zeros(2, 14, *arguments["k_cache"].shape[2:])
    refused: list[tuple[dict[str, Any], str]] = [
        ({"ring": ops.RingPosition(-1, 2)}, "ring: got chunk_start -1"),
        ({"v_cache": k_cache}, "k_cache and v_cache: share memory"),
        ({"k_cache": both[:, :13], "v_cache": both[:, 1:]}, "k_cache and v_cache: share memory"),
        ({"k_weight": k_cache.view(-1)[:48]}, "k_cache and k_weight: share memory"),
        ({"cos_sin": v_cache.view(-1)[80:160].view(5, 16)}, "v_cache and cos_sin: share memory"),
    ]
    for change, message in refused:
        case = arguments | {"k_cache": k_cache, "v_cache": v_cache} | change
        with pytest.raises(ValueError, match=message):
            ops.qk_norm_rope_kv_write(**case)
        assert not k_cache.any() and not v_cache.any() and not both.any()


def test_neighbours_in_one_buffer_are_apart() -> None:
    arguments = kv_arguments(torch.float32)
    shape = arguments["k_cache"].shape
    k_cache, v_cache = torch.full((2, *shape), float("nan")).unbind(0)
    want = run(ops.qk_norm_rope_kv_write, arguments, CACHES)
    got = ops.qk_norm_rope_kv_write(**arguments | {"k_cache": k_cache, "v_cache": v_cache})
    assert all(same_bits(a, b) for a, b in zip((got, k_cache, v_cache), want, strict=True))


@pytest.mark.parametrize("change", ["eps", "out_dtype", "alignment", "stride", "backend"])
def test_another_signature_is_checked_anew(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    planned = Planned(kernel_op("layer_norm_modulate"), monkeypatch)
    storage = torch.randn(2 * 3 * 48 + 1)
    x, vectors = storage[:-1].view(2, 3, 48), torch.randn(2, 2, 48)
    for _ in range(2):
        ops.layer_norm_modulate(x, vectors[0], vectors[1], 1e-6)
    assert planned.count == 1
    arguments: dict[str, Any] = {"x": x, "shift": vectors[0], "scale": vectors[1], "eps": 1e-6}
    arguments |= {
        "eps": {"eps": 1e-2},
        "out_dtype": {"out_dtype": torch.bfloat16},
        "alignment": {"x": storage[1:].view(2, 3, 48)},
        "stride": {"shift": vectors[:, 0]},
        "backend": {"backend": "".join(("re", "ference"))},
    }[change]
    got = [ops.layer_norm_modulate(**arguments) for _ in range(2)]
    assert planned.count == 2 and same_bits(*got)
    want = ops.layer_norm_modulate(**arguments | {"backend": "reference"})
    assert torch.allclose(got[0].float(), want.float(), atol=2e-2 if change == "out_dtype" else 1e-5)


def test_dense_but_transposed_tensors_give_contiguous_outputs() -> None:
    x, weight = torch.randn(5, 2, 48).transpose(0, 1), torch.randn(48)
    for _ in range(2):
        y = ops.rms_norm(x, weight, 1e-6, backend="cpu")
        assert y.is_contiguous()
        assert torch.allclose(y, reference.rms_norm(x, weight, 1e-6), atol=1e-5)
    arguments = kv_arguments(torch.float32)
    arguments |= {name: arguments[name].transpose(0, 1).contiguous().transpose(0, 1) for name in "qkv"}
    got, want = (f(**arguments) for f in (ops.qk_norm_rope_kv_write, reference.qk_norm_rope_kv_write))
    assert got.is_contiguous() and torch.allclose(got, want, atol=1e-5)


@pytest.mark.parametrize("backend", ["cpu", "reference", "auto"])
@pytest.mark.parametrize("name", KERNELS)
def test_every_op_keeps_its_calls(name: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On other tensors of the same signature a call gives what a checked one gives, without checking."""
    if reason := OPS[name].absent.get(backend):
        pytest.skip(reason)
    case = KernelCase("small", 2, 4, heads=2, head_dim=64, ffn_dim=96, ranks=2)
    problem = next(problem for problem in problems(case) if problem.op == name)
    planned = Planned(kernel_op(name), monkeypatch)
    cpu = torch.device("cpu")
    problem.bind(problem.make(cpu), backend)()
    inputs = problem.make(cpu)
    copies = {key: x.clone() if isinstance(x, torch.Tensor) else x for key, x in inputs.items()}
    kept = problem.results(inputs, as_tuple(problem.bind(inputs, backend)()))
    assert planned.count == 1 and kernel_op(name).kept() == 1
    kernel_op(name).forget()
    checked = problem.results(copies, as_tuple(problem.bind(copies, backend)()))
    assert planned.count == 2
    assert kept and all(same_bits(a, b) for a, b in zip(kept, checked, strict=True))


def test_all_ops_of_the_compiled_core_keep_calls() -> None:
    """Those of Triton alone do as well; a write-only half is its whole op without q, in the core."""
    others = {name for name in KERNELS if OPS[name].kernel or "cpu" in OPS[name].absent}
    assert others == {
        "k_norm_rope_kv_write", "k_norm_rope_quantize_kv_write", "frame_norm_silu", "frame_pixels"
    }  # fmt: skip
    assert set(KERNELS) == {name for name in vars(_C.cpu) if name in ops.__all__} | others


def test_the_table_is_bounded() -> None:
    op = kernel_op("rms_norm")
    op.forget()
    weight = torch.ones(8)
    for tokens in range(1, KEPT_CALLS + 20):
        ops.rms_norm(torch.ones(1, tokens, 8), weight, 1e-6)
        assert 0 < op.kept() <= KEPT_CALLS
    assert op.kept() < 20


def test_autograd_sees_what_requires_grad() -> None:
    x, weight = torch.ones(1, 2, 8), torch.nn.Parameter(torch.ones(8))
    find = kernel_op("rms_norm")._find
    with torch.no_grad():
        ops.rms_norm(x, weight, 1e-6, backend="cpu")
        assert find((x, weight, 1e-6, "cpu"), False) is not None
    assert find((x, weight, 1e-6, "cpu"), True) is None
    assert find((x, weight.detach(), 1e-6, "cpu"), True) is not None


def test_tensors_of_other_kinds_are_not_taken_for_kept_ones() -> None:
    class Own(torch.Tensor):
        pass

    x, weight = torch.ones(1, 2, 8), torch.ones(8)
    ops.rms_norm(x, weight, 1e-6, backend="cpu")
    find = kernel_op("rms_norm")._find
    assert find((x, weight, 1e-6, "cpu"), False) is not None
    for other in (x.as_subclass(Own), x.to("meta"), x.numpy(), x.int(), None, x.to_sparse(), x.expand(2, 2, 8)[:1, :1]):
        assert find((other, weight, 1e-6, "cpu"), False) is None
    with pytest.raises(TypeError, match="find takes a tuple"):
        find([x, weight, 1e-6, "cpu"], False)  # type: ignore[arg-type]


class Wrapper(torch.Tensor):
    """A tensor without memory of its own, which `torch.library` sees and this class unwraps."""

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> Wrapper:
        made: Wrapper = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, held.shape, strides=held.stride(), dtype=held.dtype
        )
        made.held = held  # type: ignore[attr-defined]
        return made

    @classmethod
    def __torch_dispatch__(cls, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return op(*tree_map(lambda x: x.held if isinstance(x, cls) else x, args), **kwargs or {})


def test_a_subclass_sees_the_call_where_it_is_in_a_list() -> None:
    attended, outs = torch.randn(1, 6, 8), [torch.zeros(1, 3, 16) for _ in range(2)]
    for _ in range(2):
        ops.attention_output_push(attended, [Wrapper(out) for out in outs], 8)
        assert same_bits(torch.cat([out[..., 8:] for out in outs], 1), attended)
        for out in outs:
            out.zero_()


def test_a_table_that_is_cleared_while_it_answers() -> None:
    """Making the answer may collect garbage, whose finalizers may clear the table."""
    exchange = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
    table = _C.CallTable(exchange, (torch.Tensor,), (torch.dtype,), [], [], 4)
    count, later = 30, []
    call = (1.0,)
    if not table.keep(call, ["plan"], tuple(range(1000, 1000 + count)), [], False):
        pytest.skip("this torch has no DLPack function table")
    find = table.find

    class Clearing:
        def __init__(self) -> None:
            self.cycle = self

        def __del__(self) -> None:
            table.clear()
            later.extend(tuple(range(i, i + count)) for i in range(300))  # where the cleared arguments lay

    enabled, threshold = gc.isenabled(), gc.get_threshold()
    gc.disable()
    try:
        held: list[Any] = [[] for _ in range(500)]  # so that the answer's list is a new one
        Clearing()
        gc.set_threshold(1)
        gc.enable()
        found = find(call, False)
    finally:
        gc.disable()
        gc.set_threshold(*threshold)
        if enabled:
            gc.enable()
    assert held and found == (["plan"], list(range(1000, 1000 + count)))


@pytest.mark.parametrize("exchange", [None, 7])
def test_without_dlpacks_function_table_every_call_is_checked(
    exchange: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    op = kernel_op("rms_norm")
    planned = Planned(op, monkeypatch)
    table = _C.CallTable(exchange, (torch.Tensor,), (torch.dtype,), [], [], 4)
    monkeypatch.setattr(op, "_table", table)
    monkeypatch.setattr(op, "_find", table.find)
    x, weight = torch.randn(1, 2, 8), torch.ones(8)
    first, second = (ops.rms_norm(x, weight, 1e-6) for _ in range(2))
    assert same_bits(first, second) and planned.count == 2 and len(table) == 0


@pytest.mark.parametrize(
    "changed,message",
    [
        ({"written": [32]}, "written: an index is too large"),
        ({"varying": [40]}, "varying: an index is too large"),
        ({"limit": 0}, "limit: must be at least 1"),
    ],
)
def test_a_table_of_wrong_make_is_refused(changed: dict[str, Any], message: str) -> None:
    made: dict[str, Any] = {
        "exchange": None, "tensors": (torch.Tensor,), "constants": (), "written": [], "varying": [], "limit": 1,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        _C.CallTable(**made | changed)


def test_threads_share_the_kept_calls() -> None:
    """Threads with shapes of their own, and a clearing one between them: each gets its own results."""
    kernel_op("residual_norm_modulate").forget()
    failures: list[str] = []

    def work(tokens: int) -> None:
        x, delta = torch.full((1, tokens, 16), float(tokens)), torch.ones(1, tokens, 16)
        vector = torch.zeros(16)
        for i in range(200):
            x_out, y = ops.residual_norm_modulate(x, delta, vector, vector, 1e-6)
            if x_out.shape != x.shape or not (x_out == tokens + 1).all() or y.any():
                failures.append(f"{tokens}: call {i}")
            if i % 50 == tokens:
                kernel_op("residual_norm_modulate").forget()

    threads = [threading.Thread(target=work, args=(tokens,)) for tokens in range(1, 7)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
