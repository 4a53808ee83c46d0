// c (+)= a b for small matrices, a and c in float32, by register tiles.
//
// A tile of c stands in registers while the inner dimension runs: for each k, a row of vectors of b is loaded once and
// multiplied by one element of each row of a (the scheme of GotoBLAS and BLIS). Each element of c is the same sequence
// of operations whatever the other rows and columns are, so results do not depend on how a matrix is cut. A library's
// sgemm would not promise that, and wants b in one piece and in float32; here b is anything with
//
//   kPerRow                       rows of b that stand in one row of its memory
//   load(row, element, column)    kLanes columns of row `row * kPerRow + element`, as float32
//
// as the operands in pages.h are: rows on pages, or rows of words of which each holds several elements.

#pragma once

#include "vectors.h"

namespace torch_rpa {
namespace CPU_CAPABILITY {

// Vector registers: 32 with 16 lanes, else 16. A tile takes kTileRows * kTileVecs, a row of b and an element of a.
constexpr int kTileRows = 6;
constexpr int kTileVecs = kLanes == 16 ? 4 : 2;

template <int kRows, int kVecs, typename B, typename Step>
inline void multiply_tile(
    const float* a, int64_t a_stride, const B& b, int64_t column, int64_t num_b_rows, float* c, int64_t c_stride,
    bool add, const Step& step) {
  Vec sums[kRows][kVecs];
  for (int row = 0; row < kRows; ++row) {
    for (int v = 0; v < kVecs; ++v) {
      sums[row][v] = add ? Vec::loadu(c + row * c_stride + column + v * kLanes) : Vec(0.0f);
    }
  }
  for (int64_t b_row = 0; b_row < num_b_rows; ++b_row) {
    step();
    for (int element = 0; element < B::kPerRow; ++element) {
      Vec b_vecs[kVecs];
      for (int v = 0; v < kVecs; ++v) {
        b_vecs[v] = b.load(b_row, element, column + v * kLanes);
      }
      for (int row = 0; row < kRows; ++row) {
        const Vec factor(a[row * a_stride + b_row * B::kPerRow + element]);
        for (int v = 0; v < kVecs; ++v) {
          sums[row][v] = at::vec::fmadd(factor, b_vecs[v], sums[row][v]);
        }
      }
    }
  }
  for (int row = 0; row < kRows; ++row) {
    for (int v = 0; v < kVecs; ++v) {
      sums[row][v].store(c + row * c_stride + column + v * kLanes);
    }
  }
}

template <int kVecs, typename B, typename Step>
inline void multiply_columns(
    const float* a, int64_t a_stride, const B& b, int64_t column, int64_t num_b_rows, float* c, int64_t c_stride,
    int64_t num_rows, bool add, const Step& step) {
  int64_t row = 0;
  for (; row + kTileRows <= num_rows; row += kTileRows) {
    multiply_tile<kTileRows, kVecs>(
        a + row * a_stride, a_stride, b, column, num_b_rows, c + row * c_stride, c_stride, add, step);
  }
  const auto rest = [&](auto rows) {
    multiply_tile<decltype(rows)::value, kVecs>(
        a + row * a_stride, a_stride, b, column, num_b_rows, c + row * c_stride, c_stride, add, step);
  };
  switch (num_rows - row) {
    case 5: return rest(std::integral_constant<int, 5>());
    case 4: return rest(std::integral_constant<int, 4>());
    case 3: return rest(std::integral_constant<int, 3>());
    case 2: return rest(std::integral_constant<int, 2>());
    case 1: return rest(std::integral_constant<int, 1>());
  }
}

// How often multiply calls step for no more than kTileRows rows of c.
constexpr int64_t steps_of(int64_t num_b_rows, int64_t num_columns) {
  constexpr int64_t kTileColumns = kTileVecs * kLanes;
  return num_b_rows * (num_columns / kTileColumns + num_columns % kTileColumns / kLanes);
}

// c[num_rows, num_columns] = a[num_rows, num_b_rows * kPerRow] b, or += if add. num_columns is a multiple of kLanes.
// step() is called all along, as often as steps_of says: to ask for memory, say.
template <typename B, typename Step>
inline void multiply(
    const float* a, int64_t a_stride, const B& b, float* c, int64_t c_stride, int64_t num_rows, int64_t num_b_rows,
    int64_t num_columns, bool add, const Step& step) {
  int64_t column = 0;
  for (; column + kTileVecs * kLanes <= num_columns; column += kTileVecs * kLanes) {
    multiply_columns<kTileVecs>(a, a_stride, b, column, num_b_rows, c, c_stride, num_rows, add, step);
  }
  for (; column < num_columns; column += kLanes) {
    multiply_columns<1>(a, a_stride, b, column, num_b_rows, c, c_stride, num_rows, add, step);
  }
}

}  // namespace CPU_CAPABILITY
}  // namespace torch_rpa
