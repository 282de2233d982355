// Instruction set × dtype -> micro-kernels and blocking.
#pragma once

#include "dispatch/isa.h"
#include "ukernel/ukernel.h"

namespace moelora {

// How drivers cut their loops and where data waits. Results differ by rounding at most, never with the threads.
struct Blocking {
  int64_t row_chunk;     // rows of one expert in a task; their packed panels share L2
  int64_t dot_rows;      // up to so many rows the dot orientation is faster
  int64_t odd_rows;      // up to so many rows beyond a multiple of half a vector become dot products
  int64_t dot_depth;     // contraction steps that dot products take of each weight row at once
  int64_t few_rows;      // up to so many rows an expert, tasks take all its outputs, so that weights are read in order
  int64_t flat_rows;     // up to so many rows, weights contiguous along the outputs are not packed at all
  int64_t flat_bytes;    // bytes of their sums and of what is unpacked for them: beyond L1, so that rows are read whole
  int64_t thin_rows;     // up to so many rows, passes over weights to be packed are
  int64_t thin_depth;    //   this deep, and
  int64_t thin_strip;    //   this wide, a multiple of strip; packed, they fit L2
  int64_t strip;         // else this wide: outputs that are packed together, a multiple of the widest tile
  int64_t pass_outputs;  // of so many outputs each pass takes the strips in turn: rows of a pass stay in L2
  int64_t packed_strips;     // of packed weights so many strips are unpacked together,
  int64_t byte_strips;       //   so many of codes of a byte,
  int64_t packed_depth;      //   so deep or a chain
  int64_t packed_flat_rows;  // up to so many rows, packed weights go to flat tiles, some steps at a time
  int64_t segment;           // weight rows per accumulator block in the row orientation; the block stays in L2
  int64_t depth;             // contraction steps per pass; two packed panels of them fit half of L2
  int64_t chain;             // steps that are one chain of additions, longer contractions are sums of these
  int64_t outputs;           // output columns of a task; a quarter of it where a task holds sums of all tokens
  int64_t combine_bytes;     // rows that are summed per token are kept apart up to so many bytes
  int64_t token_chunk;       // tokens whose sums a task holds in fp32
  int64_t outer_rows;        // rows of a weight-gradient block
  int64_t outer_cols;        // columns of it; block and panel fit L2
  int64_t outer_depth;       // tokens per pass
  bool rows_to_l1 = false;   // where few rows have weights fetched: the machine's, see isa.h

  // Rows of weights are added up by tiles alone: a chain is a pass of theirs, or there is only one. Passes of strips
  // may divide it.
  static constexpr int64_t endless = int64_t{1} << 40;
  constexpr bool chain_is_a_pass() const { return chain == depth || chain == endless; }

  // How the pass from step `p` on begins.
  Start start(int64_t p) const { return p == 0 ? Start::zero : p % chain == 0 ? Start::add : Start::resume; }
};

struct KernelChoice {
  Isa isa;
  const Kernels* kernels;
  Blocking blocking;
};

// Kernels for tensors of `dtype`: the chosen instruction set where it has that type, else the best below it.
// batch_invariant: one family of kernels for all numbers of rows, so that the bits of a row do not depend on the
// others.
const KernelChoice& kernels_for(DType dtype, bool batch_invariant = false);

// Every kernel set that can run on this machine, whatever MOELORA_ISA says; for tests.
std::vector<KernelChoice> usable_kernels();

// Gives back what kernels hold of the calling thread's matrix unit, if anything. Cheap when there is nothing.
void release_matrix_unit();

}  // namespace moelora
