// rpa_native::linear for CPU tensors: checks, and tensors to pointers.

#include "linear.h"

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <optional>

namespace torch_rpa {
namespace {

// Columns that one thread takes at least: fewer are not worth its waking.
constexpr int64_t kMinColumns = 32;

void check(const at::Tensor& input, const at::Tensor& weight, const std::optional<at::Tensor>& bias) {
  for (const at::Tensor& tensor : {input, weight, bias.value_or(weight)}) {
    TORCH_CHECK_TYPE(
        tensor.scalar_type() == at::kFloat, "input, weight and bias must be float32, got ", tensor.scalar_type());
  }
  TORCH_CHECK_VALUE(
      input.dim() >= 1 && weight.dim() == 2 && input.size(-1) == weight.size(1),
      "input and weight must be [..., depth] and [num_columns, depth], got ", input.sizes(), " and ", weight.sizes());
  TORCH_CHECK_VALUE(
      !bias.has_value() || bias->sizes() == at::IntArrayRef({weight.size(0)}), "bias must be [", weight.size(0),
      "], got ", bias->sizes());
}

at::Tensor linear(const at::Tensor& input, const at::Tensor& weight, const std::optional<at::Tensor>& bias) {
  check(input, weight, bias);
  const at::Tensor rows = input.contiguous();
  const at::Tensor columns = weight.stride(1) == 1 ? weight : weight.contiguous();
  const at::Tensor first = bias.has_value() ? bias->contiguous() : at::Tensor();
  at::DimVector out_sizes(input.sizes());
  out_sizes.back() = weight.size(0);
  const at::Tensor out = at::empty(out_sizes, rows.options());

  Linear problem;
  problem.num_rows = c10::multiply_integers(input.sizes().slice(0, input.dim() - 1));
  problem.depth = weight.size(1);
  problem.num_columns = weight.size(0);
  problem.input = rows.const_data_ptr<float>();
  problem.weight = columns.const_data_ptr<float>();
  problem.weight_stride = columns.stride(0);
  problem.bias = first.defined() ? first.const_data_ptr<float>() : nullptr;
  problem.out = out.mutable_data_ptr<float>();
  const LinearKernel kernel = linear_kernel_for_this_cpu();
  at::parallel_for(0, problem.num_columns, kMinColumns, [&](int64_t begin, int64_t end) {
    kernel(problem, begin, end);
  });
  return out;
}

}  // namespace
}  // namespace torch_rpa

TORCH_LIBRARY_IMPL(rpa_native, CPU, m) {
  m.impl("linear", torch_rpa::linear);
}
