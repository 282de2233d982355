#include "driver/grouped.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "driver/grouped_block.h"

namespace moelora {
namespace {

void run_block(const KernelChoice& choice, const GroupedLinear& op, const BlockRange& range, const TokenSums* sums,
               Arena& arena) {
  if (range.row0 == range.row1 || range.out0 == range.out1) return;
  const int64_t rows = range.row1 - range.row0;
  if (!uses_row_orientation(op) && rows <= choice.blocking.thin_rows)
    thin_orientation_block(choice, op, range, sums, arena);
  else if (!uses_row_orientation(op))
    panel_orientation_block(choice, op, range, sums, arena);
  else if (choice.kernels->dot_tile && rows <= choice.blocking.dot_rows)
    dot_orientation_block(choice, op, range, sums, arena);
  else
    row_orientation_block(choice, op, range, sums, arena);
}

// `pieces` nearly equal ranges of [0, total) with borders on multiples of `unit`.
int64_t border(int64_t piece, int64_t pieces, int64_t total, int64_t unit) {
  return min64(total, piece * ceil_div(total, unit) / pieces * unit);
}

// Into how many ranges of outputs an expert's work is cut. Few rows: none, so that weights are read in order, unless
// there are too few experts for the threads.
int64_t task_pieces(const KernelChoice& choice, const GroupedLinear& op, const Runtime& runtime) {
  const Routing& routing = *op.routing;
  int64_t used = 0;
  for (int64_t e = 0; e < routing.experts; ++e) used += routing.begin(e) < routing.end(e);
  const int64_t balanced = ceil_div(4 * runtime.threads, max64(1, used));
  if (routing.routed() <= used * choice.blocking.thin_rows) return balanced;
  return max64(balanced, ceil_div(op.w.rows, choice.blocking.outputs));
}

// Rows stay apart: a task is a chunk of an expert's rows × a range of outputs, largest first.
void run_apart(const KernelChoice& choice, const GroupedLinear& op, const Runtime& runtime) {
  const Routing& routing = *op.routing;
  const int64_t unit = segment_width(choice, op), outputs = op.w.rows;
  const int64_t pieces = max64(1, min64(task_pieces(choice, op, runtime), ceil_div(outputs, unit)));
  std::vector<BlockRange> tasks;
  for (int64_t e = 0; e < routing.experts; ++e) {
    const int64_t rows = routing.end(e) - routing.begin(e);
    const int64_t chunks = ceil_div(rows, choice.blocking.row_chunk);
    for (int64_t chunk = 0; chunk < chunks; ++chunk)
      for (int64_t piece = 0; piece < pieces; ++piece)
        tasks.push_back({e, routing.begin(e) + chunk * rows / chunks, routing.begin(e) + (chunk + 1) * rows / chunks,
                         border(piece, pieces, outputs, unit), border(piece + 1, pieces, outputs, unit)});
  }
  const auto cost = [](const BlockRange& r) { return (r.row1 - r.row0 + 8) * (r.out1 - r.out0); };
  std::stable_sort(tasks.begin(), tasks.end(),
                   [&](const BlockRange& a, const BlockRange& b) { return cost(a) > cost(b); });
  for_each_task(runtime, static_cast<int64_t>(tasks.size()),
                [&](int64_t i, Arena& arena) { run_block(choice, op, tasks[static_cast<size_t>(i)], nullptr, arena); });
  for (int64_t position = routing.routed(); position < routing.slots; ++position) {
    const int64_t bytes = outputs * size_of(op.out_dtype);
    std::memset(static_cast<char*>(op.out) + routing.row(op.out_order, position) * bytes, 0,
                static_cast<size_t>(bytes));
  }
}

// The part of an expert's rows whose tokens are in [token0, token1).
std::pair<int64_t, int64_t> rows_of_tokens(const Routing& routing, int64_t e, int64_t token0, int64_t token1) {
  const int64_t begin = routing.begin(e), end = routing.end(e);
  if (token0 == 0 && token1 == routing.tokens()) return {begin, end};
  const int64_t* slots = routing.sorted_scattered_idxs;
  const int64_t* first = std::lower_bound(slots + begin, slots + end, token0 * routing.top_k);
  const int64_t* last = std::lower_bound(first, slots + end, token1 * routing.top_k);
  return {first - slots, last - slots};
}

// Few rows in all: every row by itself first, in slot order, then each token's rows are added in that order.
void run_combined(const KernelChoice& choice, const GroupedLinear& op, const Runtime& runtime) {
  const Kernels& k = *choice.kernels;
  const int64_t outputs = op.w.rows, top_k = op.routing->top_k, pitch = outputs * accumulator_size(k);
  Arena& arena = runtime.arena();
  Arena::Scope scope(arena);
  char* rows = static_cast<char*>(arena.take(op.routing->slots * pitch));
  GroupedLinear apart = op;
  apart.out = rows;
  apart.out_dtype = accumulator_type(k);
  apart.out_order = RowOrder::scattered;
  run_apart(choice, apart, runtime);
  for_each_task(runtime, op.routing->tokens(), [&](int64_t token, Arena&) {
    char* sum = rows + token * top_k * pitch;
    for (int64_t j = 1; j < top_k; ++j) k.add(sum, sum + j * pitch, nullptr, 1.0, outputs);
    k.store[static_cast<int>(op.out_dtype)](static_cast<char*>(op.out) + token * outputs * size_of(op.out_dtype), sum,
                                            nullptr, 1.0, outputs);
  });
}

// Rows of a token are summed: a task owns a range of tokens × a range of outputs and goes through all experts in order.
void run_summed(const KernelChoice& choice, const GroupedLinear& op, const Runtime& runtime) {
  const Routing& routing = *op.routing;
  const Kernels& k = *choice.kernels;
  const int64_t unit = segment_width(choice, op), outputs = op.w.rows, tokens = routing.tokens();
  const int64_t acc = accumulator_size(k);
  const int64_t chunks = routing.stable ? max64(1, ceil_div(tokens, choice.blocking.token_chunk)) : 1;
  const int64_t units = ceil_div(outputs, unit);
  // Twice as many pieces as threads, evenly sized: every thread gets the same work whatever the routing.
  const int64_t wanted = max64(2 * runtime.threads, ceil_div(4 * outputs, choice.blocking.outputs));
  const int64_t pieces = max64(1, min64(units, round_up(wanted, runtime.threads)));
  for_each_task(runtime, chunks * pieces, [&](int64_t task, Arena& arena) {
    const int64_t piece = task % pieces, chunk = task / pieces;
    const int64_t token0 = chunk * tokens / chunks, token1 = (chunk + 1) * tokens / chunks;
    const int64_t out0 = border(piece, pieces, outputs, unit), out1 = border(piece + 1, pieces, outputs, unit);
    const int64_t width = out1 - out0, bytes = (token1 - token0) * width * acc;
    const TokenSums sums{static_cast<char*>(arena.take(bytes)), token0, width, out0};
    std::memset(sums.sums, 0, static_cast<size_t>(bytes));
    for (int64_t e = 0; e < routing.experts; ++e) {
      const auto [begin, end] = rows_of_tokens(routing, e, token0, token1);
      const int64_t cuts = ceil_div(end - begin, choice.blocking.row_chunk);
      for (int64_t cut = 0; cut < cuts; ++cut)
        run_block(choice, op,
                  {e, begin + cut * (end - begin) / cuts, begin + (cut + 1) * (end - begin) / cuts, out0, out1}, &sums,
                  arena);
    }
    for (int64_t token = token0; token < token1; ++token)
      k.store[static_cast<int>(op.out_dtype)](
          static_cast<char*>(op.out) + (token * outputs + out0) * size_of(op.out_dtype),
          sums.sums + (token - token0) * width * acc, nullptr, 1.0, width);
  });
}

}  // namespace

int64_t dot_part_count(const KernelChoice& choice, const GroupedLinear& op) {
  return ceil_div(op.w.rows, segment_width(choice, op));
}

void run_grouped_linear(const KernelChoice& choice, const GroupedLinear& op, const Runtime& runtime) {
  if (op.routing->slots == 0 || op.w.rows == 0) return;
  if (op.out_order != RowOrder::token)
    run_apart(choice, op, runtime);
  else if (op.routing->slots * op.w.rows * accumulator_size(*choice.kernels) <= choice.blocking.combine_bytes)
    run_combined(choice, op, runtime);
  else
    run_summed(choice, op, runtime);
}

Matrix run_projection(const KernelChoice& choice, const Projection& op, Arena& arena, const Runtime& runtime) {
  const int64_t slots = op.routing->slots, rank = op.a.rows;
  void* u = arena.take(slots * rank * size_of(op.u_dtype));
  GroupedLinear linear{.routing = op.routing,
                       .x = op.x,
                       .w = op.a,
                       .u = {},
                       .b = {},
                       .bias = {},
                       .gates = op.gates,
                       .scale = op.scale,
                       .out = u,
                       .out_dtype = op.u_dtype,
                       .out_order = RowOrder::grouped};
  run_grouped_linear(choice, linear, runtime);
  return {u, op.u_dtype, slots, rank, rank, 1};
}

}  // namespace moelora
