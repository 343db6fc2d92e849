// Divergence between rows of logits and their reference, and its gradient: kernels/ops/kl_divergence.py has the formulas.
//
// A block owns a row. Each thread keeps sums over its share of both rows, relative to the largest that it has seen of
// each, and they meet once at the end; Jensen and Shannon's needs the probabilities themselves, and so a second walk.
//
// I/O: forward reads both rows once (js: once more, from the L2 cache); backward reads both and writes one. Rows without a
// gradient are not read.
//
// A row is read as its core, plus or minus z, or tanh(z * inner), and x = outer * core. d = outer * (core - the largest
// core of its row), whose first digits are exact where x itself would be rounded; e = e^d.
//
// Letters: T rows, V vocabulary, K what is kept of a row, N elements of a vector; a the distribution that the sum is under,
// b the other.
#include "block.cuh"
#include "launch.cuh"

namespace alignfast::cuda {
namespace {

enum Kind { kForward, kReverse, kJensenShannon };
enum Stat { kDivergence, kTop, kExps, kRefTop, kRefExps, kOwn, kNumStats };  // kOwn: KL(policy || mixture)

constexpr int64_t kLargestV = 2000000000;  // an index may run past the row by a round of all threads
constexpr float kFar = -100.0f;      // e^-100 is 0 in float32, and 0 * -100 is 0 where 0 * -inf is NaN
constexpr float kFarthest = -1e30f;  // stands for -inf in a difference: finite times any e
constexpr float kLog2 = 0.693147181f;

template <typename T, bool kCapped>
using Whole = Variant<T, false, false, false, kCapped>;  // a block walks the row

struct Rows {
  int64_t num_rows, row_stride, ref_row_stride;
  int vocabulary, kind;
  float inner, outer;  // dx/dz = inner * outer, or that times 1 - core^2 under a softcap

  template <typename Is>
  __device__ __forceinline__ float core(float z) const {
    return Is::kCapped ? tanhf(z * inner) : z * inner;
  }
};

// visit(first, x, y) for the elements of both rows: their cores.
template <typename Is, typename Visit>
__device__ __forceinline__ void walk_both(const typename Is::T* row_V, const typename Is::T* ref_V, const Rows& rows,
                                          Visit visit) {
  using Loaded = Vector<typename Is::T>;
  walk<Is>(row_V, rows.vocabulary, threadIdx.x, [&](int first, const auto& z) {
    constexpr int N = sizeof(z) / sizeof(float);
    float x[N], y[N];
    if constexpr (N == Loaded::kSize) {
      const Loaded loaded = Loaded::load_across(ref_V + first);
#pragma unroll
      for (int j = 0; j < N; ++j) y[j] = rows.core<Is>(to_float(loaded.elements[j]));
    } else {
#pragma unroll
      for (int j = 0; j < N; ++j) y[j] = rows.core<Is>(to_float(ref_V[first + j]));
    }
#pragma unroll
    for (int j = 0; j < N; ++j) x[j] = rows.core<Is>(z[j]);
    visit(first, x, y);
  });
}

// --- forward ---

// Of one row: the largest core so far and the sum of e against it.
struct Side {
  float top = -INFINITY;
  double exps = 0;

  __device__ __forceinline__ float base() const { return top == -INFINITY ? 0.0f : top; }

  // Takes a larger top; returns by how much d falls.
  __device__ __forceinline__ float raise(float largest, float outer) {
    if (!(largest > top)) return 0;
    const float step = top == -INFINITY ? 0 : (top - largest) * outer;
    exps *= expf(step);
    top = largest;
    return step;
  }
};

struct PairSums {
  Side a, b;
  double moment = 0;  // sum e_a (d_a - d_b)
  int missing = 0;    // b rules out what a does not

