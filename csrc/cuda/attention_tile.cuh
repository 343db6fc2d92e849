// Tiles of queries, keys and values in shared memory, and the two matrix products that attention is made of.
//
// A product gives a warp 16 rows. Its result lies in registers as the tensor cores leave it: Fragment[n] of lane l
// holds, with g = l / 4 and t = l % 4, rows g, g, g + 8, g + 8 at columns 8n + 2t, + 1, + 0, + 1. 16-bit elements go
// through tensor cores; float32 takes the same lanes through plain arithmetic, since tensor cores would round it.
#pragma once

#include "numbers.cuh"
#include "tensor_core.cuh"

namespace alignfast::cuda {

constexpr int kWarpRows = 16;

// What fits into 99 KB of shared memory with four tiles and into 255 registers with two accumulators.
template <typename T, int kWidth>
struct TileShape {
  static constexpr bool kFloat = sizeof(T) == 4;
  static constexpr int kWarps = kFloat && kWidth > 128 ? 2 : 4;
  static constexpr int kThreads = kWarps * kWarpSize;
  static constexpr int kRows = kWarps * kWarpRows;                                       // that stay
  static constexpr int kColumns = kWidth > 128 ? 16 : (kWidth > 64 ? 32 : 64) / (kFloat ? 2 : 1);  // that pass by
  // 16 bytes of padding a row spread eight rows over all banks
  static constexpr int kStride = kWidth + Vector<T>::kSize;
};

// Rows of one head of a tensor (tokens, heads, width) whose last dimension is contiguous.
template <typename T>
struct HeadRows {
  T* data;
  int64_t token_stride, head_stride;

  __device__ __forceinline__ T* row(int64_t token, int64_t head) const {
    return data + token * token_stride + head * head_stride;
  }
};

// Fills a tile of kRows rows from `count` tokens on, zeros behind them and behind the width.
template <typename T, int kWidth, int kRows>
__device__ __forceinline__ void load_tile(T* tile, const HeadRows<const T>& from, int token, int count, int head,
                                          int width, bool vectors_fit) {
  using Shape = TileShape<T, kWidth>;
  constexpr int N = Vector<T>::kSize, kVectors = kWidth / N;
  for (int i = threadIdx.x; i < kRows * kVectors; i += Shape::kThreads) {
    const int row = i / kVectors, column = i % kVectors * N;
    Vector<T> vector;
    const T* source = from.row(static_cast<int64_t>(token) + row, head) + column;
    if (row < count && vectors_fit && column < width) {
      vector = Vector<T>::load(source);
    } else {
#pragma unroll
      for (int j = 0; j < N; ++j) {
        vector.elements[j] = row < count && column + j < width ? source[j] : from_float<T>(0.0f);
      }
    }
    vector.store(tile + row * Shape::kStride + column);
  }
}

template <int kColumns>
using Fragment = float[kColumns / 8][4];

template <int kColumns>
__device__ __forceinline__ void clear(Fragment<kColumns>& fragment) {
#pragma unroll
  for (int n = 0; n < kColumns / 8; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) fragment[n][i] = 0;
  }
}

// visit(row, column, value) for each element that the lane holds.
template <int kColumns, typename Visit>
__device__ __forceinline__ void for_elements(Fragment<kColumns>& fragment, Visit visit) {
  const int g = threadIdx.x % kWarpSize / 4, t = threadIdx.x % 4;
#pragma unroll
  for (int n = 0; n < kColumns / 8; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) visit(g + i / 2 * 8, 8 * n + 2 * t + i % 2, fragment[n][i]);
  }
}

// Two floats as the pair of 16-bit elements that an instruction takes.
template <typename T>
__device__ __forceinline__ uint32_t pack(float low, float high) {
  const T pair[2] = {from_float<T>(low), from_float<T>(high)};
  uint32_t bits;
  memcpy(&bits, pair, sizeof(bits));
  return bits;
}

// Sums of a few products are added to long ones as a whole: a float sum of n terms in a row errs by sqrt(n).
__device__ __forceinline__ float dot(const Vector<float>& a, const Vector<float>& b) {
  float sum = a.elements[0] * b.elements[0];
#pragma unroll
  for (int j = 1; j < Vector<float>::kSize; ++j) sum = fmaf(a.elements[j], b.elements[j], sum);
  return sum;
}

