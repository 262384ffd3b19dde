// Attention with int8 Q K^T and bfloat16 P V: the launch, and the merge of tiles that several multiprocessors share.
#include "int8_attention.cuh"

#include <cuda.h>
#include <cudaTypedefs.h>

#include <cmath>

#include "int8_attention_config.h"
#include "launch.cuh"

namespace lingbot::cuda {

// Parts of the tiles from whole_tiles on, weighted by their log-sum-exp, in the order of their keys. A warp a row.
template <int kHeadDim>
__global__ void __launch_bounds__(256)
    merge_shared_tiles(const __grid_constant__ Int8AttentionKernelParams p, int rows, int blocks) {
  const int cut_tile = blockIdx.x, row = blockIdx.y * 8 + threadIdx.x / 32, lane = threadIdx.x & 31;
  const CutTiles cut = {static_cast<int64_t>(p.tiles - p.whole_tiles) * p.key_tiles, p.key_tiles, blocks};
  const int64_t end = static_cast<int64_t>(cut_tile + 1) * p.key_tiles;
  const TilePlace place = place_of(p, p.whole_tiles + cut_tile, rows);
  const int query = place.query + row;
  if (query >= p.queries) return;
  const int first = cut.first_block(cut_tile);
  if (cut.range_begin(first + 1) >= end && cut.slot(first, cut_tile) < 0) return;  // one block's, written already
  float largest = -INFINITY, sum = 0.f, merged[kHeadDim / 32] = {};
  for (int block = first; block < blocks && cut.range_begin(block) < end; ++block) {
    const int slot = cut.slot(block, cut_tile);
    if (slot >= 0) largest = fmaxf(largest, p.partial_lse[static_cast<int64_t>(slot) * rows + row]);
  }
  for (int block = first; block < blocks && cut.range_begin(block) < end; ++block) {
    const int slot = cut.slot(block, cut_tile);
    if (slot < 0) continue;
    const int64_t at = static_cast<int64_t>(slot) * rows + row;
    const float weight = exp2f(p.partial_lse[at] - largest);
    sum += weight;
#pragma unroll
    for (int i = 0; i < kHeadDim / 32; ++i) {
      merged[i] = fmaf(p.partial[at * kHeadDim + lane * (kHeadDim / 32) + i], weight, merged[i]);
    }
  }
  const int64_t token = static_cast<int64_t>(place.batch) * p.queries + query;
  __nv_bfloat16* out = p.out + (token * p.heads + place.head) * kHeadDim + lane * (kHeadDim / 32);
#pragma unroll
  for (int i = 0; i < kHeadDim / 32; ++i) out[i] = __float2bfloat16_rn(merged[i] / sum);
  if (p.lse != nullptr && lane == 0) {
    p.lse[(static_cast<int64_t>(place.batch) * p.heads + place.head) * p.queries + query] =
        (largest + log2f(sum)) * 0.69314718f;
  }
}

// The driver's encoder of tensor maps, asked for at run time: the module loads where there is no driver.
inline PFN_cuTensorMapEncodeTiled_v12000 tensor_map_encoder() {
  static const PFN_cuTensorMapEncodeTiled_v12000 encoder = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result;
    const cudaError_t e =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
    return e == cudaSuccess && result == cudaDriverEntryPointSuccess
               ? reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(found)
               : nullptr;
  }();
  return encoder;
}

