// How each kernel is launched: pure functions of the shape, the element size and the device, without CUDA, so that they
// are tested on any machine.
#pragma once

#include <cstdint>
#include <numeric>

namespace lingbot::cuda {

constexpr int kWarpSize = 32;

// A row in registers: `threads` along it, `vectors` vectors of `width` elements each. width 1: element by element, any
// width and alignment.
struct RowConfig {
  const char* name;
  int threads;
  int vectors;
  int width;
  int dim;

  // Threads and vectors fill the row with nothing over: kernels compiled for this width need no bounds.
  constexpr bool exact(int exact_threads, int exact_vectors) const {
    return threads == exact_threads && vectors == exact_vectors && dim == threads * vectors * width;
  }
};

constexpr int round_up(int value, int multiple) { return (value + multiple - 1) / multiple * multiple; }
constexpr int64_t ceil_div(int64_t value, int64_t divisor) { return (value + divisor - 1) / divisor; }

// Threads that hold `row_vectors` vectors, `vectors` each, in whole warps and whole multiples of `period` vectors.
constexpr int row_threads(int row_vectors, int vectors, int period) {
  return round_up(static_cast<int>(ceil_div(row_vectors, vectors)), std::lcm(kWarpSize, period));
}

constexpr int max_row_threads(int vectors) { return vectors == 1 ? 1024 : 512; }

// `width`: elements of a vector that every operand's alignment allows; 1 where there is none.
// `period`: vectors after which what a thread reads besides the row repeats (head_dim / width for angles, else 1).
constexpr RowConfig row_config(int dim, int width, int period) {
  const RowConfig any = {"any", 256, 1, 1, dim};
  if (width <= 1 || dim % width != 0) return any;
  const int row_vectors = dim / width;
  // Four vectors a thread keep enough loads in flight with few threads at each barrier; short rows need the threads.
  if (row_vectors >= 320 && row_threads(row_vectors, 4, period) <= max_row_threads(4)) {
    return {"rows_x4", row_threads(row_vectors, 4, period), 4, width, dim};
  }
  if (row_vectors >= 64 && row_threads(row_vectors, 2, period) <= max_row_threads(2)) {
    return {"rows_x2", row_threads(row_vectors, 2, period), 2, width, dim};
  }
  if (row_threads(row_vectors, 1, 1) <= max_row_threads(1))
    return {"rows_x1", row_threads(row_vectors, 1, 1), 1, width, dim};
  return any;
}

// Full-width norm and rotation of one row of q, k or v a block.
constexpr RowConfig norm_rope_config(int dim, int head_dim, int width) {
  if (width <= 1 || head_dim % width != 0) return row_config(dim, 1, 1);
  return row_config(dim, width, head_dim / width);
}

// A thread owns `width` channels and walks down the rows, `rows` at a time. Columns are cut into blocks of equal size
// where that wastes no thread.
struct ColumnConfig {
  const char* name;
  int threads;
  int rows;
  int width;
};

constexpr ColumnConfig column_config(int dim, int width) {
  const int columns = (dim + width - 1) / width;
  for (int threads = 256; threads >= 128; threads -= kWarpSize) {
    if (columns % threads == 0) return {"columns", threads, width > 1 ? 4 : 1, width};
  }
  return {"columns_padded", columns < 256 ? round_up(columns, kWarpSize) : 256, width > 1 ? 4 : 1, width};
}

// K and V of `rows * tokens` tokens a block, `threads` along a token.
struct UnpackConfig {
  const char* name;
  int threads;
  int rows;
  int tokens;  // in flight in one thread
};

constexpr UnpackConfig unpack_config(int words) {
  const int threads = words >= 256 ? 256 : round_up(words, kWarpSize);
  return {"copy_2_tokens", threads, 256 / threads, 2};
}

// A block of the rotary table: rows x columns of one frame.
struct RopeTableConfig {
  const char* name;
  int threads;
  int rows, columns;
  int width;  // floats of a store
};

// The angles of a tile are made once each: (rows + columns) * head_dim / 6 + head_dim / 6 sines, then rows * columns
// tokens.
constexpr RopeTableConfig rope_table_config(int head_dim, bool aligned) {
  return {"tile_4x8", 288, 4, 8, head_dim % 4 == 0 && aligned ? 4 : 1};
}

}  // namespace lingbot::cuda
