// out = input weight^T + bias in float32, with the same bits for a row whatever other rows there are.

#pragma once

#include <cstdint>

namespace torch_rpa {

struct Linear {
  int64_t num_rows, depth, num_columns;
  const float* input;   // [num_rows, depth], contiguous
  const float* weight;  // [num_columns, depth]
  int64_t weight_stride;
  const float* bias;  // [num_columns], or null
  float* out;         // [num_rows, num_columns], contiguous
};

// Columns first .. end of out. Threads may take other columns of the same product.
using LinearKernel = void (*)(const Linear&, int64_t first, int64_t end);

// The kernel for this processor, chosen as kernel_for_this_cpu (kernel.h) does.
LinearKernel linear_kernel_for_this_cpu();

}  // namespace torch_rpa
