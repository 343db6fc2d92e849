// Estimates of a KL divergence, one a token, or their slopes: kernels/ops/kl_penalty.py has the definitions.
//
// I/O: two log-probs are read and a number written: 12 bytes a token.
#include "../kl.h"

#include "simd.h"
#include "threads.h"

namespace alignfast::ALIGNFAST_ISA {

// All contiguous and float32.
static void kl_penalty(Tensor<1> logps_T, Tensor<1> ref_logps_T, int64_t kind, int64_t slope, Tensor<1> out_T,
                       int64_t threads) {
  const auto* logps = static_cast<const float*>(logps_T.data);
  const auto* refs = static_cast<const float*>(ref_logps_T.data);
  auto* out = static_cast<float*>(out_T.data);
  const int64_t tokens = out_T.sizes[0];
  const auto of = [=](F32 d) {
    return slope ? kl_slope<VectorMath>(int(kind), d) : kl_estimate<VectorMath>(int(kind), d);
  };
  const int workers = threads_for(tokens, threads);
#pragma omp parallel for num_threads(workers) if (workers > 1) schedule(static)
  for (int64_t i = 0; i < tokens; i += kLanes) {
    if (tokens - i >= kLanes) {
      store(out + i, of(load(refs + i) - load(logps + i)));
    } else {
      const int n = int(tokens - i);
      store_first(out + i, of(load_first(refs + i, n, 0.0f) - load_first(logps + i, n, 0.0f)), n);
    }
  }
}

}  // namespace alignfast::ALIGNFAST_ISA

ALIGNFAST_EXPORT(kl_penalty)
