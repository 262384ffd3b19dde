// cos | sin of every token's (t, h, w), from its index alone: out[i] = cos, then sin, of pos_axis * theta^(-2j /
// D_axis). Angles are double and as large as the frame index needs; the table is float32.
#include <algorithm>
#include <cmath>

#include "block.cuh"
#include "launch.cuh"
#include "launch_config.h"
#include "rope_angle.h"

namespace lingbot::cuda {

struct RopeTableParams {
  float* out;  // [num_tokens, head_dim]
  int64_t num_tokens, token_start, frame_stride, width;
  int64_t first_frame, first_row;
  uint32_t row_tiles, column_tiles;
  int32_t pairs, space_pairs;  // of a token; of height, and of width (the rest is time)
  double frequency[kMaxRotaryPairs];
};

// One block is a tile of kRows x kColumns tokens of one frame. Pairs of time have one angle in it, pairs of height
// kRows, pairs of width kColumns: each is made once, then spread over the tile from shared memory.
template <int kThreads, int kRows, int kColumns, int kWidth>
__global__ void __launch_bounds__(kThreads) rope_table(const __grid_constant__ RopeTableParams p) {
  constexpr int kPositions = 1 + kRows + kColumns;
  // [position in time | height | width][pair]; a row of it serves the longest axis
  __shared__ float cos_of[kPositions][kMaxRotaryPairs], sin_of[kPositions][kMaxRotaryPairs];
  const uint32_t column_tile = blockIdx.x % p.column_tiles, tile = blockIdx.x / p.column_tiles;
  const int64_t frame = p.first_frame + tile / p.row_tiles;
  const int64_t row = p.first_row + static_cast<int64_t>(tile % p.row_tiles) * kRows;
  const int64_t column = static_cast<int64_t>(column_tile) * kColumns;

  const int time_pairs = p.pairs - 2 * p.space_pairs, height_angles = p.space_pairs * kRows;
  const int angles = time_pairs + height_angles + p.space_pairs * kColumns;
  for (int a = threadIdx.x; a < angles; a += kThreads) {
    int position, pair;  // position: row of the table above
    int64_t at;
    if (a < time_pairs) {
      position = 0, pair = a, at = frame;
    } else if (a < time_pairs + height_angles) {
      const int h = a - time_pairs;
      position = 1 + h % kRows, pair = time_pairs + h / kRows, at = row + h % kRows;
    } else {
      const int w = a - time_pairs - height_angles;
      position = 1 + kRows + w % kColumns, pair = time_pairs + p.space_pairs + w / kColumns, at = column + w % kColumns;
    }
    double c, s;
    cos_sin(static_cast<double>(at) * p.frequency[pair], &c, &s);
    cos_of[position][pair] = static_cast<float>(c);
    sin_of[position][pair] = static_cast<float>(s);
  }
  __syncthreads();
  wait_for_previous_grid();  // only the writes depend on it
  allow_next_grid();

  const int vectors = 2 * p.pairs / kWidth;
  for (int v = threadIdx.x; v < vectors * kRows * kColumns; v += kThreads) {
    const int cell = v / vectors, element = (v - cell * vectors) * kWidth, r = cell / kColumns, c = cell % kColumns;
    const int64_t in_frame = (row + r) * p.width + column + c;
    const int64_t token = frame * p.frame_stride + in_frame - p.token_start;
    if (column + c >= p.width || in_frame >= p.frame_stride || token < 0 || token >= p.num_tokens) continue;
    float value[kWidth];
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      const bool is_sin = element + i >= p.pairs;
      const int pair = element + i - (is_sin ? p.pairs : 0);
      const int position = pair < time_pairs ? 0 : pair < time_pairs + p.space_pairs ? 1 + r : 1 + kRows + c;
      value[i] = (is_sin ? sin_of : cos_of)[position][pair];
    }
    float* out = p.out + token * (2 * p.pairs) + element;
    if constexpr (kWidth == 4) *reinterpret_cast<float4*>(out) = make_float4(value[0], value[1], value[2], value[3]);
    else *out = value[0];
  }
}

