// How a compiled function reaches Python: by its name, with plain numbers for arguments.
//
//     static void token_logps_forward(Tensor<2> logits, Tensor<1> targets, double scale, ..., int64_t threads)
//     ALIGNFAST_EXPORT(token_logps_forward)
//
// makes `alignfast._cpu.token_logps_forward` (in csrc/cpu/, once for every instruction set the file is compiled for)
// or `alignfast._cuda.token_logps_forward` (in csrc/cuda/). Nothing else is to be edited: csrc/module.cpp binds
// whatever was linked in, and kernels/ops/_native.py's `launch` calls it with tensors. A function returns void and
// takes Tensor<N>, integers, pointers and doubles. On the CPU its last argument is the number of threads, on CUDA the
// stream. Sizes and strides are counted in elements.
//
// A CPU source is compiled with instructions that the running machine may lack, and the linker keeps one copy of
// an inline function: so csrc/cpu/ uses C headers, simd.h and its own namespace, never the C++ library's templates,
// and a CPU function does not throw. tests/test_build.py looks for such copies.
#pragma once

#include <stdint.h>

#ifndef ALIGNFAST_ISA
#define ALIGNFAST_ISA cuda
#endif
#define ALIGNFAST_STRING_(x) #x
#define ALIGNFAST_STRING(x) ALIGNFAST_STRING_(x)

namespace alignfast {

// The types of _native.py's DTYPES.
enum DType : int64_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kInt64 = 3, kInt32 = 4, kBool = 5 };

// A torch tensor of N dimensions as it is; Python sends 2 + 2 N integers.
template <int N>
struct Tensor {
  void* data;
  int64_t dtype;
  int64_t sizes[N];
  int64_t strides[N];
};

union Argument {
  int64_t integer;
  double real;
};

struct Export {
  const char* name;
  const char* isa;        // portable, avx2, avx512, or cuda
  const char* signature;  // a letter an argument: i integer or pointer, d double
  void (*call)(const Argument*);
  Export* next;
};

bool add_export(Export* entry);  // in module.cpp

namespace ALIGNFAST_ISA {

template <typename T>
struct Unpack {
  static constexpr int count = 1;
  static constexpr char code = 'i';
  static T from(const Argument* a) { return static_cast<T>(a->integer); }
};
template <typename T>
struct Unpack<T*> {
  static constexpr int count = 1;
  static constexpr char code = 'i';
  static T* from(const Argument* a) { return reinterpret_cast<T*>(a->integer); }
};
template <>
struct Unpack<double> {
  static constexpr int count = 1;
  static constexpr char code = 'd';
  static double from(const Argument* a) { return a->real; }
};
template <int N>
struct Unpack<Tensor<N>> {
  static constexpr int count = 2 + 2 * N;
  static constexpr char code = 'i';
  static Tensor<N> from(const Argument* a) {
    Tensor<N> tensor;
    tensor.data = reinterpret_cast<void*>(a[0].integer);
    tensor.dtype = a[1].integer;
    for (int i = 0; i < N; ++i) {
      tensor.sizes[i] = a[2 + i].integer;
      tensor.strides[i] = a[2 + N + i].integer;
    }
    return tensor;
  }
};

template <int... I>
struct Indices {};
template <int N, int... I>
struct MakeIndices : MakeIndices<N - 1, N - 1, I...> {};
template <int... I>
struct MakeIndices<0, I...> {
  using type = Indices<I...>;
};

template <auto function>
struct Erased;
template <typename... A, void (*function)(A...)>
struct Erased<function> {
  static constexpr int length = (Unpack<A>::count + ... + 0);
  struct Letters {
    char text[length + 1];
  };
  static constexpr Letters spell() {
    Letters letters{};
    constexpr char codes[] = {Unpack<A>::code...};
    constexpr int counts[] = {Unpack<A>::count...};
    int at = 0;
    for (unsigned i = 0; i < sizeof...(A); ++i) {
      for (int j = 0; j < counts[i]; ++j) letters.text[at++] = codes[i];
    }
    return letters;
  }
  static constexpr int offset(int argument) {
    constexpr int counts[] = {Unpack<A>::count...};
    int before = 0;
    for (int i = 0; i < argument; ++i) before += counts[i];
    return before;
  }
  static constexpr Letters signature = spell();

  template <int... I>
  static void unpack(const Argument* arguments, Indices<I...>) {
    function(Unpack<A>::from(arguments + offset(I))...);
  }
  static void call(const Argument* arguments) { unpack(arguments, typename MakeIndices<sizeof...(A)>::type{}); }
};

}  // namespace ALIGNFAST_ISA
}  // namespace alignfast

#define ALIGNFAST_EXPORT(function)                                                         \
  namespace alignfast::ALIGNFAST_ISA {                                                     \
  static Export function##_export = {#function, ALIGNFAST_STRING(ALIGNFAST_ISA),           \
                                     Erased<&function>::signature.text,                    \
                                     &Erased<&function>::call, nullptr};                   \
  [[maybe_unused]] static const bool function##_exported = add_export(&function##_export); \
  }
