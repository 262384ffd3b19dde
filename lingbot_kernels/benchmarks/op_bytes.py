"""Bytes that a call of an op moves, the same for the bench's rows and for a profile."""

from __future__ import annotations

from lingbot_kernels.reference.rotate_quantize import padded_width


def op_bytes(
    op: str, tokens: int, dim: int, width: int, *, residual: int = 0, heads: int = 0, hidden: int = 0,
    visible: int = 0, camera: bool = False,
) -> int:  # fmt: skip
    """Activations read and written once; weights only where they are the larger part.

    Args:
        tokens, dim: of the op's rows; dim is head_dim of the RoPE table.
        width: bytes of an activation; residual: of the residual stream's, width where 0.
        heads: of codes that have a scale for each head.
        hidden: width of the MLP.
        visible: keys that attention sees.
        camera: whether the camera's scale and shift are read.
    """
    wide, scaled = residual or width, dim + 4 * heads
    if op == "windowed_attention":
        return 2 * (tokens + visible) * dim * width
    if op == "int8_attention":
        return (tokens + visible) * (scaled + dim * width)
    if op == "linear_gelu":
        return (tokens * (dim + hidden) + dim * hidden) * width
    if op.endswith("_quantize"):  # codes and a row's scale in place of the row
        plain = op_bytes(op.removesuffix("_quantize"), tokens, dim, width, residual=residual, camera=camera)
        return plain + tokens * (padded_width(dim) + 4 - dim * width)
    per_token = {
        "rope_cos_sin": 4 * dim,
        "qk_norm_rope_kv_write": 6 * dim * width,
        "qk_norm_rope_pack": 6 * dim * width,
        "qk_norm_rope_push": 6 * dim * width,
        "k_norm_rope_kv_write": 4 * dim * width,
        "qkv_unpack_kv_write": 4 * dim * width,
        "qk_norm_rope_quantize_kv_write": 4 * dim * width + 2 * scaled,
        "qk_norm_rope_quantize_push": 4 * dim * width + 2 * scaled,
        "k_norm_rope_quantize_kv_write": 3 * dim * width + scaled,
        "rms_norm": 2 * dim * width,
        "rotate": 2 * dim * width,
        "attention_output_push": 2 * dim * width,
        "layer_norm_modulate": dim * (wide + width),
        "residual_norm_modulate": dim * (2 * wide + 2 * width),
        "gated_residual_camera_norm": dim * (2 * wide + (4 if camera else 2) * width),
        "gated_residual": dim * (2 * wide + width),
    }
    return tokens * per_token[op]
