// Products of small float matrices that lie in the first or second cache, in registers: C = A B, or C += A B.
//
// Rows of B and C are read and written in whole vectors, so their row strides leave room for that. A register tile
// holds kRegisterRows x kRegisterVectors vectors of C: as many as there are registers for, beside a row of B.
#pragma once

#include "simd.h"

namespace alignfast::ALIGNFAST_ISA {

#if defined(__AVX512F__)
constexpr int kRegisterRows = 6, kRegisterVectors = 4;  // 165 of 170 GFLOP/s at depth 64; 8 x 3 is as fast, 14 x 2 slower
#else
constexpr int kRegisterRows = 4, kRegisterVectors = 3;  // 16 registers: 6 x 2 reaches four fifths of it
#endif

// A matrix that is only read: element (i, k) at [i * stride + k], or at [k * stride + i] where it is `kTransposed`.
template <bool kTransposed>
struct Operand {
  const float* data;
  int64_t stride;

  float at(int64_t i, int64_t k) const { return kTransposed ? data[k * stride + i] : data[i * stride + k]; }
};

struct Matrix {
  float* data;
  int64_t stride;

  float* at(int64_t row, int64_t column) const { return data + row * stride + column; }
  Matrix from(int64_t row, int64_t column) const { return {at(row, column), stride}; }
};

template <int kRows, int kVectors, bool kTransposed>
static void multiply_tile(Operand<kTransposed> a, Matrix b, Matrix c, int64_t depth, bool accumulate) {
  F32 sums[kRows][kVectors];
  for (int i = 0; i < kRows; ++i) {
    for (int j = 0; j < kVectors; ++j) sums[i][j] = F32{};
  }
#pragma GCC unroll 2
  for (int64_t k = 0; k < depth; ++k) {
    F32 row[kVectors];
    for (int j = 0; j < kVectors; ++j) row[j] = load(b.at(k, j * kLanes));
    for (int i = 0; i < kRows; ++i) {
      const float factor = a.at(i, k);
      for (int j = 0; j < kVectors; ++j) sums[i][j] += factor * row[j];
    }
  }
  for (int i = 0; i < kRows; ++i) {
    for (int j = 0; j < kVectors; ++j) {
      float* to = c.at(i, j * kLanes);
      store(to, accumulate ? load(to) + sums[i][j] : sums[i][j]);
    }
  }
}

template <int kRows, bool kTransposed>
static void multiply_rows(int vectors, Operand<kTransposed> a, Matrix b, Matrix c, int64_t depth, bool accumulate) {
  switch (vectors) {
    case 1: return multiply_tile<kRows, 1>(a, b, c, depth, accumulate);
    case 2: return multiply_tile<kRows, 2>(a, b, c, depth, accumulate);
    case 3: return multiply_tile<kRows, 3>(a, b, c, depth, accumulate);
    case 4: return multiply_tile<kRows, kRegisterVectors>(a, b, c, depth, accumulate);
  }
}

// One register tile: `rows` <= kRegisterRows of A times `vectors` <= kRegisterVectors of B's columns, over `depth`.
template <bool kTransposed>
static void multiply(int rows, int vectors, Operand<kTransposed> a, Matrix b, Matrix c, int64_t depth, bool accumulate) {
  switch (rows) {
    case 1: return multiply_rows<1>(vectors, a, b, c, depth, accumulate);
    case 2: return multiply_rows<2>(vectors, a, b, c, depth, accumulate);
    case 3: return multiply_rows<3>(vectors, a, b, c, depth, accumulate);
    case 4: return multiply_rows<4>(vectors, a, b, c, depth, accumulate);
    case 5: return multiply_rows<kRegisterRows == 6 ? 5 : 1>(vectors, a, b, c, depth, accumulate);
    case 6: return multiply_rows<kRegisterRows == 6 ? 6 : 1>(vectors, a, b, c, depth, accumulate);
  }
}

// The vectors that the next panel of columns takes, of `left` vectors still to do: 5 go as 3 + 2 rather than 4 + 1.
ALIGNFAST_INLINE int panel_vectors(int left) {
  const int panels = (left + kRegisterVectors - 1) / kRegisterVectors;
  return (left + panels - 1) / panels;
}

// a[first], b[first], a[first + 1], b[first + 1], ...
ALIGNFAST_INLINE F32 interleave(F32 a, F32 b, int first) {
  const I32 lanes = lane_numbers();
  return shuffle(a, b, first + (lanes >> 1) + (lanes & 1) * kLanes);
}

// to[j][i] = from[i][j] for kLanes x kLanes values: log2(kLanes) rounds that interleave the halves of the row list.
static void transpose_square(const float* from, int64_t from_stride, float* to, int64_t to_stride) {
  F32 rows[kLanes], mixed[kLanes];
  for (int i = 0; i < kLanes; ++i) rows[i] = load(from + i * from_stride);
  for (int round = 1; round < kLanes; round *= 2) {
    for (int i = 0; i < kLanes / 2; ++i) {
      mixed[2 * i] = interleave(rows[i], rows[i + kLanes / 2], 0);
      mixed[2 * i + 1] = interleave(rows[i], rows[i + kLanes / 2], kLanes / 2);
    }
    memcpy(rows, mixed, sizeof rows);
  }
  for (int i = 0; i < kLanes; ++i) store(to + i * to_stride, rows[i]);
}

}  // namespace alignfast::ALIGNFAST_ISA
