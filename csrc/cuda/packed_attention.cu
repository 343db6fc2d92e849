// Attention over packed trees and its gradient: kernels/ops/packed_attention.py has the definition.
//
// A block owns a tile of rows of one segment and walks what the rows see, or are seen by, in at most a few runs of
// consecutive tokens: forward and dquery, a tile of queries over its prompt and its own segment; dkey and dvalue, a
// tile of keys over the queries of its own segment and, from a prompt, of its answers. Within a run, what counts is
// the position in the sequence alone: 0 <= position of query - position of key < window.
// No tile holds rows of two segments, so no NaN crosses from one to another. Nothing is added by atomics: the same
// input gives the same bits.
//
// Letters: T tokens, H query heads, K key heads, G = H / K, E head width, S segments.
#include "attention_tile.cuh"
#include "launch.cuh"

namespace alignfast::cuda {
namespace {

struct Segment {
  int start, length, prompt_start, prompt_length;
};

struct Problem {
  const Segment* segments_S;  // in the order of their starts, and so of their prompts'
  int num_segments, num_tokens, num_heads, num_key_heads, width, window;  // window: INT32_MAX for none
  float scale, softcap;                                                   // softcap: 0 for none
  bool vectors_fit;
};

// Consecutive tokens with consecutive positions.
struct Run {
  int token, position, count;
};

// --- which rows a block owns ---

// Segments have ceil(length / kRows) tiles each, and no table says where a segment's begin: segment s begins with slot
// start / kRows + s, which leaves room for all before it. A few slots stay empty.
template <int kRows>
__host__ __device__ constexpr int64_t num_slots(int64_t num_tokens, int64_t num_segments) {
  return num_tokens / kRows + num_segments;
}

// The first index below n for which reached(index) holds, reached being false and then true.
template <typename Reached>
__device__ __forceinline__ int first_index(int n, Reached reached) {
  int low = 0, high = n;
  while (low < high) {
    const int middle = (low + high) / 2;
    if (reached(middle)) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return low;
}

struct Tile {
  int index;  // of the segment
  Segment segment;
  int first, rows;  // rows <= 0: an empty slot

  __device__ __forceinline__ int token() const { return segment.start + first; }
  __device__ __forceinline__ int position() const { return segment.prompt_length + first; }
};

template <int kRows>
__device__ __forceinline__ Tile find_tile(const Problem& problem, int slot) {
  const Segment* segments_S = problem.segments_S;
  const int after = first_index(problem.num_segments, [&](int s) { return segments_S[s].start / kRows + s > slot; });
  Tile tile;
  tile.index = after - 1;
  tile.segment = segments_S[tile.index];
  tile.first = (slot - tile.segment.start / kRows - tile.index) * kRows;
  tile.rows = min(kRows, tile.segment.length - tile.first);
  return tile;
}

// --- scores ---

struct Score {
  float value, slope;  // slope: by scale * q . k
};

__device__ __forceinline__ Score score_of(const Problem& problem, float dot) {
  const float raw = dot * problem.scale;
  if (problem.softcap == 0) return {raw, 1};
  const float t = tanhf(raw / problem.softcap);
  return {t * problem.softcap, 1 - t * t};
}

__device__ __forceinline__ bool sees(const Problem& problem, int query_position, int key_position) {
  return key_position <= query_position && query_position - key_position < problem.window;
}

// Whether every query of a stretch of positions sees every key of another.
__device__ __forceinline__ bool all_see(const Problem& problem, int query, int queries, int key, int keys) {
  return key + keys - 1 <= query && query + queries - 1 - key < problem.window;
}

// visit(token, position, count) for kColumns tokens of the run after the other, from the first that is near enough
// to the position of a query.
template <int kColumns, typename Visit>
__device__ __forceinline__ void walk_keys(const Problem& problem, const Run& run, int query_position, Visit visit) {
  const int skipped = max(0, query_position - run.position - problem.window + 1);
  for (int i = skipped; i < run.count; i += kColumns) {
    visit(run.token + i, run.position + i, min(kColumns, run.count - i));
  }
}

// The keys of a tile of queries: the prompt's, then those of its segment up to its last row.
template <int kColumns, typename Visit>
__device__ __forceinline__ void walk_all_keys(const Problem& problem, const Tile& tile, Visit visit) {
  const Segment& segment = tile.segment;
  walk_keys<kColumns>(problem, {segment.prompt_start, 0, segment.prompt_length}, tile.position(), visit);
  walk_keys<kColumns>(problem, {segment.start, segment.prompt_length, tile.first + tile.rows}, tile.position(), visit);
}

// --- forward ---

__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(kWholeWarp, x, 1));
  return fmaxf(x, __shfl_xor_sync(kWholeWarp, x, 2));
}
__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(kWholeWarp, x, 1);
  return x + __shfl_xor_sync(kWholeWarp, x, 2);
}

