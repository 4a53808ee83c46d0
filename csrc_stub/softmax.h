// The online softmax (Milakov and Gimelshein 2018; Dao et al. 2022) of rows of scores, block of keys after block.
//
// Each row keeps its largest score so far, the sum of its exponentials relative to that, and the sum of values weighted
// by them. A new block may raise the largest score; then both sums shrink by exp(old - new).

#pragma once

#include "vectors.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace torch_rpa {
namespace CPU_CAPABILITY {

constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

inline void cap_scores(float* scores, int64_t n, float soft_cap) {
  const Vec cap(soft_cap), inverse(1.0f / soft_cap);
  for (int64_t i = 0; i < n; i += kLanes) {
    ((Vec::loadu(scores + i) * inverse).tanh() * cap).store(scores + i);
  }
}

// What a query does not see takes no part: its score becomes -inf, whatever it was, NaN included.
inline void hide_outside(float* scores, int64_t first, int64_t end, int64_t n) {
  std::fill(scores, scores + first, kMinusInfinity);
  std::fill(scores + end, scores + n, kMinusInfinity);
}

inline float largest_of(const float* scores, int64_t n) {
  Vec top(kMinusInfinity);
  for (int64_t i = 0; i < n; i += kLanes) {
    top = at::vec::maximum(top, Vec::loadu(scores + i));  // hands NaN through
  }
  return at::vec::vec_reduce_all<float>([](Vec& a, Vec& b) { return at::vec::maximum(a, b); }, top);
}

// scores become exp(scores - shift); returns their sum.
inline float exponentials(float* scores, int64_t n, float shift) {
  const Vec shifts(shift);
  Vec sum(0.0f);
  for (int64_t i = 0; i < n; i += kLanes) {
    const Vec weight = (Vec::loadu(scores + i) - shifts).exp_u20();
    weight.store(scores + i);
    sum = sum + weight;
  }
  return sum_lanes(sum);
}

inline void scale_row(float* row, int64_t n, float factor) {
  const Vec factors(factor);
  for (int64_t i = 0; i < n; i += kLanes) {
    (Vec::loadu(row + i) * factors).store(row + i);
  }
}

// Largest score and sum of exponentials of one row.
struct RowState {
  float top;
  float sum;
};

// Takes n more scores of a row (a multiple of kLanes) into its state and makes weights of them. Returns what the
// row's weighted values so far are to be multiplied by.
inline float online_softmax(RowState& state, float* scores, int64_t n) {
  const float block_top = largest_of(scores, n);
  const float new_top = block_top > state.top || std::isnan(block_top) ? block_top : state.top;
  // A row that has seen no key yet has a largest score of -inf; 0 in its place keeps exp free of NaN.
  const float shift = new_top == kMinusInfinity ? 0.0f : new_top;
  const float decay = new_top == state.top ? 1.0f : std::exp(state.top - shift);
  state.sum = state.sum * decay + exponentials(scores, n, shift);
  if (!(new_top < std::numeric_limits<float>::infinity())) {
    state.sum = std::numeric_limits<float>::quiet_NaN();  // NaN or infinite scores have no softmax; exp_u20 hides it
  }
  state.top = new_top;
  return decay;
}

// Adds a row's state over other keys, and its weighted values, to those of the same row.
inline void merge_rows(RowState& into, float* into_sums, const RowState& from, const float* from_sums, int64_t n) {
  if (from.top == kMinusInfinity) {
    return;  // it has seen no key
  }
  const float top = into.top > from.top ? into.top : from.top;
  const float into_decay = std::exp(into.top - top), from_decay = std::exp(from.top - top);
  into = {top, into.sum * into_decay + from.sum * from_decay};
  for (int64_t i = 0; i < n; ++i) {
    into_sums[i] = into_sums[i] * into_decay + from_sums[i] * from_decay;
  }
}

}  // namespace CPU_CAPABILITY
}  // namespace torch_rpa
