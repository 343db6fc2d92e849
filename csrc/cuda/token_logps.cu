// Statistics of rows of logits and their gradient: kernels/ops/token_logps.py has the definition.
//
// The target stays out of a row's sums and is added last, so that its log-prob does not lose its digits when it
// approaches 0.
//
// I/O: forward reads the logits once; backward reads and writes them once, and may write onto them. Rows without a
// gradient are not read; rows whose log-sum-exp was rounded too far when it was stored are read twice.
//
// Letters: T rows, V vocabulary, K the six statistics of a row, in the order of STATS.
#include "launch.cuh"
#include "token_row.cuh"

namespace alignfast::cuda {
namespace {

enum Stat { kLogps, kLse, kEntropy, kMeanLogit, kIsTop1, kSumSqProbs, kNumStats };

constexpr int64_t kLargestV = 2000000000;  // an index may run past the row by a round of all threads
constexpr float kRoundedTooFar = 16;       // numbers from here on are stored to 1e-6 or worse

struct Rows {
  const int64_t* targets_T;
  int64_t num_rows, row_stride, target_stride, ignore_index;
  int vocabulary, wanted;
  Transform transform;

  // A kernel may know more statistics than are wanted: those stay 0 and have no gradient.
  __device__ __forceinline__ bool wants(Stat stat) const { return wanted >> stat & 1; }
};

// stats_KT or its gradient, which may be expanded from one number.
struct StatsKT {
  float* data;
  int64_t stat_stride, row_stride;

  static StatsKT of(const Tensor<2>& tensor) {
    return {static_cast<float*>(tensor.data), tensor.strides[0], tensor.strides[1]};
  }
  __device__ __forceinline__ float& at(int stat, int64_t row) const {
    return data[stat * stat_stride + row * row_stride];
  }
};

// Which row a thread works on, as which of the row's threads, and what the row's target is.
template <typename Is>
struct Place {
  int64_t row;
  int thread;
  bool ignored = false, bad = false;
  int target = -1;

  __device__ __forceinline__ explicit Place(const Rows& rows)
      : row(static_cast<int64_t>(blockIdx.x) * (Is::kBlockThreads / Is::kThreads) + threadIdx.x / Is::kThreads),
        thread(threadIdx.x % Is::kThreads) {
    if (row >= rows.num_rows) return;
    const int64_t wanted = rows.targets_T[row * rows.target_stride];
    ignored = wanted == rows.ignore_index;
    bad = !ignored && (wanted < 0 || wanted >= rows.vocabulary);
    target = ignored || bad ? -1 : static_cast<int>(wanted);
  }
};

// --- forward ---

__device__ __forceinline__ float softplus(float x) { return fmaxf(x, 0.0f) + log1pf(expf(-fabsf(x))); }

template <typename Is>
__device__ void write_stats(Sums<Is> sums, float z_target, const Rows& rows, int64_t row, const StatsKT& stats_KT) {
  const Transform& transform = rows.transform;
  const float outer = transform.outer, core = transform.core<Is>(z_target), log_exps = logf(sums.exps);
  const float gap = (sums.base - core) * outer + log_exps;  // log-sum-exp of the others, minus the target's x
  const float excess = log1pf(expf(-fabsf(gap)));
  const bool leads = transform.sign * z_target >= sums.top;
  stats_KT.at(kLogps, row) = -softplus(gap);
  stats_KT.at(kLse, row) = gap > 0 ? fmaf(outer, sums.base, log_exps + excess) : fmaf(outer, core, excess);
  if (leads) sums.rebase(finite(core), outer);
  sums.add(core, outer);
  const float exps = sums.exps;  // now of all classes
  stats_KT.at(kEntropy, row) = Is::kEntropy && rows.wants(kEntropy) ? logf(exps) - sums.weighted / exps : 0;
  stats_KT.at(kMeanLogit, row) =
      Is::kMoments && rows.wants(kMeanLogit) ? outer * sums.total / rows.vocabulary : 0;
  stats_KT.at(kIsTop1, row) = rows.wants(kIsTop1) && leads && !isnan(exps);
  stats_KT.at(kSumSqProbs, row) =
      Is::kMoments && rows.wants(kSumSqProbs) ? sums.squares / (exps * exps) : 0;
}

template <typename Is>
__global__ void __launch_bounds__(Is::kBlockThreads, Is::kBlocksAnSM)
    stats_kernel(const typename Is::T* __restrict__ logits_TV, Rows rows, StatsKT stats_KT) {
  const Place<Is> place(rows);
  if (place.row >= rows.num_rows) return;
  if (place.target < 0) {
    if (place.thread < kNumStats) stats_KT.at(place.thread, place.row) = place.ignored ? 0 : NAN;
    return;
  }
  const auto* row_V = logits_TV + place.row * rows.row_stride;
  const Sums<Is> sums = sum_row<Is>(row_V, rows.vocabulary, place.target, place.thread, rows.transform);
  if (place.thread == 0) write_stats(sums, to_float(row_V[place.target]), rows, place.row, stats_KT);
}

// --- backward ---

// What a row's gradient is made of: its statistics and the gradients that came for them.
struct Upstream {
  float core, offset;  // logp_v = outer * (core_v - core) + offset
  float logp, entropy, sum_sq_probs;
  float dlogp, dlse, dentropy, dmean, dsquares;