template <typename T, int kWidth>
__global__ void __launch_bounds__(TileShape<T, kWidth>::kThreads)
    forward_kernel(Problem problem, HeadRows<const T> query, HeadRows<const T> key, HeadRows<const T> value,
                   HeadRows<T> out, float* lse_HT) {
  using Shape = TileShape<T, kWidth>;
  constexpr int kRows = Shape::kRows, kColumns = Shape::kColumns, kStride = Shape::kStride;
  const int head = blockIdx.x % problem.num_heads;
  const int key_head = head / (problem.num_heads / problem.num_key_heads);
  const Tile tile = find_tile<kRows>(problem, blockIdx.x / problem.num_heads);
  if (tile.rows <= 0) return;
  T* query_tile = reinterpret_cast<T*>(dynamic_shared);
  T* key_tile = query_tile + kRows * kStride;
  T* value_tile = key_tile + kColumns * kStride;
  const int warp_row = threadIdx.x / kWarpSize * kWarpRows;
  load_tile<T, kWidth, kRows>(query_tile, query, tile.token(), tile.rows, head, problem.width, problem.vectors_fit);

  Fragment<kWidth> sums;
  clear<kWidth>(sums);
  float largest[2] = {-INFINITY, -INFINITY}, exps[2] = {0, 0};  // of rows g and g + 8; exps: this lane's part
  walk_all_keys<kColumns>(problem, tile, [&](int token, int position, int count) {
    __syncthreads();  // the tiles before are done with
    load_tile<T, kWidth, kColumns>(key_tile, key, token, count, key_head, problem.width, problem.vectors_fit);
    load_tile<T, kWidth, kColumns>(value_tile, value, token, count, key_head, problem.width, problem.vectors_fit);
    __syncthreads();
    if (warp_row >= tile.rows) return;
    Fragment<kColumns> scores;
    clear<kColumns>(scores);
    multiply_transposed<T, kWidth, kColumns>(scores, query_tile + warp_row * kStride, key_tile);
    const bool whole = count == kColumns && all_see(problem, tile.position(), kRows, position, kColumns);
    const auto counts = [&](int row, int column) {
      return whole || (column < count && sees(problem, tile.position() + warp_row + row, position + column));
    };
    float top[2] = {largest[0], largest[1]};
    for_elements<kColumns>(scores, [&](int row, int column, float& score) {
      score = score_of(problem, score).value;
      if (counts(row, column)) top[row / 8] = fmaxf(top[row / 8], score);
    });
    float factor[2], base[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      top[i] = quad_max(top[i]);
      base[i] = top[i] == -INFINITY ? 0 : top[i];  // nothing seen yet: differences must not be NaN
      factor[i] = expf(largest[i] - base[i]);
      largest[i] = top[i];
      exps[i] *= factor[i];
    }
    for_elements<kColumns>(scores, [&](int row, int column, float& score) {
      score = counts(row, column) ? __expf(score - base[row / 8]) : 0;
      exps[row / 8] += score;
    });
    for_elements<kWidth>(sums, [&](int row, int, float& sum) { sum *= factor[row / 8]; });
    multiply_fragment<T, kWidth, kColumns>(sums, scores, value_tile);
  });
  if (warp_row >= tile.rows) return;
  const float total[2] = {quad_sum(exps[0]), quad_sum(exps[1])};
  const int token = tile.token() + warp_row, rows = tile.rows - warp_row;
  store_fragment<T, kWidth>(sums, out, token, rows, head, problem.width, [&](int i) { return 1 / total[i]; });
  const int lane = threadIdx.x % kWarpSize;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = lane / 4 + 8 * i;
    if (lane % 4 == 0 && row < rows) {
      lse_HT[static_cast<int64_t>(head) * problem.num_tokens + token + row] = largest[i] + logf(total[i]);
    }
  }
}

