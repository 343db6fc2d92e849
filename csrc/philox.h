// Philox 4x32-10 (Salmon et al., SC 2011), shared by csrc/cpu/ and csrc/cuda/: kernels/ops/_philox.py has the definition.
#pragma once

#include <stdint.h>

#ifdef __CUDACC__
#define ALIGNFAST_PHILOX static __host__ __device__ __forceinline__
#else
#define ALIGNFAST_PHILOX static inline __attribute__((always_inline))  // no copy for the linker to share: export.h
#endif

namespace alignfast {

// A number in [0, 1) with 53 random bits, a function of the 64-bit key and the 128-bit counter (sequence, position).
ALIGNFAST_PHILOX double philox_uniform(int64_t seed, int64_t sequence, int64_t position) {
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

}  // namespace alignfast