// Blocks of `tile_rows` x `tile_columns` tokens that hold the tokens asked for.
inline Status rope_table_params(const RopeCosSinParams& a, int tile_rows, int tile_columns, RopeTableParams* params,
                                uint32_t* blocks) {
  RopeTableParams& p = *params;
  p = {};
  p.out = a.out;
  p.num_tokens = a.num_tokens;
  p.token_start = a.token_start;
  p.frame_stride = a.frame_stride;
  p.width = std::min(a.width, a.frame_stride);  // a row longer than a frame is one row
  p.pairs = a.head_dim / 2;
  p.space_pairs = a.head_dim / 6;
  const int32_t time_pairs = p.pairs - 2 * p.space_pairs;
  double largest = 0.0;
  for (int32_t i = 0; i < time_pairs + p.space_pairs; ++i) {
    const double j = i < time_pairs ? i : i - time_pairs, axis_pairs = i < time_pairs ? time_pairs : p.space_pairs;
    p.frequency[i] = std::pow(a.theta, -(2.0 * j) / (2.0 * axis_pairs));
    if (i >= time_pairs) p.frequency[i + p.space_pairs] = p.frequency[i];  // width turns as height does
    largest = std::fmax(largest, p.frequency[i]);
  }

  const int64_t last = a.token_start + a.num_tokens - 1;
  p.first_frame = a.token_start / a.frame_stride;
  const int64_t frames = last / a.frame_stride - p.first_frame + 1;
  const int64_t frame_rows = ceil_div(a.frame_stride, p.width);
  // Within one frame only the rows asked for, else all rows of each.
  p.first_row = frames == 1 ? a.token_start % a.frame_stride / p.width : 0;
  const int64_t rows = frames == 1 ? last % a.frame_stride / p.width - p.first_row + 1 : frame_rows;
  const int64_t farthest = std::max(last / a.frame_stride, std::max(frame_rows, p.width) + tile_rows + tile_columns);
  if (static_cast<double>(farthest) * largest >= kMaxAngle)
    return "token position is too large: an angle is beyond 2^50";

  const int64_t row_tiles = ceil_div(rows, tile_rows);
  const int64_t column_tiles = ceil_div(p.width, tile_columns);
  if (frames > kMaxGridX / row_tiles || row_tiles * frames > kMaxGridX / column_tiles)
    return "too many tokens for one launch";
  p.row_tiles = static_cast<uint32_t>(row_tiles);
  p.column_tiles = static_cast<uint32_t>(column_tiles);
  *blocks = static_cast<uint32_t>(row_tiles * column_tiles * frames);
  return nullptr;
}

Status rope_cos_sin(const RopeCosSinParams& a, void* stream) {
  if (a.head_dim < 2 || a.head_dim % 2 != 0 || a.head_dim > 2 * kMaxRotaryPairs)
    return "head_dim must be even and in [2, 256]";
  if (a.frame_stride < 1 || a.width < 1) return "frame_stride and width must be positive";
  if (a.frame_stride > INT64_MAX / 2) return "frame_stride must be below 2^62";
  if (a.num_tokens < 0 || a.token_start < 0) return "num_tokens and token_start must not be negative";
  if (!(a.theta > 0.0)) return "theta must be positive";
  if (a.num_tokens == 0) return nullptr;
  if (a.token_start > INT64_MAX - a.num_tokens) return "token_start + num_tokens must be below 2^63";

  const RopeTableConfig config = rope_table_config(a.head_dim, aligned(a.out, 16));
  RopeTableParams p;
  uint32_t blocks = 0;
  if (Status s = rope_table_params(a, config.rows, config.columns, &p, &blocks)) return s;
  DeviceInfo device = {};
  if (Status s = device_info(&device)) return s;
  const dim3 grid(blocks), block(config.threads);
  const bool overlap = device.capability >= 90;
  if (config.width == 4) return launch(rope_table<512, 4, 8, 4>, grid, block, 0, stream, overlap, p);
  return launch(rope_table<512, 4, 8, 1>, grid, block, 0, stream, overlap, p);
}

}  // namespace lingbot::cuda
