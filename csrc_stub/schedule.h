// What has to be computed: sequences, tiles of their rows, and work items that any thread may take.
//
//                        keys of the sequence ->
//                 0         512        1024       1536
//   rows 0 .. 3   | piece 0  | piece 1  | piece 2  |    one tile: some rows of one sequence, some of its KV heads;
//   rows 4 .. 7   | piece 0  | piece 1  | piece 2  |    an item is a piece of a tile's keys, or the whole tile
//
// Each piece begins with an empty softmax, and pieces are merged in the order of their keys. Where they are cut depends
// on the places of the keys alone: not on the sequence's length, the tile's rows, the batch or the threads. So a row of
// finite values is the same bits whatever is computed beside it, and whether it is decoded or stands in a prompt.

#pragma once

#include "problem.h"

#include <cstdint>
#include <vector>

namespace torch_rpa {

struct Sequence {
  int64_t first_row;
  int64_t q_len;
  int64_t kv_len;
  const int32_t* pages;
};

// Rows first_row, first_row + 1, ... of one sequence, at positions first_position and on, with the query heads of KV
// heads first_head .. end_head, and the keys first_key .. end_key that at least one of the rows sees.
struct Tile {
  const int32_t* pages;
  int64_t first_row, num_rows, first_position, kv_len;
  int64_t first_head, end_head;
  int64_t first_key, end_key;
  int64_t num_items;  // its pieces, or 1 for the whole of it
  int64_t partial;    // where the first item's partial result starts in the buffer of its wave, in floats

  int64_t matrix_rows(int64_t group) const {  // rows of the matrix that meets the keys of one KV head
    return num_rows * group;
  }
  int64_t state_rows(int64_t group) const {  // of all its heads
    return matrix_rows(group) * (end_head - first_head);
  }
};

struct WorkItem {
  int64_t tile;
  int64_t index;  // among the items of the tile
};

// Some keys of a sequence, in its order: first .. end.
struct KeyRange {
  int64_t first, end;
};

// The piece of the tile's keys that begins with a key.
KeyRange piece_from(const Tile& tile, int64_t key);

// The piece of this number; the first one, maybe an empty one, has number 0.
KeyRange piece_of(const Tile& tile, int64_t index);

// The keys that the query at a position sees.
inline KeyRange visible_keys(const Problem& problem, int64_t position, int64_t kv_len) {
  const int64_t window = problem.sliding_window;
  const int64_t end = problem.causal ? position + 1 : position + window;
  const int64_t first = position - window + 1;
  return {first > 0 ? first : 0, end < kv_len ? end : kv_len};
}

// Items whose partial results are in memory at the same time, and are then merged.
struct Wave {
  std::vector<Tile> tiles;
  std::vector<WorkItem> items;
  int64_t partial_floats = 0;
};

// The sequences of the batch. Metadata that torch_rpa.check_batch refuses is brought into range, so that no value
// can crash or read outside: the rows of the sequences follow each other and lie inside q.
std::vector<Sequence> active_sequences(const Problem& problem);

// The most rows that any tile of the problem has, see Tile.
int64_t most_matrix_rows(const Problem& problem);
int64_t most_state_rows(const Problem& problem);

// The work of a call for so many threads, on which no result depends.
std::vector<Wave> plan(const Problem& problem, const std::vector<Sequence>& sequences, int64_t num_threads);

}  // namespace torch_rpa
