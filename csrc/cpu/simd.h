// Vectors of floats for one source and three instruction sets: portable (4 lanes, plain C++), AVX2 (8), AVX-512 (16).
//
// CMake compiles every kernel once per set, with ALIGNFAST_ISA naming the namespace; module.cpp picks at run time.
// F32, I32, U32 are GCC vector types: + - * / & | << and comparisons work lane by lane, `mask ? a : b` selects, and
// a * b + c becomes one fused instruction where there is one (-ffp-contract=fast). All is static, so that no copy
// compiled for one set can end up in another (export.h).
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>
#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "../export.h"

#define ALIGNFAST_INLINE static inline __attribute__((always_inline))

namespace alignfast::ALIGNFAST_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float F32 __attribute__((vector_size(4 * kLanes)));
typedef int32_t I32 __attribute__((vector_size(4 * kLanes)));
typedef uint32_t U32 __attribute__((vector_size(4 * kLanes)));
typedef uint16_t U16 __attribute__((vector_size(2 * kLanes)));

struct BF16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};

// ---- lanes ----

ALIGNFAST_INLINE F32 splat(float x) { return x - F32{}; }  // not x + 0, which loses the sign of -0
ALIGNFAST_INLINE U32 splat_bits(uint32_t x) { return x + U32{}; }
ALIGNFAST_INLINE U32 bits_of(F32 x) { return (U32)x; }
ALIGNFAST_INLINE F32 float_of(U32 x) { return (F32)x; }

ALIGNFAST_INLINE I32 lane_numbers() {
  I32 lanes;
  for (int i = 0; i < kLanes; ++i) lanes[i] = i;
  return lanes;
}

// The larger of two lanes; `b` where either is NaN. So max(limit, x) lets a NaN in x through, max(x, limit) does not.
ALIGNFAST_INLINE F32 max(F32 a, F32 b) {
#if defined(__AVX512F__)
  return (F32)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (F32)_mm256_max_ps((__m256)a, (__m256)b);
#elif defined(__SSE2__)
  return (F32)_mm_max_ps((__m128)a, (__m128)b);
#else
  return a > b ? a : b;
#endif
}

ALIGNFAST_INLINE F32 fma(F32 a, F32 b, F32 c) { return a * b + c; }

ALIGNFAST_INLINE F32 abs(F32 x) { return float_of(bits_of(x) & 0x7fffffffu); }

// Lane i of the result is lane `from[i]` of a and b taken as one row of 2 x kLanes.
ALIGNFAST_INLINE F32 shuffle(F32 a, F32 b, I32 from) {
#if defined(__clang__)
  F32 mixed;
  for (int i = 0; i < kLanes; ++i) mixed[i] = from[i] < kLanes ? a[from[i]] : b[from[i] - kLanes];
  return mixed;
#else
  return __builtin_shuffle(a, b, from);  // one instruction, where g++ makes many of the loop
#endif
}

ALIGNFAST_INLINE float sum(F32 x) {
  for (int half = kLanes / 2; half; half /= 2) x += shuffle(x, x, lane_numbers() ^ half);
  return x[0];
}

// The largest lane; NaN lanes may be passed over.
ALIGNFAST_INLINE float max_lane(F32 x) {
  for (int half = kLanes / 2; half; half /= 2) x = max(x, shuffle(x, x, lane_numbers() ^ half));
  return x[0];
}

// ---- memory: float32, bfloat16 and float16, computed on as float32 ----

ALIGNFAST_INLINE F32 load(const float* from) {
  F32 x;
  memcpy(&x, from, sizeof x);
  return x;
}

ALIGNFAST_INLINE F32 load(const BF16* from) {
  U16 half;
  memcpy(&half, from, sizeof half);
  return float_of(__builtin_convertvector(half, U32) << 16);
}

ALIGNFAST_INLINE F32 load(const F16* from) {
#if defined(__AVX512F__)
  return (F32)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)from));
#elif defined(__AVX2__)
  return (F32)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)from));
