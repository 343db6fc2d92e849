// Statistics of rows of logits and their gradient: kernels/ops/token_logps.py has the definition.
//
// A row belongs to one warp (V <= 1024) or one block. Each thread keeps sums of exponentials over its share, relative
// to the largest it has seen, and they meet once at the end. The target stays out of the sums and is added last, so that
// its log-prob does not lose its digits when it approaches 0.
//
// I/O: forward reads the logits once; backward reads and writes them once, and may write onto them. Rows without a
// gradient are not read.
//
// Letters: T rows, V vocabulary, K the six statistics of a row, in the order of STATS.
#include "launch.cuh"
#include "numbers.cuh"

namespace alignfast::cuda {
namespace {

enum Stat { kLogps, kLse, kEntropy, kMeanLogit, kIsTop1, kSumSqProbs, kNumStats };

constexpr int kWarpRowV = 1024;     // rows up to here are left to a warp
constexpr int kWarpRowsABlock = 4;  // then four share a block
constexpr int kBlockThreads = 512;
constexpr int kUnroll = 4;   // vectors in flight a thread: 512 threads x 64 bytes x 2 blocks hide an SM's latency
constexpr int64_t kLargestV = 2000000000;  // an index may run past the row by a round of all threads
constexpr int threads_a_block(int row_threads) {
  return row_threads == kWarpSize ? kWarpSize * kWarpRowsABlock : row_threads;
}

// x = outer * core(z), dx/dz = slope, or (1 - core^2) * slope under a softcap.
struct Transform {
  float inner, outer, slope;
  float sign;  // of the scale: sign * z rises with x
  bool capped;

  static Transform of(double scale, double softcap, double temperature) {
    const bool capped = softcap > 0;
    return {static_cast<float>(capped ? scale / softcap : 1),
            static_cast<float>((capped ? softcap : scale) / temperature),
            static_cast<float>(scale / temperature), scale < 0 ? -1.0f : 1.0f, capped};
  }
  __device__ __forceinline__ float core(float z) const { return capped ? tanhf(z * inner) : z; }
};

struct Rows {
  const int64_t* targets_T;
  int64_t num_rows, row_stride, target_stride, ignore_index;
  int vocabulary;
  Transform transform;
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

// --- sums over a row ---

__device__ __forceinline__ float finite(float x) { return fmaxf(fminf(x, FLT_MAX), -FLT_MAX); }

template <bool kWithEntropy, bool kWithMoments>
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
      if (kWithEntropy) weighted = factor > 0 ? factor * (weighted + exps * shift) : 0;
      if (kWithMoments) squares *= factor * factor;
      exps *= factor;
    }
    base = to;
  }

  __device__ __forceinline__ void raise(float largest, const Transform& transform) {
    if (!(largest > top)) return;
    top = largest;
    rebase(finite(transform.core(transform.sign * top)), transform.outer);
  }

  __device__ __forceinline__ void add(float core, float outer) {
    const float d = (core - base) * outer, e = __expf(d);
    exps += e;
    if (kWithEntropy) weighted += d == -INFINITY ? 0 : e * d;
    if (kWithMoments) squares += e * e;
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
    if (kWithEntropy) other.weighted = __shfl_xor_sync(kWholeWarp, weighted, bits);
    if (kWithMoments) other.squares = __shfl_xor_sync(kWholeWarp, squares, bits);
    if (kWithMoments) other.total = __shfl_xor_sync(kWholeWarp, total, bits);
    return other;
  }

  __device__ __forceinline__ void merge_warp(float outer) {
    for (int bits = kWarpSize / 2; bits > 0; bits /= 2) merge(from_lane(bits), outer);
  }
};

// Sums of all warps of the block, for its first warp.
template <typename AnySums>
__device__ __forceinline__ void merge_block(AnySums& sums, AnySums* shared_W, float outer) {
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  sums.merge_warp(outer);
  if (lane == 0) shared_W[warp] = sums;
  __syncthreads();
  if (warp > 0) return;
  sums = lane < kBlockThreads / kWarpSize ? shared_W[lane] : AnySums{};
  sums.merge_warp(outer);
}

// --- a row, shared out among threads ---

// visit(first, z) for the elements of a row, `z` an array of floats. Which thread takes which elements depends on their
// index alone, not on how the row lies in memory: a row gives the same bits wherever it stands in a batch.
template <typename T, int kThreads, typename Visit>
__device__ __forceinline__ void walk(const T* row_V, int V, int thread, Visit visit) {
  constexpr int N = Vector<T>::kSize;
  const int vectors = V / N;
  const auto many = [&](int i, const Vector<T>& vector) {
    float z[N];
#pragma unroll
    for (int j = 0; j < N; ++j) z[j] = to_float(vector.elements[j]);
    visit(i * N, z);
  };
  int i = thread;
  if (misalignment(row_V) == 0) {
    for (; i + (kUnroll - 1) * kThreads < vectors; i += kUnroll * kThreads) {
      Vector<T> loaded[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) loaded[u] = Vector<T>::load(row_V + (i + u * kThreads) * N);
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) many(i + u * kThreads, loaded[u]);
    }
  }
  for (; i < vectors; i += kThreads) many(i, Vector<T>::load_across(row_V + i * N));
  if (const int last = vectors * N + thread; last < V) {
    const float z[1] = {to_float(row_V[last])};
    visit(last, z);
  }
}

