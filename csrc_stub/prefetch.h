// Asks for the memory that is needed next while the present one is computed with.
//
// Left alone, a core waits for a block of keys, then computes, then waits for the next. So each line that a product
// reads comes with a request for the same line of the next head: the requests are spread evenly, stay few enough for
// the core's line buffers, and follow the order of the memory, in which hardware prefetchers then run ahead.

#pragma once

#include "vectors.h"

namespace torch_rpa {
namespace CPU_CAPABILITY {

// Asks for the cache line of an address. Any address is allowed.
inline void ask_for(const char* address) {
  __builtin_prefetch(address, /*for writing=*/0, /*locality: second-level cache=*/2);
}

// Asks for all lines of a row.
inline void ask_for_row(const char* row, int64_t num_bytes) {
  constexpr int64_t kLineBytes = 64;
  for (int64_t byte = 0; byte < num_bytes; byte += kLineBytes) {
    ask_for(row + byte);
  }
}

}  // namespace CPU_CAPABILITY
}  // namespace torch_rpa
