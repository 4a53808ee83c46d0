// Keys and values from the pages of a KV cache, as float32, and as operands of the products (scores.h, matmul.h).

#pragma once

#include "vectors.h"

#include "prefetch.h"
#include "problem.h"

#include <ATen/cpu/vec/functional_bfloat16.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Float8_e4m3fn.h>
#include <c10/util/Float8_e5m2.h>
#include <c10/util/Half.h>

#include <algorithm>
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

// n elements as Element: as they are, or as float32; then zeros up to padded_n.
template <typename Page, typename Element>
inline void copy_row(const Page* in, Element* out, int64_t n, int64_t padded_n) {
  if constexpr (std::is_same_v<Page, Element>) {
    std::memcpy(out, in, n * sizeof(Page));
  } else {
    load_row(in, out, n);
  }
  std::fill(out + n, out + padded_n, Element(0));
}

// ---- Operands of the products ---------------------------------------------------------------------------------

// kLanes elements as float32, those from a column of a row on.
template <typename Element>
inline Vec load_vec(const char* row, int64_t column) {
  const Element* const in = reinterpret_cast<const Element*>(row) + column;
  if constexpr (std::is_same_v<Element, float>) {
    return Vec::loadu(in);
  } else {
    Vec vec;
    at::vec::load_to_float<Element>(in, vec);
    return vec;
  }
}

// The keys or the values of one head in a block of tokens: row i begins at tokens[i] + first_byte.
struct HeadRows {
  const char* const* tokens;
  int64_t first_byte;

  const char* row(int64_t i) const { return tokens[i] + first_byte; }
};

// Rows of elements, such as keys or values where they stand on the pages.
template <typename Element>
struct Rows {
  HeadRows rows;

  Vec load(int64_t row, int64_t column) const { return load_vec<Element>(rows.row(row), column); }
};

// Rows that come with requests for the next head's, which stand on pages as Page.
template <typename Element, typename Page>
struct AskingRows {
  HeadRows rows;
  HeadRows next;

  Vec load(int64_t row, int64_t column) const {
    ask_for(next.row(row) + column * sizeof(Page));  // some lines twice: a branch would cost more
    return load_vec<Element>(rows.row(row), column);
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
