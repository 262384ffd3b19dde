"""The public ops: each checks its arguments, allocates its outputs and dispatches to a backend.

Tensors are token-major: x [B, S, D] with the heads inside D; K/V caches are [B, capacity, heads, head_dim].
"""

from lingbot_kernels.ops._dispatch import BACKENDS, BackendUnavailable, use_backend
from lingbot_kernels.ops.attention_output_push import attention_output_push
from lingbot_kernels.ops.frame_norm_silu import frame_norm_silu
from lingbot_kernels.ops.frame_pixels import frame_pixels
from lingbot_kernels.ops.gated_residual import gated_residual
from lingbot_kernels.ops.gated_residual_camera_norm import gated_residual_camera_norm
from lingbot_kernels.ops.gated_residual_camera_norm_quantize import gated_residual_camera_norm_quantize
from lingbot_kernels.ops.int8_attention import int8_attention
from lingbot_kernels.ops.int8_linear import int8_linear
from lingbot_kernels.ops.k_norm_rope_kv_write import k_norm_rope_kv_write
from lingbot_kernels.ops.k_norm_rope_quantize_kv_write import k_norm_rope_quantize_kv_write
from lingbot_kernels.ops.layer_norm_modulate import layer_norm_modulate
from lingbot_kernels.ops.layer_norm_modulate_quantize import layer_norm_modulate_quantize
from lingbot_kernels.ops.linear_gelu import linear_gelu
from lingbot_kernels.ops.merge_segments import merge_segments
from lingbot_kernels.ops.qk_norm_rope_kv_write import qk_norm_rope_kv_write
from lingbot_kernels.ops.qk_norm_rope_pack import qk_norm_rope_pack
from lingbot_kernels.ops.qk_norm_rope_push import qk_norm_rope_push
from lingbot_kernels.ops.qk_norm_rope_quantize_kv_write import qk_norm_rope_quantize_kv_write
from lingbot_kernels.ops.qk_norm_rope_quantize_push import qk_norm_rope_quantize_push
from lingbot_kernels.ops.qkv_unpack_kv_write import qkv_unpack_kv_write
from lingbot_kernels.ops.residual_norm_modulate import residual_norm_modulate
from lingbot_kernels.ops.residual_norm_modulate_quantize import residual_norm_modulate_quantize
from lingbot_kernels.ops.rms_norm import rms_norm
from lingbot_kernels.ops.rope_cos_sin import rope_cos_sin
from lingbot_kernels.ops.rotate_quantize import rotate_quantize
from lingbot_kernels.ops.windowed_attention import windowed_attention
from lingbot_kernels.ring import RingPosition

__all__ = [
    "BACKENDS",
    "BackendUnavailable",
    "RingPosition",
    "attention_output_push",
    "frame_norm_silu",
    "frame_pixels",
    "gated_residual",
    "gated_residual_camera_norm",
    "gated_residual_camera_norm_quantize",
    "int8_attention",
    "int8_linear",
    "k_norm_rope_kv_write",
    "k_norm_rope_quantize_kv_write",
    "layer_norm_modulate",
    "layer_norm_modulate_quantize",
    "linear_gelu",
    "merge_segments",
    "qk_norm_rope_kv_write",
    "qk_norm_rope_pack",
    "qk_norm_rope_push",
    "qk_norm_rope_quantize_kv_write",
    "qk_norm_rope_quantize_push",
    "qkv_unpack_kv_write",
    "residual_norm_modulate",
    "residual_norm_modulate_quantize",
    "rms_norm",
    "rope_cos_sin",
    "rotate_quantize",
    "use_backend",
    "windowed_attention",
]
