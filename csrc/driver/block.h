// One block of a grouped contraction: some rows of one expert × some outputs, in either orientation.
#pragma once

#include "driver/grouped.h"

namespace moelora {

// Rows [row0, row1) in grouped order, outputs [out0, out1), all of one expert.
struct BlockRange {
  int64_t expert, row0, row1, out0, out1;
  const BlockRange* next = nullptr;  // what is probably worked on afterwards; its first weights are fetched
};

// fp32 sums of a token range × output range, for out_order token.
struct TokenSums {
  char* sums;  // [tokens][width], accumulator type
  int64_t token0, width, out0;
};

// Weight rows are the tile's L operand, read in place; x is packed into lanes. For weights contiguous along the depth.
void row_orientation_block(const KernelChoice& choice, const GroupedLinear& op, const BlockRange& range,
                           const TokenSums* sums, Arena& arena);

// Few rows: weight rows and x rows both as they are, dot products over the depth.
void dot_orientation_block(const KernelChoice& choice, const GroupedLinear& op, const BlockRange& range,
                           const TokenSums* sums, Arena& arena);

// x rows are the tile's L operand, read in place; weights are packed into lanes. For weights contiguous along the
// outputs: where tiles can weave them, panel by panel,
void panel_orientation_block(const KernelChoice& choice, const GroupedLinear& op, const BlockRange& range,
                             const TokenSums* sums, Arena& arena);

// the same for few rows,
void thin_orientation_block(const KernelChoice& choice, const GroupedLinear& op, const BlockRange& range,
                            const TokenSums* sums, Arena& arena);

// for fewer still, weights not packed at all,
void flat_orientation_block(const KernelChoice& choice, const GroupedLinear& op, const BlockRange& range,
                            const TokenSums* sums, Arena& arena);

// and for all other weights, some panels at a time.
void strip_orientation_block(const KernelChoice& choice, const GroupedLinear& op, const BlockRange& range,
                             const TokenSums* sums, Arena& arena);

// Outputs per accumulator block; also the width of one part of ⟨row, dot⟩.
int64_t segment_width(const KernelChoice& choice, const GroupedLinear& op);
bool uses_row_orientation(const GroupedLinear& op);
// Of the blocks in the panel orientation.
bool in_thin_passes(const KernelChoice& choice, const BlockRange& block);

// Addresses of column 0 of rows [row0, row0 + count) in grouped order.
const void** row_addresses(const Routing& routing, const RowsIn& in, int64_t row0, int64_t count, Arena& arena);

inline DType accumulator_type(const Kernels& k) { return k.compute == DType::f64 ? DType::f64 : DType::f32; }
inline int64_t accumulator_size(const Kernels& k) { return size_of(accumulator_type(k)); }

}  // namespace moelora
