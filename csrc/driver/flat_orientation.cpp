#include <cstring>

#include "driver/epilogue.h"
#include "driver/rows.h"
#include "driver/weight_tiles.h"

namespace moelora {
namespace {

// Weight rows whose streams the processor follows side by side, and whose lines share a set of L1.
constexpr int64_t kStep = 8;

// c: [rows][width] = or += rows l · rows r, steps [p0, p1).
struct Steps {
  const Kernels& k;
  LeftRows l;
  WeightTiles::FlatOperand r;  // step 0
  int64_t rows, width, element;

  void add(int64_t p0, int64_t p1, Start start, char* c) const {
    for (int64_t p = p0; p < p1; p += kStep, start = Start::resume)
      run_flat_tile(k, r.storage,
                    {l.at(0, p * element), l.stride, r.rows.data + p * r.rows.stride, r.rows.stride,
                     min64(kStep, p1 - p), width, static_cast<int>(rows), c, width, start, kStep * r.rows.stride});
  }
};

// LoRA's rows as lanes: in place, or packed into one panel, which is the same with one p a line.
WeightTiles::FlatOperand lora_rows(const Kernels& k, const WeightTiles& b, int64_t out, int64_t width, Arena& arena) {
  if (b.flat_as_stored()) return b.flat_rows(out, 0);
  const int64_t lanes = round_up(width, k.lane_step());
  char* panel = static_cast<char*>(arena.take(panel_bytes(k, b.depth(), lanes)));
  b.strip(out, width, 0, b.depth(), panel, lanes, 0, arena);
  return {{panel, lanes * size_of(k.compute)}, k.compute};
}

}  // namespace

// x: rows in place.  W[e]: [depth][outputs] rows in place.  C: [rows][outputs].
void flat_orientation_block(const KernelChoice& choice, const GroupedLinear& op, const BlockRange& range,
                            const TokenSums* sums, Arena& arena) {
  Arena::Scope scope(arena);
  const Kernels& k = *choice.kernels;
  const Epilogue epilogue(choice, op, range, sums, arena);
  const WeightTiles w(k, op.w, range.expert);
  const int64_t rows = range.row1 - range.row0, depth = w.depth(), chain = choice.blocking.chain;
  const int64_t width = range.out1 - range.out0, acc = accumulator_size(k), size = size_of(k.compute);
  const int64_t bytes = rows * width * acc, piece = segment_width(choice, op);
  const Steps base{k, x_rows(k, op, range, arena), w.flat_rows(range.out0, 0), rows, width, size};
  char* c = static_cast<char*>(arena.take(bytes));
  char* total = depth > chain ? static_cast<char*>(arena.take(bytes)) : nullptr;
  for (int64_t p = 0; p < depth; p += chain) {
    const int64_t end = min64(depth, p + chain);
    base.add(p, end, Start::zero, c);
    if (op.u.data && end == depth) {
      const WeightTiles b(k, op.b, range.expert);
      const LeftRows u = left_rows(k, op.u, range.row0, rows, 0, b.depth(), arena);
      const Steps lora{k, u, lora_rows(k, b, range.out0, width, arena), rows, width, size};
      lora.add(0, b.depth(), Start::resume, c);
    }
    if (total && p == 0)
      std::memcpy(total, c, static_cast<size_t>(bytes));
    else if (total)
      k.add(total, c, nullptr, 1.0, rows * width);
  }
  for (int64_t j = 0; j < width; j += piece) {
    const int64_t outputs = min64(piece, width - j);
    epilogue(range.row0, rows, (total ? total : c) + j * acc, width * acc, range.out0 + j, outputs);
  }
}

}  // namespace moelora
