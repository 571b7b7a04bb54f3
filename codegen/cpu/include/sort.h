// Which rows each expert takes: a counting sort of the (token, slot) pairs, and the pieces of work that follow.
#pragma once
#include "tile.h"

// Rows of one expert that are taken through both GEMMs together.
struct Chunk {
  int32_t expert;
  int32_t begin;  // of its rows in `order`
  int32_t rows;
  int32_t tile;  // the tiles before its own, all chunks' tiles laid end to end
};

// order[place[p]] = p for every pair p = token * slots + slot that is not skipped; place[p] = -1 for the others.
struct Sorted {
  int32_t* order;
  int32_t* place;
  int32_t* bounds;  // [experts + 1]
  Chunk* chunks;    // largest first
  int32_t pairs;    // that are not skipped
  int32_t num_chunks;
  int32_t num_tiles;
};

// Ids outside of 0..experts-1 are skipped. Each expert's rows are cut into equal chunks of at most `most_rows`.
template <class Id>
static void sort_pairs(const Id* ids, int64_t count, int experts, int most_rows, Sorted& s) {
  int32_t* fill = s.bounds + experts + 1;  // scratch, [experts]
  memset(s.bounds, 0, sizeof(int32_t) * (experts + 1));
  for (int64_t p = 0; p < count; ++p)
    if (uint64_t(ids[p]) < uint64_t(experts)) ++s.bounds[ids[p] + 1];
  for (int e = 0; e < experts; ++e) {
    fill[e] = s.bounds[e];
    s.bounds[e + 1] += s.bounds[e];
  }
  for (int64_t p = 0; p < count; ++p) {
    const bool taken = uint64_t(ids[p]) < uint64_t(experts);
    s.place[p] = taken ? fill[ids[p]]++ : -1;
    if (taken) s.order[s.place[p]] = int32_t(p);
  }
  s.pairs = s.bounds[experts];
  s.num_chunks = s.num_tiles = 0;
  for (int e = 0; e < experts; ++e) {
    const int rows = s.bounds[e + 1] - s.bounds[e], parts = int(ceil_div(rows, most_rows));
    const int tiles = int(ceil_div(rows, ROWS));
    for (int i = 0, begin = 0; i < parts; ++i) {
      const int end = least(int(ceil_div(int64_t(tiles) * (i + 1), parts)) * ROWS, rows);
      s.chunks[s.num_chunks++] = {e, s.bounds[e] + begin, end - begin, s.num_tiles};
      s.num_tiles += int(ceil_div(end - begin, ROWS));
      begin = end;
    }
  }
  // Insertion by rows, stable: chunks are few, and nearly sorted where routing is even.
  for (int i = 1; i < s.num_chunks; ++i) {
    const Chunk chunk = s.chunks[i];
    int at = i;
    for (; at > 0 && s.chunks[at - 1].rows < chunk.rows; --at) s.chunks[at] = s.chunks[at - 1];
    s.chunks[at] = chunk;
  }
}
