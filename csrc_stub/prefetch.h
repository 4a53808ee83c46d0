// Asks for the next block of keys while the present one is computed with.
//
// Decode is bound by memory. Left alone, a core waits for a block, then computes, then waits for the next: the two take
// turns. Asking for a few cache lines at each step of the computation keeps the memory busy all the time.

#pragma once

#include "vectors.h"

namespace torch_rpa {
namespace CPU_CAPABILITY {

class Prefetch {
 public:
  // Bytes first_byte .. end_byte of each token, in no more than num_steps steps.
  Prefetch(const char* const* tokens, int64_t num_tokens, int64_t first_byte, int64_t end_byte, int64_t num_steps)
      : tokens_(tokens),
        end_(tokens + num_tokens),
        byte_(first_byte),
        first_byte_(first_byte),
        end_byte_(end_byte),
        bytes_per_step_(round_up((end_byte - first_byte) * num_tokens / num_steps + 1, kLineBytes)) {}

  void advance(int64_t steps) {
    for (; steps > 0 && tokens_ < end_; --steps) {
      for (int64_t byte = byte_; byte < byte_ + bytes_per_step_; byte += kLineBytes) {  // past the end is no error
        __builtin_prefetch(*tokens_ + byte, /*for writing=*/0, /*locality: second-level cache=*/2);
      }
      byte_ += bytes_per_step_;
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
  int64_t byte_, first_byte_, end_byte_, bytes_per_step_;
};

}  // namespace CPU_CAPABILITY
}  // namespace torch_rpa
