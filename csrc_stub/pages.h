// Keys and values from the pages of a KV cache, as float32.

#pragma once

#include "vectors.h"

#include "problem.h"

#include <c10/util/BFloat16.h>
#include <c10/util/Float8_e4m3fn.h>
#include <c10/util/Float8_e5m2.h>
#include <c10/util/Half.h>

#include <cstring>
#include <limits>

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

inline float to_float(float x) {
  return x;
}
inline float to_float(int8_t x) {
  return static_cast<float>(x);
}
inline float to_float(c10::BFloat16 x) {
  return float_of_bits(static_cast<uint32_t>(x.x) << 16);
}
inline float to_float(c10::Half x) {
  return small_float<5, 10, true>(x.x);
}
inline float to_float(c10::Float8_e5m2 x) {
  return small_float<5, 2, true>(x.x);
}
inline float to_float(c10::Float8_e4m3fn x) {
  return small_float<4, 3, false>(x.x);
}

template <typename Page>
inline void load_row(const Page* in, float* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    out[i] = to_float(in[i]);
  }
}

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
