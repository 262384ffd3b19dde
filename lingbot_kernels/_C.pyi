"""The compiled core. Pointers are ints (0: null), strides count elements, a dtype is 0 float32, 1 float16, 2 bfloat16.

Arguments are the fields of the structs in csrc/params.h in their order. A launcher that can't serve raises
RuntimeError. The last argument is the number of threads (0: every core) on the CPU, the stream's handle with CUDA.
"""

from collections.abc import Callable, Sequence
from typing import Any

version: str
cpu_isa: str
compiled_with_cuda: bool
cuda_architectures: str

def environment(name: str, /) -> str | None: ...

class CallTable:
    """Calls of an op that were found valid, by their arguments' signature; see csrc/call_table.cpp.

    exchange: the capsule `torch.Tensor.__dlpack_c_exchange_api__`; without one nothing is kept. tensors: exact types
    read as tensors. constants: exact types whose objects live as long as the process. written: positions of tensors
    that must not overlap another one. varying: positions of ints of any value from 0. limit: signatures kept.
    """

    def __init__(
        self,
        exchange: object,
        tensors: tuple[type, ...],
        constants: tuple[type, ...],
        written: Sequence[int],
        varying: Sequence[int],
        limit: int,
    ) -> None: ...
    @property
    def find(self) -> Callable[[tuple[Any, ...], bool], tuple[Any, list[Any]] | None]: ...
    def keep(
        self,
        call: tuple[Any, ...],
        plan: object,
        arguments: tuple[Any, ...],
        slots: Sequence[tuple[int, int]],
        addresses: bool,
    ) -> bool: ...
    def clear(self) -> None: ...
    def __len__(self) -> int: ...

