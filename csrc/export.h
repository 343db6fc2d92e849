// How a compiled function reaches Python: by its name, with plain numbers for arguments.
//
//     ALIGNFAST_EXPORT(token_logps_forward)
//
// at the end of a source file makes `alignfast._cpu.token_logps_forward` (in csrc/cpu/, once for every instruction
// set the file is compiled for) or `alignfast._cuda.token_logps_forward` (in csrc/cuda/). Nothing else is to be
// edited: csrc/module.cpp binds whatever was linked in. A function returns void and takes integers, doubles and
// pointers, which arrive from Python as int, float and int. On the CPU its last argument is the number of threads,
// on CUDA the stream. Sizes and strides are counted in elements.
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
enum DType : int64_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

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
  static constexpr char code = 'i';
  static T from(Argument a) { return static_cast<T>(a.integer); }
};
template <typename T>
struct Unpack<T*> {
  static constexpr char code = 'i';
  static T* from(Argument a) { return reinterpret_cast<T*>(a.integer); }
};
template <>
struct Unpack<double> {
  static constexpr char code = 'd';
  static double from(Argument a) { return a.real; }
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
  static constexpr char signature[] = {Unpack<A>::code..., 0};
  template <int... I>
  static void unpack(const Argument* arguments, Indices<I...>) {
    function(Unpack<A>::from(arguments[I])...);
  }
  static void call(const Argument* arguments) { unpack(arguments, typename MakeIndices<sizeof...(A)>::type{}); }
};

}  // namespace ALIGNFAST_ISA
}  // namespace alignfast

#define ALIGNFAST_EXPORT(function)                                                                              \
  namespace alignfast::ALIGNFAST_ISA {                                                                          \
  static Export function##_export = {#function, ALIGNFAST_STRING(ALIGNFAST_ISA), Erased<&function>::signature, \
                                     &Erased<&function>::call, nullptr};                                        \
  [[maybe_unused]] static const bool function##_is_exported = add_export(&function##_export);                  \
  }
