// The two tensor-core instructions in use, of all cards since sm_80: an 8x8 matrix load and a 16x8x16 product.
//
// Lane l of a warp holds, with g = l / 4 and t = l % 4 (PTX ISA, "Matrix Fragments for mma.m16n8k16"):
//   A (16 x 16)  4 pairs: rows g, g + 8, g, g + 8; columns 2t, 2t, 2t + 8, 2t + 8 and the next
//   B (16 x 8)   2 pairs: rows 2t, 2t + 8 and the next; column g
//   C (16 x 8)   4 floats: rows g, g, g + 8, g + 8; columns 2t, 2t + 1, 2t, 2t + 1
#pragma once

#include "numbers.cuh"

#ifdef __CUDACC__

namespace alignfast::cuda {

// Four 8x8 matrices of 16-bit elements from shared memory; lane l points to row l % 8 of matrix l / 8, which must lie
// on 16 bytes. A lane receives the elements 2t and 2t + 1 of row g of each, or of column g if kTransposed.
template <bool kTransposed>
__device__ __forceinline__ void load_matrices(uint32_t (&registers)[4], const void* row_in_shared) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row_in_shared));
  if constexpr (kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
                 : "r"(address)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
                 : "r"(address)
                 : "memory");
  }
}

// c += a b
__device__ __forceinline__ void multiply(__nv_bfloat16, float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                         uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void multiply(__half, float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

}  // namespace alignfast::cuda

#else
#include <tensor_core_emulated.h>  // tests/cuda/emulator: the same functions by their definition
#endif
