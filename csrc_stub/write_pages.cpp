// rpa_native::write_kv_pages_ for CPU tensors: puts new keys and values into the pages of a KV cache, in place.
//
// A slot is one token's place in the cache. Both forms of the pages are contiguous, so a slot is one row of memory:
//
//   slot 0   | K0 | V0 | K1 | V1 | ... |      every | | holds head_dim elements,
//   slot 1   | K0 | V0 | K1 | V1 | ... |      2 * num_kv_heads of them make a row
//     ...                                     slot = page * page_size + position in the page
//
// Token i's k goes to the K heads and its v to the V heads of row slots[i]. A negative slot marks a padding token,
// whose k and v may hold anything, NaN included, and are not read.

#include "write_pages.h"

#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

namespace torch_rpa {
namespace {

// Fewer elements than this take less time than waking another thread (PyTorch's own elementwise grain).
constexpr int64_t kElementsPerTask = 32768;

// ---- One element ----------------------------------------------------------------------------------------------

template <typename Page>
constexpr bool is_float8 = std::is_same_v<Page, at::Float8_e4m3fn> || std::is_same_v<Page, at::Float8_e5m2>;

// The page element nearest to x, ties to even. Quantised kinds are clamped to their finite range first: a plain cast
// would wrap int8, and would make NaN or infinity of a large value in fp8. NaN stays NaN, and is 0 in int8.
template <typename Page>
inline Page to_page_element(float x) {
  if constexpr (std::is_same_v<Page, int8_t>) {
    if (std::isnan(x)) {
      return 0;
    }
    // The bounds are whole numbers, so clamping before rounding gives what clamping after it would.
    return static_cast<int8_t>(std::lrint(std::clamp(x, -128.0f, 127.0f)));
  } else if constexpr (is_float8<Page>) {
    const float largest = static_cast<float>(std::numeric_limits<Page>::max());
    return static_cast<Page>(std::clamp(x, -largest, largest));  // clamp hands NaN through
  } else {
    return static_cast<Page>(x);
  }
}

// ---- One head of one token ------------------------------------------------------------------------------------

template <typename In, typename Page>
inline void write_head(const In* in, Page* out, int64_t head_dim, float scale) {
  if constexpr (std::is_same_v<In, Page>) {
    if (scale == 1.0f) {
      std::memcpy(out, in, head_dim * sizeof(Page));
      return;
    }
  }
  for (int64_t d = 0; d < head_dim; ++d) {
    out[d] = to_page_element<Page>(static_cast<float>(in[d]) / scale);
  }
}

// ---- All tokens -----------------------------------------------------------------------------------------------

template <typename In, typename Page>
void write_tokens(
    const at::Tensor& kv_pages,
    const at::Tensor& k,
    const at::Tensor& v,
    const at::Tensor& slots,
    float k_scale,
    float v_scale) {
  const int64_t num_tokens = k.size(0), num_kv_heads = k.size(1), head_dim = k.size(2);
  const int64_t slot_elements = 2 * num_kv_heads * head_dim;
  const int64_t tokens_per_task = std::max<int64_t>(1, kElementsPerTask / std::max<int64_t>(1, slot_elements));
  const In* k_data = k.const_data_ptr<In>();
  const In* v_data = v.const_data_ptr<In>();
  const int64_t* slot_data = slots.const_data_ptr<int64_t>();
  Page* pages = kv_pages.mutable_data_ptr<Page>();

  // No two tokens share a slot, so tasks never write to the same memory.
  at::parallel_for(0, num_tokens, tokens_per_task, [&](int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; ++token) {
      if (slot_data[token] < 0) {
        continue;
      }
      Page* out = pages + slot_data[token] * slot_elements;
      for (int64_t head = 0; head < num_kv_heads; ++head, out += 2 * head_dim) {
        write_head(k_data + token * k.stride(0) + head * k.stride(1), out, head_dim, k_scale);
        write_head(v_data + token * v.stride(0) + head * v.stride(1), out + head_dim, head_dim, v_scale);
      }
    }
  });
}

// ---- Choosing the instance: In is the dtype of k and v, Page that of the pages --------------------------------

template <typename In>
void write_tokens_from(
    const at::Tensor& kv_pages,
    const at::Tensor& k,
    const at::Tensor& v,
    const at::Tensor& slots,
    float k_scale,
    float v_scale) {
  switch (kv_pages.scalar_type()) {
    case at::kChar:
      return write_tokens<In, int8_t>(kv_pages, k, v, slots, k_scale, v_scale);
    case at::kFloat8_e4m3fn:
      return write_tokens<In, at::Float8_e4m3fn>(kv_pages, k, v, slots, k_scale, v_scale);
    case at::kFloat8_e5m2:
      return write_tokens<In, at::Float8_e5m2>(kv_pages, k, v, slots, k_scale, v_scale);
    default:  // check_dtypes lets only k's own dtype come here
      return write_tokens<In, In>(kv_pages, k, v, slots, k_scale, v_scale);
  }
}

// ---- Checks: all of them before the first byte is written -----------------------------------------------------

void check_dtypes(const at::Tensor& kv_pages, const at::Tensor& k, const at::Tensor& v, const at::Tensor& slots) {
  const auto in = k.scalar_type();
  const auto page = kv_pages.scalar_type();
  TORCH_CHECK_TYPE(
      in == at::kFloat || in == at::kBFloat16 || in == at::kHalf,
      "k must be float32, bfloat16 or float16, got ", in);
  TORCH_CHECK_TYPE(v.scalar_type() == in, "v must have k's dtype ", in, ", got ", v.scalar_type());
  TORCH_CHECK_TYPE(
      page == in || page == at::kChar || page == at::kFloat8_e4m3fn || page == at::kFloat8_e5m2,
      "kv_pages must have k's dtype ", in, ", or be float8_e4m3fn, float8_e5m2 or int8, got ", page);
  TORCH_CHECK_TYPE(slots.scalar_type() == at::kLong, "slots must be int64, got ", slots.scalar_type());
}

void check_shapes(const at::Tensor& kv_pages, const at::Tensor& k, const at::Tensor& v, const at::Tensor& slots) {
  TORCH_CHECK_VALUE(k.dim() == 3, "k must be [num_tokens, num_kv_heads, head_dim], got ", k.sizes());
  TORCH_CHECK_VALUE(v.sizes() == k.sizes(), "v must have k's shape ", k.sizes(), ", got ", v.sizes());
  TORCH_CHECK_VALUE(
      slots.dim() == 1 && slots.size(0) == k.size(0), "slots must be [", k.size(0), "], got ", slots.sizes());

  const int64_t num_heads = 2 * k.size(1), head_dim = k.size(2);
  const bool by_head = kv_pages.dim() == 4 && kv_pages.size(2) == num_heads && kv_pages.size(3) == head_dim;
  const bool flat = kv_pages.dim() == 3 && kv_pages.size(2) == num_heads * head_dim;
  TORCH_CHECK_VALUE(
      by_head || flat,
      "kv_pages must be [num_pages, page_size, ", num_heads, ", ", head_dim, "] or [num_pages, page_size, ",
      num_heads * head_dim, "] for k of ", k.sizes(), ", got ", kv_pages.sizes());
  TORCH_CHECK_VALUE(kv_pages.is_contiguous(), "kv_pages must be contiguous, got strides ", kv_pages.strides());
}

void check_slots(const at::Tensor& slots, int64_t num_slots) {
  const int64_t* slot_data = slots.const_data_ptr<int64_t>();
  for (int64_t token = 0; token < slots.numel(); ++token) {
    TORCH_CHECK_INDEX(
        slot_data[token] < num_slots,
        "slots[", token, "] is ", slot_data[token], ", but kv_pages has ", num_slots, " slots");
  }
}

// Views of a larger projection come with any strides between tokens and heads; only a head must be contiguous.
at::Tensor with_contiguous_heads(const at::Tensor& x) {
  return x.size(2) <= 1 || x.stride(2) == 1 ? x : x.contiguous();
}

}  // namespace

// ---- The operator ---------------------------------------------------------------------------------------------

void write_kv_pages_(
    const at::Tensor& kv_pages,
    const at::Tensor& k,
    const at::Tensor& v,
    const at::Tensor& slots,
    double k_scale,
    double v_scale) {
  check_dtypes(kv_pages, k, v, slots);
  check_shapes(kv_pages, k, v, slots);
  const at::Tensor slots_in_order = slots.contiguous();
  check_slots(slots_in_order, kv_pages.size(0) * kv_pages.size(1));

  const auto write = k.scalar_type() == at::kFloat ? write_tokens_from<float>
      : k.scalar_type() == at::kBFloat16           ? write_tokens_from<at::BFloat16>
                                                   : write_tokens_from<at::Half>;
  write(
      kv_pages,
      with_contiguous_heads(k),
      with_contiguous_heads(v),
      slots_in_order,
      static_cast<float>(k_scale),
      static_cast<float>(v_scale));
}

}  // namespace torch_rpa

TORCH_LIBRARY_IMPL(rpa_native, CPU, m) {
  m.impl("write_kv_pages_", torch_rpa::write_kv_pages_);
}
