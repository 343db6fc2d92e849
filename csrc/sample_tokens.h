// What csrc/cpu/ and csrc/cuda/ share of sample_tokens: the random number of a row, and thresholds on its logits.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#ifdef __CUDACC__
#define ALIGNFAST_SAMPLE static __host__ __device__ __forceinline__
#else
#define ALIGNFAST_SAMPLE static inline __attribute__((always_inline))  // no copy for the linker to share: export.h
#endif

namespace alignfast {

struct SampleOptions {
  int64_t seed;
  double temperature;
  int64_t top_k;
  double top_p, floor;
  bool greedy;
};

// Philox 4x32-10 (kernels/ops/_philox.py): a number in [0, 1) with 53 random bits, a function of the 64-bit key and the
// 128-bit counter (sequence, position).
ALIGNFAST_SAMPLE double philox_uniform(int64_t seed, int64_t sequence, int64_t position) {
  uint32_t low = uint32_t(seed), high = uint32_t(uint64_t(seed) >> 32);
  uint32_t a = uint32_t(position), b = uint32_t(uint64_t(position) >> 32);
  uint32_t c = uint32_t(sequence), d = uint32_t(uint64_t(sequence) >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t first = uint64_t(0xd2511f53u) * a, second = uint64_t(0xcd9e8d57u) * c;
    a = uint32_t(second >> 32) ^ b ^ low;
    b = uint32_t(second);
    c = uint32_t(first >> 32) ^ d ^ high;
    d = uint32_t(first);
    low += 0x9e3779b9u;
    high += 0xbb67ae85u;
  }
  return double((uint64_t(a) << 32 | b) >> 11) * 0x1p-53;
}

// Floats in the order of integers, -0 just below 0. `coarse` low bits are left out: those that the floats do not have.
ALIGNFAST_SAMPLE int64_t rank_of(float x, int coarse = 0) {
  int32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return (bits < 0 ? bits ^ 0x7fffffff : bits) >> coarse;
}

ALIGNFAST_SAMPLE float of_rank(int64_t rank, int coarse = 0) {
  const uint32_t fine = uint32_t(rank) << coarse;
  const uint32_t bits = rank < 0 ? (fine | ((1u << coarse) - 1)) ^ 0x7fffffffu : fine;
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

// The largest x in [low, high] with enough(x), which holds at `low` and from some x on no more.
template <typename Enough>
ALIGNFAST_SAMPLE float largest_with(float low, float high, Enough enough, int coarse = 0) {
  int64_t first = rank_of(low, coarse), last = rank_of(high, coarse);
  while (first < last) {
    const int64_t middle = first + (last - first + 1) / 2;
    if (enough(of_rank(middle, coarse))) {
      first = middle;
    } else {
      last = middle - 1;
    }
  }
  return of_rank(first, coarse);
}

// The smallest float that is no less than top + floor.
ALIGNFAST_SAMPLE float least_of_floor(float top, const SampleOptions& options) {
  const double least = double(top) + options.floor;
  const float rounded = float(least);
  return rounded < least ? of_rank(rank_of(rounded) + 1) : rounded;
}

// Log-prob of a token of weight e^exponent beside others of that weight together.
ALIGNFAST_SAMPLE float logp_beside(double others, double exponent) {
  const double x = log(others) - exponent;
  return float(-(x > 0 ? x + log1p(exp(-x)) : log1p(exp(x))));
}

}  // namespace alignfast
