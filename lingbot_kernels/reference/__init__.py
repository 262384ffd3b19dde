"""Every op in plain torch, any dtype up to float64: what tests and benches compare with.

Arithmetic is float64 for float64 inputs, else float32; in bf16 and f16 it rounds where the official formulation does.
"""

from lingbot_kernels.reference.attention_output_push import attention_output_push
from lingbot_kernels.reference.frame_norm_silu import frame_norm_silu
from lingbot_kernels.reference.frame_pixels import frame_pixels
from lingbot_kernels.reference.gated_residual import gated_residual
from lingbot_kernels.reference.gated_residual_camera_norm import gated_residual_camera_norm
from lingbot_kernels.reference.gated_residual_camera_norm_quantize import gated_residual_camera_norm_quantize
from lingbot_kernels.reference.int8_attention import int8_attention
from lingbot_kernels.reference.int8_linear import int8_linear
from lingbot_kernels.reference.k_norm_rope_kv_write import k_norm_rope_kv_write
from lingbot_kernels.reference.k_norm_rope_quantize_kv_write import k_norm_rope_quantize_kv_write
from lingbot_kernels.reference.layer_norm_modulate import layer_norm_modulate
from lingbot_kernels.reference.layer_norm_modulate_quantize import layer_norm_modulate_quantize
from lingbot_kernels.reference.linear_gelu import linear_gelu
from lingbot_kernels.reference.merge_segments import merge_segments
from lingbot_kernels.reference.qk_norm_rope_kv_write import qk_norm_rope_kv_write
from lingbot_kernels.reference.qk_norm_rope_pack import qk_norm_rope_pack
from lingbot_kernels.reference.qk_norm_rope_push import qk_norm_rope_push
from lingbot_kernels.reference.qk_norm_rope_quantize_kv_write import qk_norm_rope_quantize_kv_write
from lingbot_kernels.reference.qk_norm_rope_quantize_push import qk_norm_rope_quantize_push
from lingbot_kernels.reference.qkv_unpack_kv_write import qkv_unpack_kv_write
from lingbot_kernels.reference.residual_norm_modulate import residual_norm_modulate
from lingbot_kernels.reference.residual_norm_modulate_quantize import residual_norm_modulate_quantize
from lingbot_kernels.reference.rms_norm import rms_norm
from lingbot_kernels.reference.rope_cos_sin import apply_rope, rope_cos_sin, rope_frequencies
from lingbot_kernels.reference.rotate_quantize import rotate_quantize
from lingbot_kernels.reference.windowed_attention import windowed_attention, windowed_attention_with_lse

__all__ = [
    "apply_rope",
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
    "rope_frequencies",
    "rotate_quantize",
    "windowed_attention",
    "windowed_attention_with_lse",
]