  __device__ __forceinline__ void raise(float a_largest, float b_largest, float outer) {
    const double before = a.exps;
    const float a_step = a.raise(a_largest, outer), b_step = b.raise(b_largest, outer);
    if (a_step != 0 || b_step != 0) {
      moment = expf(a_step) * (moment + (static_cast<double>(a_step) - b_step) * before);
    }
  }

  template <int N>
  __device__ __forceinline__ void add(const float (&a_core)[N], const float (&b_core)[N], float outer) {
    float a_largest = -INFINITY, b_largest = -INFINITY;
#pragma unroll
    for (int j = 0; j < N; ++j) {
      a_largest = fmaxf(a_largest, a_core[j]);
      b_largest = fmaxf(b_largest, b_core[j]);
    }
    raise(a_largest, b_largest, outer);
    const float a_base = a.base(), b_base = b.base();
    float a_exps = 0, b_exps = 0, terms = 0;
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const float a_d = (a_core[j] - a_base) * outer, b_d = (b_core[j] - b_base) * outer, e = __expf(a_d);
      a_exps += e;
      b_exps += __expf(b_d);
      terms += e * (fmaxf(a_d, kFar) - fmaxf(b_d, kFarthest));
      missing |= b_core[j] == -INFINITY && a_core[j] > -INFINITY;
    }
    a.exps += a_exps;  // a conversion to double a vector, not one an element
    b.exps += b_exps;
    moment += terms;
  }

  __device__ __forceinline__ void merge(PairSums other, float outer) {
    raise(other.a.top, other.b.top, outer);
    other.raise(a.top, b.top, outer);
    a.exps += other.a.exps;
    b.exps += other.b.exps;
    moment += other.moment;
    missing |= other.missing;
  }

  __device__ __forceinline__ void merge_warp(float outer) {
    for (int bits = kWarpSize / 2; bits > 0; bits /= 2) {
      PairSums other;
      other.a.top = __shfl_xor_sync(kWholeWarp, a.top, bits);
      other.a.exps = __shfl_xor_sync(kWholeWarp, a.exps, bits);
      other.b.top = __shfl_xor_sync(kWholeWarp, b.top, bits);
      other.b.exps = __shfl_xor_sync(kWholeWarp, b.exps, bits);
      other.moment = __shfl_xor_sync(kWholeWarp, moment, bits);
      other.missing = __shfl_xor_sync(kWholeWarp, missing, bits);
      merge(other, outer);
    }
  }

  // Of all threads, known to each.
  __device__ __forceinline__ void merge_block(float outer) {
    merge_warp(outer);
    PairSums* sums_W = reinterpret_cast<PairSums*>(dynamic_shared);
    const int lane = threadIdx.x % kWarpSize;
    if (lane == 0) sums_W[threadIdx.x / kWarpSize] = *this;
    __syncthreads();
    *this = lane < kRowWarps ? sums_W[lane] : PairSums{};
    merge_warp(outer);
  }

  __device__ __forceinline__ float divergence() const {
    if (!(a.exps > 0 && b.exps > 0 && a.top < INFINITY && b.top < INFINITY)) return NAN;
    return missing ? INFINITY : static_cast<float>(moment / a.exps + log(b.exps / a.exps));
  }
};

// How log p follows from a core.
struct Norm {
  float outer, top, log_sum;

