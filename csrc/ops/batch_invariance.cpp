#include <atomic>

#include "ops/tensors.h"

namespace {

std::atomic<bool> process_wide{false};
thread_local int32_t of_this_thread = -1;  // 0, 1, or -1: as the process

}  // namespace

// Python calls these through ctypes: they are no operators, so that graphs do not capture them.
extern "C" {
__attribute__((visibility("default"))) void moelora_set_batch_invariant(int32_t on) { process_wide = on != 0; }
__attribute__((visibility("default"))) void moelora_override_batch_invariant(int32_t on) { of_this_thread = on; }
}

namespace moelora::ops {

bool batch_invariant() { return of_this_thread < 0 ? process_wide.load() : of_this_thread != 0; }

}  // namespace moelora::ops
