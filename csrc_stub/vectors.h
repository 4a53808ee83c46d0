// Float vectors of ATen, as long as those of the vector unit that a file is compiled for.

#pragma once

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <c10/macros/Macros.h>
#include <c10/util/Unroll.h>

#include <cstdint>
#include <type_traits>

namespace torch_rpa {
namespace CPU_CAPABILITY {

using Vec = at::vec::Vectorized<float>;
constexpr int64_t kLanes = Vec::size();

constexpr int64_t round_up(int64_t n, int64_t unit) {
  return (n + unit - 1) / unit * unit;
}

// Calls function(std::integral_constant<int, num_rows>) if num_rows is 1 .. kMostRows.
template <int kMostRows, typename Function>
inline void with_rows(int64_t num_rows, const Function& function) {
  if constexpr (kMostRows > 0) {
    if (num_rows == kMostRows) {
      function(std::integral_constant<int, kMostRows>());
    } else {
      with_rows<kMostRows - 1>(num_rows, function);
    }
  }
}

// The sum of the lanes, by halves: the same bits if lanes are rotated, as where a block begins at another key.
inline float sum_lanes(const Vec& vec) {
  float lanes[kLanes];
  vec.store(lanes);
  for (int64_t count = kLanes / 2; count > 0; count /= 2) {
    for (int64_t i = 0; i < count; ++i) {
      lanes[i] += lanes[i + count];
    }
  }
  return lanes[0];
}

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

}  // namespace CPU_CAPABILITY
}  // namespace torch_rpa