// The row of a thread and its number among the row's threads; no row for the warps that are left over.
template <int kThreads>
struct Place {
  int64_t row;
  int thread;
  __device__ __forceinline__ Place()
      : row(static_cast<int64_t>(blockIdx.x) * (blockDim.x / kThreads) + threadIdx.x / kThreads),
        thread(threadIdx.x % kThreads) {}
};

// --- forward ---

__device__ __forceinline__ float softplus(float x) { return fmaxf(x, 0.0f) + log1pf(expf(-fabsf(x))); }

template <bool kWithEntropy, bool kWithMoments>
__device__ void write_stats(Sums<kWithEntropy, kWithMoments> sums, float z_target, const Rows& rows, int64_t row,
                            const StatsKT& stats_KT) {
  const Transform& transform = rows.transform;
  const float outer = transform.outer, core = transform.core(z_target), log_exps = logf(sums.exps);
  const float gap = (sums.base - core) * outer + log_exps;  // log-sum-exp of the others, minus the target's x
  const bool leads = transform.sign * z_target >= sums.top;
  stats_KT.at(kLogps, row) = -softplus(gap);
  stats_KT.at(kLse, row) = fmaf(outer, gap > 0 ? sums.base : core, log1pf(expf(-fabsf(gap))) + (gap > 0 ? log_exps : 0));
  if (leads) sums.rebase(finite(core), outer);
  sums.add(core, outer);
  const float exps = sums.exps;  // now of all classes
  stats_KT.at(kEntropy, row) = kWithEntropy ? logf(exps) - sums.weighted / exps : 0;
  stats_KT.at(kMeanLogit, row) = kWithMoments ? transform.outer * sums.total / rows.vocabulary : 0;
  stats_KT.at(kIsTop1, row) = leads && !isnan(exps);
  stats_KT.at(kSumSqProbs, row) = kWithMoments ? sums.squares / (exps * exps) : 0;
}

template <typename T, int kThreads, bool kWithEntropy, bool kWithMoments>
__global__ void __launch_bounds__(threads_a_block(kThreads), kThreads == kWarpSize ? 8 : 2)
    stats_kernel(const T* __restrict__ logits_TV, Rows rows, StatsKT stats_KT) {
  using RowSums = Sums<kWithEntropy, kWithMoments>;
  const Place<kThreads> place;
  if (place.row >= rows.num_rows) return;
  const int V = rows.vocabulary;
  const int64_t target = rows.targets_T[place.row * rows.target_stride];
  const bool ignored = target == rows.ignore_index;
  if (ignored || target < 0 || target >= V) {
    if (place.thread < kNumStats) stats_KT.at(place.thread, place.row) = ignored ? 0 : NAN;
    return;
  }
  const T* row_V = logits_TV + place.row * rows.row_stride;
  const Transform& transform = rows.transform;
  RowSums sums;
  walk<T, kThreads>(row_V, V, place.thread, [&](int first, const auto& z) {
    constexpr int N = sizeof(z) / sizeof(float);
    float core[N], largest = -INFINITY;
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const bool is_target = first + j == target;
      core[j] = transform.core(z[j]);
      if (kWithMoments) sums.total += core[j];
      if (is_target) core[j] = transform.outer > 0 ? -INFINITY : INFINITY;
      largest = fmaxf(largest, is_target ? -INFINITY : transform.sign * z[j]);
    }
    sums.raise(largest, transform);
#pragma unroll
    for (int j = 0; j < N; ++j) sums.add(core[j], transform.outer);
  });
  if constexpr (kThreads == kWarpSize) {
    sums.merge_warp(transform.outer);
  } else {
    merge_block(sums, reinterpret_cast<RowSums*>(dynamic_shared), transform.outer);
  }
  if (place.thread == 0) write_stats(sums, to_float(row_V[target]), rows, place.row, stats_KT);
}

// --- backward ---

// What a row's gradient is made of: its statistics and the gradients that came for them.
//
// logp_v = outer * (core_v - core) + offset with the target's core and log-prob, or with 0 and -lse: whichever offset
// is the smaller number, since what is stored is rounded: lse = 25 to 1e-6, logp = -0.01 to 5e-10.
struct Upstream {
  float core, offset, logp, entropy, sum_sq_probs;
  float dlogp, dlse, dentropy, dmean, dsquares;

