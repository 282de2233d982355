// What `ukernel.h` asks of a caller, checked: in sanitized builds alone, a call that breaks it is reported and aborts.
#pragma once

#include "ukernel/ukernel.h"

namespace moelora {

#ifdef MOELORA_SANITIZED
void check(const Kernels& k, const TileArgs& args);
// l: the storage type of the first segment's L; r: of R
void check(const Kernels& k, const DotArgs& args, DType l);
void check(const Kernels& k, const FlatArgs& args, DType r);
// Of pack_lanes, whose rows are lanes of the panel, and of pack_depth, whose elements are.
void check_pack_lanes(const Kernels& k, const PackArgs& args);
void check_pack_depth(const Kernels& k, const PackArgs& args);
#else
inline void check(const Kernels&, const TileArgs&) {}
inline void check(const Kernels&, const DotArgs&, DType) {}
inline void check(const Kernels&, const FlatArgs&, DType) {}
inline void check_pack_lanes(const Kernels&, const PackArgs&) {}
inline void check_pack_depth(const Kernels&, const PackArgs&) {}
#endif

// The micro-kernels as drivers call them.
inline void run_tile(const Kernels& k, const TileArgs& args) {
  check(k, args);
  k.tile(args);
}
inline void run_dot_tile(const Kernels& k, DType l, const DotArgs& args) {
  check(k, args, l);
  k.dot_tile[static_cast<int>(l)](args);
}
inline void run_flat_tile(const Kernels& k, DType r, const FlatArgs& args) {
  check(k, args, r);
  k.flat_tile[static_cast<int>(r)](args);
}
inline void run_pack_lanes(const Kernels& k, DType source, const PackArgs& args) {
  check_pack_lanes(k, args);
  k.pack_lanes[static_cast<int>(source)](args);
}
inline void run_pack_depth(const Kernels& k, DType source, const PackArgs& args) {
  check_pack_depth(k, args);
  k.pack_depth[static_cast<int>(source)](args);
}

}  // namespace moelora
