"""The gate: green for the ops as they are, red for each way in which a kernel can be wrong."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from lingbot_kernels.benchmarks import gate
from lingbot_kernels.benchmarks.kernel_cases import KERNEL_CASES, KernelCase
from lingbot_kernels.benchmarks.problem import Problem, as_tuple, written_slots
from lingbot_kernels.benchmarks.problems import problems

CPU = torch.device("cpu")
SMALL = KernelCase("small", 2, 4, heads=2, head_dim=64, ffn_dim=96, residual_float32=True)
WRAP = dataclasses.replace(SMALL, name="small-wrap", wrap=True)


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


def find(op: str, case: KernelCase = SMALL) -> Problem:
    return next(problem for problem in problems(case) if problem.op == op)


def judged(problem: Problem, spoil=lambda inputs, outputs: outputs) -> gate.Verdict:
    """The verdict on the reference, with `spoil` applied to what it did."""
    backend = "reference" if "reference" in problem.backends else "sdpa"
    expectation = gate.expect(problem, problem.make(CPU))

    def run(inputs):
        return spoil(inputs, as_tuple(problem.bind(inputs, backend)()))

    return gate.judge(expectation, run, fill_outputs=False)


@pytest.mark.parametrize("case", [SMALL, WRAP], ids=lambda case: case.name)
def test_every_problem_passes_with_the_plain_formulation(case):
    found = list(problems(case))
    for problem in found:
        verdict = judged(problem)
        assert verdict.green, (problem.op, problem.case, verdict)
    ops = {problem.op for problem in found}
    from lingbot_kernels.ops._dispatch import OPS

    ring = {"qk_norm_rope_kv_write", "k_norm_rope_kv_write", "qkv_unpack_kv_write"}
    assert ops == (ring if case.wrap else set(OPS))
    assert len({(problem.op, problem.case) for problem in found}) == len(found)


def nudge(position: int, factor: float):
    """Spoil one result by a relative error of `factor - 1`, everywhere."""

    def spoil(inputs, outputs):
        return tuple(x * factor if i == position else x for i, x in enumerate(outputs))

    return spoil


def test_an_output_that_is_off_is_red():
    verdict = judged(find("rms_norm"), nudge(0, 1.02))
    assert not verdict.green and "error" in verdict.reason
    assert verdict.error > gate.ERROR_FACTOR * verdict.plain_error > 0


@pytest.mark.parametrize("op", ["residual_norm_modulate", "gated_residual_camera_norm"])
@pytest.mark.parametrize("position", [0, 1])
def test_each_output_is_judged(op, position):
    verdict = judged(find(op), nudge(position, 1.02))
    assert not verdict.green and verdict.reason.startswith(f"result {position}")


@pytest.mark.parametrize("name", ["k_cache", "v_cache"])
def test_a_wrong_slot_is_red(name):
    def spoil(inputs, outputs):
        cache, slots = inputs[name], written_slots(inputs)
        cache[:, slots] = cache[:, slots.roll(1)].clone()
        return outputs

    assert not judged(find("k_norm_rope_kv_write"), spoil).green


@pytest.mark.parametrize("case", [SMALL, WRAP], ids=lambda case: case.name)
def test_a_slot_outside_the_chunk_that_changes_is_red(case):
    problem = find("qk_norm_rope_kv_write", case)

    def spoil(inputs, outputs):
        slots = written_slots(inputs).tolist()
        other = next(i for i in range(inputs["v_cache"].shape[1]) if i not in slots)
        inputs["v_cache"][0, other, 0, 0] = 1.0
        return outputs

    verdict = judged(problem, spoil)
    assert not verdict.green and "v_cache" in verdict.reason


def test_a_slot_left_unwritten_is_red():
    def spoil(inputs, outputs):
        inputs["k_cache"][:, written_slots(inputs)[-1]] = torch.nan
        return outputs

    verdict = judged(find("k_norm_rope_kv_write"), spoil)
    assert not verdict.green and verdict.error == float("inf")


def test_an_output_left_unwritten_is_red():
    problem = find("rms_norm")
    expectation = gate.expect(problem, problem.make(CPU))

    def lazy(inputs):
        y = inputs["x"].new_empty(inputs["x"].shape)  # the allocation a kernel would forget a part of
        y[:, :-1] = as_tuple(problem.bind(inputs, "reference")())[0][:, :-1]
        return (y,)

    assert not gate.judge(expectation, lazy).green
    assert not torch.are_deterministic_algorithms_enabled()


def test_wrong_counts_and_shapes_are_red():
    assert not judged(find("gated_residual"), lambda inputs, outputs: ()).green
    assert not judged(find("gated_residual"), lambda inputs, outputs: (outputs[0][:, :-1],)).green


def test_attention_is_judged_beyond_the_sampled_rows_for_finiteness():
    problem = find("windowed_attention", KERNEL_CASES["s192-d512"])

    def spoil(inputs, outputs):
        out = outputs[0].clone()
        unseen = next(i for i in range(out.shape[1]) if i not in inputs["rows"].tolist())
        out[:, unseen] = torch.nan
        return (out,)

    verdict = judged(problem, spoil)
    assert not verdict.green and "finite" in verdict.reason


@pytest.mark.parametrize("steps, green", [(1, True), (3, False)])
def test_the_rope_table_may_be_one_ulp_off(steps, green):
    def spoil(inputs, outputs):
        (table,) = outputs
        for _ in range(steps):
            table = torch.nextafter(table, torch.zeros(()))
        return (torch.where(outputs[0].abs() > 0.1, table, outputs[0]),)

    verdict = judged(find("rope_cos_sin"), spoil)
    # One step from the correctly rounded value is at most 1.5 ulp from the oracle: take those within one.
    assert verdict.green is green or (steps == 1 and "ulp" in verdict.reason)


def test_bytes_are_those_of_the_activations():
    case = KERNEL_CASES["s4524-d5120"]
    by_op = {(p.op, p.case): p.bytes for p in problems(case)}
    assert by_op["qk_norm_rope_kv_write", case.name] == 6 * 4524 * 5120 * 2  # q, k, v in; q, K, V out
    assert by_op["k_norm_rope_kv_write", case.name] == 4 * 4524 * 5120 * 2
    assert by_op["gated_residual_camera_norm", case.name + "-camera"] == 6 * 4524 * 5120 * 2
    assert by_op["gated_residual", case.name + "-r32"] == (4 + 2 + 4) * 4524 * 5120
    assert [KERNEL_CASES[name].tokens for name in ("s4524-d5120", "s2262-d5120", "s1131-d5120")] == [4524, 2262, 1131]
