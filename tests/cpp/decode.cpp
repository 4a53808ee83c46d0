// A C++ program without Python that calls the native kernel through PyTorch's dispatcher.
//
//     decode path/to/torch_rpa/_C.cpython-311-x86_64-linux-gnu.so
//
// One sequence decodes its third token: it writes the token's k and v to its page, and attends to the three keys there.

#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <dlfcn.h>

#include <cmath>
#include <cstdio>
#include <optional>

int main(int argc, char** argv) {
  // Loading the library registers the operators. Lazily: it has one function for Python, which is not here.
  if (argc != 2 || dlopen(argv[1], RTLD_LAZY | RTLD_LOCAL) == nullptr) {
    std::fprintf(stderr, "%s\n", argc == 2 ? dlerror() : "usage: decode LIBRARY");
    return 1;
  }
  using Update = at::Tensor(
      const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& kv_pages,
      const at::Tensor& kv_lens, const at::Tensor& page_indices, const at::Tensor& cu_q_lens,
      const at::Tensor& num_seqs, const std::optional<at::Tensor>& sinks, double sm_scale, double k_scale,
      double v_scale, bool causal, std::optional<int64_t> sliding_window, std::optional<double> soft_cap);
  const auto update = c10::Dispatcher::singleton()
                          .findSchemaOrThrow("rpa_native::ragged_paged_attention_update_", "")
                          .typed<Update>();

  const auto int32 = [](std::initializer_list<int> values) {
    return at::tensor(at::ArrayRef<int>(values), at::kInt);
  };
  at::Tensor kv_pages = at::zeros({2, 8, 2 * 1, 64});  // 2 pages of 8 tokens, one KV head: K0 V0
  kv_pages[1][0][1].fill_(1.0);                        // the values of the first two tokens, on page 1
  kv_pages[1][1][1].fill_(2.0);
  const at::Tensor q = at::ones({1, 4, 64}), k = at::zeros({1, 1, 64}), v = at::full({1, 1, 64}, 6.0);
  const at::Tensor out = update.call(
      q, k, v, kv_pages, int32({3}), int32({1}).view({1, 1}), int32({0, 1}), int32({1}), std::nullopt,
      /*sm_scale=*/0.125, /*k_scale=*/1.0, /*v_scale=*/1.0, /*causal=*/true, std::nullopt, std::nullopt);

  // All keys are zeros, so every weight is a third.
  const double first = out[0][0][0].item<double>(), written = kv_pages[1][2][1][0].item<double>();
  std::printf("out %.3f, written %.1f\n", first, written);
  return std::abs(first - 3.0) < 1e-5 && written == 6.0 ? 0 : 1;
}
