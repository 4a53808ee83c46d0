// Scores, the dot products of queries and keys, in two ways that give the same bits: a token has them whether it is
// decoded or stands in a prompt.
//
// Lane l of a score sums the products of elements l, l + kLanes, l + 2 kLanes, ... in this order. Then lanes are added
// in pairs, l and l + kLanes / 2, their sums again in pairs, and so on until one is left.
//
//   few rows    Keys are read as they stand, a vector of elements at a time, and kLanes scores are summed side by side.
//               That a dot product ends in adding lanes costs less than transposing every key.
//   many rows   Keys were transposed, [head_dim, keys]; a vector holds one element of kLanes keys.

#pragma once

#include "matmul.h"

#include <c10/macros/Macros.h>
#include <c10/util/Unroll.h>

#include <algorithm>

namespace torch_rpa {
namespace CPU_CAPABILITY {

// Lane i of the result is the sum of the lanes of sums[i]: vectors with kLanes / kVecs numbers left of each sum are
// interleaved and halved until there is one.
template <int kVecs>
C10_ALWAYS_INLINE Vec add_lanes(const Vec* sums) {
  if constexpr (kVecs == 1) {
    return sums[0];
  } else {
    Vec halves[kVecs / 2];
    c10::ForcedUnroll<kVecs / 2>{}([&](auto i) {
      const auto [low, high] = at::vec::interleave2<float>(sums[i], sums[i + kVecs / 2]);
      halves[i] = low + high;
    });
    return add_lanes<kVecs / 2>(halves);
  }
}

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
inline void score_few_rows(
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

constexpr int reversed_bits(int n, int num_bits) {
  return num_bits == 0 ? 0 : (n & 1) << (num_bits - 1) | reversed_bits(n >> 1, num_bits - 1);
}

// scores[num_rows, num_keys] of transposed keys [head_dim, keys_stride], with num_keys a multiple of kLanes.
inline void score_many_rows(
    const float* q, int64_t q_stride, const float* keys, int64_t keys_stride, int64_t num_rows, int64_t num_keys,
    int64_t head_dim, float* scores, int64_t scores_stride) {
  constexpr int kLevels = __builtin_ctz(kLanes);
  for_each_tile(num_rows, num_keys, [&](auto rows, auto vecs, int64_t row, int64_t column) {
    // Lanes are taken in the order in which a tree is walked, and added as a binary counter carries: the sum of
    // 2^level lanes waits until its partner is there.
    Vec waiting[kLevels][rows()][vecs()];
    TileSums<rows(), vecs()> tile;
    for (int n = 0; n < kLanes; ++n) {
      tile.update([](Vec, int64_t, int64_t) { return Vec(0.0f); });
      for (int64_t k = reversed_bits(n, kLevels); k < head_dim; k += kLanes) {
        tile.add_product(q + row * q_stride + k, q_stride, [&](int64_t first) {
          return Vec::loadu(keys + k * keys_stride + column + first);
        });
      }
      int level = 0;
      for (; n >> level & 1; ++level) {
        tile.update([&](Vec sum, int64_t r, int64_t v) { return waiting[level][r][v] + sum; });
      }
      if (level < kLevels) {
        tile.update([&](Vec sum, int64_t r, int64_t v) { return waiting[level][r][v] = sum; });
      }
    }
    tile.update([&](Vec sum, int64_t r, int64_t v) {
      sum.store(scores + (row + r) * scores_stride + column + v * kLanes);
      return sum;
    });
  });
}

}  // namespace CPU_CAPABILITY
}  // namespace torch_rpa