  // never -inf, so that differences and products with a p of 0 are no NaN; a NaN has been seen to by now
  __device__ __forceinline__ float logp(float core) const { return fmaxf((core - top) * outer - log_sum, kFarthest); }
};

// log(p / m) for the mixture m = (p + q) / 2.
__device__ __forceinline__ float log_over_mixture(float logp, float logq) {
  const float gap = logp - logq;
  return fminf(gap, 0.0f) - log1pf(__expf(-fabsf(gap))) + kLog2;
}

template <typename T, bool kCapped>
__global__ void __launch_bounds__(kRowThreads)
    divergence_kernel(const T* __restrict__ logits_TV, const T* __restrict__ ref_TV, Rows rows, float* stats_KT) {
  using Is = Whole<T, kCapped>;
  const int64_t row = blockIdx.x;
  const T *row_V = logits_TV + row * rows.row_stride, *ref_V = ref_TV + row * rows.ref_row_stride;
  const bool under_ref = rows.kind == kForward;
  PairSums sums;
  if (under_ref) {
    walk_both<Is>(row_V, ref_V, rows, [&](int, const auto& x, const auto& y) { sums.add(y, x, rows.outer); });
  } else {
    walk_both<Is>(row_V, ref_V, rows, [&](int, const auto& x, const auto& y) { sums.add(x, y, rows.outer); });
  }
  sums.merge_block(rows.outer);
  const Side own = under_ref ? sums.b : sums.a, ref = under_ref ? sums.a : sums.b;
  float divergence = sums.divergence(), own_divergence = 0;
  if (rows.kind == kJensenShannon && !isnan(divergence)) {  // all threads of the block alike
    const Norm norm{rows.outer, own.top, static_cast<float>(log(own.exps))};
    const Norm ref_norm{rows.outer, ref.top, static_cast<float>(log(ref.exps))};
    double under_own = 0, under_ref_sum = 0;
    walk_both<Is>(row_V, ref_V, rows, [&](int, const auto& x, const auto& y) {
      constexpr int N = sizeof(x) / sizeof(float);
      float of_own = 0, of_ref = 0;
#pragma unroll
      for (int j = 0; j < N; ++j) {
        const float logp = norm.logp(x[j]), logq = ref_norm.logp(y[j]);
        of_own += __expf(logp) * log_over_mixture(logp, logq);
        of_ref += __expf(logq) * log_over_mixture(logq, logp);
      }
      under_own += of_own;
      under_ref_sum += of_ref;
    });
    under_own = sum_over_block(under_own);
    divergence = static_cast<float>((under_own + sum_over_block(under_ref_sum)) / 2);
    own_divergence = static_cast<float>(under_own);
  }
  if (threadIdx.x != 0) return;
  const float stats[kNumStats] = {divergence, own.top, static_cast<float>(own.exps), ref.top,
                                  static_cast<float>(ref.exps), own_divergence};
  for (int k = 0; k < kNumStats; ++k) stats_KT[k * rows.num_rows + row] = stats[k];
}

// --- backward ---

// No __restrict__ on logits and gradient: one may be written onto the other. A thread writes only where it has read.
template <typename T, bool kCapped>
__global__ void __launch_bounds__(kRowThreads)
    gradient_kernel(const T* logits_TV, const T* __restrict__ ref_TV, Rows rows, const float* stats_KT,
                    int64_t stat_stride, int64_t stat_row_stride, const float* dkl_T, int64_t dkl_stride, T* out_TV,
                    int64_t out_stride) {
  using Is = Whole<T, kCapped>;
  const int64_t row = blockIdx.x;
  T* out_V = out_TV + row * out_stride;
  float stats[kNumStats];
#pragma unroll
  for (int k = 0; k < kNumStats; ++k) stats[k] = stats_KT[k * stat_stride + row * stat_row_stride];
  const float dkl = dkl_T[row * dkl_stride], divergence = stats[kDivergence], own = stats[kOwn];
  const bool lost = isnan(divergence) || (rows.kind == kReverse && isinf(divergence));
  if (dkl == 0 || lost) return fill<Is>(out_V, rows.vocabulary, threadIdx.x, dkl == 0 ? 0.0f : NAN);
  const Norm norm{rows.outer, stats[kTop], logf(stats[kExps])};
  const Norm ref_norm{rows.outer, stats[kRefTop], logf(stats[kRefExps])};
  const float dx_dz = rows.inner * rows.outer * dkl;
  const bool vectors_fit = misalignment(out_V) == 0;
  walk_both<Is>(logits_TV + row * rows.row_stride, ref_TV + row * rows.ref_row_stride, rows,
                [&](int first, const auto& x, const auto& y) {
    constexpr int N = sizeof(x) / sizeof(float);
    T dz[N];
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const float logp = norm.logp(x[j]), logq = ref_norm.logp(y[j]);
      // expf, not __expf: p itself is written, and no sum smooths its error
      const float p = expf(logp);
      float dx = 0;
      if (rows.kind == kForward) dx = p - expf(logq);
      if (rows.kind == kReverse) dx = p * (logp - logq - divergence);
      if (rows.kind == kJensenShannon) dx = p * 0.5f * (log_over_mixture(logp, logq) - own);
      dz[j] = from_float<T>(dx * (kCapped ? (1 - x[j] * x[j]) * dx_dz : dx_dz));
    }
    store_elements(out_V + first, dz, vectors_fit);
  });
}

