// Runs one call on the threads that PyTorch has (at::get_num_threads).

#pragma once

#include "problem.h"

namespace torch_rpa {

// Writes every row of out and lse; rows of no sequence become zeros and -inf.
void run(const Problem& problem);

}  // namespace torch_rpa
