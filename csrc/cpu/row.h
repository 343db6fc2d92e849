// Rows of logits in blocks that stay in the first cache: read, transformed, shared out among threads.
#pragma once

#include "simd.h"
#include "threads.h"

namespace alignfast::ALIGNFAST_ISA {

constexpr int kBlock = 512;        // 2 KiB: longer blocks made token_logps' backward pass slower by 15 to 40 %
constexpr int kStep = 2 * kLanes;  // two vectors at once, so that one's additions hide the other's latency
// What to fetch while a block is summed: a block takes about as long as memory does to answer, so one ahead comes late
// (a third more time) and four are in the cache in time.
constexpr int kAhead = 4 * kBlock;

ALIGNFAST_INLINE int block_length(int64_t classes, int64_t start) {
  return classes - start < kBlock ? int(classes - start) : kBlock;
}

// Reads n numbers as `transform` makes them, pads them with -inf to whole steps, returns the largest of each lane.
template <typename T, typename Transform>
ALIGNFAST_INLINE F32 read_block(const T* from, int n, float* x, Transform transform) {
  F32 largest = splat(-INFINITY);
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const F32 value = transform(load(from + i));
    store(x + i, value);
    largest = max(value, largest);
  }
  if (i < n) {
    const F32 value = transform(load_first(from + i, n - i, 0.0f));
    const F32 padded = lane_numbers() < n - i ? value : splat(-INFINITY);
    store(x + i, padded);
    largest = max(padded, largest);
    i += kLanes;
  }
  if (i % kStep) store(x + i, splat(-INFINITY));
  return largest;
}

ALIGNFAST_INLINE double exact_sum(F32 x) {
  double total = 0;
  for (int i = 0; i < kLanes; ++i) total += x[i];
  return total;
}

// log(1 + e^x)
ALIGNFAST_INLINE double softplus(double x) { return x > 0 ? x + ::log1p(::exp(-x)) : ::log1p(::exp(x)); }

// body(row) for every row, on as many threads as the work is worth.
template <typename Body>
static void for_rows(int64_t rows, int64_t classes, int64_t threads, Body body) {
  const int workers = threads_for(rows * classes, threads);
  if (workers == 1) {
    for (int64_t row = 0; row < rows; ++row) body(row);
    return;
  }
  const int64_t at_once = 1 + (1 << 15) / (classes + 1);
#pragma omp parallel for num_threads(workers) schedule(dynamic, at_once)
  for (int64_t row = 0; row < rows; ++row) body(row);
}

}  // namespace alignfast::ALIGNFAST_ISA