#else
  U16 half;
  memcpy(&half, from, sizeof half);
  const U32 h = __builtin_convertvector(half, U32);
  // Exponent and mantissa in float32's places, then * 2^112 moves the bias from 15 to 127; subnormals come out right.
  const F32 magnitude = float_of((h & 0x7fffu) << 13) * 0x1p112f;
  const U32 finite = bits_of(magnitude);
  const U32 special = ((h & 0x7fffu) << 13) | 0x7f800000u;
  return float_of(((h & 0x7c00u) == 0x7c00u ? special : finite) | ((h & 0x8000u) << 16));
#endif
}

ALIGNFAST_INLINE void store(float* to, F32 x) { memcpy(to, &x, sizeof x); }

// To memory, past the caches; `to` is aligned to a vector. Another thread sees it after the end of the parallel region.
ALIGNFAST_INLINE void stream(float* to, F32 x) {
#if defined(__AVX512F__)
  _mm512_stream_ps(to, (__m512)x);
#elif defined(__AVX2__)
  _mm256_stream_ps(to, (__m256)x);
#elif defined(__SSE2__)
  _mm_stream_ps(to, (__m128)x);
#else
  store(to, x);
#endif
}

ALIGNFAST_INLINE void store(BF16* to, F32 x) {
  const U32 bits = bits_of(x);
  const U32 rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;  // to nearest, ties to even
  const U16 half = __builtin_convertvector(x == x ? rounded : (bits >> 16) | 0x40u, U16);
  memcpy(to, &half, sizeof half);
}

ALIGNFAST_INLINE void store(F16* to, F32 x) {
#if defined(__AVX512F__)
  _mm256_storeu_si256((__m256i*)to, _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__AVX2__)
  _mm_storeu_si128((__m128i*)to, _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT));
#else
  const U32 sign = (bits_of(x) >> 16) & 0x8000u;
  const U32 magnitude = bits_of(abs(x));
  const U32 normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // Below 2^-14 float16 counts in steps of 2^-24, as float32 does in [0.5, 1): adding 0.5 rounds to them.
  const U32 subnormal = bits_of(abs(x) + 0.5f) - 0x3f000000u;
  const U32 finite = magnitude < 0x38800000u ? subnormal : normal;
  const U32 overflow = magnitude > 0x7f800000u ? splat_bits(0x7e00u) : splat_bits(0x7c00u);
  const U32 result = (magnitude < 0x477ff000u ? finite : overflow) | sign;  // 65520 and more round to infinity
  const U16 half = __builtin_convertvector(result, U16);
  memcpy(to, &half, sizeof half);
#endif
}

// The first `n` < kLanes values, the other lanes `fill`; nothing beyond the first `n` is touched.
template <typename T>
ALIGNFAST_INLINE F32 load_first(const T* from, int n, float fill) {
  T padded[kLanes] = {};
  memcpy(padded, from, n * sizeof(T));
  return lane_numbers() < n ? load(padded) : splat(fill);
}

template <typename T>
ALIGNFAST_INLINE void store_first(T* to, F32 x, int n) {
  T padded[kLanes];
  store(padded, x);
  memcpy(to, padded, n * sizeof(T));
}

ALIGNFAST_INLINE float load_one(const float* from) { return *from; }
template <typename T>
ALIGNFAST_INLINE float load_one(const T* from) {
  return load_first(from, 1, 0.0f)[0];
}

// Calls `body` with a null pointer of the type that `dtype` names.
template <typename Body>
ALIGNFAST_INLINE void with_dtype(int64_t dtype, Body body) {
  if (dtype == kFloat32) body((float*)nullptr);
  if (dtype == kBFloat16) body((BF16*)nullptr);
  if (dtype == kFloat16) body((F16*)nullptr);
}

// ---- functions ----

