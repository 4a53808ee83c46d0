#include "kernel.h"
#include "linear.h"

#include <ATen/Version.h>

#include <string>

namespace torch_rpa {

// Each defined by attention.cpp and linear.cpp, which setup.py compiles with that capability's flags.
namespace DEFAULT {
extern const Kernel kernel;
extern const LinearKernel linear_kernel;
}
#ifdef TORCH_RPA_X86
namespace AVX2 {
extern const Kernel kernel;
extern const LinearKernel linear_kernel;
}
namespace AVX512 {
extern const Kernel kernel;
extern const LinearKernel linear_kernel;
}
#else
namespace AVX2 = DEFAULT;
namespace AVX512 = DEFAULT;
#endif

namespace {

template <typename T>
const T& for_this_cpu(const T& by_default, const T& avx2, const T& avx512) {
  static const std::string capability = at::get_cpu_capability();
  return capability == "AVX512" ? avx512 : capability == "AVX2" ? avx2 : by_default;
}

}  // namespace

const Kernel& kernel_for_this_cpu() {
  return for_this_cpu(DEFAULT::kernel, AVX2::kernel, AVX512::kernel);
}

LinearKernel linear_kernel_for_this_cpu() {
  return for_this_cpu(DEFAULT::linear_kernel, AVX2::linear_kernel, AVX512::linear_kernel);
}

}  // namespace torch_rpa
