#include <cstring>

#include "driver/epilogue.h"
#include "driver/rows.h"
#include "driver/weight_tiles.h"

namespace moelora {
namespace {

// Weight rows that are added to C together; meanwhile the next ones are fetched.
constexpr int64_t kStep = 8;

// c: [rows][ldc] = or += rows l · rows r, of outputs [first, first + width) of those that r begins with.
struct Steps {
  const Kernels& k;
  LeftRows l;
  WeightTiles::FlatOperand r;  // step 0
  int64_t rows, ldc, depth;
  bool to_l1;  // what is fetched

  // after: what is read after step p1
  void add(int64_t p0, int64_t p1, int64_t first, int64_t width, const Ahead& after, Start start, char* c) const {
    for (int64_t p = p0; p < p1; p += kStep, start = Start::resume) {
      const Ahead ahead = p + kStep < p1 ? part(p + kStep, first, width) : after;
      multiply(p, min64(kStep, p1 - p), part(p, first, width).from, ahead, first, width, start, c);
    }
  }

  // All outputs, so many at a time.
  void add_pieces(int64_t p0, int64_t p1, int64_t outputs, const Ahead& after, Start start, char* c) const {
    for (int64_t j = 0, next = outputs; j < ldc; j = next, next += outputs)
      add(p0, p1, j, min64(outputs, ldc - j), next < ldc ? part(p0, next, min64(outputs, ldc - next)) : after, start,
          c);
  }

  // The rows from step p on that are added together, in memory.
  Ahead part(int64_t p, int64_t first, int64_t width) const {
    const int64_t steps_a_row = r.lines ? k.pack : 1, lane_bytes = size_of(r.storage) * steps_a_row;
    return {r.rows.data + first * lane_bytes + p / steps_a_row * r.rows.stride,
            r.rows.stride,
            ceil_div(min64(kStep, depth - p), steps_a_row),
            width * lane_bytes,
            nullptr,
            0,
            to_l1};
  }

  // from: of step p and output `first`
  void multiply(int64_t p, int64_t steps, const void* from, const Ahead& ahead, int64_t first, int64_t width,
                Start start, char* c) const {
    const int64_t groups = ceil_div(rows, kMaxFlatRows);
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t row = g * rows / groups;
      FlatArgs args = tile(row, (g + 1) * rows / groups - row, p, steps, first, width, start, c);
      args.r = from;
      args.r_stride = r.rows.stride;
      if (g == 0) args.ahead = ahead;
      r.lines ? run_flat_lines(k, args) : run_flat_tile(k, r.storage, args);
    }
  }

  // All but R.
  FlatArgs tile(int64_t row, int64_t height, int64_t p, int64_t steps, int64_t first, int64_t width, Start start,
                char* c) const {
    return {l.at(row, p * size_of(k.compute)),
            l.stride,
            nullptr,
            0,
            steps,
            width,
            static_cast<int>(height),
            c + (row * ldc + first) * accumulator_size(k),
            ldc,
            start,
            {}};
  }
};

// The base's rows: in place, or of packed weights some at a time.
class BaseSteps {
 public:
  BaseSteps(const KernelChoice& choice, const WeightTiles& w, const LeftRows& x, int64_t rows, int64_t out,
            int64_t width)
      : w_(w), out_(out), steps_{*choice.kernels, x, {}, rows, width, w.depth(), choice.blocking.rows_to_l1} {
    if (!w.has_lines()) steps_.r = w.flat_rows(out, 0);
  }

  // Bytes that wait for each output.
  int64_t bytes_each() const {
    const Kernels& k = steps_.k;
    return steps_.rows * accumulator_size(k) + (w_.has_lines() ? lined() * size_of(k.compute) : 0);
  }

  // c: all outputs, so many at a time.  after: what is read after the last step
  void set(int64_t p0, int64_t p1, int64_t outputs, const Ahead& after, char* c, Arena& arena) {
    if (w_.has_lines()) return unpack_and_set(p0, p1, outputs, c, arena);
    const Ahead end = p1 < w_.depth() ? steps_.part(p1, 0, min64(outputs, steps_.ldc)) : after;
    steps_.add_pieces(p0, p1, outputs, end, Start::zero, c);
  }

 private:
  // Some steps of all outputs after the other: codes are read in the order of their memory.
  void unpack_and_set(int64_t p0, int64_t p1, int64_t outputs, char* c, Arena& arena) {
    Arena::Scope scope(arena);
    const Kernels& k = steps_.k;
    const int64_t all = steps_.ldc, stride = copy_pitch(k, min64(outputs, all) * k.pack);
    char* some = static_cast<char*>(arena.take(lined() / k.pack * stride));
    steps_.r = {{some, stride}, k.compute, true};
    bool as_codes = true;  // until some must be unpacked: those that follow then probably must, too
    for (int64_t p = p0; p < p1; p += lined()) {
      const int64_t steps = min64(lined(), p1 - p);
      const Start start = p == p0 ? Start::zero : Start::resume;
      as_codes = as_codes && codes_and_set(p, steps, start, c, arena);
      if (as_codes) continue;
      for (int64_t j = 0; j < all; j += outputs) {
        const int64_t width = min64(outputs, all - j);
        w_.lines(out_ + j, width, p, steps, some, stride, 2 * lined(), arena);
        steps_.multiply(p, steps, some, {}, j, width, start, c);
      }
    }
  }

