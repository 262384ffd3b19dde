"""The write-only kernel's reference; it lives beside the full one."""

from lingbot_kernels.reference.qk_norm_rope_quantize_kv_write import k_norm_rope_quantize_kv_write

__all__ = ["k_norm_rope_quantize_kv_write"]