class _Ops:  # written by csrc/make_stub.py, from here on
    def rope_cos_sin(
        self, out: int, num_tokens: int, token_start: int, frame_stride: int, width: int, head_dim: int, theta: float,
        threads_or_stream: int, /
    ) -> None: ...
    def qk_norm_rope_kv_write(
        self, q_ptr: int, q_batch_stride: int, q_token_stride: int, k_ptr: int, k_batch_stride: int,
        k_token_stride: int, v_ptr: int, v_batch_stride: int, v_token_stride: int, q_weight: int, k_weight: int,
        cos_sin: int, q_out_ptr: int, q_out_batch_stride: int, q_out_token_stride: int, q_out_group_stride: int,
        k_cache_ptr: int, k_cache_batch_stride: int, k_cache_token_stride: int, v_cache_ptr: int,
        v_cache_batch_stride: int, v_cache_token_stride: int, ring_chunk_start: int, ring_cursor: int, ring_sink: int,
        ring_capacity: int, batch: int, tokens: int, heads: int, head_dim: int, dtype: int, eps: float,
        threads_or_stream: int, /
    ) -> None: ...
    def qk_norm_rope_quantize_kv_write(
        self, q_ptr: int, q_batch_stride: int, q_token_stride: int, k_ptr: int, k_batch_stride: int,
        k_token_stride: int, v_ptr: int, v_batch_stride: int, v_token_stride: int, q_weight: int, k_weight: int,
        cos_sin: int, q_codes: int, q_scale: int, k_cache_ptr: int, k_cache_batch_stride: int,
        k_cache_token_stride: int, k_scale: int, k_scale_batch_stride: int, k_scale_token_stride: int,
        k_scale_head_stride: int, v_cache_ptr: int, v_cache_batch_stride: int, v_cache_token_stride: int,
        ring_chunk_start: int, ring_cursor: int, ring_sink: int, ring_capacity: int, batch: int, tokens: int,
        heads: int, head_dim: int, dtype: int, eps: float, threads_or_stream: int, /
    ) -> None: ...
    def qk_norm_rope_pack(
        self, q_ptr: int, q_batch_stride: int, q_token_stride: int, k_ptr: int, k_batch_stride: int,
        k_token_stride: int, v_ptr: int, v_batch_stride: int, v_token_stride: int, q_weight: int, k_weight: int,
        cos_sin: int, out: int, batch: int, tokens: int, heads: int, head_dim: int, ranks: int, dtype: int, eps: float,
        threads_or_stream: int, /
    ) -> None: ...
    def qkv_unpack_kv_write(
        self, packed: int, parts: int, k_cache_ptr: int, k_cache_batch_stride: int, k_cache_token_stride: int,
        v_cache_ptr: int, v_cache_batch_stride: int, v_cache_token_stride: int, ring_chunk_start: int, ring_cursor: int,
        ring_sink: int, ring_capacity: int, batch: int, tokens: int, heads: int, head_dim: int, dtype: int,
        threads_or_stream: int, /
    ) -> None: ...
    def qk_norm_rope_push(
        self, q_ptr: int, q_batch_stride: int, q_token_stride: int, k_ptr: int, k_batch_stride: int,
        k_token_stride: int, v_ptr: int, v_batch_stride: int, v_token_stride: int, q_weight: int, k_weight: int,
        cos_sin: int, addresses: int, q_out_batch_stride: int, q_out_token_stride: int, k_cache_batch_stride: int,
        k_cache_token_stride: int, v_cache_batch_stride: int, v_cache_token_stride: int, ring_chunk_start: int,
        ring_cursor: int, ring_sink: int, ring_capacity: int, first_token: int, batch: int, tokens: int, heads: int,
        head_dim: int, ranks: int, dtype: int, eps: float, threads_or_stream: int, /
    ) -> None: ...
    def qk_norm_rope_quantize_push(
        self, q_ptr: int, q_batch_stride: int, q_token_stride: int, k_ptr: int, k_batch_stride: int,
        k_token_stride: int, v_ptr: int, v_batch_stride: int, v_token_stride: int, q_weight: int, k_weight: int,
        cos_sin: int, addresses: int, q_out_batch_stride: int, q_out_token_stride: int, q_scale_batch_stride: int,
        q_scale_token_stride: int, q_scale_head_stride: int, k_cache_batch_stride: int, k_cache_token_stride: int,
        k_scale_batch_stride: int, k_scale_token_stride: int, k_scale_head_stride: int, v_cache_batch_stride: int,
        v_cache_token_stride: int, ring_chunk_start: int, ring_cursor: int, ring_sink: int, ring_capacity: int,
        first_token: int, batch: int, tokens: int, heads: int, head_dim: int, ranks: int, dtype: int, eps: float,
        threads_or_stream: int, /
    ) -> None: ...
    def attention_output_push(
        self, attended_ptr: int, attended_batch_stride: int, attended_token_stride: int, addresses: int, ends: int,
        batch_strides: int, token_stride: int, column: int, batch: int, tokens: int, width: int, ranks: int, dtype: int,
        threads_or_stream: int, /
    ) -> None: ...
    def merge_segments(
        self, segments: int, segment_stride: int, batch_stride: int, token_stride: int, lse: int,
        lse_segment_stride: int, lse_batch_stride: int, lse_head_stride: int, out: int, batch: int, tokens: int,
        count: int, heads: int, head_dim: int, dtype: int, threads_or_stream: int, /
    ) -> None: ...
    def int8_attention(
        self, q_ptr: int, q_batch_stride: int, q_token_stride: int, q_scale: int, q_scale_batch_stride: int,
        q_scale_token_stride: int, q_scale_head_stride: int, k_cache_ptr: int, k_cache_batch_stride: int,
        k_cache_token_stride: int, k_scale: int, k_scale_batch_stride: int, k_scale_token_stride: int,
        k_scale_head_stride: int, v_cache_ptr: int, v_cache_batch_stride: int, v_cache_token_stride: int, out: int,
        lse: int, workspace: int, workspace_bytes: int, batch: int, queries: int, keys: int, heads: int, head_dim: int,
        softmax_scale: float, last_key_count: float, threads_or_stream: int, /
    ) -> None: ...
    def rms_norm(
        self, x_ptr: int, x_batch_stride: int, x_token_stride: int, weight: int, y: int, batch: int, tokens: int,
        dim: int, dtype: int, eps: float, threads_or_stream: int, /
    ) -> None: ...
    def layer_norm_modulate(
        self, x: int, shift_ptr: int, shift_batch_stride: int, scale_ptr: int, scale_batch_stride: int, y: int,
        batch: int, tokens: int, dim: int, residual_dtype: int, dtype: int, eps: float, threads_or_stream: int, /
    ) -> None: ...
    def residual_norm_modulate(
        self, x: int, delta: int, gate_ptr: int, gate_batch_stride: int, shift_ptr: int, shift_batch_stride: int,
        scale_ptr: int, scale_batch_stride: int, x_out: int, y: int, batch: int, tokens: int, dim: int,
        residual_dtype: int, dtype: int, eps: float, threads_or_stream: int, /
    ) -> None: ...
    def gated_residual_camera_norm(
        self, x: int, delta: int, gate_ptr: int, gate_batch_stride: int, cam_scale: int, cam_shift: int, weight: int,
        bias: int, x_out: int, y: int, batch: int, tokens: int, dim: int, residual_dtype: int, dtype: int, eps: float,
        threads_or_stream: int, /
    ) -> None: ...
    def gated_residual(
        self, x: int, delta: int, gate_ptr: int, gate_batch_stride: int, x_out: int, batch: int, tokens: int, dim: int,
        residual_dtype: int, dtype: int, threads_or_stream: int, /
    ) -> None: ...
    def rotate_quantize(
        self, x_ptr: int, x_batch_stride: int, x_token_stride: int, out_codes: int, out_row_scale: int, out_signs: int,
        out_rotate: int, batch: int, tokens: int, dim: int, dtype: int, threads_or_stream: int, /
    ) -> None: ...
    def layer_norm_modulate_quantize(
        self, x: int, shift_ptr: int, shift_batch_stride: int, scale_ptr: int, scale_batch_stride: int, out_codes: int,
        out_row_scale: int, out_signs: int, out_rotate: int, batch: int, tokens: int, dim: int, residual_dtype: int,
        eps: float, threads_or_stream: int, /
    ) -> None: ...
    def residual_norm_modulate_quantize(
        self, x: int, delta: int, gate_ptr: int, gate_batch_stride: int, shift_ptr: int, shift_batch_stride: int,
        scale_ptr: int, scale_batch_stride: int, x_out: int, out_codes: int, out_row_scale: int, out_signs: int,
        out_rotate: int, batch: int, tokens: int, dim: int, residual_dtype: int, dtype: int, eps: float,
        threads_or_stream: int, /
    ) -> None: ...
    def gated_residual_camera_norm_quantize(
        self, x: int, delta: int, gate_ptr: int, gate_batch_stride: int, cam_scale: int, cam_shift: int, weight: int,
        bias: int, x_out: int, out_codes: int, out_row_scale: int, out_signs: int, out_rotate: int, batch: int,
        tokens: int, dim: int, residual_dtype: int, dtype: int, eps: float, threads_or_stream: int, /
    ) -> None: ...

class _Cpu(_Ops):
    isas: tuple[str, ...]
    def int8_linear(
        self, x: int, x_scale: int, w: int, w_scale: int, bias: int, y: int, rows: int, inputs: int, outputs: int,
        gelu: int, bias_dtype: int, dtype: int, threads: int, /
    ) -> None: ...
    def set_isa(self, name: str) -> None: ...

cpu: _Cpu
cuda: _Ops  # only where compiled_with_cuda