  __device__ __forceinline__ bool silent() const {
    return dlogp == 0 && dlse == 0 && dentropy == 0 && dmean == 0 && dsquares == 0;
  }
};

template <typename Is>
__device__ __forceinline__ Upstream read_upstream(const StatsKT& stats_KT, const StatsKT& dstats_KT, int64_t row,
                                                  const Rows& rows) {
  Upstream up{};
  up.logp = stats_KT.at(kLogps, row);
  up.dlogp = dstats_KT.at(kLogps, row);
  up.dlse = dstats_KT.at(kLse, row);
  if (Is::kEntropy && rows.wants(kEntropy)) {
    up.entropy = stats_KT.at(kEntropy, row);
    up.dentropy = dstats_KT.at(kEntropy, row);
  }
  if (Is::kMoments && rows.wants(kMeanLogit)) up.dmean = dstats_KT.at(kMeanLogit, row) / rows.vocabulary;
  if (Is::kMoments && rows.wants(kSumSqProbs)) {
    up.sum_sq_probs = stats_KT.at(kSumSqProbs, row);
    up.dsquares = dstats_KT.at(kSumSqProbs, row);
  }
  return up;
}

template <typename Is>
using WithoutExtras = Variant<typename Is::T, Is::kThreads == kWarpSize, false, false, Is::kCapped>;

// What is stored is rounded: lse = 72 to 4e-6, and so would be every p. The target's logit and log-prob are the better
// pair where the log-prob is the smaller number; where both are large, the row is summed once more.
template <typename Is>
__device__ __forceinline__ void choose_base(Upstream& up, const typename Is::T* row_V, const Place<Is>& place,
                                            const Rows& rows, float lse) {
  const float core = rows.transform.core<Is>(to_float(row_V[place.target]));
  const bool by_target = fabsf(core) < INFINITY && 2 * fabsf(up.logp) < fabsf(lse);
  up.core = by_target ? core : 0;
  up.offset = by_target ? up.logp : -lse;
  const float rounded = fabsf(by_target ? 2 * up.logp : lse);
  if (rounded >= kRoundedTooFar && rounded < INFINITY) {
    const auto all = sum_row<WithoutExtras<Is>>(row_V, rows.vocabulary, -1, place.thread, rows.transform);
    up.core = all.base;
    up.offset = -logf(all.exps);
  }
}

template <typename Is>
__device__ __forceinline__ float gradient(float core, float outer, bool is_target, const Upstream& up) {
  // expf, not __expf: p itself is written, and no sum smooths its error
  const float logp = fmaf(core - up.core, outer, up.offset), p = expf(logp);
  // at the target -expm1 of its log-prob, since 1 - p would lose its digits
  float dx = is_target ? p * up.dlse - up.dlogp * expm1f(up.logp) : p * (up.dlse - up.dlogp);
  if (Is::kEntropy && logp != -INFINITY) dx -= up.dentropy * p * (logp + up.entropy);
  if (Is::kMoments) dx += up.dmean + 2 * up.dsquares * p * (p - up.sum_sq_probs);
  return dx;
}

// No __restrict__: the gradient may be written onto the logits. In the walk a thread writes only where it reads.
template <typename Is>
__global__ void __launch_bounds__(Is::kBlockThreads, Is::kBlocksAnSM)
    gradient_kernel(const typename Is::T* logits_TV, Rows rows, StatsKT stats_KT, StatsKT dstats_KT,
                    typename Is::T* out_TV, int64_t out_stride) {
  using T = typename Is::T;
  const Place<Is> place(rows);
  if (place.row >= rows.num_rows) return;
  const int V = rows.vocabulary;
  const Transform& transform = rows.transform;
  T* out_V = out_TV + place.row * out_stride;
  const T* row_V = logits_TV + place.row * rows.row_stride;
  Upstream up = read_upstream<Is>(stats_KT, dstats_KT, place.row, rows);
  if (place.target < 0 || up.silent()) return fill<Is>(out_V, V, place.thread, place.bad ? NAN : 0.0f);
  choose_base<Is>(up, row_V, place, rows, stats_KT.at(kLse, place.row));
  // every thread has read the target's logit before one overwrites it
  if constexpr (Is::kThreads == kWarpSize) {
    __syncwarp();
  } else {
    __syncthreads();
  }
  const bool vectors_fit = misalignment(out_V) == 0;
  walk<Is>(row_V, V, place.thread, [&](int first, const auto& z) {
    constexpr int N = sizeof(z) / sizeof(float);
    T dz[N];
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const float core = transform.core<Is>(z[j]);
      const float slope = Is::kCapped ? (1 - core * core) * transform.slope : transform.slope;
      dz[j] = from_float<T>(slope * gradient<Is>(core, transform.outer, first + j == place.target, up));
    }
    store_elements(out_V + first, dz, vectors_fit);
  });
}

// --- launches ---

Rows rows_of(const Tensor<2>& logits_TV, const Tensor<1>& targets_T, int64_t ignore_index, int64_t wanted,
             Transform transform) {
  const int64_t V = logits_TV.sizes[1];
  if (V < 1 || V > kLargestV) {
    throw std::invalid_argument("token_logps: a row must have 1 to " + std::to_string(kLargestV) + " logits, got " +
                                std::to_string(V));
  }
  return {static_cast<const int64_t*>(targets_T.data), logits_TV.sizes[0], logits_TV.strides[0], targets_T.strides[0],
          ignore_index, static_cast<int>(V), static_cast<int>(wanted), transform};
}

void check_columns(const Tensor<2>& tensor, const char* name) {
  if (tensor.sizes[0] > 0 && tensor.sizes[1] > 1 && tensor.strides[1] != 1) {
    throw std::invalid_argument(std::string("token_logps: ") + name +
                                " must be contiguous along the vocabulary, got a stride of " +
                                std::to_string(tensor.strides[1]));
  }
}

// Calls visit(Variant{}) with the variant for a type, a shape and a set of statistics. A softcap has one variant, with
// all statistics, to keep the number of kernels down.
template <typename Visit>
void with_variant(int64_t dtype, const Rows& rows, bool capped, Visit visit) {
  const int wanted = rows.wanted;
  const bool entropy = wanted >> kEntropy & 1, moments = (wanted >> kMeanLogit | wanted >> kSumSqProbs) & 1;
  with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    const auto with_rows = [&](auto one_warp) {
      constexpr bool kOneWarp = one_warp;
      if (capped) return visit(Variant<T, kOneWarp, true, true, true>{});
      if (moments) return visit(Variant<T, kOneWarp, true, true, false>{});
      if (entropy) return visit(Variant<T, kOneWarp, true, false, false>{});
      visit(Variant<T, kOneWarp, false, false, false>{});
    };
    if (rows.vocabulary <= kWarpRowV) return with_rows(std::true_type{});
    with_rows(std::false_type{});
  });
}

