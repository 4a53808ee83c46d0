#pragma once

#include <ATen/core/Tensor.h>

namespace torch_rpa {

// Writes row i of k and v to slot slots[i] of kv_pages, in place; see write_pages.cpp. Checks everything first.
void write_kv_pages_(
    const at::Tensor& kv_pages,
    const at::Tensor& k,
    const at::Tensor& v,
    const at::Tensor& slots,
    double k_scale,
    double v_scale);

}  // namespace torch_rpa
