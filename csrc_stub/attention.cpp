// Attention of one tile of rows over a range of keys; setup.py compiles this file once for each kind of vector unit.
//
// For each block of keys, and each KV head of the tile:
//
//    [A] find the keys                           [block keys, head_dim]
//    [B] scores = q keys^T                       [matrix rows, block keys]
//    [C] soft cap, mask, online softmax          scores become weights; sums of earlier blocks shrink
//    [D] find the values                         [block keys, head_dim]
//    [E] sums += weights values                  [matrix rows, head_dim]
//
// float32 is read where it stands on the pages, everything else is copied as float32 in [A] and [D]. Few rows, as decode
// has, are bound by memory: they also read 16-bit floats in place, and widen them in registers, which many rows would do
// many times. And their products ask for the next head's keys and values; for many rows [A] does.
//
// The rows of a matrix are the tile's query rows times the query heads that share the KV head. Keys that no row of the
// tile sees are never touched: not even multiplied by a weight of 0, which would make NaN of NaN.

#include "kernel.h"
#include "matmul.h"
#include "pages.h"
#include "prefetch.h"
#include "scores.h"
#include "softmax.h"

#include <algorithm>
#include <cmath>

namespace torch_rpa {
namespace CPU_CAPABILITY {
namespace {

constexpr int64_t kBlockKeys = 64;
static_assert(kBlockKeys % kLanes == 0);
// Up to so many rows of a matrix, memory is what is waited for.
constexpr int64_t kMostFewRows = 16;

// State of a tile's rows: those of its first head, then those of the next.
struct State {
  RowState* rows;
  float* sums;  // [state rows, stride]
  int64_t stride;
};

struct Scratch {
  float* q;       // [state rows, padded head_dim]
  State piece;    // of one piece of keys
  State total;    // of all pieces so far
  float* tokens;  // [kBlockKeys, padded head_dim]: copies of keys, then of values
  float* scores;  // [matrix rows, kBlockKeys]
};

int64_t padded_head_dim(const Problem& problem) {
  return round_up(problem.head_dim, kLanes);
}

// Lays out scratch memory from `memory`; returns how many floats that takes.
int64_t lay_out(const Problem& problem, float* memory, Scratch& scratch) {
  const int64_t head_dim = padded_head_dim(problem);
  const int64_t state_rows = most_state_rows(problem);
  float* next = memory;
  const auto take = [&](int64_t floats) {
    float* const start = next;
    next += round_up(floats, 16);  // a cache line
    return start;
  };
  scratch.q = take(state_rows * head_dim);
  for (State* state : {&scratch.piece, &scratch.total}) {
    *state = {reinterpret_cast<RowState*>(take(state_rows * 2)), take(state_rows * head_dim), head_dim};
  }
  scratch.tokens = take(kBlockKeys * head_dim);
  scratch.scores = take(most_matrix_rows(problem) * kBlockKeys);
  return next - memory;
}

int64_t scratch_floats(const Problem& problem) {
  Scratch scratch;
  return lay_out(problem, nullptr, scratch);
}

// Calls function(head, query row, query head, state row) for every state row of the tile.
template <typename Function>
void for_each_row(const Problem& problem, const Tile& tile, const Function& function) {
  const int64_t group = problem.group();
  int64_t state_row = 0;
  for (int64_t head = tile.first_head; head < tile.end_head; ++head) {
    for (int64_t row = 0; row < tile.num_rows; ++row) {
      for (int64_t member = 0; member < group; ++member) {
        function(tile.first_row + row, head * group + member, state_row++);
      }
    }
  }
}

// ---- Before the first block -----------------------------------------------------------------------------------

// q as float32, times the scale of the scores; then zeros up to whole vectors.
void load_q(const Problem& problem, const Tile& tile, float* out) {
  const int64_t stride = padded_head_dim(problem);
  with_type(problem.dtype, [&](auto type) {
    const auto* q = static_cast<const decltype(type)*>(problem.q);
    for_each_row(problem, tile, [&](int64_t row, int64_t q_head, int64_t state_row) {
      float* const out_row = out + state_row * stride;
      copy_row(q + row * problem.q_token_stride + q_head * problem.q_head_stride, out_row, problem.head_dim, stride);
      scale_row(out_row, stride, problem.score_scale);
    });
  });
}

// No key yet.
void start_state(const State& state, int64_t state_rows) {
  std::fill_n(state.rows, state_rows, RowState{kMinusInfinity, 0.0f});
  std::fill_n(state.sums, state_rows * state.stride, 0.0f);
}

// ---- One block of keys ----------------------------------------------------------------------------------------

struct Block {
  int64_t first_key;
  int64_t num_keys;
  const char* tokens[kBlockKeys];  // where each key's token stands on the pages; then the last one's again
};

// The block of keys from first_key on: up to a multiple of kBlockKeys, or to end_key.
Block locate(const Problem& problem, const Tile& tile, int64_t first_key, int64_t end_key) {
  const int64_t element_bytes = c10::elementSize(problem.page_dtype);
  Block block;
  block.first_key = first_key;
  block.num_keys = std::min(end_key, first_key / kBlockKeys * kBlockKeys + kBlockKeys) - first_key;
  for (int64_t i = 0; i < block.num_keys; ++i) {
    const int64_t key = first_key + i;
    const int64_t page = std::clamp<int64_t>(tile.pages[key / problem.page_size], 0, problem.num_pages - 1);
    const int64_t offset = page * problem.page_stride + key % problem.page_size * problem.slot_stride;
    block.tokens[i] = static_cast<const char*>(problem.kv_pages) + offset * element_bytes;
  }
  std::fill(
      block.tokens + block.num_keys, block.tokens + kBlockKeys,
      block.num_keys > 0 ? block.tokens[block.num_keys - 1] : static_cast<const char*>(problem.kv_pages));
  return block;
}

template <typename Page>
HeadRows keys_of(const Problem& problem, const Block& block, int64_t head) {
  return {block.tokens, 2 * head * problem.head_dim * static_cast<int64_t>(sizeof(Page))};
}

template <typename Page>
HeadRows values_of(const Problem& problem, const Block& block, int64_t head) {
  return {block.tokens, (2 * head + 1) * problem.head_dim * static_cast<int64_t>(sizeof(Page))};
}

// What the products read of pages of this kind: few rows widen 16-bit floats in registers.
template <typename Page, bool kFewRows>
using OperandOf = std::conditional_t<kFewRows && sizeof(Page) == 2, Page, float>;

// Copies of keys or values, in whole vectors and as float32 if Operand is that; `starts` is room for where they stand.
template <typename Page, typename Operand>
HeadRows copy_rows(
    const Problem& problem, const HeadRows& in, int64_t num_rows, const Scratch& scratch, const char** starts) {
  const int64_t stride = padded_head_dim(problem);
  for (int64_t i = 0; i < num_rows; ++i) {
    Operand* const copy = reinterpret_cast<Operand*>(scratch.tokens) + i * stride;
    copy_row(reinterpret_cast<const Page*>(in.row(i)), copy, problem.head_dim, stride);
    starts[i] = reinterpret_cast<const char*>(copy);
  }
  return {starts, 0};
}

// [C] The scores of a head, a row for each query row and member of the group, become weights.
void weigh(
    const Problem& problem, const Tile& tile, const Block& block, const State& state, int64_t state_row,
    float* scores) {
  const int64_t group = problem.group();
  const int64_t padded_keys = round_up(block.num_keys, kLanes);
  for (int64_t row = 0; row < tile.num_rows; ++row) {
    const KeyRange seen = visible_keys(problem, tile.first_position + row, tile.kv_len);
    const int64_t first = std::clamp<int64_t>(seen.first - block.first_key, 0, block.num_keys);
    const int64_t end = std::clamp<int64_t>(seen.end - block.first_key, first, block.num_keys);
    for (int64_t member = 0; member < group; ++member, ++state_row, scores += kBlockKeys) {
      if (problem.soft_cap != 0) {
        cap_scores(scores, padded_keys, problem.soft_cap);
      }
      hide_outside(scores, first, end, padded_keys);
      const float decay = online_softmax(state.rows[state_row], scores, padded_keys);
      if (decay != 1.0f) {
        scale_row(state.sums + state_row * state.stride, state.stride, decay);
      }
    }
  }
}

// [A, D] Calls function(operand) with the keys or values `in`; few rows ask for those of `next` with every load.
template <typename Page, bool kFewRows, typename Function>
void with_operand(
    const Problem& problem, const HeadRows& in, const HeadRows& next, int64_t num_rows, const Scratch& scratch,
    const Function& function) {
  using Operand = OperandOf<Page, kFewRows>;
  // Else a vector would end past the row.
  const bool in_place = std::is_same_v<Page, Operand> && problem.head_dim == padded_head_dim(problem);
  const char* starts[kBlockKeys];
  const HeadRows rows = in_place ? in : copy_rows<Page, Operand>(problem, in, num_rows, scratch, starts);
  if constexpr (kFewRows) {
    function(AskingRows<Operand, Page>{rows, next});
  } else {
    function(Rows<Operand>{rows});
  }
}

// [A, B] The scores of num_rows rows of q, all of one head.
template <typename Page, bool kFewRows>
void score(
    const Problem& problem, const Block& block, const HeadRows& keys, const HeadRows& next_keys, const float* q,
    int64_t num_rows, const Scratch& scratch) {
  const int64_t head_dim = padded_head_dim(problem), padded_keys = round_up(block.num_keys, kLanes);
  if constexpr (!kFewRows) {
    for (int64_t i = 0; i < kBlockKeys; ++i) {
      ask_for_row(next_keys.row(i), 2 * problem.head_dim * sizeof(Page));  // the values come after the keys
    }
  }
  with_operand<Page, kFewRows>(problem, keys, next_keys, padded_keys, scratch, [&](const auto& operand) {
    score_keys(q, head_dim, operand, num_rows, padded_keys, head_dim, scratch.scores, kBlockKeys);
  });
}

// [D, E] Adds the values of a head, weighted for each of num_rows rows, to the sums.
template <typename Page, bool kFewRows>
void add_values(
    const Problem& problem, const Block& block, const HeadRows& values, const HeadRows& next_values, float* sums,
    int64_t sums_stride, int64_t num_rows, const Scratch& scratch) {
  with_operand<Page, kFewRows>(problem, values, next_values, block.num_keys, scratch, [&](const auto& operand) {
    add_product(
        scratch.scores, kBlockKeys, operand, sums, sums_stride, num_rows, block.num_keys, padded_head_dim(problem));
  });
}

template <typename Page, bool kFewRows>
void attend_block(
    const Problem& problem, const Tile& tile, const Block& block, const Block& next_block, const Scratch& scratch,
    const State& state) {
  const int64_t matrix_rows = tile.matrix_rows(problem.group());
  for (int64_t head = tile.first_head; head < tile.end_head; ++head) {
    const bool is_last = head + 1 == tile.end_head;
    const Block& with_next = is_last ? next_block : block;
    const int64_t next_head = is_last ? tile.first_head : head + 1;
    const int64_t state_row = (head - tile.first_head) * matrix_rows;
    score<Page, kFewRows>(
        problem, block, keys_of<Page>(problem, block, head), keys_of<Page>(problem, with_next, next_head),
        scratch.q + state_row * padded_head_dim(problem), matrix_rows, scratch);
    weigh(problem, tile, block, state, state_row, scratch.scores);
    add_values<Page, kFewRows>(
        problem, block, values_of<Page>(problem, block, head), values_of<Page>(problem, with_next, next_head),
        state.sums + state_row * state.stride, state.stride, matrix_rows, scratch);
  }
}

template <typename Page, bool kFewRows>
void attend_keys(
    const Problem& problem, const Tile& tile, const KeyRange& keys, const Scratch& scratch, const State& state) {
  Block block = locate(problem, tile, keys.first, keys.end);
  while (block.num_keys > 0) {
    const Block next = locate(problem, tile, block.first_key + block.num_keys, keys.end);
    attend_block<Page, kFewRows>(problem, tile, block, next, scratch, state);
    block = next;
  }
}

// The state of a tile's rows over one piece of keys.
void attend_piece(
    const Problem& problem, const Tile& tile, const KeyRange& piece, const Scratch& scratch, const State& state) {
  start_state(state, tile.state_rows(problem.group()));
  with_type(problem.page_dtype, [&](auto type) {
    using Page = decltype(type);
    const bool few_rows = tile.matrix_rows(problem.group()) <= kMostFewRows;
    const auto attend = few_rows ? attend_keys<Page, true> : attend_keys<Page, false>;
    attend(problem, tile, piece, scratch, state);
  });
}

// ---- After the last block of a piece ---------------------------------------------------------------------------

void add_state(const Problem& problem, const Tile& tile, const State& into, const State& from) {
  for (int64_t row = 0; row < tile.state_rows(problem.group()); ++row) {
    merge_rows(
        into.rows[row], into.sums + row * into.stride, from.rows[row], from.sums + row * from.stride,
        problem.head_dim);
  }
}

// The state of a row and of a sink, a logit without a value; `decay` is what sums of values are then multiplied by.
RowState with_sink(const RowState& row, float sink, float& decay) {
  decay = 1.0f;
  if (sink == kMinusInfinity) {
    return row;
  }
  const float top = sink > row.top ? sink : row.top;
  decay = std::exp(row.top - top);
  return {top, row.sum * decay + std::exp(sink - top)};
}

void finish(const Problem& problem, const Tile& tile, const State& state) {
  with_type(problem.dtype, [&](auto type) {
    using Out = decltype(type);
    Out* const out = static_cast<Out*>(problem.out);
    for_each_row(problem, tile, [&](int64_t row, int64_t q_head, int64_t state_row) {
      float decay;
      const float sink = problem.sinks == nullptr ? kMinusInfinity : problem.sinks[q_head];
      const auto [top, sum] = with_sink(state.rows[state_row], sink, decay);
      const int64_t place = row * problem.num_q_heads + q_head;
      const float* const sums = state.sums + state_row * state.stride;
      const float scale = sum == 0.0f ? 0.0f : problem.value_scale * decay / sum;
      for (int64_t d = 0; d < problem.head_dim; ++d) {
        out[place * problem.head_dim + d] = static_cast<Out>(sums[d] * scale);
      }
      problem.lse[place] = top + std::log(sum);
    });
  });
}

// The place of an item's partial result.
State partial_state(const Problem& problem, const Tile& tile, int64_t item, float* partials) {
  const int64_t state_rows = tile.state_rows(problem.group());
  float* const start = partials + tile.partial + item * state_rows * (problem.head_dim + 2);
  return {reinterpret_cast<RowState*>(start), start + 2 * state_rows, problem.head_dim};
}

void save(const Problem& problem, const Tile& tile, const State& from, const State& to) {
  const int64_t state_rows = tile.state_rows(problem.group());
  std::copy_n(from.rows, state_rows, to.rows);
  for (int64_t row = 0; row < state_rows; ++row) {
    std::copy_n(from.sums + row * from.stride, problem.head_dim, to.sums + row * to.stride);
  }
}

// The whole of a tile, piece by piece.
void attend_tile(const Problem& problem, const Tile& tile, const Scratch& scratch) {
  KeyRange piece = piece_of(tile, 0);
  attend_piece(problem, tile, piece, scratch, scratch.total);
  while (piece.end < tile.end_key) {
    piece = piece_from(tile, piece.end);
    attend_piece(problem, tile, piece, scratch, scratch.piece);
    add_state(problem, tile, scratch.total, scratch.piece);
  }
  finish(problem, tile, scratch.total);
}

void attend(const Problem& problem, const Tile& tile, int64_t item, float* partials, float* memory) {
  Scratch scratch;
  lay_out(problem, memory, scratch);
  load_q(problem, tile, scratch.q);
  if (tile.num_items == 1) {
    attend_tile(problem, tile, scratch);
  } else {
    attend_piece(problem, tile, piece_of(tile, item), scratch, scratch.piece);
    save(problem, tile, scratch.piece, partial_state(problem, tile, item, partials));
  }
}

void merge(const Problem& problem, const Tile& tile, float* partials) {
  const State into = partial_state(problem, tile, 0, partials);
  for (int64_t item = 1; item < tile.num_items; ++item) {
    add_state(problem, tile, into, partial_state(problem, tile, item, partials));
  }
  finish(problem, tile, into);
}

}  // namespace

extern const Kernel kernel;
const Kernel kernel{scratch_floats, attend, merge};

}  // namespace CPU_CAPABILITY
}  // namespace torch_rpa
