// Small kernels that tests/cuda/test_emulator.py tries the emulator on: one with the mistakes that it must see, and
// one for each thing that it must do right.
#include "../../../csrc/cuda/attention_tile.cuh"
#include "../../../csrc/cuda/launch.cuh"

namespace alignfast::cuda {
namespace {

enum Fault { kNone, kNoBarrier, kOverrun, kUnreached, kDivergent, kUnwritten, kTooManyBytes };

constexpr int kThreads = 64;

// out[i] = in[kThreads - 1 - i] + the sum of lane numbers of a warp
__global__ void reverse_kernel(const float* in, float* out, int fault) {
  float* values = reinterpret_cast<float*>(dynamic_shared);
  const int thread = threadIdx.x;
  if (fault != kUnwritten) values[thread + (fault == kOverrun ? 1 : 0)] = in[thread];
  if (fault == kUnreached && thread == 0) return;
  if (fault != kNoBarrier) __syncthreads();
  float sum = static_cast<float>(thread % kWarpSize);
  if (fault == kDivergent && thread % 2) {
    sum += __shfl_xor_sync(kWholeWarp, sum, 1);
  } else {
    sum += __shfl_xor_sync(kWholeWarp, sum, 1);
  }
  for (int bits = 2; bits < kWarpSize; bits *= 2) sum += __shfl_xor_sync(kWholeWarp, sum, bits);
  out[thread] = values[kThreads - 1 - thread] + sum;
}

template <typename T>
__global__ void widen_kernel(const T* in, float* out) {
  const int i = blockIdx.x * kThreads + threadIdx.x;
  out[i] = to_float(in[i]);
}

template <typename T>
__global__ void narrow_kernel(const float* in, T* out, int64_t count) {
  const int i = blockIdx.x * kThreads + threadIdx.x;
  if (i < count) out[i] = from_float<T>(in[i]);
}

// c = a b by transposed loads of b, d the same by plain loads of its transpose; 16 x 16 each
template <typename T>
__global__ void product_kernel(const T* a, const T* b, const T* b_transposed, float* c, float* d) {
  constexpr int kWidth = 64, kStride = TileShape<T, kWidth>::kStride;
  T* tile = reinterpret_cast<T*>(dynamic_shared);
  const HeadRows<const T> rows[3] = {{a, 16, 0}, {b, 16, 0}, {b_transposed, 16, 0}};
  for (int i = 0; i < 3; ++i) {
    for (int row = threadIdx.x; row < 16; row += kWarpSize) {
      for (int k = 0; k < kWidth; ++k) {
        tile[(16 * i + row) * kStride + k] = k < 16 ? rows[i].row(row, 0)[k] : from_float<T>(0.0f);
      }
    }
  }
  __syncwarp();
  Fragment<16> of_a, result;
  clear<16>(of_a);
  clear<16>(result);
  multiply_transposed<T, kWidth, 16>(result, tile, tile + 32 * kStride);
  for_elements<16>(result, [&](int row, int column, float value) { d[row * 16 + column] = value; });
  for_elements<16>(of_a, [&](int row, int column, float& value) { value = to_float(tile[row * kStride + column]); });
  Fragment<kWidth> wide;
  clear<kWidth>(wide);
  multiply_fragment<T, kWidth, 16>(wide, of_a, tile + 16 * kStride);
  for_elements<kWidth>(wide, [&](int row, int column, float value) {
    if (column < 16) c[row * 16 + column] = value;
  });
}

// Calls visit(T{}) for the two 16-bit types, which alone go through tensor cores.
template <typename Visit>
void with_16_bits(int64_t dtype, Visit visit) {
  if (dtype == kBFloat16) return visit(__nv_bfloat16{});
  visit(__half{});
}

}  // namespace

static void widen(Tensor<1> in, Tensor<1> out, void* stream) {
  with_16_bits(in.dtype, [&](auto zero) {
    using T = decltype(zero);
    launch("widen", widen_kernel<T>, in.sizes[0] / kThreads, kThreads, 0, stream, static_cast<const T*>(in.data),
           static_cast<float*>(out.data));
  });
}
ALIGNFAST_EXPORT(widen)

static void narrow(Tensor<1> in, Tensor<1> out, void* stream) {
  with_16_bits(out.dtype, [&](auto zero) {
    using T = decltype(zero);
    launch("narrow", narrow_kernel<T>, ceil_div(in.sizes[0], kThreads), kThreads, 0, stream,
           static_cast<const float*>(in.data), static_cast<T*>(out.data), in.sizes[0]);
  });
}
ALIGNFAST_EXPORT(narrow)

static void product(Tensor<2> a, Tensor<2> b, Tensor<2> b_transposed, Tensor<2> c, Tensor<2> d, void* stream) {
  with_16_bits(a.dtype, [&](auto zero) {
    using T = decltype(zero);
    launch("product", product_kernel<T>, 1, kWarpSize, 48 * TileShape<T, 64>::kStride * sizeof(T), stream,
           static_cast<const T*>(a.data), static_cast<const T*>(b.data), static_cast<const T*>(b_transposed.data),
           static_cast<float*>(c.data), static_cast<float*>(d.data));
  });
}
ALIGNFAST_EXPORT(product)

static void reverse(Tensor<1> in, Tensor<1> out, int64_t fault, void* stream) {
  const size_t shared_bytes = fault == kTooManyBytes ? 228 * 1024 : kThreads * sizeof(float);
  launch("reverse", reverse_kernel, 1, kThreads, shared_bytes, stream, static_cast<const float*>(in.data),
         static_cast<float*>(out.data), static_cast<int>(fault));
}
ALIGNFAST_EXPORT(reverse)

}  // namespace alignfast::cuda