template <typename Is>
int64_t blocks_for(const Rows& rows) {
  return ceil_div(rows.num_rows, Is::kBlockThreads / Is::kThreads);
}

}  // namespace

static void token_logps_forward(Tensor<2> logits_TV, Tensor<1> targets_T, double scale, double softcap,
                                double temperature, int64_t ignore_index, int64_t wanted, Tensor<2> stats_KT,
                                void* stream) {
  check_columns(logits_TV, "logits");
  const Rows rows = rows_of(logits_TV, targets_T, ignore_index, wanted, Transform::of(scale, softcap, temperature));
  with_variant(logits_TV.dtype, rows, softcap > 0, [&](auto variant) {
    using Is = decltype(variant);
    launch("token_logps_forward", stats_kernel<Is>, blocks_for<Is>(rows), Is::kBlockThreads,
           Is::kBlockThreads / kWarpSize * sizeof(Sums<Is>), stream,
           static_cast<const typename Is::T*>(logits_TV.data), rows, StatsKT::of(stats_KT));
  });
}
ALIGNFAST_EXPORT(token_logps_forward)

static void token_logps_backward(Tensor<2> logits_TV, Tensor<1> targets_T, Tensor<2> stats_KT, Tensor<2> dstats_KT,
                                 double scale, double softcap, double temperature, int64_t ignore_index,
                                 int64_t wanted, Tensor<2> out_TV, void* stream) {
  check_columns(logits_TV, "logits");
  check_columns(out_TV, "the gradient");
  const Rows rows = rows_of(logits_TV, targets_T, ignore_index, wanted, Transform::of(scale, softcap, temperature));
  with_variant(logits_TV.dtype, rows, softcap > 0, [&](auto variant) {
    using Is = decltype(variant);
    using T = typename Is::T;
    launch("token_logps_backward", gradient_kernel<Is>, blocks_for<Is>(rows), Is::kBlockThreads,
           Is::kBlockThreads / kWarpSize * sizeof(Sums<WithoutExtras<Is>>), stream,
           static_cast<const T*>(logits_TV.data), rows, StatsKT::of(stats_KT), StatsKT::of(dstats_KT),
           static_cast<T*>(out_TV.data), out_TV.strides[0]);
  });
}
ALIGNFAST_EXPORT(token_logps_backward)

}  // namespace alignfast::cuda
