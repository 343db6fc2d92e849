// A row of logits, shared out among the threads of a warp (V <= 1024) or a block, and its sums of exponentials.
//
// Each thread keeps sums over its share, relative to the largest it has seen; they meet once at the end. Which thread
// takes which elements depends on their index alone, not on how the row lies in memory: a row gives the same bits
// wherever it stands in a batch.
//
// Letters: V vocabulary, N elements of a vector, W warps of a block.
#pragma once

#include "numbers.cuh"

namespace alignfast::cuda {

constexpr int kWarpRowV = 1024;     // rows up to here are left to a warp
constexpr int kWarpRowsABlock = 4;  // then four share a block

// What a kernel is compiled for. kMoments: the mean logit and the sum of squared probabilities.
template <typename T_, bool kOneWarp, bool kEntropy_, bool kMoments_, bool kCapped_>
struct Variant {
  using T = T_;
  static constexpr bool kEntropy = kEntropy_, kMoments = kMoments_, kCapped = kCapped_;
  static constexpr int kThreads = kOneWarp ? kWarpSize : 512;  // of a row
  static constexpr int kBlockThreads = kOneWarp ? kWarpSize * kWarpRowsABlock : kThreads;
  static constexpr int kBlocksAnSM = kOneWarp ? 8 : 2;  // holds kernels to 64 registers
  // vectors in flight: 512 threads x 64 bytes x 2 blocks cover an SM's latency; tanh is the limit under a softcap
  static constexpr int kUnroll = kCapped ? 1 : 4;
};

// x = outer * core(z), dx/dz = slope, or (1 - core^2) * slope under a softcap.
struct Transform {
  float inner, outer, slope;
  float sign;  // of the scale: sign * z rises with x

  static Transform of(double scale, double softcap, double temperature) {
    const bool capped = softcap > 0;
    return {static_cast<float>(capped ? scale / softcap : 1),
            static_cast<float>((capped ? softcap : scale) / temperature), static_cast<float>(scale / temperature),
            scale < 0 ? -1.0f : 1.0f};
  }

  template <typename Is>
  __device__ __forceinline__ float core(float z) const {
    return Is::kCapped ? tanhf(z * inner) : z;
  }
};

__device__ __forceinline__ float finite(float x) { return fmaxf(fminf(x, FLT_MAX), -FLT_MAX); }

template <typename Is>
struct Sums {
  float top = -INFINITY;  // largest sign * z
  float base = 0;         // its core, made finite where it is infinite: differences to it are then no NaN
  float exps = 0;         // of e = exp(d), d = (core - base) * outer: 0 and 1 exactly for the largest
  float weighted = 0;     // of e * d
  float squares = 0;      // of e * e
  float total = 0;        // of core

  __device__ __forceinline__ void rebase(float to, float outer) {
    if (base != to && exps != 0) {
      const float shift = (base - to) * outer, factor = expf(shift);
      if (Is::kEntropy) weighted = factor > 0 ? factor * (weighted + exps * shift) : 0;
      if (Is::kMoments) squares *= factor * factor;
      exps *= factor;
    }
    base = to;
  }

  __device__ __forceinline__ void raise(float largest, const Transform& transform) {
    if (!(largest > top)) return;
    top = largest;
    rebase(finite(transform.core<Is>(transform.sign * top)), transform.outer);
  }

  __device__ __forceinline__ void add(float core, float outer) {
    const float d = (core - base) * outer, e = __expf(d);
    exps += e;
    if (Is::kEntropy) weighted += d == -INFINITY ? 0 : e * d;
    if (Is::kMoments) squares += e * e;
  }

  __device__ __forceinline__ void merge(Sums other, float outer) {
    if (other.top > top) {
      rebase(other.base, outer);
      top = other.top;
    } else {
      other.rebase(base, outer);
    }
    exps += other.exps;
    weighted += other.weighted;
    squares += other.squares;
    total += other.total;
  }

  __device__ __forceinline__ Sums from_lane(int bits) const {
    Sums other;
    other.top = __shfl_xor_sync(kWholeWarp, top, bits);
    other.base = __shfl_xor_sync(kWholeWarp, base, bits);
    other.exps = __shfl_xor_sync(kWholeWarp, exps, bits);
    if (Is::kEntropy) other.weighted = __shfl_xor_sync(kWholeWarp, weighted, bits);
    if (Is::kMoments) other.squares = __shfl_xor_sync(kWholeWarp, squares, bits);
    if (Is::kMoments) other.total = __shfl_xor_sync(kWholeWarp, total, bits);
    return other;
  }

