// One call of ragged paged attention as plain pointers and sizes: all that the schedule and the kernel know of it.

#pragma once

#include <c10/core/ScalarType.h>

#include <cstdint>

namespace torch_rpa {

struct Problem {
  // q and out: [num_tokens, num_q_heads, head_dim]; out and lse are contiguous, q has any strides but the last, 1.
  int64_t num_tokens;
  int64_t num_q_heads;
  int64_t head_dim;
  c10::ScalarType dtype;  // float32, bfloat16 or float16
  const void* q;
  int64_t q_token_stride;  // in elements, as all strides
  int64_t q_head_stride;
  void* out;
  float* lse;  // [num_tokens, num_q_heads]

  // kv_pages: [num_pages, page_size, 2 * num_kv_heads * head_dim], heads interleaved K0 V0 K1 V1 ...
  int64_t num_pages;
  int64_t page_size;
  int64_t num_kv_heads;
  c10::ScalarType page_dtype;  // dtype, float8_e4m3fn, float8_e5m2 or int8
  const void* kv_pages;
  int64_t page_stride;
  int64_t slot_stride;

  // Metadata: any values. Those out of range are brought into it, see active_sequences.
  int64_t max_num_seqs;
  int64_t pages_per_seq;
  const int32_t* kv_lens;       // [max_num_seqs]
  const int32_t* page_indices;  // [max_num_seqs, pages_per_seq]
  const int32_t* cu_q_lens;     // [max_num_seqs + 1]
  const int32_t* num_seqs;      // [1]

  // Options.
  const float* sinks;  // [num_q_heads], or null
  float score_scale;   // of the dot product of q and a stored key
  float value_scale;   // of the weighted sum of stored values
  bool causal;
  int64_t sliding_window;  // kNoWindow for none
  float soft_cap;          // 0 for none

  static constexpr int64_t kNoWindow = INT64_MAX / 4;  // sums of it and of positions do not overflow

  int64_t group() const {  // query heads that share a KV head
    return num_q_heads / num_kv_heads;
  }
};

}  // namespace torch_rpa
