// The product of linear.h, compiled for each vector unit.
//
// Each element of out is a dot product of two rows that stand in memory as they are: nothing is packed, so weight is read
// at the speed of memory if there are few rows of input. A tile has kTileRows x kTileColumns elements, as many as a vector
// has lanes, and one vector of partial sums for each; adding up the lanes of all of them gives one vector of results.
//
//                 columns: rows of weight                for each block of rows and of depth (input in the L2 cache)
//                 [ . . . . ]  kTileColumns                for each tile of columns (weight in the L1 cache)
//      rows of    [ . . . . ]                                for each tile of rows
//      input      [ . . . . ]                                  for each vector of depth
//      kTileRows  [ . . . . ]                                    kLanes products of two vectors
//
// What is added to what, and in which order, follows from depth alone: a row's result does not depend on other rows.

#include "linear.h"

#include "vectors.h"

#include <algorithm>

namespace torch_rpa {
namespace CPU_CAPABILITY {
namespace {

constexpr int kTileRows = 4;
constexpr int kTileColumns = kLanes / kTileRows;
// A tile's rows and columns of so many floats are 24 KiB, for the L1 cache; a block's rows are 192 KiB, for the L2 cache.
constexpr int64_t kBlockDepth = 768;
constexpr int64_t kBlockRows = 64;

// Rows row .. end_row of input, elements k .. k + depth of each.
struct Block {
  int64_t row, end_row, k, depth;
};

// A few rows of weight, from the block's first element on.
struct WeightRows {
  const float* begin[kTileColumns];
  int count = 0;
};

// The dot products of kRows rows of input and a tile's columns: lane row * kTileColumns + column. The rows of `ahead` are
// asked for on the way; left alone, a core would read weight, then compute, then read on.
template <int kRows>
inline Vec multiply_tile(
    const float* input, int64_t input_stride, const WeightRows& columns, const WeightRows& ahead, int64_t depth) {
  Vec sums[kLanes];
  for (Vec& sum : sums) {
    sum = Vec(0.0f);
  }
  const auto add_products = [&](int64_t k, const auto& load) {
    Vec column_vecs[kTileColumns];
    for (int column = 0; column < kTileColumns; ++column) {
      column_vecs[column] = load(columns.begin[column] + k);
    }
    for (int row = 0; row < kRows; ++row) {
      const Vec row_vec = load(input + row * input_stride + k);
      for (int column = 0; column < kTileColumns; ++column) {
        Vec& sum = sums[row * kTileColumns + column];
        sum = at::vec::fmadd(row_vec, column_vecs[column], sum);
      }
    }
  };
  int64_t k = 0;
  for (; k + kLanes <= depth; k += kLanes) {
    for (int i = 0; i < ahead.count; ++i) {
      __builtin_prefetch(ahead.begin[i] + k);
    }
    add_products(k, [](const float* from) { return Vec::loadu(from); });
  }
  if (k < depth) {
    add_products(k, [&](const float* from) { return Vec::loadu(from, depth - k); });  // and zeros
  }
  return add_lanes<kLanes>(sums);
}

// The rows of weight that the columns from `column` on are, the last one again for those from `end` on.
WeightRows columns_from(const Linear& linear, const Block& block, int64_t column, int64_t end) {
  WeightRows columns;
  for (; columns.count < kTileColumns; ++columns.count) {
    const int64_t row = std::min(column + columns.count, end - 1);
    columns.begin[columns.count] = linear.weight + row * linear.weight_stride + block.k;
  }
  return columns;
}

// The share of the tile of rows from `row` on in asking for these columns: each tile of the block takes other ones.
WeightRows share_of(const Block& block, int64_t row, const WeightRows& columns) {
  const int64_t num_tiles = (block.end_row - block.row + kTileRows - 1) / kTileRows;
  WeightRows share;
  for (int64_t i = (row - block.row) / kTileRows; i < kTileColumns; i += num_tiles) {
    share.begin[share.count++] = columns.begin[i];
  }
  return share;
}

// Adds the block's products to kRows rows of out, a tile of columns, but for those from `end` on.
template <int kRows>
void add_tile(const Linear& linear, const Block& block, int64_t row, int64_t column, int64_t end) {
  const WeightRows columns = columns_from(linear, block, column, end);
  const WeightRows ahead = share_of(block, row, columns_from(linear, block, column + kTileColumns, end));
  const float* const input = linear.input + row * linear.depth + block.k;
  float products[kLanes];
  multiply_tile<kRows>(input, linear.depth, columns, ahead, block.depth).store(products);
  const int64_t num_columns = std::min<int64_t>(kTileColumns, end - column);
  for (int i = 0; i < kRows; ++i) {
    float* const out = linear.out + (row + i) * linear.num_columns + column;
    for (int j = 0; j < num_columns; ++j) {
      out[j] += products[i * kTileColumns + j];
    }
  }
}

void add_columns(const Linear& linear, const Block& block, int64_t column, int64_t end) {
  int64_t row = block.row;
  for (; row + kTileRows <= block.end_row; row += kTileRows) {
    add_tile<kTileRows>(linear, block, row, column, end);
  }
  with_rows<kTileRows - 1>(block.end_row - row, [&](auto rows) { add_tile<rows()>(linear, block, row, column, end); });
}

void begin_with_bias(const Linear& linear, int64_t first, int64_t end) {
  for (int64_t row = 0; row < linear.num_rows; ++row) {
    float* const out = linear.out + row * linear.num_columns;
    if (linear.bias == nullptr) {
      std::fill(out + first, out + end, 0.0f);
    } else {
      std::copy(linear.bias + first, linear.bias + end, out + first);
    }
  }
}

void multiply(const Linear& linear, int64_t first, int64_t end) {
  begin_with_bias(linear, first, end);
  for (int64_t row = 0; row < linear.num_rows; row += kBlockRows) {
    for (int64_t k = 0; k < linear.depth; k += kBlockDepth) {
      const Block block{
          row, std::min(row + kBlockRows, linear.num_rows), k, std::min(kBlockDepth, linear.depth - k)};
      for (int64_t column = first; column < end; column += kTileColumns) {
        add_columns(linear, block, column, end);
      }
    }
  }
}

}  // namespace

extern const LinearKernel linear_kernel = multiply;

}  // namespace CPU_CAPABILITY
}  // namespace torch_rpa
