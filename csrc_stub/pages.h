// Keys and values from the pages of a KV cache, as float32, and as the operands of a product (matmul.h).

#pragma once

#include "vectors.h"

#include "problem.h"

#include <ATen/cpu/vec/functional_bfloat16.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Float8_e4m3fn.h>
#include <c10/util/Float8_e5m2.h>
#include <c10/util/Half.h>
#include <c10/util/Unroll.h>

#include <cstring>
#include <type_traits>

namespace torch_rpa {
namespace CPU_CAPABILITY {

inline float float_of_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// A float of kExponentBits and kMantissaBits, without branches, so that the compiler can make vectors of the loop
// around it. Without the infinities of IEEE 754 (e4m3fn) only a magnitude of all ones is NaN.
template <int kExponentBits, int kMantissaBits, bool kHasInfinity>
inline float small_float(uint32_t code) {
  constexpr uint32_t kMagnitude = (1u << (kExponentBits + kMantissaBits)) - 1;
  constexpr uint32_t kNormal = 1u << kMantissaBits;
  constexpr int kBias = (1 << (kExponentBits - 1)) - 1;
  constexpr uint32_t kSpecial = kHasInfinity ? kMagnitude - (kNormal - 1) : kMagnitude;
  const uint32_t magnitude = code & kMagnitude;
  const uint32_t sign = (code & ~kMagnitude) << (31 - kExponentBits - kMantissaBits);
  const uint32_t shifted = magnitude << (23 - kMantissaBits);
  const uint32_t normal = shifted + ((127u - kBias) << 23);
  const uint32_t special = shifted | 0x7f800000u;
  // A subnormal is a whole number of the smallest steps.
  const float step = float_of_bits((127u - kBias + 1 - kMantissaBits) << 23);
  const float steps = static_cast<float>(static_cast<int32_t>(magnitude)) * step;
  uint32_t subnormal;
  std::memcpy(&subnormal, &steps, sizeof subnormal);
  const uint32_t finite = magnitude < kNormal ? subnormal : normal;
  return float_of_bits((magnitude >= kSpecial ? special : finite) | sign);
}

// The value of an element whose bits are the lowest of `bits`; those above may hold anything.
template <typename Page>
inline float float_of_element(uint32_t bits) {
  if constexpr (std::is_same_v<Page, int8_t>) {
    return static_cast<float>(static_cast<int32_t>(bits << 24) >> 24);
  } else if constexpr (std::is_same_v<Page, c10::BFloat16>) {
    return float_of_bits(bits << 16);
  } else if constexpr (std::is_same_v<Page, c10::Half>) {
    return small_float<5, 10, true>(bits & 0xffff);
  } else if constexpr (std::is_same_v<Page, c10::Float8_e5m2>) {
    return small_float<5, 2, true>(bits & 0xff);
  } else if constexpr (std::is_same_v<Page, c10::Float8_e4m3fn>) {
    return small_float<4, 3, false>(bits & 0xff);
  } else {
    return float_of_bits(bits);
  }
}

template <typename Page>
using BitsOf = std::conditional_t<sizeof(Page) == 4, uint32_t, std::conditional_t<sizeof(Page) == 2, uint16_t, uint8_t>>;

// n elements as float32.
template <typename Page>
inline void load_row(const Page* in, float* __restrict out, int64_t n) {
  const auto* const bits = reinterpret_cast<const BitsOf<Page>*>(in);
  for (int64_t i = 0; i < n; ++i) {
    out[i] = float_of_element<Page>(bits[i]);
  }
}

// n elements as Element: as they are, or as float32.
template <typename Page, typename Element>
inline void copy_row(const Page* in, Element* out, int64_t n) {
  if constexpr (std::is_same_v<Page, Element>) {
    std::memcpy(out, in, n * sizeof(Page));
  } else {
    load_row(in, out, n);
  }
}

// ---- Keys, transposed -----------------------------------------------------------------------------------------

// Transposes a square of words: rows first and last half are interleaved as often as it takes to halve them to one. All in
// registers, which at::vec::transpose_mxn is not.
inline void transpose_square(const float* in, int64_t in_stride, float* out, int64_t out_stride) {
  using Unroll = c10::ForcedUnroll<kLanes>;
  using UnrollHalf = c10::ForcedUnroll<kLanes / 2>;
  Vec rows[kLanes], next[kLanes];
  Unroll{}([&](auto i) { rows[i] = Vec::loadu(in + i * in_stride); });
  c10::ForcedUnroll<__builtin_ctz(kLanes)>{}([&](auto) {
    UnrollHalf{}([&](auto i) {
      std::tie(next[2 * i], next[2 * i + 1]) = at::vec::interleave2<float>(rows[i], rows[i + kLanes / 2]);
    });
    Unroll{}([&](auto i) { rows[i] = next[i]; });
  });
  Unroll{}([&](auto i) { rows[i].store(out + i * out_stride); });
}

// Copies 32-bit words: column i of out = row i of in, for kLanes rows of num_words words; strides are in words.
inline void transpose_words(const float* in, int64_t in_stride, float* out, int64_t out_stride, int64_t num_words) {
  int64_t word = 0;
  for (; word + kLanes <= num_words; word += kLanes) {
    transpose_square(in + word, in_stride, out + word * out_stride, out_stride);
  }
  for (; word < num_words; ++word) {
    for (int64_t i = 0; i < kLanes; ++i) {
      std::memcpy(out + word * out_stride + i, in + i * in_stride + word, sizeof(float));
    }
  }
}

// Takes the elements of words apart: row `word` of in, of n words, becomes rows of n floats, one for each element.
template <typename Page>
inline void expand_words(const float* in, float* __restrict out, int64_t stride, int64_t num_words, int64_t n) {
  constexpr int64_t kElements = sizeof(float) / sizeof(Page);
  for (int64_t word = 0; word < num_words; ++word) {
    const auto* const words = reinterpret_cast<const uint32_t*>(in + word * stride);
    for (int64_t element = 0; element < kElements; ++element) {
      float* const row = out + (word * kElements + element) * stride;
      for (int64_t i = 0; i < n; ++i) {
        row[i] = float_of_element<Page>(words[i] >> (8 * sizeof(Page) * element));
      }
    }
  }
}

// ---- Operands -------------------------------------------------------------------------------------------------

// Rows of elements, such as values where they stand on the pages.
template <typename Element>
struct Rows {
  const Element* const* rows;