// c (16 x kColumns) += a (16 x kWidth) b^T (b: kColumns x kWidth), both in shared memory, `a` at the warp's first row.
template <typename T, int kWidth, int kColumns>
__device__ __forceinline__ void multiply_transposed(Fragment<kColumns>& c, const T* a, const T* b) {
  constexpr int kStride = TileShape<T, kWidth>::kStride;
  const int lane = threadIdx.x % kWarpSize;
  if constexpr (sizeof(T) == 2) {
    const T* a_row = a + lane % 16 * kStride + lane / 16 * 8;
    const T* b_row = b + (lane / 16 * 8 + lane % 8) * kStride + lane / 8 % 2 * 8;
#pragma unroll
    for (int k = 0; k < kWidth; k += 16) {
      uint32_t of_a[4];
      load_matrices<false>(of_a, a_row + k);
#pragma unroll
      for (int n = 0; n < kColumns; n += 16) {
        uint32_t of_b[4];
        load_matrices<false>(of_b, b_row + n * kStride + k);
        multiply(T{}, c[n / 8], of_a, of_b[0], of_b[1]);
        multiply(T{}, c[n / 8 + 1], of_a, of_b[2], of_b[3]);
      }
    }
  } else {
    const int g = lane / 4, t = lane % 4;
#pragma unroll 2
    for (int k = 0; k < kWidth; k += 4) {
      const Vector<T> low = Vector<T>::load(a + g * kStride + k), high = Vector<T>::load(a + (g + 8) * kStride + k);
#pragma unroll
      for (int n = 0; n < kColumns / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const Vector<T> of_b = Vector<T>::load(b + (8 * n + 2 * t + i) * kStride + k);
          c[n][i] += dot(low, of_b);
          c[n][2 + i] += dot(high, of_b);
        }
      }
    }
  }
}

// c (16 x kWidth) += p (16 x kDepth, in registers) b (kDepth x kWidth, in shared memory)
template <typename T, int kWidth, int kDepth>
__device__ __forceinline__ void multiply_fragment(Fragment<kWidth>& c, const Fragment<kDepth>& p, const T* b) {
  constexpr int kStride = TileShape<T, kWidth>::kStride;
  const int lane = threadIdx.x % kWarpSize;
  if constexpr (sizeof(T) == 2) {
    const T* b_row = b + lane % 16 * kStride + lane / 16 * 8;
#pragma unroll
    for (int k = 0; k < kDepth; k += 16) {
      // a product's result is laid out as the next one's left factor, two of its blocks side by side
      const auto& left = p[k / 8];
      const auto& right = p[k / 8 + 1];
      const uint32_t of_p[4] = {pack<T>(left[0], left[1]), pack<T>(left[2], left[3]), pack<T>(right[0], right[1]),
                                pack<T>(right[2], right[3])};
#pragma unroll
      for (int n = 0; n < kWidth; n += 16) {
        uint32_t of_b[4];
        load_matrices<true>(of_b, b_row + k * kStride + n);
        multiply(T{}, c[n / 8], of_p, of_b[0], of_b[1]);
        multiply(T{}, c[n / 8 + 1], of_p, of_b[2], of_b[3]);
      }
    }
  } else {
    const int t = lane % 4;
#pragma unroll
    for (int k = 0; k < kDepth; k += 8) {
      float low[8], high[8];  // rows g and g + 8 of eight columns of p
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        low[j] = __shfl_sync(kWholeWarp, p[k / 8][j % 2], lane / 4 * 4 + j / 2);
        high[j] = __shfl_sync(kWholeWarp, p[k / 8][2 + j % 2], lane / 4 * 4 + j / 2);
      }
#pragma unroll
      for (int n = 0; n < kWidth / 8; ++n) {
        float sums[4] = {0, 0, 0, 0};
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          const float2 of_b = *reinterpret_cast<const float2*>(b + (k + j) * kStride + 8 * n + 2 * t);
          sums[0] = fmaf(low[j], of_b.x, sums[0]);
          sums[1] = fmaf(low[j], of_b.y, sums[1]);
          sums[2] = fmaf(high[j], of_b.x, sums[2]);
          sums[3] = fmaf(high[j], of_b.y, sums[3]);
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) c[n][i] += sums[i];
      }
    }
  }
}

// Writes the first `count` rows and `width` columns of a warp's result, each times its row's factor(i), i = 0 for row
// g and 1 for row g + 8.
template <typename T, int kWidth, typename Factor>
__device__ __forceinline__ void store_fragment(Fragment<kWidth>& c, const HeadRows<T>& to, int token, int count,
                                               int head, int width, Factor factor) {
  for_elements<kWidth>(c, [&](int row, int column, float value) {
    if (row < count && column < width) {
      to.row(static_cast<int64_t>(token) + row, head)[column] = from_float<T>(value * factor(row / 8));
    }
  });
}

}  // namespace alignfast::cuda