// --- backward ---

// Inputs that both backward kernels read. delta_HT = sum_e dout out is written by the first, read by the second.
template <typename T>
struct Backward {
  HeadRows<const T> query, key, value, out, dout;
  const float* lse_HT;
  float* delta_HT;
};

template <typename T, int kWidth>
__global__ void __launch_bounds__(TileShape<T, kWidth>::kThreads)
    query_gradient_kernel(Problem problem, Backward<T> in, HeadRows<T> dquery) {
  using Shape = TileShape<T, kWidth>;
  constexpr int kRows = Shape::kRows, kColumns = Shape::kColumns, kStride = Shape::kStride;
  const int head = blockIdx.x % problem.num_heads;
  const int key_head = head / (problem.num_heads / problem.num_key_heads);
  const Tile tile = find_tile<kRows>(problem, blockIdx.x / problem.num_heads);
  if (tile.rows <= 0) return;
  T* query_tile = reinterpret_cast<T*>(dynamic_shared);
  T* dout_tile = query_tile + kRows * kStride;
  T* key_tile = dout_tile + kRows * kStride;
  T* value_tile = key_tile + kColumns * kStride;
  const int lane = threadIdx.x % kWarpSize, warp_row = threadIdx.x / kWarpSize * kWarpRows;
  load_tile<T, kWidth, kRows>(query_tile, in.query, tile.token(), tile.rows, head, problem.width, problem.vectors_fit);
  load_tile<T, kWidth, kRows>(dout_tile, in.dout, tile.token(), tile.rows, head, problem.width, problem.vectors_fit);
  __syncthreads();

  const int64_t row_of_head = static_cast<int64_t>(head) * problem.num_tokens + tile.token() + warp_row;
  float lse[2] = {0, 0}, delta[2] = {0, 0};
  for (int row = 0; row < min(kWarpRows, tile.rows - warp_row); ++row) {
    const T* out_E = in.out.row(static_cast<int64_t>(tile.token()) + warp_row + row, head);
    float sum = 0;
    for (int e = lane; e < problem.width; e += kWarpSize) {
      sum += to_float(out_E[e]) * to_float(dout_tile[(warp_row + row) * kStride + e]);
    }
    for (int bits = kWarpSize / 2; bits > 0; bits /= 2) sum += __shfl_xor_sync(kWholeWarp, sum, bits);
    if (lane == 0) in.delta_HT[row_of_head + row] = sum;
    if (lane / 4 == row % 8) {
      delta[row / 8] = sum;
      lse[row / 8] = in.lse_HT[row_of_head + row];
    }
  }

  Fragment<kWidth> sums;
  clear<kWidth>(sums);
  walk_all_keys<kColumns>(problem, tile, [&](int token, int position, int count) {
    __syncthreads();  // the tiles before are done with
    load_tile<T, kWidth, kColumns>(key_tile, in.key, token, count, key_head, problem.width, problem.vectors_fit);
    load_tile<T, kWidth, kColumns>(value_tile, in.value, token, count, key_head, problem.width, problem.vectors_fit);
    __syncthreads();
    if (warp_row >= tile.rows) return;
    Fragment<kColumns> dots, dprobs;
    clear<kColumns>(dots);
    clear<kColumns>(dprobs);
    multiply_transposed<T, kWidth, kColumns>(dots, query_tile + warp_row * kStride, key_tile);
    multiply_transposed<T, kWidth, kColumns>(dprobs, dout_tile + warp_row * kStride, value_tile);
    const bool whole = count == kColumns && all_see(problem, tile.position(), kRows, position, kColumns);
#pragma unroll
    for (int n = 0; n < kColumns / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + i / 2 * 8, column = 8 * n + lane % 4 * 2 + i % 2;
        const bool counts =
            whole || (column < count && sees(problem, tile.position() + warp_row + row, position + column));
        const Score score = score_of(problem, dots[n][i]);
        dots[n][i] =
            counts ? __expf(score.value - lse[i / 2]) * (dprobs[n][i] - delta[i / 2]) * score.slope : 0;
      }
    }
    multiply_fragment<T, kWidth, kColumns>(sums, dots, key_tile);
  });
  if (warp_row >= tile.rows) return;
  store_fragment<T, kWidth>(sums, dquery, tile.token() + warp_row, tile.rows - warp_row, head, problem.width,
                            [&](int) { return problem.scale; });
}