// A cache's visible slots as a tensor [batch, keys, heads, head_dim]; boxes of `channels` of one head of `rows` slots.
inline Status cache_map(CUtensorMap* map, const Cache& cache, const Int8AttentionParams& a, int element_bytes,
                        int channels, int rows) {
  const auto encode = tensor_map_encoder();
  if (encode == nullptr) return "the driver has no cuTensorMapEncodeTiled";
  const uint64_t row = static_cast<uint64_t>(a.head_dim) * element_bytes;
  const uint64_t token = static_cast<uint64_t>(cache.token_stride) * element_bytes;
  const cuuint64_t sizes[4] = {static_cast<cuuint64_t>(a.head_dim), static_cast<cuuint64_t>(a.heads),
                               static_cast<cuuint64_t>(a.keys), static_cast<cuuint64_t>(a.batch)};
  const cuuint64_t strides[3] = {row, token,
                                 a.batch > 1 ? static_cast<cuuint64_t>(cache.batch_stride) * element_bytes : token};
  const cuuint32_t box[4] = {static_cast<cuuint32_t>(channels), 1, static_cast<cuuint32_t>(rows), 1};
  const cuuint32_t steps[4] = {1, 1, 1, 1};
  const CUresult result =
      encode(map, element_bytes == 1 ? CU_TENSOR_MAP_DATA_TYPE_UINT8 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 4, cache.ptr,
             sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
             channels * element_bytes == 128 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? nullptr : "the driver refused the caches' layout as a tensor map";
}

template <class C>
Status int8_attention_with(const Int8AttentionParams& a, const DeviceInfo& device, void* stream) {
  const int64_t part_bytes = static_cast<int64_t>(C::kRows) * (C::kHeadDim + 1) * sizeof(float);
  const bool share = a.workspace != nullptr && a.workspace_bytes >= 2 * device.multiprocessors * part_bytes;
  const AttentionPlan plan =
      attention_plan(a.batch, a.queries, a.keys, a.heads, C::kRows, C::kKeys, device.multiprocessors, share);
  if (plan.tiles > INT32_MAX) return "batch * heads * queries must stay below 2^31 tiles";
  CUtensorMap k_map, v_map;
  if (Status s = cache_map(&k_map, a.k_cache, a, 1, C::kHeadDim, C::kKeys)) return s;
  if (Status s = cache_map(&v_map, a.v_cache, a, 2, 64, C::kKeys)) return s;
  float* partial = static_cast<float*>(a.workspace);
  const Int8AttentionKernelParams p = {static_cast<const int8_t*>(a.q.ptr),
                                       a.q.batch_stride,
                                       a.q.token_stride,
                                       a.q_scale,
                                       a.q_scale_batch_stride,
                                       a.q_scale_token_stride,
                                       a.q_scale_head_stride,
                                       a.k_scale,
                                       a.k_scale_batch_stride,
                                       a.k_scale_token_stride,
                                       a.k_scale_head_stride,
                                       static_cast<__nv_bfloat16*>(a.out),
                                       a.lse,
                                       partial,
                                       partial + static_cast<int64_t>(2) * plan.grid * C::kRows * C::kHeadDim,
                                       static_cast<float>(a.softmax_scale * 1.4426950408889634),
                                       static_cast<float>(std::log2(a.last_key_count)),
                                       static_cast<int>(a.queries),
                                       static_cast<int>(a.keys),
                                       a.heads,
                                       plan.query_tiles,
                                       plan.key_tiles,
                                       static_cast<int>(plan.tiles),
                                       static_cast<int>(plan.whole_tiles)};
  const auto kernel = int8_attention_tiles<C>;
  const cudaError_t e = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, C::kSharedBytes);
  if (e != cudaSuccess) return cudaGetErrorString(e);
  if (Status s = launch(kernel, dim3(plan.grid), dim3(C::kThreads), C::kSharedBytes, stream, false, p, k_map, v_map)) {
    return s;
  }
  if (plan.whole_tiles == plan.tiles) return nullptr;
  const dim3 grid(static_cast<uint32_t>(plan.tiles - plan.whole_tiles), C::kRows / 8);
  return launch(merge_shared_tiles<C::kHeadDim>, grid, dim3(256), 0, stream, false, p, C::kRows, plan.grid);
}

Status int8_attention(const Int8AttentionParams& a, void* stream) {
  if (a.head_dim != 64 && a.head_dim != 128) return "head_dim must be 64 or 128";
  if (a.heads < 1) return "heads must be positive";
  if (a.batch < 0 || a.batch > kMaxGridYZ) return "batch must be in [0, 65535]";
  if (a.queries < 0 || a.queries > kMaxGridX) return "queries must be in [0, 2^31)";
  if (a.keys < 1 || a.keys > 1 << 30) return "keys must be in [1, 2^30]";
  if (!(a.last_key_count > 0)) return "last_key_count must be positive";
  if (!rows_aligned(a.q.ptr, a.q.batch_stride, a.q.token_stride, 1, 4)) return "q must be aligned to 4 bytes";
  if (!rows_aligned(a.k_cache.ptr, a.k_cache.batch_stride, a.k_cache.token_stride, 1, 16) ||
      !rows_aligned(a.v_cache.ptr, a.v_cache.batch_stride, a.v_cache.token_stride, 2, 16)) {
    return "caches must be aligned to 16 bytes";
  }
  if (!aligned(a.out, 4) || !aligned(a.workspace, 8)) return "out and workspace must be aligned";
  if (a.batch == 0 || a.queries == 0) return nullptr;
  DeviceInfo device = {};
  if (Status s = device_info(&device)) return s;
  if (device.capability != 90) return "needs a GPU of compute capability 9.0";
  return a.head_dim == 128 ? int8_attention_with<AttentionShape<128>>(a, device, stream)
                           : int8_attention_with<AttentionShape<64>>(a, device, stream);
}

}  // namespace lingbot::cuda
