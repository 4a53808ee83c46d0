// rpa_native::ragged_paged_attention and rpa_native::ragged_paged_attention_update_ for CPU tensors: checks, and tensors
// to pointers. What is computed stands in schedule.cpp (which keys and rows) and attention.cpp (one tile of them).

#include "run.h"
#include "schedule.h"
#include "write_pages.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <tuple>

namespace torch_rpa {
namespace {

// ---- Checks: memory safety only; torch_rpa/validation.py says more, and says it first --------------------------

bool is_float8(c10::ScalarType dtype) {
  return dtype == at::kFloat8_e4m3fn || dtype == at::kFloat8_e5m2;
}

void check_q_and_pages(const at::Tensor& q, const at::Tensor& kv_pages) {
  const auto dtype = q.scalar_type(), page_dtype = kv_pages.scalar_type();
  TORCH_CHECK_TYPE(
      dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf,
      "q must be float32, bfloat16 or float16, got ", dtype);
  TORCH_CHECK_TYPE(
      page_dtype == dtype || page_dtype == at::kChar || is_float8(page_dtype), "kv_pages must have q's dtype ", dtype,
      ", or be float8_e4m3fn, float8_e5m2 or int8, got ", page_dtype);
  TORCH_CHECK_VALUE(q.dim() == 3, "q must be [num_tokens, num_q_heads, head_dim], got ", q.sizes());
  const int64_t head_dim = q.size(2);
  TORCH_CHECK_VALUE(
      head_dim % 8 == 0 && 0 < head_dim && head_dim <= 256, "head_dim must be a multiple of 8 up to 256, got ", head_dim);
  const bool by_head = kv_pages.dim() == 4 && kv_pages.size(2) % 2 == 0 && kv_pages.size(3) == head_dim;
  const bool flat = kv_pages.dim() == 3 && kv_pages.size(2) % (2 * head_dim) == 0;
  TORCH_CHECK_VALUE(
      (by_head || flat) && kv_pages.numel() > 0,
      "kv_pages must be [num_pages, page_size, 2 * num_kv_heads, ", head_dim,
      "] or [num_pages, page_size, 2 * num_kv_heads * ", head_dim, "], and not empty, got ", kv_pages.sizes());
}

void check_metadata(
    const at::Tensor& kv_lens, const at::Tensor& page_indices, const at::Tensor& cu_q_lens,
    const at::Tensor& num_seqs) {
  for (const at::Tensor* tensor : {&kv_lens, &page_indices, &cu_q_lens, &num_seqs}) {
    TORCH_CHECK_TYPE(tensor->scalar_type() == at::kInt, "metadata must be int32, got ", tensor->scalar_type());
  }
  TORCH_CHECK_VALUE(
      page_indices.dim() == 2, "page_indices must be [max_num_seqs, pages_per_seq], got ", page_indices.sizes());
  const int64_t max_num_seqs = page_indices.size(0);
  TORCH_CHECK_VALUE(
      kv_lens.sizes() == at::IntArrayRef({max_num_seqs}) && cu_q_lens.sizes() == at::IntArrayRef({max_num_seqs + 1}) &&
          num_seqs.sizes() == at::IntArrayRef({1}),
      "kv_lens, cu_q_lens and num_seqs must be [", max_num_seqs, "], [", max_num_seqs + 1,
      "] and [1] to go with page_indices ", page_indices.sizes(), ", got ", kv_lens.sizes(), ", ", cu_q_lens.sizes(),
      " and ", num_seqs.sizes());
}

// ---- From tensors to a problem --------------------------------------------------------------------------------

// The arguments of a call, contiguous where the kernel needs it; holds what the problem points to.
struct Call {
  at::Tensor q, kv_pages, kv_lens, page_indices, cu_q_lens, num_seqs, sinks, out, lse;
  Problem problem;
};

// Whether a token's heads follow each other, and tokens are whole 32-bit words apart.
bool has_contiguous_tokens(const at::Tensor& kv_pages) {
  return kv_pages.stride(-1) == 1 && (kv_pages.dim() == 3 || kv_pages.stride(2) == kv_pages.size(3)) &&
      kv_pages.stride(1) * kv_pages.element_size() % sizeof(float) == 0;
}

void set_tensors(Call& call) {
  call.q = call.q.stride(2) == 1 ? call.q : call.q.contiguous();
  call.kv_pages = has_contiguous_tokens(call.kv_pages) ? call.kv_pages : call.kv_pages.contiguous();
  call.kv_lens = call.kv_lens.contiguous();
  call.page_indices = call.page_indices.contiguous();
  call.cu_q_lens = call.cu_q_lens.contiguous();
  call.out = at::empty(call.q.sizes(), call.q.options().memory_format(at::MemoryFormat::Contiguous));
  call.lse = at::empty({call.q.size(0), call.q.size(1)}, call.q.options().dtype(at::kFloat));

  Problem& problem = call.problem;
  problem.num_tokens = call.q.size(0);
  problem.num_q_heads = call.q.size(1);
  problem.head_dim = call.q.size(2);
  problem.dtype = call.q.scalar_type();
  problem.q = call.q.const_data_ptr();
  problem.q_token_stride = call.q.stride(0);
  problem.q_head_stride = call.q.stride(1);
  problem.out = call.out.mutable_data_ptr();
  problem.lse = call.lse.mutable_data_ptr<float>();
  problem.num_pages = call.kv_pages.size(0);
  problem.page_size = call.kv_pages.size(1);
  problem.num_kv_heads = call.kv_pages[0][0].numel() / (2 * problem.head_dim);
  problem.page_dtype = call.kv_pages.scalar_type();
  problem.kv_pages = call.kv_pages.const_data_ptr();
  problem.page_stride = call.kv_pages.stride(0);
  problem.slot_stride = call.kv_pages.stride(1);
  problem.max_num_seqs = call.page_indices.size(0);
  problem.pages_per_seq = call.page_indices.size(1);
  problem.kv_lens = call.kv_lens.const_data_ptr<int32_t>();
  problem.page_indices = call.page_indices.const_data_ptr<int32_t>();
  problem.cu_q_lens = call.cu_q_lens.const_data_ptr<int32_t>();
  problem.num_seqs = call.num_seqs.const_data_ptr<int32_t>();
  TORCH_CHECK_VALUE(
      problem.num_q_heads > 0 && problem.num_q_heads % problem.num_kv_heads == 0,
      "num_q_heads must be a multiple of num_kv_heads, got ", problem.num_q_heads, " and ", problem.num_kv_heads);
}

void set_options(
    Call& call, const std::optional<at::Tensor>& sinks, double score_scale, double value_scale, bool causal,
    std::optional<int64_t> sliding_window, std::optional<double> soft_cap) {
  Problem& problem = call.problem;
  problem.sinks = nullptr;
  if (sinks.has_value()) {
    TORCH_CHECK_VALUE(
        sinks->sizes() == at::IntArrayRef({problem.num_q_heads}), "sinks must be [", problem.num_q_heads, "], got ",
        sinks->sizes());
    call.sinks = sinks->to(at::kFloat).contiguous();
    problem.sinks = call.sinks.const_data_ptr<float>();
  }
  problem.score_scale = static_cast<float>(score_scale);
  problem.value_scale = static_cast<float>(value_scale);
  problem.causal = causal;
  const int64_t window = sliding_window.value_or(Problem::kNoWindow);
  TORCH_CHECK_VALUE(window > 0, "sliding_window must be at least 1, got ", window);
  problem.sliding_window = std::min(window, Problem::kNoWindow);
  problem.soft_cap = static_cast<float>(soft_cap.value_or(0.0));
}

Call make_call(
    const at::Tensor& q, const at::Tensor& kv_pages, const at::Tensor& kv_lens, const at::Tensor& page_indices,
    const at::Tensor& cu_q_lens, const at::Tensor& num_seqs, const std::optional<at::Tensor>& sinks,
    double score_scale, double value_scale, bool causal, std::optional<int64_t> sliding_window,
    std::optional<double> soft_cap) {
  check_q_and_pages(q, kv_pages);
  check_metadata(kv_lens, page_indices, cu_q_lens, num_seqs);
  Call call{q, kv_pages, kv_lens, page_indices, cu_q_lens, num_seqs, {}, {}, {}, {}};
  set_tensors(call);
  set_options(call, sinks, score_scale, value_scale, causal, sliding_window, soft_cap);
  return call;
}

// ---- The operators --------------------------------------------------------------------------------------------

std::tuple<at::Tensor, at::Tensor> ragged_paged_attention(
    const at::Tensor& q, const at::Tensor& kv_pages, const at::Tensor& kv_lens, const at::Tensor& page_indices,
    const at::Tensor& cu_q_lens, const at::Tensor& num_seqs, const std::optional<at::Tensor>& sinks,
    double score_scale, double value_scale, bool causal, std::optional<int64_t> sliding_window,
    std::optional<double> soft_cap) {
  Call call = make_call(
      q, kv_pages, kv_lens, page_indices, cu_q_lens, num_seqs, sinks, score_scale, value_scale, causal, sliding_window,
      soft_cap);
  run(call.problem);
  return {call.out, call.lse};
}

// The slot that each row of the batch is written to; -1 where a row has none.
at::Tensor token_slots(const Problem& problem) {
  at::Tensor slots = at::empty({problem.num_tokens}, at::kLong).fill_(-1);
  int64_t* const slot = slots.mutable_data_ptr<int64_t>();
  for (const Sequence& sequence : active_sequences(problem)) {
    for (int64_t i = 0; i < sequence.q_len; ++i) {
      const int64_t position = sequence.kv_len - sequence.q_len + i;
      const int64_t page = position < 0 ? -1 : sequence.pages[position / problem.page_size];
      if (0 <= page && page < problem.num_pages) {
        slot[sequence.first_row + i] = page * problem.page_size + position % problem.page_size;
      }
    }
  }
  return slots;
}

at::Tensor ragged_paged_attention_update_(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& kv_pages,
    const at::Tensor& kv_lens, const at::Tensor& page_indices, const at::Tensor& cu_q_lens,
    const at::Tensor& num_seqs, const std::optional<at::Tensor>& sinks, double sm_scale, double k_scale,
    double v_scale, bool causal, std::optional<int64_t> sliding_window, std::optional<double> soft_cap) {
  Call call = make_call(
      q, kv_pages, kv_lens, page_indices, cu_q_lens, num_seqs, sinks, sm_scale * k_scale, v_scale, causal,
      sliding_window, soft_cap);
  write_kv_pages_(kv_pages, k, v, token_slots(call.problem), k_scale, v_scale);
  run(call.problem);
  return call.out;
}

}  // namespace
}  // namespace torch_rpa

TORCH_LIBRARY_IMPL(rpa_native, CPU, m) {
  m.impl("ragged_paged_attention", torch_rpa::ragged_paged_attention);
  m.impl("ragged_paged_attention_update_", torch_rpa::ragged_paged_attention_update_);
}
