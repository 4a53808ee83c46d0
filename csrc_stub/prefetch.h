// Asks for the next block of keys while the present one is computed with.
//
// Decode is bound by memory. Left alone, a core waits for a block, then computes, then waits for the next: the two take
// turns. Asking for a few cache lines at each step of the computation keeps the memory busy all the time.

#pragma once

#include <cstdint>

namespace torch_rpa {
namespace CPU_CAPABILITY {

class Prefetch {
 public:
  // Bytes first_byte .. end_byte of each token, in steps_per_token steps.
  Prefetch(const char* const* tokens, int64_t num_tokens, int64_t first_byte, int64_t end_byte, int64_t steps_per_token)
      : tokens_(tokens),
        end_(tokens + num_tokens),
        byte_(first_byte),
        first_byte_(first_byte),
        end_byte_(end_byte),
        lines_per_step_((end_byte - first_byte) / (kLineBytes * steps_per_token) + 1) {}

  void advance(int64_t steps) {
    for (int64_t line = 0; line < steps * lines_per_step_ && tokens_ < end_; ++line) {
      __builtin_prefetch(*tokens_ + byte_, /*for writing=*/0, /*locality: second-level cache=*/2);
      byte_ += kLineBytes;
      if (byte_ >= end_byte_) {
        byte_ = first_byte_;
        ++tokens_;
      }
    }
  }

 private:
  static constexpr int64_t kLineBytes = 64;

  const char* const* tokens_;
  const char* const* end_;
  int64_t byte_, first_byte_, end_byte_, lines_per_step_;
};

}  // namespace CPU_CAPABILITY
}  // namespace torch_rpa