  __device__ __forceinline__ bool silent() const {
    return dlogp == 0 && dlse == 0 && dentropy == 0 && dmean == 0 && dsquares == 0;
  }
  __device__ __forceinline__ void choose_offset(float core_target, float lse) {
    const bool by_target = fabsf(core_target) < INFINITY && 4 * fabsf(logp) < fabsf(lse);
    core = by_target ? core_target : 0;
    offset = by_target ? logp : -lse;
  }
};

template <bool kWithEntropy, bool kWithMoments>
__device__ __forceinline__ Upstream read_upstream(const StatsKT& stats_KT, const StatsKT& dstats_KT, int64_t row,
                                                  int V) {
  Upstream up{};
  up.logp = stats_KT.at(kLogps, row);
  up.dlogp = dstats_KT.at(kLogps, row);
  up.dlse = dstats_KT.at(kLse, row);
  if (kWithEntropy) {
    up.entropy = stats_KT.at(kEntropy, row);
    up.dentropy = dstats_KT.at(kEntropy, row);
  }
  if (kWithMoments) {
    up.sum_sq_probs = stats_KT.at(kSumSqProbs, row);
    up.dmean = dstats_KT.at(kMeanLogit, row) / V;
    up.dsquares = dstats_KT.at(kSumSqProbs, row);
  }
  return up;
}

template <bool kWithEntropy, bool kWithMoments>
__device__ __forceinline__ float gradient(float core, float outer, bool is_target, const Upstream& up) {
  // expf, not __expf: p itself is written, and no sum smooths its error
  const float logp = fmaf(core - up.core, outer, up.offset), p = expf(logp);
  // at the target -expm1 of its log-prob, since 1 - p would lose its digits
  float dx = is_target ? p * up.dlse - up.dlogp * expm1f(up.logp) : p * (up.dlse - up.dlogp);
  if (kWithEntropy && logp != -INFINITY) dx -= up.dentropy * p * (logp + up.entropy);
  if (kWithMoments) dx += up.dmean + 2 * up.dsquares * p * (p - up.sum_sq_probs);
  return dx;
}

template <typename T, int kThreads>
__device__ __forceinline__ void fill(T* row_V, int V, int thread, float value) {
  constexpr int N = Vector<T>::kSize;
  const int off = misalignment(row_V) / static_cast<int>(sizeof(T));
  const int head = min(V, off ? N - off : 0), vectors = (V - head) / N, tail = head + vectors * N;
  Vector<T> filled;
#pragma unroll
  for (int j = 0; j < N; ++j) filled.elements[j] = from_float<T>(value);
  if (thread < head) row_V[thread] = filled.elements[0];
  for (int i = thread; i < vectors; i += kThreads) filled.store(row_V + head + i * N);
  if (tail + thread < V) row_V[tail + thread] = filled.elements[0];
}

// No __restrict__: the gradient may be written onto the logits. A thread writes only what it has read itself.
template <typename T, int kThreads, bool kWithEntropy, bool kWithMoments>
__global__ void __launch_bounds__(threads_a_block(kThreads), kThreads == kWarpSize ? 8 : 2)
    gradient_kernel(const T* logits_TV, Rows rows, StatsKT stats_KT, StatsKT dstats_KT, T* out_TV, int64_t out_stride) {
  const Place<kThreads> place;
  if (place.row >= rows.num_rows) return;
  const int V = rows.vocabulary;
  T* out_V = out_TV + place.row * out_stride;
  const int64_t target = rows.targets_T[place.row * rows.target_stride];
  const bool ignored = target == rows.ignore_index, bad = !ignored && (target < 0 || target >= V);
  Upstream up = read_upstream<kWithEntropy, kWithMoments>(stats_KT, dstats_KT, place.row, V);
  if (ignored || bad || up.silent()) return fill<T, kThreads>(out_V, V, place.thread, bad ? NAN : 0.0f);
  const T* row_V = logits_TV + place.row * rows.row_stride;
  const Transform& transform = rows.transform;
  const bool vectors_fit = misalignment(out_V) == 0;
  up.choose_offset(transform.core(to_float(row_V[target])), stats_KT.at(kLse, place.row));
  walk<T, kThreads>(row_V, V, place.thread, [&](int first, const auto& z) {
    constexpr int N = sizeof(z) / sizeof(float);
    T dz[N];
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const float core = transform.core(z[j]);
      const float slope = transform.capped ? (1 - core * core) * transform.slope : transform.slope;
      const bool is_target = first + j == target;
      dz[j] = from_float<T>(slope * gradient<kWithEntropy, kWithMoments>(core, transform.outer, is_target, up));
    }
    if constexpr (N == Vector<T>::kSize) {
      if (vectors_fit) {
        Vector<T> vector;
#pragma unroll
        for (int j = 0; j < N; ++j) vector.elements[j] = dz[j];
        return vector.store(out_V + first);
      }
    }
#pragma unroll
    for (int j = 0; j < N; ++j) out_V[first + j] = dz[j];
  });
}

