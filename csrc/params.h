// What a launcher is handed: plain data, no torch, no Python. CUDA and CPU launchers of an op take the same struct.
//
// Strides are in elements, the innermost dimension is contiguous. T is the compute type (Dtype), R the residual type:
// R is T or float32. All arithmetic is float32; every output is rounded once unless a kernel's formula says otherwise.
#pragma once

#include <cstdint>

namespace lingbot {

enum class Dtype : int32_t { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

constexpr int kMaxRotaryPairs = 128;  // head_dim <= 256
constexpr int kMaxRanks = 64;         // of one exchange
constexpr int kRotationBlock = 128;   // channels that a quantised row's rotation mixes

// A [batch, tokens, D] operand whose tokens lie `token_stride` apart; a null pointer means "absent".
struct Rows {
  const void* ptr;
  int64_t batch_stride;
  int64_t token_stride;
};

// The same, written to. Head h of a token goes to group h / heads_per_group, `group_stride` apart: one group for a
// plain [batch, tokens, D] tensor, one group a rank for the packed all-to-all buffer.
struct OutRows {
  void* ptr;
  int64_t batch_stride;
  int64_t token_stride;
  int64_t group_stride;
};

// K/V ring with a pinned sink. Token i of the chunk has position p = chunk_start + i, counted from the first token the
// cache received; slot(p) = p < sink ? p : sink + (p - sink) % (capacity - sink). `cursor`, where not null, points to
// device memory and replaces chunk_start: a captured graph then follows the ring.
struct Ring {
  int64_t chunk_start;
  const int32_t* cursor;
  int64_t sink;
  int64_t capacity;
};

struct Cache {  // [batch, capacity, heads, head_dim]; a token's heads are contiguous
  void* ptr;
  int64_t batch_stride;
  int64_t token_stride;
};

// out[i] = cos | sin of token n = token_start + i at
// (t, h, w) = (n / frame_stride, n % frame_stride / width, n % width).
struct RopeCosSinParams {
  float* out;  // [num_tokens, head_dim]
  int64_t num_tokens;
  int64_t token_start;
  int64_t frame_stride;
  int64_t width;
  int32_t head_dim;
  double theta;
};

// q_out = rope(rms_norm(q)); ring slot of K = rope(rms_norm(k)); ring slot of V = v.
// q.ptr null: write-only. v.ptr null: V is already in its slot.
struct QkNormRopeKvWriteParams {
  Rows q, k, v;
  const void* q_weight;  // [D], T
  const void* k_weight;
  const float* cos_sin;  // [tokens, head_dim], shared by the batch
  OutRows q_out;         // group_stride unused
  Cache k_cache, v_cache;
  Ring ring;
  int64_t batch, tokens;
  int32_t heads, head_dim;
  Dtype dtype;
  float eps;
};

// The same norm and rotation; q and k are then not rounded to T but quantised, a token's head for itself (QuantizedRows
// has the formula; no signs, no Hadamard product). q.ptr null: write-only. v.ptr null: V is already in its slot.
struct QkNormRopeQuantizeKvWriteParams {
  Rows q, k, v;
  const void* q_weight;  // [D], T
  const void* k_weight;
  const float* cos_sin;  // [tokens, head_dim], shared by the batch
  int8_t* q_codes;       // [batch, tokens, heads, head_dim], contiguous
  float* q_scale;        // [batch, tokens, heads], contiguous
  Cache k_cache;         // int8
  float* k_scale;        // [batch, capacity, heads]
  int64_t k_scale_batch_stride, k_scale_token_stride, k_scale_head_stride;
  Cache v_cache;
  Ring ring;
  int64_t batch, tokens;
  int32_t heads, head_dim;
  Dtype dtype;
  float eps;
};

// The norm and rotation of qk_norm_rope_kv_write, written into one all-to-all buffer: out is [ranks, tokens, batch,
// parts, heads / ranks, head_dim] with parts = (q, k, v), or (k, v) when q.ptr is null.
struct QkNormRopePackParams {
  Rows q, k, v;
  const void* q_weight;
  const void* k_weight;
  const float* cos_sin;
  void* out;
  int64_t batch, tokens;
  int32_t heads, head_dim, ranks;
  Dtype dtype;
  float eps;
};

// K and V of a received all-to-all buffer [tokens, batch, parts, heads, head_dim] go to their ring slots (heads are
// this rank's).
struct QkvUnpackKvWriteParams {
  const void* packed;
  int32_t parts;  // 3: q, k, v; 2: k, v
  Cache k_cache, v_cache;
  Ring ring;
  int64_t batch, tokens;
  int32_t heads, head_dim;
  Dtype dtype;
};

// The same norm and rotation, each rank's heads written straight to that rank: q to its rows, k and v to its ring.
// Token i of this shard is token first_token + i of the chunk.
struct QkNormRopePushParams {
  Rows q, k, v;
  const void* q_weight;
  const void* k_weight;
  const float* cos_sin;
  // In host memory: addresses of each rank's Q [batch, chunk tokens, heads / ranks, head_dim] (not read where q.ptr is
  // null), then of each rank's K ring, then of each rank's V ring; 3 * ranks of them.
  const int64_t* addresses;
  int64_t q_out_batch_stride, q_out_token_stride, k_cache_batch_stride, k_cache_token_stride;
  int64_t v_cache_batch_stride, v_cache_token_stride;
  Ring ring;
  int64_t first_token;
  int64_t batch, tokens;
  int32_t heads, head_dim, ranks;
  Dtype dtype;
  float eps;
};

// The same with q and k quantised as in qk_norm_rope_quantize_kv_write: codes and scales to each rank's rows and ring.
struct QkNormRopeQuantizePushParams {
  Rows q, k, v;
  const void* q_weight;
  const void* k_weight;
  const float* cos_sin;
  // In host memory: addresses of each rank's Q codes [batch, chunk tokens, heads / ranks, head_dim] and Q scales
  // [batch, chunk tokens, heads / ranks] (neither read where q.ptr is null), K ring, K scales and V ring; 5 * ranks.
  const int64_t* addresses;
  int64_t q_out_batch_stride, q_out_token_stride;
  int64_t q_scale_batch_stride, q_scale_token_stride, q_scale_head_stride;
  int64_t k_cache_batch_stride, k_cache_token_stride;
  int64_t k_scale_batch_stride, k_scale_token_stride, k_scale_head_stride;
  int64_t v_cache_batch_stride, v_cache_token_stride;
  Ring ring;
  int64_t first_token;
  int64_t batch, tokens;
  int32_t heads, head_dim, ranks;
  Dtype dtype;
  float eps;
};

// Attention's [batch, tokens, width] of this rank's heads to the ranks that own the tokens: the first ends[0] tokens to
// rank 0, those up to ends[1] to rank 1 and so on, into columns [column, column + width) of their rows.
struct AttentionOutputPushParams {
  Rows attended;
  const int64_t* addresses;      // in host memory, a rank each: its rows, all heads of a token contiguous
  const int64_t* ends;           // in host memory, a rank each
  const int64_t* batch_strides;  // in host memory, a rank each: of its rows
  int64_t token_stride;          // of every rank's rows
  int64_t column;
  int64_t batch, tokens;
  int32_t width, ranks;
  Dtype dtype;
};

// Attention over disjoint sets of keys into attention over all of them: out = sum_p softmax_p(lse) * segments[p].
// segments [count, batch, tokens, heads, head_dim], a token's heads contiguous; lse float32 [count, batch, heads,
// tokens], tokens contiguous; out [batch, tokens, heads * head_dim], contiguous.
struct MergeSegmentsParams {
  const void* segments;
  int64_t segment_stride, batch_stride, token_stride;
  const float* lse;
  int64_t lse_segment_stride, lse_batch_stride, lse_head_stride;
  void* out;
  int64_t batch, tokens;
  int32_t count, heads, head_dim;
  Dtype dtype;
};

// out = softmax(q_scale * k_scale * (q k^T) * softmax_scale) v with q and k in int8, v and out in bfloat16. Of every
// operand a token's heads are contiguous; slots [0, keys) of the caches are seen, the last counts last_key_count
// times.
struct Int8AttentionParams {
  Rows q;                // [batch, queries, heads, head_dim], int8
  const float* q_scale;  // [batch, queries, heads]
  int64_t q_scale_batch_stride, q_scale_token_stride, q_scale_head_stride;
  Cache k_cache;         // [batch, capacity, heads, head_dim], int8
  const float* k_scale;  // [batch, capacity, heads]; loads best with tokens contiguous
  int64_t k_scale_batch_stride, k_scale_token_stride, k_scale_head_stride;
  Cache v_cache;    // [batch, capacity, heads, head_dim], bfloat16
  void* out;        // [batch, queries, heads, head_dim], bfloat16, contiguous
  float* lse;       // [batch, heads, queries], natural logarithm
  void* workspace;  // for the parts of tiles that several multiprocessors share; null: tiles are never shared
  int64_t workspace_bytes;
  int64_t batch, queries, keys;
  int32_t heads, head_dim;
  double softmax_scale, last_key_count;
};

// y = rms_norm(x) * weight over the whole row, rounded to T twice: after the normalisation and after the weight.
struct RmsNormParams {
  Rows x;
  const void* weight;  // [dim], T
  void* y;             // [batch, tokens, dim], T
  int64_t batch, tokens;
  int32_t dim;
  Dtype dtype;
  float eps;
};

// A per-channel float32 vector [dim]; batch_stride 0 shares it over the batch. Null: absent.
struct Modulation {
  const float* ptr;
  int64_t batch_stride;
};

// y = layer_norm(x) * (1 + scale) + shift, no affine parameters.
struct LayerNormModulateParams {
  const void* x;  // [batch, tokens, dim], R
  Modulation shift, scale;
  void* y;  // T
  int64_t batch, tokens;
  int32_t dim;
  Dtype residual_dtype, dtype;
  float eps;
};

// x_out = x + delta * gate (gate null: 1), rounded to R; y = layer_norm(x_out) * (1 + scale) + shift.
struct ResidualNormModulateParams {
  const void* x;      // R
  const void* delta;  // T
  Modulation gate, shift, scale;
  void* x_out;  // R
  void* y;      // T
  int64_t batch, tokens;
  int32_t dim;
  Dtype residual_dtype, dtype;
  float eps;
};

// x1 = x + delta * gate; x_out = (1 + cam_scale) * x1 + cam_shift, rounded to R once (cam_* null: x_out = x1);
// y = layer_norm(x_out) * weight + bias.
struct GatedResidualCameraNormParams {
  const void* x;      // R
  const void* delta;  // T
  Modulation gate;
  const void* cam_scale;  // [batch, tokens, dim], T, or null (both)
  const void* cam_shift;
  const void* weight;  // [dim], T
  const void* bias;    // [dim], T
  void* x_out;         // R
  void* y;             // T
  int64_t batch, tokens;
  int32_t dim;
  Dtype residual_dtype, dtype;
  float eps;
};

// Where rows y [batch, tokens, dim] of float32 values go as int8, padded with zeros to `width`, the next multiple of
// kRotationBlock: u = y * signs, times the Hadamard matrix (Sylvester's order) / sqrt(128) of each block; then
// codes = round(u * (127 / amax)) and row_scale = amax / 127, amax the row's largest |u|.
struct QuantizedRows {
  int8_t* codes;        // [batch, tokens, width]
  float* row_scale;     // [batch, tokens]; 0: a row of zeros; NaN: a NaN or Inf is in the row; codes of both are 0
  const int8_t* signs;  // [width], +1 or -1; null: +1
  int32_t rotate;       // 0: no Hadamard product
};

struct RotateQuantizeParams {
  Rows x;  // T
  QuantizedRows out;
  int64_t batch, tokens;
  int32_t dim;
  Dtype dtype;
};

// layer_norm_modulate whose y is not rounded but quantised.
struct LayerNormModulateQuantizeParams {
  const void* x;  // R
  Modulation shift, scale;
  QuantizedRows out;
  int64_t batch, tokens;
  int32_t dim;
  Dtype residual_dtype;
  float eps;
};

// residual_norm_modulate whose y is not rounded but quantised.
struct ResidualNormModulateQuantizeParams {
  const void* x;      // R
  const void* delta;  // T
  Modulation gate, shift, scale;
  void* x_out;  // R
  QuantizedRows out;
  int64_t batch, tokens;
  int32_t dim;
  Dtype residual_dtype, dtype;
  float eps;
};

// gated_residual_camera_norm whose y is not rounded but quantised.
struct GatedResidualCameraNormQuantizeParams {
  const void* x;      // R
  const void* delta;  // T
  Modulation gate;
  const void* cam_scale;  // T, or null (both)
  const void* cam_shift;
  const void* weight;  // T
  const void* bias;    // T
  void* x_out;         // R
  QuantizedRows out;
  int64_t batch, tokens;
  int32_t dim;
  Dtype residual_dtype, dtype;
  float eps;
};

// y = activation((x w^T) * (x_scale * w_scale) + bias): exact int32 sums, then float32, rounded once.
struct Int8LinearParams {
  const int8_t* x;       // [rows, inputs]
  const float* x_scale;  // [rows]
  const int8_t* w;       // [outputs, inputs]
  const float* w_scale;  // [outputs]
  const void* bias;      // [outputs], of bias_dtype; null: 0
  void* y;               // [rows, outputs], T
  int64_t rows;
  int32_t inputs, outputs;
  int32_t gelu;  // not 0: gelu in its tanh form
  Dtype bias_dtype, dtype;
};

// x_out = x + delta * gate (gate null: 1), rounded to R.
struct GatedResidualParams {
  const void* x;      // R
  const void* delta;  // T
  Modulation gate;
  void* x_out;  // R
  int64_t batch, tokens;
  int32_t dim;
  Dtype residual_dtype, dtype;
};

// A launcher returns null, or a static message of what it can't serve or what failed. It never aborts.
using Status = const char*;

namespace cpu {
Status rope_cos_sin(const RopeCosSinParams&, int threads);
Status qk_norm_rope_kv_write(const QkNormRopeKvWriteParams&, int threads);
Status qk_norm_rope_quantize_kv_write(const QkNormRopeQuantizeKvWriteParams&, int threads);
Status qk_norm_rope_pack(const QkNormRopePackParams&, int threads);
Status qkv_unpack_kv_write(const QkvUnpackKvWriteParams&, int threads);
Status qk_norm_rope_push(const QkNormRopePushParams&, int threads);
Status qk_norm_rope_quantize_push(const QkNormRopeQuantizePushParams&, int threads);
Status attention_output_push(const AttentionOutputPushParams&, int threads);
Status merge_segments(const MergeSegmentsParams&, int threads);
Status int8_attention(const Int8AttentionParams&, int threads);
Status rms_norm(const RmsNormParams&, int threads);
Status layer_norm_modulate(const LayerNormModulateParams&, int threads);
Status residual_norm_modulate(const ResidualNormModulateParams&, int threads);
Status gated_residual_camera_norm(const GatedResidualCameraNormParams&, int threads);
Status gated_residual(const GatedResidualParams&, int threads);
Status rotate_quantize(const RotateQuantizeParams&, int threads);
Status layer_norm_modulate_quantize(const LayerNormModulateQuantizeParams&, int threads);
Status residual_norm_modulate_quantize(const ResidualNormModulateQuantizeParams&, int threads);
Status gated_residual_camera_norm_quantize(const GatedResidualCameraNormQuantizeParams&, int threads);
Status int8_linear(const Int8LinearParams&, int threads);
}  // namespace cpu

namespace cuda {  // stream is a cudaStream_t
Status rope_cos_sin(const RopeCosSinParams&, void* stream);
Status qk_norm_rope_kv_write(const QkNormRopeKvWriteParams&, void* stream);
Status qk_norm_rope_quantize_kv_write(const QkNormRopeQuantizeKvWriteParams&, void* stream);
Status qk_norm_rope_pack(const QkNormRopePackParams&, void* stream);
Status qkv_unpack_kv_write(const QkvUnpackKvWriteParams&, void* stream);
Status qk_norm_rope_push(const QkNormRopePushParams&, void* stream);
Status qk_norm_rope_quantize_push(const QkNormRopeQuantizePushParams&, void* stream);
Status attention_output_push(const AttentionOutputPushParams&, void* stream);
Status merge_segments(const MergeSegmentsParams&, void* stream);
Status int8_attention(const Int8AttentionParams&, void* stream);
Status rms_norm(const RmsNormParams&, void* stream);
Status layer_norm_modulate(const LayerNormModulateParams&, void* stream);
Status residual_norm_modulate(const ResidualNormModulateParams&, void* stream);
Status gated_residual_camera_norm(const GatedResidualCameraNormParams&, void* stream);
Status gated_residual(const GatedResidualParams&, void* stream);
Status rotate_quantize(const RotateQuantizeParams&, void* stream);
Status layer_norm_modulate_quantize(const LayerNormModulateQuantizeParams&, void* stream);
Status residual_norm_modulate_quantize(const ResidualNormModulateQuantizeParams&, void* stream);
Status gated_residual_camera_norm_quantize(const GatedResidualCameraNormQuantizeParams&, void* stream);
}  // namespace cuda

}  // namespace lingbot
