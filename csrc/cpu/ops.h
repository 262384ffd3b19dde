// The operations compiled once for each instruction set, and the choice between them.
#pragma once

#include "../params.h"

#define LINGBOT_CPU_ROW_OPS(X)                                           \
  X(qk_norm_rope_kv_write, QkNormRopeKvWriteParams)                      \
  X(qk_norm_rope_quantize_kv_write, QkNormRopeQuantizeKvWriteParams)     \
  X(qk_norm_rope_pack, QkNormRopePackParams)                             \
  X(qkv_unpack_kv_write, QkvUnpackKvWriteParams)                         \
  X(qk_norm_rope_push, QkNormRopePushParams)                             \
  X(qk_norm_rope_quantize_push, QkNormRopeQuantizePushParams)            \
  X(attention_output_push, AttentionOutputPushParams)                    \
  X(merge_segments, MergeSegmentsParams)                                 \
  X(int8_attention, Int8AttentionParams)                                 \
  X(rms_norm, RmsNormParams)                                             \
  X(layer_norm_modulate, LayerNormModulateParams)                        \
  X(residual_norm_modulate, ResidualNormModulateParams)                  \
  X(gated_residual_camera_norm, GatedResidualCameraNormParams)           \
  X(gated_residual, GatedResidualParams)                                 \
  X(rotate_quantize, RotateQuantizeParams)                               \
  X(layer_norm_modulate_quantize, LayerNormModulateQuantizeParams)       \
  X(residual_norm_modulate_quantize, ResidualNormModulateQuantizeParams) \
  X(gated_residual_camera_norm_quantize, GatedResidualCameraNormQuantizeParams)

// Those that have code of their own for processors with AVX-512 VNNI.
#define LINGBOT_CPU_PRODUCTS(X) X(int8_linear, Int8LinearParams)

#define LINGBOT_CPU_OPS(X) \
  LINGBOT_CPU_ROW_OPS(X)   \
  LINGBOT_CPU_PRODUCTS(X)

namespace lingbot::cpu {

constexpr int kMaxIsas = 4;

// Names of the instruction sets that were compiled and that this processor runs, best first; null after the last.
const char* const* available_isas();

const char* active_isa();

// False, and nothing changes, when `name` is not available.
bool set_isa(const char* name);

}  // namespace lingbot::cpu