// e^x for x <= 88, within 1.2 units in the last place; NaN for NaN; 0 below -104, and without AVX-512 below -86.6,
// where float32 nears its subnormals.
// x = n log 2 + r with |r| <= log(2) / 2, and e^r from a polynomial fitted for relative error (3e-9).
ALIGNFAST_INLINE F32 exp(F32 x) {
#if defined(__AVX512F__)
  constexpr float kLowest = -150.0f;
#else
  constexpr float kLowest = -86.6f;
#endif
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the last bits
  const F32 clamped = max(splat(kLowest), x);
  const F32 shifted = fma(clamped, splat(1.44269504f), splat(kRound));
  const F32 n = shifted - kRound;
  // log 2 in two pieces: n times the first is exact, since its last 9 bits are 0
  const F32 r = fma(n, splat(-0x1.7f7d1cp-20f), fma(n, splat(-0x1.62e4p-1f), clamped));
  F32 p = splat(0.00138145986f);
  p = fma(p, r, splat(0.00836871688f));
  p = fma(p, r, splat(0.0416683880f));
  p = fma(p, r, splat(0.166665206f));
  p = fma(p, r, splat(0.499999934f));
  p = fma(p, r, splat(1.0f));
  p = fma(p, r, splat(1.0f));
#if defined(__AVX512F__)
  return (F32)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
  const F32 power = float_of((bits_of(shifted) << 23) + 0x3f800000u);  // 2^n
  return x < kLowest ? F32{} : p * power;
#endif
}

// e^x for every x, within 2.9 units in the last place: inf past 88.7, subnormal and then 0 below -87.3.
// Where `exp` ends it is the square of e^(x / 2).
ALIGNFAST_INLINE F32 exp_anywhere(F32 x) {
  const I32 is_far = abs(x) > 80.0f;
  const F32 half = x * 0.5f;
  const F32 root = exp(is_far ? (half > 88.0f ? splat(88.0f) : half) : x);
  return is_far ? root * root : root;
}

// What the headers shared with csrc/cuda/ compute on.
struct VectorMath {
  typedef F32 F;
  ALIGNFAST_INLINE F number(float x) { return splat(x); }
  ALIGNFAST_INLINE F exp(F x) { return exp_anywhere(x); }
};

struct Tanh {
  F32 value, slope;
};

// tanh and its derivative, within 2 and 4 units in the last place. Away from 0 both come from t = e^(-2|x|), where
// 1 - tanh^2 would cancel; near 0 it is 1 - t that would, so there tanh is a polynomial.
ALIGNFAST_INLINE Tanh tanh_and_slope(F32 x) {
  const F32 s = x * x;
  F32 p = splat(0.00223106403f);
  p = fma(p, s, splat(-0.00826709079f));
  p = fma(p, s, splat(0.0217344397f));
  p = fma(p, s, splat(-0.0539524756f));
  p = fma(p, s, splat(0.133332478f));
  p = fma(p, s, splat(-0.333333318f));
  const F32 near_zero = fma(p * s, x, x);
  const F32 t = exp(abs(x) * -2.0f);
  const F32 inverse = 1.0f / (1.0f + t);
  const F32 far = float_of(bits_of((1.0f - t) * inverse) | (bits_of(x) & 0x80000000u));
  const I32 is_near = abs(x) < 0.6f;
  return {is_near ? near_zero : far, is_near ? 1.0f - near_zero * near_zero : 4.0f * t * inverse * inverse};
}

ALIGNFAST_INLINE F32 tanh(F32 x) { return tanh_and_slope(x).value; }

// log(1 + t) for t in [0, 1], within 2 units in the last place: 2 artanh(t / (2 + t)), fitted for relative error (6e-9).
ALIGNFAST_INLINE F32 log1p_to_1(F32 t) {
  const F32 s = t / (2.0f + t);
  const F32 w = s * s;
  F32 p = splat(0.140060097f);
  p = fma(p, w, splat(0.140008986f));
  p = fma(p, w, splat(0.200107634f));
  p = fma(p, w, splat(0.333332092f));
  return fma(p * w, s, s) * 2.0f;
}

}  // namespace alignfast::ALIGNFAST_ISA
