#include "run.h"

#include "kernel.h"
#include "schedule.h"

#include <ATen/Parallel.h>
#include <c10/core/CPUAllocator.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <limits>

namespace torch_rpa {
namespace {

c10::DataPtr allocate_floats(int64_t n) {
  return c10::GetCPUAllocator()->allocate(n * sizeof(float));
}

// Calls function(thread, i) for i = 0 .. count. Threads take the next i as they become free, since items of a ragged
// batch differ in length; which thread takes which changes no result.
template <typename Function>
void take_in_turns(int64_t count, const Function& function) {
  std::atomic<int64_t> next{0};
  at::parallel_for(0, std::min<int64_t>(at::get_num_threads(), count), 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread) {
      for (int64_t i = next++; i < count; i = next++) {
        function(thread, i);
      }
    }
  });
}

void clear_rows(const Problem& problem, int64_t first, int64_t end) {
  const int64_t row_bytes = problem.num_q_heads * problem.head_dim * c10::elementSize(problem.dtype);
  std::memset(static_cast<char*>(problem.out) + first * row_bytes, 0, (end - first) * row_bytes);
  std::fill(
      problem.lse + first * problem.num_q_heads, problem.lse + end * problem.num_q_heads,
      -std::numeric_limits<float>::infinity());
}

void run_wave(const Problem& problem, const Kernel& kernel, const Wave& wave, float* partials) {
  const int64_t scratch_floats = kernel.scratch_floats(problem);
  const int64_t num_threads = std::min<int64_t>(at::get_num_threads(), wave.items.size());
  const c10::DataPtr scratch = allocate_floats(num_threads * scratch_floats);
  float* const memory = static_cast<float*>(scratch.get());
  take_in_turns(wave.items.size(), [&](int64_t thread, int64_t i) {
    const WorkItem& item = wave.items[i];
    kernel.attend(problem, wave.tiles[item.tile], item.index, partials, memory + thread * scratch_floats);
  });
  if (wave.partial_floats == 0) {
    return;
  }
  take_in_turns(wave.tiles.size(), [&](int64_t, int64_t i) {
    if (wave.tiles[i].num_items > 1) {
      kernel.merge(problem, wave.tiles[i], partials);
    }
  });
}

}  // namespace

void run(const Problem& problem) {
  const std::vector<Sequence> sequences = active_sequences(problem);
  clear_rows(problem, 0, sequences.empty() ? problem.num_tokens : sequences.front().first_row);
  if (sequences.empty()) {
    return;
  }
  clear_rows(problem, sequences.back().first_row + sequences.back().q_len, problem.num_tokens);

  const std::vector<Wave> waves = plan(problem, sequences, at::get_num_threads());
  int64_t partial_floats = 0;
  for (const Wave& wave : waves) {
    partial_floats = std::max(partial_floats, wave.partial_floats);
  }
  const c10::DataPtr partials = allocate_floats(partial_floats);
  for (const Wave& wave : waves) {
    run_wave(problem, kernel_for_this_cpu(), wave, static_cast<float*>(partials.get()));
  }
}

}  // namespace torch_rpa
