#include "schedule.h"

#include <algorithm>

namespace torch_rpa {
namespace {

// Rows of a tile's matrix (query rows times query heads per KV head). A block of keys is loaded once for each tile, so
// that many rows make its cost small; scores and sums of this many stay in the second-level cache.
constexpr int64_t kMatrixRows = 192;
// Rows of all the heads of a tile. Decode takes all heads at once, and so reads whole tokens from end to end.
constexpr int64_t kStateRows = 256;
// With so many tiles for each thread, a sequence has work for all without sharing out the pieces of a tile.
constexpr int64_t kTilesPerThread = 4;
// Keys of a piece: fewer are not worth the merge of one more result. But a power of two is cut into kPiecesOfPower at most
// from there to the next, so that their number grows with the logarithm of the context.
constexpr int64_t kPieceKeys = 512;
constexpr int64_t kPiecesOfPower = 16;
// Partial results in memory at once: 32 MiB, or those of one tile.
constexpr int64_t kPartialFloatsPerWave = int64_t{8} << 20;

int64_t divide_up(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

int64_t next_cut(int64_t key) {
  int64_t piece_keys = kPieceKeys;
  while (piece_keys * kPiecesOfPower * 2 <= key) {
    piece_keys *= 2;
  }
  return (key / piece_keys + 1) * piece_keys;
}

int64_t count_pieces(const Tile& tile) {
  int64_t count = 1;
  for (KeyRange piece = piece_of(tile, 0); piece.end < tile.end_key; piece = piece_from(tile, piece.end)) {
    ++count;
  }
  return count;
}

std::vector<Tile> tiles_of(const Problem& problem, const Sequence& sequence, int64_t num_threads) {
  const int64_t group = problem.group();
  const int64_t tile_rows = std::min(sequence.q_len, std::max<int64_t>(1, kMatrixRows / group));
  const int64_t tile_heads =
      std::clamp<int64_t>(kStateRows / (tile_rows * group), 1, problem.num_kv_heads);
  const int64_t num_tiles = divide_up(sequence.q_len, tile_rows) * divide_up(problem.num_kv_heads, tile_heads);

  std::vector<Tile> tiles;
  for (int64_t head = 0; head < problem.num_kv_heads; head += tile_heads) {
    for (int64_t row = 0; row < sequence.q_len; row += tile_rows) {
      Tile tile{};
      tile.pages = sequence.pages;
      tile.first_row = sequence.first_row + row;
      tile.num_rows = std::min(tile_rows, sequence.q_len - row);
      tile.first_position = sequence.kv_len - sequence.q_len + row;
      tile.kv_len = sequence.kv_len;
      tile.first_head = head;
      tile.end_head = std::min(head + tile_heads, problem.num_kv_heads);
      tile.first_key = visible_keys(problem, tile.first_position, sequence.kv_len).first;
      tile.end_key = visible_keys(problem, tile.first_position + tile.num_rows - 1, sequence.kv_len).end;
      tile.end_key = std::max(tile.first_key, tile.end_key);
      tile.num_items = num_tiles < kTilesPerThread * num_threads ? count_pieces(tile) : 1;
      tiles.push_back(tile);
    }
  }
  return tiles;
}

}  // namespace

KeyRange piece_from(const Tile& tile, int64_t key) {
  return {key, std::min(next_cut(key), tile.end_key)};
}

KeyRange piece_of(const Tile& tile, int64_t index) {
  KeyRange piece = piece_from(tile, tile.first_key);
  for (; index > 0; --index) {
    piece = piece_from(tile, piece.end);
  }
  return piece;
}

int64_t most_matrix_rows(const Problem& problem) {
  return std::max(kMatrixRows, problem.group());
}

int64_t most_state_rows(const Problem& problem) {
  return std::max(kStateRows, most_matrix_rows(problem));
}

std::vector<Sequence> active_sequences(const Problem& problem) {
  const int64_t count = std::clamp<int64_t>(*problem.num_seqs, 0, problem.max_num_seqs);
  const int64_t max_kv_len = problem.pages_per_seq * problem.page_size;
  std::vector<Sequence> sequences;
  int64_t first_row = std::clamp<int64_t>(problem.cu_q_lens[0], 0, problem.num_tokens);
  for (int64_t s = 0; s < count; ++s) {
    const int64_t end_row = std::clamp<int64_t>(problem.cu_q_lens[s + 1], first_row, problem.num_tokens);
    const int64_t kv_len = std::clamp<int64_t>(problem.kv_lens[s], 0, max_kv_len);
    sequences.push_back({first_row, end_row - first_row, kv_len, problem.page_indices + s * problem.pages_per_seq});
    first_row = end_row;
  }
  return sequences;
}

std::vector<Wave> plan(const Problem& problem, const std::vector<Sequence>& sequences, int64_t num_threads) {
  std::vector<Wave> waves(1);
  for (const Sequence& sequence : sequences) {
    if (sequence.q_len == 0) {
      continue;
    }
    for (Tile tile : tiles_of(problem, sequence, num_threads)) {
      const int64_t item_floats = tile.state_rows(problem.group()) * (problem.head_dim + 2);
      const int64_t partial_floats = tile.num_items > 1 ? tile.num_items * item_floats : 0;
      if (waves.back().partial_floats + partial_floats > kPartialFloatsPerWave && !waves.back().tiles.empty()) {
        waves.emplace_back();
      }
      Wave& wave = waves.back();
      tile.partial = wave.partial_floats;
      wave.partial_floats += partial_floats;
      for (int64_t index = 0; index < tile.num_items; ++index) {
        wave.items.push_back({static_cast<int64_t>(wave.tiles.size()), index});
      }
      wave.tiles.push_back(tile);
    }
  }
  return waves;
}

}  // namespace torch_rpa
