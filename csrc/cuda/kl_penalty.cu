// Estimates of a KL divergence, one a token, or their slopes: kernels/ops/kl_penalty.py has the definitions.
//
// I/O: two log-probs are read and a number written: 12 bytes a token.
#include "../kl.h"

#include "launch.cuh"
#include "numbers.cuh"

namespace alignfast::cuda {
namespace {

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads)
    kl_kernel(const float* logps, const float* refs, int kind, bool slope, float* out, int64_t tokens) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= tokens) return;
  const float d = refs[i] - logps[i];
  out[i] = slope ? kl_slope<FloatMath>(kind, d) : kl_estimate<FloatMath>(kind, d);
}

}  // namespace

// All contiguous and float32.
static void kl_penalty(Tensor<1> logps_T, Tensor<1> ref_logps_T, int64_t kind, int64_t slope, Tensor<1> out_T,
                       void* stream) {
  launch("kl_penalty", kl_kernel, ceil_div(out_T.sizes[0], kThreads), kThreads, 0, stream,
         static_cast<const float*>(logps_T.data), static_cast<const float*>(ref_logps_T.data), static_cast<int>(kind),
         slope != 0, static_cast<float*>(out_T.data), out_T.sizes[0]);
}
ALIGNFAST_EXPORT(kl_penalty)

}  // namespace alignfast::cuda
