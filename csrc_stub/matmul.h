// c += a b for small matrices in float32, by register tiles.
//
// A tile of c stands in registers while the inner dimension runs: for each k, a row of vectors of b is loaded once and
// multiplied by one element of each row of a (the scheme of GotoBLAS and BLIS). Each element of c is the same sequence
// of operations whatever the other rows and columns are, so results do not depend on how a matrix is cut. A library's
// sgemm would not promise that, and wants b in one piece and in float32.

#pragma once

#include "vectors.h"

#include <type_traits>

namespace torch_rpa {
namespace CPU_CAPABILITY {

// Vector registers: 32 with 16 lanes, else 16. A tile takes kTileRows * kTileVecs, a row of b and an element of a.
constexpr int kTileRows = 6;
constexpr int kTileVecs = kLanes == 16 ? 4 : 2;

// A tile of kRows rows and kVecs vectors of columns.
template <int kRows, int kVecs>
struct TileSums {
  Vec sums[kRows][kVecs];

  // sum = function(sum, row, vector)
  template <typename Function>
  void update(const Function& function) {
    for (int row = 0; row < kRows; ++row) {
      for (int v = 0; v < kVecs; ++v) {
        sums[row][v] = function(sums[row][v], row, v);
      }
    }
  }

  // Adds the product of a column of a and a row of b; load(column) loads from the row.
  template <typename Load>
  void add_product(const float* a, int64_t a_stride, const Load& load) {
    Vec b_vecs[kVecs];
    for (int v = 0; v < kVecs; ++v) {
      b_vecs[v] = load(v * kLanes);
    }
    for (int row = 0; row < kRows; ++row) {
      const Vec factor(a[row * a_stride]);
      for (int v = 0; v < kVecs; ++v) {
        sums[row][v] = at::vec::fmadd(factor, b_vecs[v], sums[row][v]);
      }
    }
  }
};

// Calls function(rows, vecs, first row, first column) for tiles that cover a matrix; rows and vecs, the tile's size,
// are std::integral_constant. num_columns is a multiple of kLanes.
template <typename Function>
inline void for_each_tile(int64_t num_rows, int64_t num_columns, const Function& function) {
  const auto with_columns = [&](auto vecs, int64_t column) {
    int64_t row = 0;
    for (; row + kTileRows <= num_rows; row += kTileRows) {
      function(std::integral_constant<int, kTileRows>(), vecs, row, column);
    }
    with_rows<kTileRows - 1>(num_rows - row, [&](auto rows) { function(rows, vecs, row, column); });
  };
  int64_t column = 0;
  for (; column + kTileVecs * kLanes <= num_columns; column += kTileVecs * kLanes) {
    with_columns(std::integral_constant<int, kTileVecs>(), column);
  }
  for (; column < num_columns; column += kLanes) {
    with_columns(std::integral_constant<int, 1>(), column);
  }
}

// c[num_rows, num_columns] += a[num_rows, num_b_rows] b, of which b.load(row, column) gives kLanes columns as float32.
template <typename B>
inline void add_product(
    const float* a, int64_t a_stride, const B& b, float* c, int64_t c_stride, int64_t num_rows, int64_t num_b_rows,
    int64_t num_columns) {
  for_each_tile(num_rows, num_columns, [&](auto rows, auto vecs, int64_t row, int64_t column) {
    float* const c_tile = c + row * c_stride + column;
    TileSums<rows(), vecs()> tile;
    tile.update([&](Vec, int64_t r, int64_t v) { return Vec::loadu(c_tile + r * c_stride + v * kLanes); });
    for (int64_t b_row = 0; b_row < num_b_rows; ++b_row) {
      tile.add_product(
          a + row * a_stride + b_row, a_stride, [&](int64_t first) { return b.load(b_row, column + first); });
    }
    tile.update([&](Vec sum, int64_t r, int64_t v) {
      sum.store(c_tile + r * c_stride + v * kLanes);
      return sum;
    });
  });
}

}  // namespace CPU_CAPABILITY
}  // namespace torch_rpa
