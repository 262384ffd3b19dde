// K and V of a received all-to-all buffer [tokens, batch, parts, heads, head_dim] to their ring slots: a pure copy.
#include "block.cuh"
#include "launch.cuh"
#include "ring.h"
#include "vec.cuh"

namespace lingbot::cuda {

// Sizes and strides in words of one copy.
struct UnpackParams {
  const void* k;  // of token 0, batch 0; V lies `width` words behind
  int64_t in_batch, in_token;
  void* cache[2];  // K, V
  int64_t cache_batch[2], cache_token[2];
  DeviceRing ring;
  uint32_t tokens, width;
};

template <typename Word, LoadHint kLoad>
__device__ __forceinline__ Word load_word(const Word* p) {
  if constexpr (sizeof(Word) == 16) {
    const Vec<float, 4> v = load_stream<kLoad, 4>(reinterpret_cast<const float*>(p));
    return make_uint4(v.word[0], v.word[1], v.word[2], v.word[3]);
  } else {
    return *p;
  }
}

template <typename Word, StoreHint kStore>
__device__ __forceinline__ void store_word(Word* p, const Word& word) {
  if constexpr (sizeof(Word) == 16 && kStore == StoreHint::kStream) __stcs(p, word);
  else *p = word;
}

// blockDim.x threads along a token's width, blockDim.y * kTokens tokens per block: 2 * kTokens loads in flight per
// thread.
template <typename Word, int kTokens, LoadHint kLoad, StoreHint kStore>
__global__ void __launch_bounds__(512) unpack_to_ring(const __grid_constant__ UnpackParams p) {
  wait_for_previous_grid();
  allow_next_grid();
  const uint32_t batch = blockIdx.y;
  const uint64_t first = (static_cast<uint64_t>(blockIdx.x) * blockDim.y + threadIdx.y) * kTokens;
  const Word* in[kTokens];
  int64_t slot[kTokens];
#pragma unroll
  for (int t = 0; t < kTokens; ++t) {
    in[t] = static_cast<const Word*>(p.k) + batch * p.in_batch + static_cast<int64_t>(first + t) * p.in_token;
    slot[t] = first + t < p.tokens ? ring_slot(p.ring, static_cast<uint32_t>(first + t)) : 0;
  }
  Word* k_cache = static_cast<Word*>(p.cache[0]) + batch * p.cache_batch[0];
  Word* v_cache = static_cast<Word*>(p.cache[1]) + batch * p.cache_batch[1];
  for (uint32_t w = threadIdx.x; w < p.width; w += blockDim.x) {
    Word k[kTokens], v[kTokens];
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
      if (first + t < p.tokens) {
        k[t] = load_word<Word, kLoad>(in[t] + w);
        v[t] = load_word<Word, kLoad>(in[t] + p.width + w);
      }
    }
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
      if (first + t < p.tokens) {
        store_word<Word, kStore>(k_cache + slot[t] * p.cache_token[0] + w, k[t]);
        store_word<Word, kStore>(v_cache + slot[t] * p.cache_token[1] + w, v[t]);
      }
    }
  }
}

// `elements`: of one word.
inline UnpackParams kernel_params(const QkvUnpackKvWriteParams& a, int elements) {
  const int64_t width = static_cast<int64_t>(a.heads) * a.head_dim, row = a.parts * width;
  UnpackParams p = {};
  p.k = static_cast<const char*>(a.packed) + (a.parts - 2) * width * element_size(a.dtype);
  p.in_batch = row / elements;
  p.in_token = a.batch * row / elements;
  p.cache[0] = a.k_cache.ptr, p.cache[1] = a.v_cache.ptr;
  p.cache_batch[0] = a.k_cache.batch_stride / elements, p.cache_batch[1] = a.v_cache.batch_stride / elements;
  p.cache_token[0] = a.k_cache.token_stride / elements, p.cache_token[1] = a.v_cache.token_stride / elements;
  p.ring = device_ring(a.ring);
  p.tokens = static_cast<uint32_t>(a.tokens);
  p.width = static_cast<uint32_t>(width / elements);
  return p;
}

Status qkv_unpack_kv_write(const QkvUnpackKvWriteParams& a, void* stream) {
  if (a.parts != 2 && a.parts != 3) return "parts must be 2 (k, v) or 3 (q, k, v)";
  if (a.heads < 1 || a.head_dim < 1) return "heads and head_dim must be positive";
  if (a.batch < 0 || a.batch > kMaxGridYZ) return "batch must be in [0, 65535]";
  if (a.tokens < 0 || a.tokens > kMaxGridX) return "tokens must be in [0, 2^31)";
  if (a.batch == 0 || a.tokens == 0) return nullptr;
  if (Status s = ring_problem(a.ring, a.tokens)) return s;
  const int64_t width = static_cast<int64_t>(a.heads) * a.head_dim;
  if (width > 1 << 24) return "heads * head_dim must be at most 2^24";
  DeviceInfo device = {};
  if (Status s = device_info(&device)) return s;

  const int size = element_size(a.dtype);
  const bool vectors = width * size % 16 == 0 && aligned(a.packed, 16) &&
                       rows_aligned(a.k_cache.ptr, a.k_cache.batch_stride, a.k_cache.token_stride, size, 16) &&
                       rows_aligned(a.v_cache.ptr, a.v_cache.batch_stride, a.v_cache.token_stride, size, 16);
  const int elements = vectors ? 16 / size : 1;  // of one word
  const UnpackParams p = kernel_params(a, elements);
  const UnpackConfig config = unpack_config(static_cast<int>(p.width));
  const dim3 block(config.threads, config.rows);
  const dim3 grid(static_cast<uint32_t>(ceil_div(a.tokens, config.rows * config.tokens)),
                  static_cast<uint32_t>(a.batch));
  const bool overlap = device.capability >= 90;
  constexpr LoadHint kLoad = LoadHint::kNoAllocate;
  constexpr StoreHint kStore = StoreHint::kWriteBack;
  const auto launch_words = [&](auto word) -> Status {
    using Word = decltype(word);
    if (config.tokens == 1) return launch(unpack_to_ring<Word, 1, kLoad, kStore>, grid, block, 0, stream, overlap, p);
    return launch(unpack_to_ring<Word, 2, kLoad, kStore>, grid, block, 0, stream, overlap, p);
  };
  if (vectors) return launch_words(uint4{});
  return size == 4 ? launch_words(uint32_t{}) : launch_words(uint16_t{});
}

}  // namespace lingbot::cuda
