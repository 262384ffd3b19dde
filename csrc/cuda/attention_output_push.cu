// Attention's output for this rank's heads, straight into the rows of the ranks that own the tokens: a pure copy.
// Blocks take the ranks in turn, so that all links are busy at once.
#include "../push.h"
#include "block.cuh"
#include "launch.cuh"
#include "vec.cuh"

namespace lingbot::cuda {

// Sizes and strides in words of one copy.
struct OutputPushParams {
  const void* attended;
  int64_t in_batch, in_token;
  int64_t out_token;
  uint32_t width, ranks;
  uint32_t ends[kMaxRanks];
  void* out[kMaxRanks];  // at this rank's columns
  int64_t out_batch[kMaxRanks];
};

constexpr int kPushTokens = 4;  // loads in flight in a thread

template <typename Word>
__global__ void __launch_bounds__(512) push_output(const __grid_constant__ OutputPushParams p) {
  wait_for_previous_grid();
  allow_next_grid();
  const uint32_t group = blockIdx.x / p.ranks, rank = blockIdx.x - group * p.ranks, batch = blockIdx.y;
  const uint32_t begin = rank == 0 ? 0 : p.ends[rank - 1], tokens = p.ends[rank] - begin;
  const uint32_t first = (group * blockDim.y + threadIdx.y) * kPushTokens;
  const Word* in = static_cast<const Word*>(p.attended) + batch * p.in_batch + (begin + first) * p.in_token;
  Word* out = static_cast<Word*>(p.out[rank]) + batch * p.out_batch[rank] + first * p.out_token;
  for (uint32_t w = threadIdx.x; w < p.width; w += blockDim.x) {
    Word word[kPushTokens];
#pragma unroll
    for (int t = 0; t < kPushTokens; ++t) {
      if (first + t < tokens) word[t] = in[t * p.in_token + w];
    }
#pragma unroll
    for (int t = 0; t < kPushTokens; ++t) {
      if (first + t < tokens) out[t * p.out_token + w] = word[t];
    }
  }
}

inline OutputPushParams kernel_params(const AttentionOutputPushParams& a, int elements) {
  OutputPushParams p = {};
  p.attended = a.attended.ptr;
  p.in_batch = a.attended.batch_stride / elements, p.in_token = a.attended.token_stride / elements;
  p.out_token = a.token_stride / elements;
  p.width = static_cast<uint32_t>(a.width / elements), p.ranks = static_cast<uint32_t>(a.ranks);
  for (int r = 0; r < a.ranks; ++r) {
    p.ends[r] = static_cast<uint32_t>(a.ends[r]);
    p.out[r] = reinterpret_cast<void*>(a.addresses[r] + a.column * element_size(a.dtype));
    p.out_batch[r] = a.batch_strides[r] / elements;
  }
  return p;
}

Status attention_output_push(const AttentionOutputPushParams& a, void* stream) {
  if (Status s = push_problem(a.ranks, a.ranks, 0)) return s;
  if (a.batch < 0 || a.batch > kMaxGridYZ) return "batch must be in [0, 65535]";
  if (a.tokens < 0 || a.tokens > kMaxGridX / kMaxRanks) return "tokens must be in [0, 2^31 / 64)";
  if (a.width < 0 || a.width > 1 << 24) return "width must be in [0, 2^24]";
  if (Status s = ends_problem(a.ends, a.ranks, a.tokens)) return s;
  if (a.batch == 0 || a.tokens == 0 || a.width == 0) return nullptr;
  if (Status s = addresses_problem(a.addresses, a.ranks, a.dtype, a.ends)) return s;
  DeviceInfo device = {};
  if (Status s = device_info(&device)) return s;

  const int size = element_size(a.dtype);
  bool vectors = a.width * size % 16 == 0 && a.column * size % 16 == 0 && a.token_stride * size % 16 == 0 &&
                 rows_aligned(a.attended.ptr, a.attended.batch_stride, a.attended.token_stride, size, 16);
  int64_t longest = 0;
  for (int r = 0; r < a.ranks; ++r) {
    const int64_t tokens = a.ends[r] - (r == 0 ? 0 : a.ends[r - 1]);
    if (tokens > longest) longest = tokens;
    vectors = vectors && a.addresses[r] % 16 == 0 && a.batch_strides[r] * size % 16 == 0;
  }
  const OutputPushParams p = kernel_params(a, vectors ? 16 / size : 1);
  const UnpackConfig config = unpack_config(static_cast<int>(p.width));
  const dim3 block(config.threads, config.rows);
  const dim3 grid(static_cast<uint32_t>(ceil_div(longest, config.rows * kPushTokens) * a.ranks),
                  static_cast<uint32_t>(a.batch));
  const bool overlap = device.capability >= 90;
  if (vectors) return launch(push_output<uint4>, grid, block, 0, stream, overlap, p);
  if (size == 4) return launch(push_output<uint32_t>, grid, block, 0, stream, overlap, p);
  return launch(push_output<uint16_t>, grid, block, 0, stream, overlap, p);
}

}  // namespace lingbot::cuda