  // Codes as they are; false if it takes unpacking.
  bool codes_and_set(int64_t p, int64_t steps, Start start, char* c, Arena& arena) const {
    const int64_t all = steps_.ldc;
    FlatArgs args = steps_.tile(0, steps_.rows, p, steps, 0, all, start, c);
    args.ahead = w_.rows_ahead(out_, all, p + steps, min64(lined(), w_.depth() - p - steps));
    args.ahead.to_l1 = steps_.to_l1;
    return w_.flat_codes(out_, all, p, steps, 2 * lined(), args, arena);
  }

  int64_t lined() const { return kStep * steps_.k.pack; }

  const WeightTiles& w_;
  const int64_t out_;
  Steps steps_;
};

// What the next block begins with, if it is one of few rows in place, too.
Ahead first_rows(const KernelChoice& choice, const GroupedLinear& op, const BlockRange* block, int64_t outputs) {
  if (block == nullptr || block->row1 - block->row0 > choice.blocking.flat_rows) return {};
  const Kernels& k = *choice.kernels;
  const WeightTiles w(k, op.w, block->expert);
  const int64_t width = min64(outputs, block->out1 - block->out0);
  if (!w.flat_as_stored()) return {};
  return Steps{k, {}, w.flat_rows(block->out0, 0), 0, width, w.depth(), choice.blocking.rows_to_l1}.part(0, 0, width);
}

// LoRA's rows as lanes: in place, or packed into one panel.
WeightTiles::FlatOperand lora_rows(const Kernels& k, const WeightTiles& b, int64_t out, int64_t width, Arena& arena) {
  if (b.flat_as_stored()) return b.flat_rows(out, 0);
  const int64_t lanes = round_up(width, k.lane_step());
  char* panel = static_cast<char*>(arena.take(panel_bytes(k, b.depth(), lanes)));
  b.strip(out, width, 0, b.depth(), panel, lanes, 0, arena);
  return {{panel, lanes * k.pack * size_of(k.compute)}, k.compute, true};
}

}  // namespace

// x: rows in place.  W[e]: [depth][outputs] rows in place, or unpacked some at a time.  C: [rows][outputs].
void flat_orientation_block(const KernelChoice& choice, const GroupedLinear& op, const BlockRange& range,
                            const TokenSums* sums, Arena& arena) {
  Arena::Scope scope(arena);
  const Kernels& k = *choice.kernels;
  const Epilogue epilogue(choice, op, range, sums, arena);
  const WeightTiles w(k, op.w, range.expert);
  const int64_t rows = range.row1 - range.row0, depth = w.depth(), chain = choice.blocking.chain;
  const int64_t width = range.out1 - range.out0, acc = accumulator_size(k);
  const int64_t bytes = rows * width * acc, piece = segment_width(choice, op);
  const int64_t rank = op.u.data ? op.b.cols : 0;
  BaseSteps base(choice, w, x_rows(k, op, range, arena), rows, range.out0, width);
  Steps lora{k, {}, {}, rows, width, rank, choice.blocking.rows_to_l1};
  if (rank) {
    lora.l = left_rows(k, op.u, range.row0, rows, 0, rank, arena);
    lora.r = lora_rows(k, WeightTiles(k, op.b, range.expert), range.out0, width, arena);
  }
  char* c = static_cast<char*>(arena.take(bytes));
  char* total = depth > chain ? static_cast<char*>(arena.take(bytes)) : nullptr;
  const int64_t outputs = max64(1, choice.blocking.flat_bytes / (base.bytes_each() * piece)) * piece;
  const Ahead next = first_rows(choice, op, range.next, outputs);
  const Ahead after = rank ? lora.part(0, 0, min64(outputs, width)) : next;
  for (int64_t p = 0; p < depth; p += chain) {
    const int64_t end = min64(depth, p + chain);
    base.set(p, end, outputs, after, c, arena);
    if (rank && end == depth) lora.add_pieces(0, rank, outputs, next, Start::resume, c);
    if (total && p == 0)
      std::memcpy(total, c, static_cast<size_t>(bytes));
    else if (total)
      k.add(total, c, nullptr, 1.0, rows * width);
  }
  for (int64_t j = 0; j < width; j += piece) {
    epilogue(range.row0, rows, (total ? total : c) + j * acc, width * acc, range.out0 + j, min64(piece, width - j));
  }
}

}  // namespace moelora
