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

// One row of logits, and how it is read: x = factor * z, or with a softcap outer * tanh(factor * z).
struct LogitRow {
  const char* logits;
  int64_t dtype, item_size, classes;
  bool capped;
  float factor, outer;

  LogitRow(const Tensor<2>& tensor, int64_t row, double scale, double softcap, double temperature)
      : dtype(tensor.dtype),
        item_size(tensor.dtype == kFloat32 ? 4 : 2),
        classes(tensor.sizes[1]),
        capped(softcap != 0),
        factor(float(scale / (capped ? softcap : temperature))),
        outer(float(softcap / temperature)) {
    logits = static_cast<const char*>(tensor.data) + row * tensor.strides[0] * item_size;
  }

  int length(int64_t start) const { return block_length(classes, start); }
  // What to fetch while the block at `start` is summed.
  const char* after(int64_t start) const { return logits + (start + kAhead) * item_size; }
};

// Reads the block at `start` as x, padded with -inf to whole steps, and returns the largest of each lane.
template <bool capped>
static F32 read_logits(const LogitRow& row, int64_t start, float* x) {
  const float factor = row.factor, outer = row.outer;
  const auto transform = [=](F32 value) { return capped ? tanh(value * factor) * outer : value * factor; };
  F32 largest = {};
  with_dtype(row.dtype, [&](auto* typed) {
    const auto* from = reinterpret_cast<decltype(typed)>(const_cast<char*>(row.logits)) + start;
    largest = read_block(from, row.length(start), x, transform);
  });
  return largest;
}

static void write_block(const float* x, int n, const Tensor<2>& out, int64_t row, int64_t start) {
  with_dtype(out.dtype, [&](auto* typed) {
    auto* to = static_cast<decltype(typed)>(out.data) + row * out.strides[0] + start;
    int i = 0;
    for (; i + kLanes <= n; i += kLanes) store(to + i, load(x + i));
    if (i < n) store_first(to + i, load(x + i), n - i);
  });
}

[[maybe_unused]] static void fill_row(const Tensor<2>& out, int64_t row, float value) {
  alignas(64) float block[kBlock];
  for (int i = 0; i < kBlock; ++i) block[i] = value;
  for (int64_t start = 0; start < out.sizes[1]; start += kBlock) {
    write_block(block, block_length(out.sizes[1], start), out, row, start);
  }
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
