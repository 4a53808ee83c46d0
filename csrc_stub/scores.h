// Scores, the dot products of queries and keys: keys are read as they stand, a vector of elements at a time, and kLanes
// scores are summed side by side. That a dot product ends in adding lanes costs less than transposing every key.
//
// Lane l of a score sums the products of elements l, l + kLanes, l + 2 kLanes, ... in this order. Then lanes are added
// in pairs, l and l + kLanes / 2, their sums again in pairs, and so on until one is left: whatever other rows there are, so
// that a token has the same bits whether it is decoded or stands in a prompt.

#pragma once

#include "matmul.h"

#include <c10/macros/Macros.h>

#include <algorithm>

namespace torch_rpa {
namespace CPU_CAPABILITY {

// The scores of kRows rows, tile by tile: as many keys as make kLanes scores, if three rows take the room of four. Not
// inlined, so that all pointers of a tile's keys find registers.
template <int kRows, typename Keys>
C10_NOINLINE void score_rows(
    const float* q, int64_t q_stride, Keys keys, int64_t num_keys, int64_t head_dim, float* scores,
    int64_t scores_stride) {
  constexpr int kKeys = kLanes / (kRows == 3 ? 4 : kRows);
  for (int64_t first_key = 0; first_key < num_keys; first_key += kKeys) {
    Vec sums[kLanes];
    std::fill_n(sums, kLanes, Vec(0.0f));
    for (int64_t column = 0; column < head_dim; column += kLanes) {
      Vec key_vecs[kKeys];
      for (int key = 0; key < kKeys; ++key) {
        key_vecs[key] = keys.load(first_key + key, column);
      }
      for (int row = 0; row < kRows; ++row) {
        const Vec q_vec = Vec::loadu(q + row * q_stride + column);
        for (int key = 0; key < kKeys; ++key) {
          sums[row * kKeys + key] = at::vec::fmadd(q_vec, key_vecs[key], sums[row * kKeys + key]);
        }
      }
    }
    float lanes[kLanes];
    add_lanes<kLanes>(sums).store(lanes);
    for (int row = 0; row < kRows; ++row) {
      std::copy_n(lanes + row * kKeys, kKeys, scores + row * scores_stride + first_key);
    }
  }
}

// scores[num_rows, num_keys] of keys.load(key, column), with head_dim and num_keys multiples of kLanes.
template <typename Keys>
inline void score_keys(
    const float* q, int64_t q_stride, const Keys& keys, int64_t num_rows, int64_t num_keys, int64_t head_dim,
    float* scores, int64_t scores_stride) {
  const auto score = [&](auto rows, int64_t row) {
    score_rows<rows()>(
        q + row * q_stride, q_stride, keys, num_keys, head_dim, scores + row * scores_stride, scores_stride);
  };
  constexpr int kMostRows = 4;
  int64_t row = 0;
  for (; row + kMostRows <= num_rows; row += kMostRows) {
    score(std::integral_constant<int, kMostRows>(), row);
  }
  with_rows<kMostRows - 1>(num_rows - row, [&](auto rows) { score(rows, row); });
}

}  // namespace CPU_CAPABILITY
}  // namespace torch_rpa