// visit(run) for the queries that read a tile of keys: the rest of its segment, and a prompt's answers. Without a
// window the answers are one run, since each of their queries reads the whole prompt, whatever its position.
template <typename Visit>
__device__ __forceinline__ void walk_readers(const Problem& problem, const Tile& tile, Visit visit) {
  const Segment& segment = tile.segment;
  const int reach = problem.window == INT32_MAX ? INT32_MAX : tile.position() + tile.rows - 1 + problem.window;
  visit(Run{tile.token(), tile.position(), min(segment.length - tile.first, reach - tile.position())});
  const auto answers = [&](int s) {
    return s < problem.num_segments && problem.segments_S[s].prompt_length > 0 &&
           problem.segments_S[s].prompt_start == segment.start;
  };
  const int position = segment.length;  // of an answer's first token
  if (segment.prompt_length > 0 || !answers(tile.index + 1) || position >= reach) return;
  if (problem.window == INT32_MAX) {
    const int next_tree = first_index(problem.num_segments,
                                      [&](int s) { return problem.segments_S[s].prompt_start > segment.start; });
    const int end = next_tree < problem.num_segments ? problem.segments_S[next_tree].start : problem.num_tokens;
    visit(Run{segment.start + segment.length, position, end - segment.start - segment.length});
    return;
  }
  for (int s = tile.index + 1; answers(s); ++s) {
    visit(Run{problem.segments_S[s].start, position, min(problem.segments_S[s].length, reach - position)});
  }
}

