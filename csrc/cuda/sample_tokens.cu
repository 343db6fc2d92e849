// A token drawn from each row of logits: kernels/ops/sample_tokens.py has the contract and the definition.
//
// A block owns a row. It finds the largest logit, bisects for the least that the filters keep, and then goes down to the
// token: each warp sums one of 16 consecutive parts of the row, the part that the random number falls into is divided
// again, until few enough are left for a thread. Sums are double and their order is fixed, so that a row gives the same
// bits wherever it stands in a batch.
//
// I/O: the logits once from memory; from the L2 cache once more to draw, and once for each step of a bisection, 16 for
// 16-bit logits and 32 for float32, where there is a top-k or a top-p.
//
// Letters: B rows, V vocabulary, N elements of a vector, W warps of a block.
#include "../sample_tokens.h"

#include "block.cuh"
#include "launch.cuh"

namespace alignfast::cuda {
namespace {

constexpr int64_t kLargestV = 2000000000;  // an index may run past the row by a round of all threads
constexpr int kFewest = 32;                // elements that a thread adds up alone

template <typename T>
using Whole = Variant<T, false, false, false, false>;  // a block walks the row

// Bits that a type leaves 0 in a float: steps that its bisection can do without.
template <typename T>
constexpr int kCoarse = 0;
template <>
constexpr int kCoarse<__nv_bfloat16> = 16;
template <>
constexpr int kCoarse<__half> = 13;

struct Batch {
  const int64_t *sequence_B, *position_B;
  int64_t row_stride, sequence_stride, position_stride;
  int vocabulary;
  SampleOptions options;
  int64_t* tokens_B;
  float *logps_B, *sampled_logps_B;
};

template <typename T>
struct Row {
  const T* logits_V;
  int V;
  float inverse;  // of the temperature
  float top = -INFINITY;

  __device__ __forceinline__ float weight(float z) const { return expf((z - top) * inverse); }

  template <typename Add>
  __device__ __forceinline__ void each(Add add) const {
    walk<Whole<T>>(logits_V, V, threadIdx.x, [&](int, const auto& z) {
      constexpr int N = sizeof(z) / sizeof(float);
#pragma unroll
      for (int j = 0; j < N; ++j) add(z[j]);
    });
  }

  // Finds the top; false where the row has no distribution.
  __device__ __forceinline__ bool find_top() {
    float largest = -INFINITY;
    int bad = 0;
    each([&](float z) {
      largest = fmaxf(largest, z);
      bad |= !(z < INFINITY);  // NaN too
    });
    top = over_block(largest, [](float a, float b) { return fmaxf(a, b); });
    return sum_over_block(bad) == 0 && top > -INFINITY;
  }

  __device__ __forceinline__ int64_t count_from(float least) const {
    int64_t count = 0;
    each([&](float z) { count += z >= least; });
    return sum_over_block(count);
  }

  __device__ __forceinline__ double mass_from(float least) const {
    double mass = 0;
    each([&](float z) {
      if (z >= least) mass += weight(z);
    });
    return sum_over_block(mass);
  }
};

// The smallest logit that the filters leave.
template <typename T>
__device__ float least_kept(const Row<T>& row, const SampleOptions& options) {
  float least = least_of_floor(row.top, options), lower = -INFINITY;
  if (options.top_k && options.top_k < row.V) {
    lower = largest_with(lower, row.top, [&](float x) { return row.count_from(x) >= options.top_k; }, kCoarse<T>);
    least = fmaxf(lower, least);
  }
  if (options.top_p < 1) {
    const double wanted = options.top_p * row.mass_from(lower);
    least = fmaxf(
        largest_with(lower, row.top, [&](float x) { return row.mass_from(x) >= wanted; }, kCoarse<T>), least);
  }
  return least;
}

// Weights of a stretch of a row: of all its tokens, and of those that are kept.
struct Mass {
  double all = 0, kept = 0;

