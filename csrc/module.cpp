// The Python module around the exported functions: alignfast._cpu and alignfast._cuda are this one file.
//
// `isas` lists the instruction sets that were compiled and that this machine has, best first; `isa()` is the one in
// use and `use_isa(name)` changes it, as ALIGNFAST_CPU_ISA does at import.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdlib>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "export.h"

namespace py = pybind11;

namespace alignfast {

// A plain pointer, since it is written before main by the initialisers of other files.
static Export* exports = nullptr;

bool add_export(Export* entry) {
  entry->next = exports;
  exports = entry;
  return true;
}

namespace {

constexpr int kMaxArguments = 128;

bool runs_here(const std::string& isa) {
#if defined(__x86_64__)
  if (isa == "avx512") {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  }
  if (isa == "avx2") {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  }
#endif
  return isa == "portable" || isa == "cuda";
}

std::vector<std::string> find_isas() {
  std::vector<std::string> found;
  for (const char* isa : {"avx512", "avx2", "portable", "cuda"}) {
    bool compiled = false;
    for (Export* entry = exports; entry; entry = entry->next) compiled |= entry->isa == std::string(isa);
    if (compiled && runs_here(isa)) found.push_back(isa);
  }
  return found;
}

std::vector<std::string> isas;
size_t isa_in_use = 0;

void use_isa(const std::string& name) {
  std::string known;
  for (size_t i = 0; i < isas.size(); ++i) {
    if (isas[i] == name) {
      isa_in_use = i;
      return;
    }
    known += (i ? ", " : "") + isas[i];
  }
  throw py::value_error("instruction set '" + name + "' is not compiled in or not on this machine; there are: " + known);
}

// One Python function: its variants by instruction set, in the order of `isas`.
struct Function {
  std::string name;
  std::vector<const Export*> variants;

  void operator()(const py::args& args) const {
    const Export* chosen = variants[isa_in_use];
    const std::string signature = chosen->signature;
    if (args.size() != signature.size()) {
      throw py::type_error(name + " takes " + std::to_string(signature.size()) + " arguments, got " +
                           std::to_string(args.size()));
    }
    Argument arguments[kMaxArguments];
    for (size_t i = 0; i < signature.size(); ++i) {
      if (signature[i] == 'd') {
        arguments[i].real = args[i].cast<double>();
      } else {
        arguments[i].integer = args[i].cast<int64_t>();
      }
    }
    py::gil_scoped_release release;
    chosen->call(arguments);
  }
};

void bind(py::module_& module) {
  isas = find_isas();
  if (const char* wanted = std::getenv("ALIGNFAST_CPU_ISA"); wanted && isas.front() != "cuda") use_isa(wanted);
  std::map<std::string, Function> functions;
  for (Export* entry = exports; entry; entry = entry->next) {
    Function& function = functions[entry->name];
    function.name = entry->name;
    function.variants.resize(isas.size());
    for (size_t i = 0; i < isas.size(); ++i) {
      if (isas[i] == entry->isa) function.variants[i] = entry;
    }
    if (std::string(entry->signature).size() > kMaxArguments) {
      throw std::logic_error(function.name + " has too many arguments; raise kMaxArguments in csrc/module.cpp");
    }
  }
  for (auto& [name, function] : functions) {
    module.attr(name.c_str()) = py::cpp_function(function, py::name(name.c_str()), py::scope(module));
  }
  module.attr("isas") = py::tuple(py::cast(isas));
  module.def("isa", [] { return isas[isa_in_use]; });
  module.def("use_isa", &use_isa, py::arg("name"));
}

}  // namespace
}  // namespace alignfast

PYBIND11_MODULE(ALIGNFAST_MODULE, module) { alignfast::bind(module); }