// kWithKeys, kWithValues: which of the two gradients. Widths above 128 take them one at a time, as the accumulators of
// both would not fit into registers.
template <typename T, int kWidth, bool kWithKeys, bool kWithValues>
__global__ void __launch_bounds__(TileShape<T, kWidth>::kThreads)
    key_gradient_kernel(Problem problem, Backward<T> in, HeadRows<T> dkey, HeadRows<T> dvalue) {
  using Shape = TileShape<T, kWidth>;
  constexpr int kRows = Shape::kRows, kColumns = Shape::kColumns, kStride = Shape::kStride;
  const int key_head = blockIdx.x % problem.num_key_heads, group = problem.num_heads / problem.num_key_heads;
  const Tile tile = find_tile<kRows>(problem, blockIdx.x / problem.num_key_heads);
  if (tile.rows <= 0) return;
  T* key_tile = reinterpret_cast<T*>(dynamic_shared);
  T* value_tile = key_tile + kRows * kStride;
  T* query_tile = value_tile + kRows * kStride;
  T* dout_tile = query_tile + kColumns * kStride;
  float* lse = reinterpret_cast<float*>(dout_tile + kColumns * kStride);
  float* delta = lse + kColumns;
  const int lane = threadIdx.x % kWarpSize, warp_row = threadIdx.x / kWarpSize * kWarpRows;
  load_tile<T, kWidth, kRows>(key_tile, in.key, tile.token(), tile.rows, key_head, problem.width, problem.vectors_fit);
  load_tile<T, kWidth, kRows>(value_tile, in.value, tile.token(), tile.rows, key_head, problem.width,
                              problem.vectors_fit);

  Fragment<kWidth> key_sums, value_sums;
  clear<kWidth>(key_sums);
  clear<kWidth>(value_sums);
  const auto add = [&](int head, int token, int position, int count) {
    __syncthreads();  // the tiles before are done with
    load_tile<T, kWidth, kColumns>(query_tile, in.query, token, count, head, problem.width, problem.vectors_fit);
    load_tile<T, kWidth, kColumns>(dout_tile, in.dout, token, count, head, problem.width, problem.vectors_fit);
    const int thread = threadIdx.x;
    if (thread < count) {
      const int64_t row = static_cast<int64_t>(head) * problem.num_tokens + token + thread;
      lse[thread] = in.lse_HT[row];
      delta[thread] = in.delta_HT[row];
    }
    __syncthreads();
    if (warp_row >= tile.rows) return;
    Fragment<kColumns> dots, dprobs;
    clear<kColumns>(dots);
    clear<kColumns>(dprobs);
    multiply_transposed<T, kWidth, kColumns>(dots, key_tile + warp_row * kStride, query_tile);
    if (kWithKeys) multiply_transposed<T, kWidth, kColumns>(dprobs, value_tile + warp_row * kStride, dout_tile);
    const bool whole = count == kColumns && all_see(problem, position, kColumns, tile.position(), kRows);
#pragma unroll
    for (int n = 0; n < kColumns / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + i / 2 * 8, column = 8 * n + lane % 4 * 2 + i % 2;
        const bool counts =
            whole || (column < count && sees(problem, position + column, tile.position() + warp_row + row));
        const Score score = score_of(problem, dots[n][i]);
        dots[n][i] = counts ? __expf(score.value - lse[column]) : 0;
        dprobs[n][i] = counts ? dots[n][i] * (dprobs[n][i] - delta[column]) * score.slope : 0;
      }
    }
    if (kWithValues) multiply_fragment<T, kWidth, kColumns>(value_sums, dots, dout_tile);
    if (kWithKeys) multiply_fragment<T, kWidth, kColumns>(key_sums, dprobs, query_tile);
  };
  for (int head = key_head * group; head < (key_head + 1) * group; ++head) {
    walk_readers(problem, tile, [&](const Run& run) {
      for (int i = 0; i < run.count; i += kColumns) {
        add(head, run.token + i, run.position + i, min(kColumns, run.count - i));
      }
    });
  }
  const int token = tile.token() + warp_row, rows = tile.rows - warp_row;
  if (kWithKeys) {
    store_fragment<T, kWidth>(key_sums, dkey, token, rows, key_head, problem.width,
                              [&](int) { return problem.scale; });
  }
  if (kWithValues) {
    store_fragment<T, kWidth>(value_sums, dvalue, token, rows, key_head, problem.width, [](int) { return 1.0f; });
  }
}

// --- launches ---

template <typename T>
HeadRows<T> rows_of(const Tensor<3>& tensor) {
  if (tensor.sizes[2] > 1 && tensor.strides[2] != 1) {
    throw std::invalid_argument("packed_attention: heads must be contiguous along their width, got a stride of " +
                                std::to_string(tensor.strides[2]));
  }
  return {static_cast<T*>(tensor.data), tensor.strides[0], tensor.strides[1]};
}

// Whether each head of each token lies on 16 bytes.
bool on_vectors(const Tensor<3>& tensor) {
  const int64_t size = tensor.dtype == kFloat32 ? 4 : 2;
  return misalignment(tensor.data) == 0 && tensor.strides[0] * size % kVectorBytes == 0 &&
         tensor.strides[1] * size % kVectorBytes == 0 && tensor.sizes[2] * size % kVectorBytes == 0;
}

Problem problem_of(const Tensor<3>& query, const Tensor<3>& key, const Tensor<3>& value, const Tensor<2>& segments_S4,
                   double scale, int64_t window, double softcap) {
  if (query.sizes[2] > 256) {
    throw std::invalid_argument("packed_attention: heads up to 256 wide, got " + std::to_string(query.sizes[2]));
  }
  return {static_cast<const Segment*>(segments_S4.data), static_cast<int>(segments_S4.sizes[0]),
          static_cast<int>(query.sizes[0]), static_cast<int>(query.sizes[1]), static_cast<int>(key.sizes[1]),
          static_cast<int>(query.sizes[2]),
          window > 0 && window < query.sizes[0] ? static_cast<int>(window) : INT32_MAX,
          static_cast<float>(scale), static_cast<float>(softcap),
          on_vectors(query) && on_vectors(key) && on_vectors(value)};
}

