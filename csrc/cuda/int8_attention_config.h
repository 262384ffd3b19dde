// How attention's tiles are handed to multiprocessors: plain arithmetic, tested on any machine.
//
// A tile is some queries of a head. Blocks take whole tiles, every grid-th, as long as there is one for each; the tiles
// left over are laid end to end, in tiles of keys, and cut evenly: every block takes one range, in one or two tiles.
#pragma once

#include <cstdint>

#include "launch_config.h"
#include "ring.h"

namespace lingbot::cuda {

struct AttentionPlan {
  int query_tiles, key_tiles;  // of one head
  int64_t tiles;               // of queries, all heads
  int64_t whole_tiles;         // these are handed out one by one, the others are cut
  int grid;
};

// What the merge of cut tiles costs, in the time of one tile of queries with one of keys.
constexpr int kMergeTiles = 10;

// `share`: there is memory for the parts of tiles; they are cut where all then ends sooner.
constexpr AttentionPlan attention_plan(int64_t batch, int64_t queries, int64_t keys, int heads, int rows_of_tile,
                                       int keys_of_tile, int multiprocessors, bool share) {
  const int64_t query_tiles = ceil_div(queries, rows_of_tile), key_tiles = ceil_div(keys, keys_of_tile);
  const int64_t tiles = batch * heads * query_tiles, left = tiles % multiprocessors;
  const bool cut = share && left > 0 && ceil_div(left * key_tiles, multiprocessors) + kMergeTiles < key_tiles;
  const int64_t grid = cut || tiles > multiprocessors ? multiprocessors : tiles;
  return {static_cast<int>(query_tiles), static_cast<int>(key_tiles), tiles, cut ? tiles - left : tiles,
          static_cast<int>(grid)};
}

// Tiles of keys [first, end) of one tile of queries. slot < 0: all of them; else where the part goes.
struct AttentionWork {
  int tile, first, end, slot;
};

// The cut tiles, end to end: `units` tiles of keys. A block's range begins at range_begin, the next block's ends it.
struct CutTiles {
  int64_t units;
  int key_tiles, grid;

  LINGBOT_HOST_DEVICE int64_t range_begin(int block) const { return units * block / grid; }

  // Part 0 or 1 of the block's range, in tiles counted from the first cut one; false where there is none.
  LINGBOT_HOST_DEVICE bool part(int block, int which, AttentionWork* work) const {
    const int64_t from = range_begin(block), to = range_begin(block + 1);
    const int64_t tile = from / key_tiles + which, of_tile = tile * key_tiles;
    const int64_t start = which == 0 ? from : of_tile;
    if (which > 1 || start >= to) return false;
    const int first = static_cast<int>(start - of_tile);
    const int end = to - of_tile < key_tiles ? static_cast<int>(to - of_tile) : key_tiles;
    const bool whole = first == 0 && end == key_tiles;
    *work = {static_cast<int>(tile), first, end, whole ? -1 : 2 * block + which};
    return true;
  }

  // The first block whose range reaches into a cut tile.
  LINGBOT_HOST_DEVICE int first_block(int tile) const {
    const int64_t begin = static_cast<int64_t>(tile) * key_tiles;
    int block = static_cast<int>(begin * grid / units);
    while (block > 0 && range_begin(block) > begin) --block;
    while (range_begin(block + 1) <= begin) ++block;
    return block;
  }

  // Where the block's part of a cut tile lies; -1 where it has none, or all of it.
  LINGBOT_HOST_DEVICE int slot(int block, int tile) const {
    AttentionWork work;
    for (int which = 0; which < 2; ++which) {
      if (part(block, which, &work) && work.tile == tile) return work.slot;
    }
    return -1;
  }
};

// The step-th piece of work of a block of the grid; false after the last.
LINGBOT_HOST_DEVICE bool attention_work(int tiles, int whole_tiles, int key_tiles, int block, int grid, int step,
                                        AttentionWork* work) {
  const int tile = block + step * grid;
  if (tile < whole_tiles) {
    *work = {tile, 0, key_tiles, -1};
    return true;
  }
  const CutTiles cut = {static_cast<int64_t>(tiles - whole_tiles) * key_tiles, key_tiles, grid};
  if (!cut.part(block, step - (block < whole_tiles ? (whole_tiles - 1 - block) / grid + 1 : 0), work)) return false;
  work->tile += whole_tiles;
  return true;
}

}  // namespace lingbot::cuda
