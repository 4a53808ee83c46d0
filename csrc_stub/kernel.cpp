#include "kernel.h"

#include <ATen/Version.h>

#include <string>

namespace torch_rpa {

// Each defined by attention.cpp, which setup.py compiles with that capability's flags.
namespace DEFAULT {
extern const Kernel kernel;
}
#ifdef TORCH_RPA_X86
namespace AVX2 {
extern const Kernel kernel;
}
namespace AVX512 {
extern const Kernel kernel;
}
#endif

const Kernel& kernel_for_this_cpu() {
#ifdef TORCH_RPA_X86
  static const std::string capability = at::get_cpu_capability();
  if (capability == "AVX512") {
    return AVX512::kernel;
  }
  if (capability == "AVX2") {
    return AVX2::kernel;
  }
#endif
  return DEFAULT::kernel;
}

}  // namespace torch_rpa
