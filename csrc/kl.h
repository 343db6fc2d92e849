// Estimators of a KL divergence from the log-probs of one token, and their slopes: shared by csrc/cpu/ and csrc/cuda/.
//
// kernels/ops/kl_penalty.py has the definitions. `Math` names the number and its exp: a float on a GPU (FloatMath of
// cuda/numbers.cuh), a vector of floats on a CPU (VectorMath of cpu/simd.h). `mask ? a : b` selects in either.
#pragma once

#include <math.h>

#ifdef __CUDACC__
#define ALIGNFAST_TOKEN static __host__ __device__ __forceinline__
#else
#define ALIGNFAST_TOKEN static inline __attribute__((always_inline))  // no copy for the linker to share: export.h
#endif

namespace alignfast {

// The order of KINDS in kl_penalty.py.
enum KlKind { kK1 = 0, kAbs = 1, kK2 = 2, kK3 = 3 };

template <class Math>
struct Exponential {
  typename Math::F value;   // e^d
  typename Math::F minus1;  // e^d - 1
  typename Math::F excess;  // e^d - 1 - d, which is k3
};

// To float's last digits, where differences would have none: with y = d / 2, s = e^y - 1 - y and h = y + s
//     e^d - 1 = h (h + 2)        e^d - 1 - d = h^2 + 2 s
// and s is a sum of y^k / k! for |y| < 1, its first omitted term 3e-9 of it. Further out the differences are good.
template <class Math>
ALIGNFAST_TOKEN Exponential<Math> exponential(typename Math::F d) {
  using F = typename Math::F;
  const F y = d * 0.5f;
  F p = y * (1.0f / 39916800) + 1.0f / 3628800;
  p = p * y + 1.0f / 362880;
  p = p * y + 1.0f / 40320;
  p = p * y + 1.0f / 5040;
  p = p * y + 1.0f / 720;
  p = p * y + 1.0f / 120;
  p = p * y + 1.0f / 24;
  p = p * y + 1.0f / 6;
  p = p * y + 0.5f;
  const F s = p * y * y, h = y + s;
  const F value = Math::exp(d);
  const auto is_far = (d > 2.0f) | (d < -2.0f);
  return {value, is_far ? value - 1.0f : h * (h + 2.0f), is_far ? value - 1.0f - d : h * h + s * 2.0f};
}

// d is the reference's log-prob minus the policy's.
template <class Math>
ALIGNFAST_TOKEN typename Math::F kl_estimate(int kind, typename Math::F d) {
  if (kind == kK1) return -d;
  if (kind == kAbs) return d < 0.0f ? -d : d;
  if (kind == kK2) return d * d * 0.5f;
  return exponential<Math>(d).excess;
}

// Derivative by the policy's log-prob.
template <class Math>
ALIGNFAST_TOKEN typename Math::F kl_slope(int kind, typename Math::F d) {
  if (kind == kK1) return Math::number(1.0f);
  if (kind == kAbs) return d < 0.0f ? Math::number(1.0f) : d > 0.0f ? Math::number(-1.0f) : Math::number(0.0f);
  if (kind == kK2) return -d;
  return -exponential<Math>(d).minus1;
}

}  // namespace alignfast