  __device__ __forceinline__ void add(float weight, bool is_kept) {
    all += weight;
    if (is_kept) kept += weight;
  }
};

// Of elements [first, last), by the 32 threads of a warp.
template <typename T>
__device__ __forceinline__ Mass mass_of_part(const Row<T>& row, int first, int last, float least) {
  constexpr int N = Vector<T>::kSize;
  Mass mass;
  for (int i = first + threadIdx.x % kWarpSize * N; i < last; i += kWarpSize * N) {
    if (i + N <= last) {
      const auto vector = Vector<T>::load_across(row.logits_V + i);
#pragma unroll
      for (int j = 0; j < N; ++j) {
        const float z = to_float(vector.elements[j]);
        mass.add(row.weight(z), z >= least);
      }
    } else {
      for (int j = i; j < last; ++j) mass.add(row.weight(to_float(row.logits_V[j])), to_float(row.logits_V[j]) >= least);
    }
  }
  for (int bits = kWarpSize / 2; bits > 0; bits /= 2) {
    mass.all += __shfl_xor_sync(kWholeWarp, mass.all, bits);
    mass.kept += __shfl_xor_sync(kWholeWarp, mass.kept, bits);
  }
  return mass;
}

// A walk down to one token.
struct Search {
  int first, last;  // it is in [first, last)
  double left = 0;  // of the kept weights in there, how many go by before it
  Mass others = {};  // outside
};

// Divides [first, last) among the warps and goes on in the part that `left` falls into.
template <typename T>
__device__ void narrow(Search& search, const Row<T>& row, float least, double u, bool is_first) {
  constexpr int N = Vector<T>::kSize;
  const int length = static_cast<int>(ceil_div(search.last - search.first, kRowWarps * N)) * N;
  const auto start = [&](int part) {
    return static_cast<int>(min(search.first + static_cast<int64_t>(part) * length, static_cast<int64_t>(search.last)));
  };
  const int warp = threadIdx.x / kWarpSize;
  const Mass own = mass_of_part(row, start(warp), start(warp + 1), least);
  Mass* parts_W = reinterpret_cast<Mass*>(dynamic_shared);
  __syncthreads();  // what is there has been read
  if (threadIdx.x % kWarpSize == 0) parts_W[warp] = own;
  __syncthreads();
  if (is_first) {
    double kept = 0;
    for (int part = 0; part < kRowWarps; ++part) kept += parts_W[part].kept;
    search.left = u * kept;
  }
  // what rounding leaves over falls to the last part that has any
  int chosen = -1;
  double left = search.left;
  for (int part = 0; part < kRowWarps && (chosen < 0 || left >= parts_W[chosen].kept); ++part) {
    if (parts_W[part].kept == 0) continue;
    if (chosen >= 0) left -= parts_W[chosen].kept;
    chosen = part;
  }
  for (int part = 0; part < kRowWarps; ++part) {
    if (part == chosen) continue;
    search.others.all += parts_W[part].all;
    search.others.kept += parts_W[part].kept;
  }
  search.left = left;
  const int from = start(chosen), to = start(chosen + 1);
  search.first = from;
  search.last = to;
}

// The last steps of the walk: returns the token.
template <typename T>
__device__ int pick(Search& search, const Row<T>& row, float least) {
  int token = -1;
  float of_token = 0;
  double left = search.left;
  for (int v = search.first; v < search.last; ++v) {
    const float z = to_float(row.logits_V[v]), weight = row.weight(z);
    const bool passes = z >= least && weight > 0 && (token < 0 || left >= of_token);
    search.others.add(weight, z >= least);
    if (!passes) continue;
    if (token >= 0) left -= of_token;
    token = v;
    of_token = weight;
  }
  return token;
}

template <typename T>
__global__ void __launch_bounds__(kRowThreads) sample_kernel(const T* __restrict__ logits_BV, Batch batch) {
  const int64_t b = blockIdx.x;
  const SampleOptions& options = batch.options;
  Row<T> row{logits_BV + b * batch.row_stride, batch.vocabulary, static_cast<float>(1 / options.temperature)};
  if (!row.find_top()) {
    if (threadIdx.x == 0) {
      batch.tokens_B[b] = -1;
      batch.logps_B[b] = batch.sampled_logps_B[b] = NAN;
    }
    return;
  }
  const double u = options.greedy ? 0
                                  : philox_uniform(options.seed, batch.sequence_B[b * batch.sequence_stride],
                                                   batch.position_B[b * batch.position_stride]);
  const float least = least_kept(row, options);
  Search search{0, row.V};
  bool is_first = true;
  do {
    narrow(search, row, least, u, is_first);
    is_first = false;
  } while (search.last - search.first > kFewest);
  if (threadIdx.x != 0) return;
  const int token = pick(search, row, least);
  batch.tokens_B[b] = token;
  const float z = to_float(row.logits_V[token]);
  const double exponent = (static_cast<double>(z) - row.top) / options.temperature, weight = row.weight(z);
  batch.logps_B[b] = logp_beside(fmax(search.others.all - weight, 0.0), exponent);
  batch.sampled_logps_B[b] = options.greedy ? 0 : logp_beside(fmax(search.others.kept - weight, 0.0), exponent);
}

}  // namespace

// `scratch` is for csrc/cpu/ alone.
static void sample_tokens(Tensor<2> logits_BV, Tensor<1> sequence_B, Tensor<1> position_B, int64_t seed,
                          double temperature, int64_t top_k, double top_p, double floor, int64_t greedy,
                          Tensor<1> tokens_B, Tensor<1> logps_B, Tensor<1> sampled_logps_B, Tensor<2>, void* stream) {
  const int64_t V = logits_BV.sizes[1];
  if (V > kLargestV) {
    throw std::invalid_argument("sample_tokens: a row must have up to " + std::to_string(kLargestV) +
                                " logits, got " + std::to_string(V));
  }
  const Batch batch = {static_cast<const int64_t*>(sequence_B.data),
                       static_cast<const int64_t*>(position_B.data),
                       logits_BV.strides[0],
                       sequence_B.strides[0],
                       position_B.strides[0],
                       static_cast<int>(V),
                       {seed, temperature, top_k, top_p, floor, greedy != 0},
                       static_cast<int64_t*>(tokens_B.data),
                       static_cast<float*>(logps_B.data),
                       static_cast<float*>(sampled_logps_B.data)};
  with_dtype(logits_BV.dtype, [&](auto zero) {
    using T = decltype(zero);
    launch("sample_tokens", sample_kernel<T>, logits_BV.sizes[0], kRowThreads, kRowWarps * sizeof(Mass), stream,
           static_cast<const T*>(logits_BV.data), batch);
  });
}
ALIGNFAST_EXPORT(sample_tokens)

}  // namespace alignfast::cuda
