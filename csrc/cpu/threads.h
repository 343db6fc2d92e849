// When a loop is worth more than one thread.
#pragma once

#include <stdint.h>

#include "../export.h"

namespace alignfast::ALIGNFAST_ISA {

// `threads` for a loop over that many numbers, or 1 below half a million (0.3 ms of work): on a busy machine a parallel
// region costs 4 to 8 ms. Nothing in between: OpenMP ends and starts threads when their number changes.
static inline int threads_for(int64_t numbers, int64_t threads) { return numbers < (1 << 19) ? 1 : int(threads); }

}  // namespace alignfast::ALIGNFAST_ISA