  static constexpr int kPerRow = 1;

  Vec load(int64_t row, int /*element*/, int64_t column) const {
    if constexpr (std::is_same_v<Element, float>) {
      return Vec::loadu(rows[row] + column);
    } else {
      Vec vec;
      at::vec::load_to_float<Element>(rows[row] + column, vec);
      return vec;
    }
  }
};

// Rows of 32-bit words that each hold the elements of several rows, the first one lowest: transposed keys.
template <typename Element>
struct WordRows {
  const float* words;
  int64_t stride;

  static constexpr int kPerRow = sizeof(float) / sizeof(Element);

  Vec load(int64_t row, int element, int64_t column) const {
    const float* const place = words + row * stride + column;
    if constexpr (std::is_same_v<Element, float>) {
      return Vec::loadu(place);
    } else {
      static_assert(std::is_same_v<Element, c10::BFloat16>, "the upper half of a float32");
      using Words = at::vec::Vectorized<int32_t>;
      const Words word = Words::loadu(place);
      return at::vec::cast<float>(element == 0 ? word << Words(16) : word & Words(static_cast<int32_t>(0xffff0000)));
    }
  }
};

// Calls function(Page()) with the C++ type of a dtype.
template <typename Function>
inline void with_type(c10::ScalarType dtype, const Function& function) {
  switch (dtype) {
    case c10::ScalarType::Float: return function(float());
    case c10::ScalarType::BFloat16: return function(c10::BFloat16());
    case c10::ScalarType::Half: return function(c10::Half());
    case c10::ScalarType::Float8_e4m3fn: return function(c10::Float8_e4m3fn());
    case c10::ScalarType::Float8_e5m2: return function(c10::Float8_e5m2());
    default: return function(int8_t());
  }
}

}  // namespace CPU_CAPABILITY
}  // namespace torch_rpa
