// csrc/cuda/tensor_core.cuh by its definition: which lane holds which element, and the product of two matrices.
#pragma once

#include <cfenv>

#include "cuda_bf16.h"
#include "cuda_fp16.h"
#include "cuda_runtime.h"

namespace alignfast::cuda {

template <bool kTransposed>
void load_matrices(uint32_t (&registers)[4], const void* row_in_shared) {
  const auto address = reinterpret_cast<uintptr_t>(row_in_shared);
  const auto shared = reinterpret_cast<uintptr_t>(emulated_shared);
  if (address % 16 || address < shared || address >= shared + kSharedLimit) {
    emulator::fail("a matrix row is not in shared memory or not on 16 bytes");
  }
  const auto* rows = emulator::exchange(0xffffffffu, row_in_shared, __LINE__);
  const int g = emulator::lane() / 4, t = emulator::lane() % 4;
  for (int matrix = 0; matrix < 4; ++matrix) {
    uint16_t pair[2];
    for (int i = 0; i < 2; ++i) {
      const int row = kTransposed ? 2 * t + i : g, column = kTransposed ? g : 2 * t + i;
      pair[i] = emulator::read<const uint16_t*>(rows[8 * matrix + row])[column];
    }
    memcpy(&registers[matrix], pair, sizeof(pair));
  }
}

namespace emulated {

struct Operands {
  uint32_t a[4], b[2];
};

inline float element(__nv_bfloat16, uint16_t bits) { return __bfloat162float({bits}); }
inline float element(__half, uint16_t bits) { return __half2float({bits}); }

template <typename T>
float half_of(uint32_t pair, int which) {
  return element(T{}, static_cast<uint16_t>(which ? pair >> 16 : pair));
}

}  // namespace emulated

template <typename T>
void multiply(T, float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  using emulated::Operands;
  const Operands mine = {{a[0], a[1], a[2], a[3]}, {b0, b1}};
  const auto* all = emulator::exchange(0xffffffffu, mine, __LINE__);
  const int g = emulator::lane() / 4, t = emulator::lane() % 4;
  for (int i = 0; i < 4; ++i) {
    const int row = g + 8 * (i / 2), column = 2 * t + i % 2;
    double sum = c[i];
    for (int k = 0; k < 16; ++k) {
      const auto of_a = emulator::read<Operands>(all[4 * (row % 8) + k % 8 / 2]);
      const auto of_b = emulator::read<Operands>(all[4 * column + k % 8 / 2]);
      sum += static_cast<double>(emulated::half_of<T>(of_a.a[row / 8 + 2 * (k / 8)], k % 2)) *
             emulated::half_of<T>(of_b.b[k / 8], k % 2);
    }
    // tensor cores cut off what does not fit into the accumulator
    const float nearest = static_cast<float>(sum);
    c[i] = std::fabs(nearest) > std::fabs(sum) && std::isfinite(nearest) ? std::nextafterf(nearest, 0.0f) : nearest;
  }
}

}  // namespace alignfast::cuda