  __device__ __forceinline__ void merge_warp(float outer) {
    for (int bits = kWarpSize / 2; bits > 0; bits /= 2) merge(from_lane(bits), outer);
  }
};

// visit(first, z) for the elements of a row, `z` an array of floats.
template <typename Is, typename Visit>
__device__ __forceinline__ void walk(const typename Is::T* row_V, int V, int thread, Visit visit) {
  using Loaded = Vector<typename Is::T>;
  constexpr int N = Loaded::kSize, kThreads = Is::kThreads, kUnroll = Is::kUnroll;
  const int vectors = V / N;
  const auto many = [&](int i, const Loaded& vector) {
    float z[N];
#pragma unroll
    for (int j = 0; j < N; ++j) z[j] = to_float(vector.elements[j]);
    visit(i * N, z);
  };
  int i = thread;
  if (kUnroll > 1 && misalignment(row_V) == 0) {
    for (; i + (kUnroll - 1) * kThreads < vectors; i += kUnroll * kThreads) {
      Loaded loaded[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) loaded[u] = Loaded::load(row_V + (i + u * kThreads) * N);
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) many(i + u * kThreads, loaded[u]);
    }
  }
  for (; i < vectors; i += kThreads) many(i, Loaded::load_across(row_V + i * N));
  if (const int last = vectors * N + thread; last < V) {
    const float z[1] = {to_float(row_V[last])};
    visit(last, z);
  }
}

// Writes elements that a visit was given; `vectors_fit` where the row starts on a vector's border.
template <typename T, int N>
__device__ __forceinline__ void store_elements(T* to, const T (&elements)[N], bool vectors_fit) {
  if constexpr (N == Vector<T>::kSize) {
    if (vectors_fit) {
      Vector<T> vector;
#pragma unroll
      for (int j = 0; j < N; ++j) vector.elements[j] = elements[j];
      return vector.store(to);
    }
  }
#pragma unroll
  for (int j = 0; j < N; ++j) to[j] = elements[j];
}

template <typename Is>
__device__ __forceinline__ void fill(typename Is::T* row_V, int V, int thread, float value) {
  using T = typename Is::T;
  constexpr int N = Vector<T>::kSize;
  const int off = misalignment(row_V) / static_cast<int>(sizeof(T));
  const int head = min(V, off ? N - off : 0), vectors = (V - head) / N, tail = head + vectors * N;
  Vector<T> filled;
#pragma unroll
  for (int j = 0; j < N; ++j) filled.elements[j] = from_float<T>(value);
  if (thread < head) row_V[thread] = filled.elements[0];
  for (int i = thread; i < vectors; i += Is::kThreads) filled.store(row_V + head + i * N);
  if (tail + thread < V) row_V[tail + thread] = filled.elements[0];
}

// Sums over a row, but for the class `left_out` (-1: for none), known to each of its threads. Uses the block's shared
// memory, a Sums for each warp.
template <typename Is>
__device__ __forceinline__ Sums<Is> sum_row(const typename Is::T* row_V, int V, int left_out, int thread,
                                            const Transform& transform) {
  Sums<Is> sums;
  walk<Is>(row_V, V, thread, [&](int first, const auto& z) {
    constexpr int N = sizeof(z) / sizeof(float);
    float core[N], largest = -INFINITY;
#pragma unroll
    for (int j = 0; j < N; ++j) {
      core[j] = transform.core<Is>(z[j]);
      if (Is::kMoments) sums.total += core[j];
      const bool out = first + j == left_out;
      if (out) core[j] = transform.outer > 0 ? -INFINITY : INFINITY;
      largest = fmaxf(largest, out ? -INFINITY : transform.sign * z[j]);
    }
    sums.raise(largest, transform);
#pragma unroll
    for (int j = 0; j < N; ++j) sums.add(core[j], transform.outer);
  });
  sums.merge_warp(transform.outer);
  if constexpr (Is::kThreads > kWarpSize) {
    Sums<Is>* sums_W = reinterpret_cast<Sums<Is>*>(dynamic_shared);
    const int lane = threadIdx.x % kWarpSize;
    if (lane == 0) sums_W[threadIdx.x / kWarpSize] = sums;
    __syncthreads();
    sums = lane < Is::kThreads / kWarpSize ? sums_W[lane] : Sums<Is>{};
    sums.merge_warp(transform.outer);
  }
  return sums;
}

}  // namespace alignfast::cuda
