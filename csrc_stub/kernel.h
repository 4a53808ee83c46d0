// The part that is compiled once for each kind of vector unit, and the choice among the results.

#pragma once

#include "problem.h"
#include "schedule.h"

namespace torch_rpa {

struct Kernel {
  // Floats of scratch memory that attend needs, whatever the item.
  int64_t (*scratch_floats)(const Problem&);
  // Attention of a tile's rows over one item's keys: into out and lse, or, if the tile has several items, into its
  // place in partials.
  void (*attend)(const Problem&, const Tile&, int64_t item, float* partials, float* scratch);
  // Merges the partial results of a tile's items, in order, into out and lse.
  void (*merge)(const Problem&, const Tile&, float* partials);
};

// The kernel for this processor, by PyTorch's own choice (environment variable ATEN_CPU_CAPABILITY included).
const Kernel& kernel_for_this_cpu();

}  // namespace torch_rpa
