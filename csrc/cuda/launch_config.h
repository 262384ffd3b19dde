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
// `most`: vectors a thread is to hold of a long row, 4 or 2.
constexpr RowConfig row_config(int dim, int width, int period, int most = 4) {
  const RowConfig any = {"any", 256, 1, 1, dim};
  if (width <= 1 || dim % width != 0) return any;
  const int row_vectors = dim / width;
  // Four vectors a thread keep enough loads in flight with few threads at each barrier; short rows need the threads.
  if (most >= 4 && row_vectors >= 320 && row_threads(row_vectors, 4, period) <= max_row_threads(4)) {
    return {"rows_x4", row_threads(row_vectors, 4, period), 4, width, dim};
  }
  if (row_vectors >= 64 && row_threads(row_vectors, 2, period) <= max_row_threads(2)) {
    return {"rows_x2", row_threads(row_vectors, 2, period), 2, width, dim};
  }
  if (most < 4 && row_threads(row_vectors, 4, period) <= max_row_threads(4)) {
    return {"rows_x4", row_threads(row_vectors, 4, period), 4, width, dim};
  }
  if (row_threads(row_vectors, 1, 1) <= max_row_threads(1))
    return {"rows_x1", row_threads(row_vectors, 1, 1), 1, width, dim};
  return any;
}

// Passes that hold two rows or more at once (x and delta, camera) want few vectors of each in a thread: their registers
// else leave too few rows in flight. Vectors of a float32 row and its 16-bit neighbours are half as large.
constexpr RowConfig residual_row_config(int dim, int width) { return row_config(dim, width, 1, width == 8 ? 2 : 4); }

// `rows` on `multiprocessors`: where one wave of blocks holds all rows, 5 vectors a thread fit more of them at once.
constexpr RowConfig rms_norm_config(int dim, int width, int64_t rows, int multiprocessors) {
  const RowConfig config = row_config(dim, width, 1);
  const int row_vectors = width > 1 ? dim / width : 0;
  if (row_vectors == 5 * 128 && rows <= int64_t{10} * multiprocessors) return {"rows_x5", 128, 5, width, dim};
  return config;
}

// Layer norm of few rows: `steps` blocks a multiprocessor step through them with the modulation in registers, for a
// grid of single rows would end on a partial wave. 0: a block is one row.
struct LayerNormConfig {
  RowConfig row;
  int steps;
};

constexpr int kLayerNormSteps = 2;  // blocks of layer_norm_steps that fit a multiprocessor

constexpr LayerNormConfig layer_norm_config(int dim, int width, int64_t rows, int multiprocessors) {
  if (width == 8 && rows <= int64_t{18} * multiprocessors) {
    const RowConfig row = row_config(dim, width, 1, 2);
    if (row.exact(320, 2)) return {row, kLayerNormSteps};  // the shape that is compiled to step
  }
  return {row_config(dim, width, 1), 0};
}

// A row as blocks of 128 channels, padded to whole ones, each in 128 / (8 * vectors) threads. `most`: vectors a thread
// is to hold of a long row. 4 need the fewest instructions: the rotation of a block then crosses two lanes' bits, not
// three; 2 leave registers to passes that hold other operands besides.
constexpr RowConfig quantize_config(int dim, int width, int most) {
  const RowConfig any = {"any", 256, 1, 1, dim};
  if (width != 8 || dim % width != 0) return any;
  const int row_vectors = round_up(dim, 128) / width;
  const RowConfig four = {"blocks_x4", row_threads(row_vectors, 4, 1), 4, width, dim};
  const RowConfig two = {"blocks_x2", row_threads(row_vectors, 2, 1), 2, width, dim};
  if (most == 4 && row_vectors >= 320 && four.threads <= max_row_threads(4)) return four;
  if (row_vectors >= 64 && two.threads <= max_row_threads(2)) return two;
  if (row_vectors < 64) return {"blocks_x1", row_threads(row_vectors, 1, 1), 1, width, dim};
  return four.threads <= max_row_threads(4) ? four : any;
}

// Blocks of `threads` (0: any number) that a multiprocessor holds with `registers` each: its quarters have 512
// registers a lane, and a warp stays in one.
constexpr int resident_blocks(int threads, int registers) {
  const int blocks = threads == 0 ? 1 : 512 / registers * 4 / (threads / kWarpSize);
  return blocks > 0 ? blocks : 1;
}

constexpr int kMaxTwoVectorRow = 2 * 8 * max_row_threads(2);  // elements of the longest row in two vectors a thread

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
    if (columns % threads == 0) return {"columns", threads, 1, width};
  }
  return {"columns_padded", columns < 256 ? round_up(columns, kWarpSize) : 256, 1, width};
}

// K and V of `rows * tokens` tokens per block, `threads` along a token.
struct UnpackConfig {
  const char* name;
  int threads;
  int rows;
  int tokens;  // in flight in one thread
};

// Threads that divide a token's words, where some do; short tokens two a block.
constexpr UnpackConfig unpack_config(int words) {
  if (words <= 128) return {"copy_1_token", round_up(words, kWarpSize), 2, 1};
  for (int threads = 256; threads >= 128; threads -= kWarpSize) {
    if (words % threads == 0) return {"copy_2_tokens", threads, 1, 2};
  }
  return {"copy_2_tokens_padded", words < 256 ? round_up(words, kWarpSize) : 256, 1, 2};
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
  return {"tile_4x8", 512, 4, 8, head_dim % 4 == 0 && aligned ? 4 : 1};
}

}  // namespace lingbot::cuda