// Calls visit(T{}, width), the width an integral_constant.
template <typename Visit>
void with_kernel(int64_t dtype, int width, Visit visit) {
  with_dtype(dtype, [&](auto zero) {
    if (width <= 64) return visit(zero, std::integral_constant<int, 64>{});
    if (width <= 128) return visit(zero, std::integral_constant<int, 128>{});
    visit(zero, std::integral_constant<int, 256>{});
  });
}

}  // namespace

static void packed_attention_forward(Tensor<3> query, Tensor<3> key, Tensor<3> value, Tensor<2> segments_S4,
                                     double scale, int64_t window, double softcap, Tensor<3> out, Tensor<2> lse_HT,
                                     void* stream) {
  const Problem problem = problem_of(query, key, value, segments_S4, scale, window, softcap);
  with_kernel(query.dtype, problem.width, [&](auto zero, auto width) {
    using T = decltype(zero);
    constexpr int kWidth = width;
    using Shape = TileShape<T, kWidth>;
    const size_t shared_bytes = (Shape::kRows + 2 * Shape::kColumns) * Shape::kStride * sizeof(T);
    launch("packed_attention_forward", forward_kernel<T, kWidth>,
           num_slots<Shape::kRows>(problem.num_tokens, problem.num_segments) * problem.num_heads, Shape::kThreads,
           shared_bytes, stream, problem, rows_of<const T>(query), rows_of<const T>(key), rows_of<const T>(value),
           rows_of<T>(out), static_cast<float*>(lse_HT.data));
  });
}
ALIGNFAST_EXPORT(packed_attention_forward)

// delta_HT is workspace, of lse_HT's shape; both are contiguous float32.
static void packed_attention_backward(Tensor<3> dout, Tensor<3> query, Tensor<3> key, Tensor<3> value, Tensor<3> out,
                                      Tensor<2> lse_HT, Tensor<2> segments_S4, double scale, int64_t window,
                                      double softcap, Tensor<2> delta_HT, Tensor<3> dquery, Tensor<3> dkey,
                                      Tensor<3> dvalue, void* stream) {
  Problem problem = problem_of(query, key, value, segments_S4, scale, window, softcap);
  problem.vectors_fit = problem.vectors_fit && on_vectors(dout);
  with_kernel(query.dtype, problem.width, [&](auto zero, auto width) {
    using T = decltype(zero);
    constexpr int kWidth = width;
    using Shape = TileShape<T, kWidth>;
    const Backward<T> inputs = {rows_of<const T>(query), rows_of<const T>(key), rows_of<const T>(value),
                                rows_of<const T>(out), rows_of<const T>(dout), static_cast<const float*>(lse_HT.data),
                                static_cast<float*>(delta_HT.data)};
    const int64_t slots = num_slots<Shape::kRows>(problem.num_tokens, problem.num_segments);
    const size_t tiles = 2 * (Shape::kRows + Shape::kColumns) * Shape::kStride * sizeof(T);
    launch("packed_attention_backward: dquery", query_gradient_kernel<T, kWidth>, slots * problem.num_heads,
           Shape::kThreads, tiles, stream, problem, inputs, rows_of<T>(dquery));
    const auto keys = [&](auto kernel) {
      launch("packed_attention_backward: dkey, dvalue", kernel, slots * problem.num_key_heads, Shape::kThreads,
             tiles + 2 * Shape::kColumns * sizeof(float), stream, problem, inputs, rows_of<T>(dkey),
             rows_of<T>(dvalue));
    };
    if constexpr (kWidth <= 128) {
      keys(key_gradient_kernel<T, kWidth, true, true>);
    } else {
      keys(key_gradient_kernel<T, kWidth, true, false>);
      keys(key_gradient_kernel<T, kWidth, false, true>);
    }
  });
}
ALIGNFAST_EXPORT(packed_attention_backward)

}  // namespace alignfast::cuda