// --- choice of kernel ---

Rows rows_of(const Tensor<2>& logits_TV, const Tensor<1>& targets_T, int64_t ignore_index, Transform transform) {
  const int64_t V = logits_TV.sizes[1];
  if (V < 1 || V > kLargestV) {
    throw std::invalid_argument("token_logps: a row must have 1 to " + std::to_string(kLargestV) + " logits, got " +
                                std::to_string(V));
  }
  if (logits_TV.sizes[0] > 0 && V > 1 && logits_TV.strides[1] != 1) {
    throw std::invalid_argument("token_logps: logits must be contiguous along the vocabulary, got a stride of " +
                                std::to_string(logits_TV.strides[1]));
  }
  return {static_cast<const int64_t*>(targets_T.data), logits_TV.sizes[0], logits_TV.strides[0], targets_T.strides[0],
          ignore_index, static_cast<int>(V), transform};
}

// Calls visit(threads a row, entropy, moments), each an integral_constant, for a shape and a set of statistics.
template <typename Visit>
void with_variant(int64_t V, int64_t wanted, Visit visit) {
  const bool entropy = wanted >> kEntropy & 1, moments = (wanted >> kMeanLogit | wanted >> kSumSqProbs) & 1;
  const auto with_threads = [&](auto with_entropy, auto with_moments) {
    if (V <= kWarpRowV) {
      visit(std::integral_constant<int, kWarpSize>{}, with_entropy, with_moments);
    } else {
      visit(std::integral_constant<int, kBlockThreads>{}, with_entropy, with_moments);
    }
  };
  if (moments) return with_threads(std::true_type{}, std::true_type{});
  if (entropy) return with_threads(std::true_type{}, std::false_type{});
  with_threads(std::false_type{}, std::false_type{});
}

}  // namespace

static void token_logps_forward(Tensor<2> logits_TV, Tensor<1> targets_T, double scale, double softcap,
                                double temperature, int64_t ignore_index, int64_t wanted, Tensor<2> stats_KT,
                                void* stream) {
  const Rows rows = rows_of(logits_TV, targets_T, ignore_index, Transform::of(scale, softcap, temperature));
  with_dtype(logits_TV.dtype, [&](auto zero) {
    using T = decltype(zero);
    with_variant(rows.vocabulary, wanted, [&](auto threads, auto entropy, auto moments) {
      constexpr bool kEntropy = entropy, kMoments = moments;
      constexpr int kBlock = threads_a_block(threads);
      const size_t shared_bytes = kBlock / kWarpSize * sizeof(Sums<kEntropy, kMoments>);
      launch("token_logps_forward", stats_kernel<T, threads, kEntropy, kMoments>,
             ceil_div(rows.num_rows, kBlock / threads), kBlock, shared_bytes, stream,
             static_cast<const T*>(logits_TV.data), rows, StatsKT::of(stats_KT));
    });
  });
}
ALIGNFAST_EXPORT(token_logps_forward)

static void token_logps_backward(Tensor<2> logits_TV, Tensor<1> targets_T, Tensor<2> stats_KT, Tensor<2> dstats_KT,
                                 double scale, double softcap, double temperature, int64_t ignore_index,
                                 int64_t wanted, Tensor<2> out_TV, void* stream) {
  if (out_TV.sizes[0] > 0 && out_TV.sizes[1] > 1 && out_TV.strides[1] != 1) {
    throw std::invalid_argument("token_logps: the gradient must be contiguous along the vocabulary, got a stride of " +
                                std::to_string(out_TV.strides[1]));
  }
  const Rows rows = rows_of(logits_TV, targets_T, ignore_index, Transform::of(scale, softcap, temperature));
  with_dtype(logits_TV.dtype, [&](auto zero) {
    using T = decltype(zero);
    with_variant(rows.vocabulary, wanted, [&](auto threads, auto entropy, auto moments) {
      constexpr int kBlock = threads_a_block(threads);
      launch("token_logps_backward", gradient_kernel<T, threads, entropy, moments>,
             ceil_div(rows.num_rows, kBlock / threads), kBlock, 0, stream, static_cast<const T*>(logits_TV.data), rows,
             StatsKT::of(stats_KT), StatsKT::of(dstats_KT), static_cast<T*>(out_TV.data), out_TV.strides[0]);
    });
  });
}
ALIGNFAST_EXPORT(token_logps_backward)

}  // namespace alignfast::cuda