// --- launches ---

Rows rows_of(const Tensor<2>& logits_TV, const Tensor<2>& ref_TV, int64_t kind, double scale, double softcap,
             double temperature) {
  const int64_t V = logits_TV.sizes[1];
  if (V > kLargestV) {
    throw std::invalid_argument("kl_divergence: a row must have up to " + std::to_string(kLargestV) +
                                " logits, got " + std::to_string(V));
  }
  const double inner = softcap > 0 ? scale / softcap : scale < 0 ? -1 : 1;
  const double outer = (softcap > 0 ? softcap : scale < 0 ? -scale : scale) / temperature;
  return {logits_TV.sizes[0], logits_TV.strides[0], ref_TV.strides[0], static_cast<int>(V), static_cast<int>(kind),
          static_cast<float>(inner), static_cast<float>(outer)};
}

}  // namespace

// stats (6, T) contiguous, from logits and their reference (T, V) with unit column strides; kind: a Kind.
static void kl_divergence_forward(Tensor<2> logits_TV, Tensor<2> ref_TV, int64_t kind, double scale, double softcap,
                                  double temperature, Tensor<2> stats_KT, void* stream) {
  const Rows rows = rows_of(logits_TV, ref_TV, kind, scale, softcap, temperature);
  with_dtype(logits_TV.dtype, [&](auto zero) {
    using T = decltype(zero);
    const auto kernel = softcap > 0 ? divergence_kernel<T, true> : divergence_kernel<T, false>;
    launch("kl_divergence_forward", kernel, rows.num_rows, kRowThreads, kRowWarps * sizeof(PairSums), stream,
           static_cast<const T*>(logits_TV.data), static_cast<const T*>(ref_TV.data), rows,
           static_cast<float*>(stats_KT.data));
  });
}
ALIGNFAST_EXPORT(kl_divergence_forward)

static void kl_divergence_backward(Tensor<2> logits_TV, Tensor<2> ref_TV, Tensor<2> stats_KT, Tensor<1> dkl_T,
                                   int64_t kind, double scale, double softcap, double temperature, Tensor<2> out_TV,
                                   void* stream) {
  const Rows rows = rows_of(logits_TV, ref_TV, kind, scale, softcap, temperature);
  with_dtype(logits_TV.dtype, [&](auto zero) {
    using T = decltype(zero);
    const auto kernel = softcap > 0 ? gradient_kernel<T, true> : gradient_kernel<T, false>;
    launch("kl_divergence_backward", kernel, rows.num_rows, kRowThreads, 0, stream,
           static_cast<const T*>(logits_TV.data), static_cast<const T*>(ref_TV.data), rows,
           static_cast<const float*>(stats_KT.data), stats_KT.strides[0], stats_KT.strides[1],
           static_cast<const float*>(dkl_T.data), dkl_T.strides[0], static_cast<T*>(out_TV.data), out_TV.strides[0]);
  });
}
ALIGNFAST_EXPORT(kl_divergence_backward)

}  // namespace alignfast::cuda
