// What a test may set, as one more function of the emulated module.
#include "../../../csrc/export.h"
#include "cuda_runtime.h"

namespace alignfast::cuda {

// In which order threads and blocks run, and whether mathematical functions err as a GPU's do.
static void configure_emulator(int64_t descending, int64_t approximate) {
  emulator::order = descending ? emulator::Order::kDescending : emulator::Order::kAscending;
  emulator::approximate = approximate;
}
ALIGNFAST_EXPORT(configure_emulator)

}  // namespace alignfast::cuda
