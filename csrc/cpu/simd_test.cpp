// The functions of simd.h, made callable so that tests/test_build.py can hold them to float64.
#include "simd.h"

namespace alignfast::ALIGNFAST_ISA {

// out[i] = e^x[i] (function 0), tanh x[i] (1), the derivative of tanh (2), e^x[i] for every x (3), or log(1 + x[i]) (4).
static void simd_function(int64_t function, const float* x, int64_t count, float* out) {
  for (int64_t i = 0; i < count; i += kLanes) {
    const int n = count - i < kLanes ? int(count - i) : kLanes;
    const F32 value = load_first(x + i, n, 0.0f);
    const Tanh of_tanh = tanh_and_slope(value);
    const F32 results[] = {exp(value), of_tanh.value, of_tanh.slope, exp_anywhere(value), log1p_to_1(value)};
    store_first(out + i, results[function], n);
  }
}

// out = x, read as one type and written as another.
static void simd_convert(int64_t from, const void* x, int64_t to, void* out, int64_t count) {
  with_dtype(from, [&](auto* source) {
    with_dtype(to, [&](auto* target) {
      const auto* typed_x = static_cast<decltype(source)>(const_cast<void*>(x));
      auto* typed_out = static_cast<decltype(target)>(out);
      int64_t i = 0;
      for (; i + kLanes <= count; i += kLanes) store(typed_out + i, load(typed_x + i));
      store_first(typed_out + i, load_first(typed_x + i, int(count - i), 0.0f), int(count - i));
    });
  });
}

}  // namespace alignfast::ALIGNFAST_ISA

ALIGNFAST_EXPORT(simd_function)
ALIGNFAST_EXPORT(simd_convert)
