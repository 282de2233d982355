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
void check_flat_lines(const Kernels& k, const FlatArgs& args);
void check_unpack(const Kernels& k, Code code, DType values, const UnpackArgs& args);
void check_unpack_lines(const Kernels& k, Code code, DType values, const UnpackArgs& args);
void check_scales(const Kernels& k, ScaleType type, const ScaleArgs& args);
void check_dot_codes(const Kernels& k, Code code, const UnpackArgs& l, const DotArgs& args);
void check_flat_codes(const Kernels& k, Code code, const UnpackArgs& r, const FlatArgs& args);
#else
inline void check(const Kernels&, const TileArgs&) {}
inline void check(const Kernels&, const DotArgs&, DType) {}
inline void check(const Kernels&, const FlatArgs&, DType) {}
inline void check_pack_lanes(const Kernels&, const PackArgs&) {}
inline void check_pack_depth(const Kernels&, const PackArgs&) {}
inline void check_flat_lines(const Kernels&, const FlatArgs&) {}
inline void check_unpack(const Kernels&, Code, DType, const UnpackArgs&) {}
inline void check_unpack_lines(const Kernels&, Code, DType, const UnpackArgs&) {}
inline void check_scales(const Kernels&, ScaleType, const ScaleArgs&) {}
inline void check_dot_codes(const Kernels&, Code, const UnpackArgs&, const DotArgs&) {}
inline void check_flat_codes(const Kernels&, Code, const UnpackArgs&, const FlatArgs&) {}
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
inline void run_flat_lines(const Kernels& k, const FlatArgs& args) {
  check_flat_lines(k, args);
  k.flat_lines(args);
}
inline void run_unpack(const Kernels& k, Code code, DType values, const UnpackArgs& args) {
  check_unpack(k, code, values, args);
  k.unpack[static_cast<int>(code)][static_cast<int>(values)](args);
}
inline void run_unpack_lines(const Kernels& k, Code code, DType values, const UnpackArgs& args) {
  check_unpack_lines(k, code, values, args);
  k.unpack_lines[static_cast<int>(code)][static_cast<int>(values)](args);
}
inline bool run_dot_codes(const Kernels& k, Code code, const UnpackArgs& l, const DotArgs& args) {
  check_dot_codes(k, code, l, args);
  return k.dot_codes[static_cast<int>(code)](l, args);
}
inline bool run_flat_codes(const Kernels& k, Code code, const UnpackArgs& r, const FlatArgs& args) {
  check_flat_codes(k, code, r, args);
  return k.flat_codes[static_cast<int>(code)](r, args);
}
inline bool run_scales(const Kernels& k, ScaleType type, const ScaleArgs& args) {
  check_scales(k, type, args);
  return k.scales[static_cast<int>(type)](args);
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
