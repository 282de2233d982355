#include "driver/grouped.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <thread>
#include <vector>

#include "driver/block.h"
#include "driver/weight_tiles.h"

namespace moelora {
namespace {

void run_block(const KernelChoice& choice, const GroupedLinear& op, const BlockRange& range, const TokenSums* sums,
               Arena& arena) {
  if (range.row0 == range.row1 || range.out0 == range.out1) return;
  const Kernels& k = *choice.kernels;
  const int64_t rows = range.row1 - range.row0;
  if (uses_row_orientation(op)) {
    const bool few = k.dots() && rows <= choice.blocking.dot_rows;
    (few ? dot_orientation_block : row_orientation_block)(choice, op, range, sums, arena);
    return;
  }
  const WeightTiles w(k, op.w, range.expert);
  if (w.has_lines() ? k.flat_lines && rows <= choice.blocking.packed_flat_rows
                    : w.flat_as_stored() && rows <= choice.blocking.flat_rows) {
    flat_orientation_block(choice, op, range, sums, arena);
  } else if (!w.weaves(k.lanes * k.vecs, k.pack)) {
    strip_orientation_block(choice, op, range, sums, arena);
  } else {
    (in_thin_passes(choice, range) ? thin_orientation_block : panel_orientation_block)(choice, op, range, sums, arena);
  }
}

// `pieces` nearly equal ranges of [0, total) with borders on multiples of `unit`.
int64_t border(int64_t piece, int64_t pieces, int64_t total, int64_t unit) {
  return min64(total, piece * ceil_div(total, unit) / pieces * unit);
}

constexpr int64_t kTasksPerThread = 8;

// Into how many ranges of outputs the work on a chunk of rows is cut. Few rows: none, so that weights are read in
// order, unless there are too few chunks for the threads.
int64_t task_pieces(const KernelChoice& choice, const GroupedLinear& op, const Runtime& runtime) {
  const Routing& routing = *op.routing;
  int64_t used = 0, chunks = 0;
  for (int64_t e = 0; e < routing.experts; ++e) {
    const int64_t rows = routing.end(e) - routing.begin(e);
    used += rows > 0;
    chunks += ceil_div(rows, choice.blocking.row_chunk);
  }
  const int64_t balanced = ceil_div(kTasksPerThread * runtime.threads, max64(1, chunks));
  if (routing.routed() <= used * choice.blocking.few_rows) return balanced;
  return max64(balanced, ceil_div(op.w.rows(), choice.blocking.outputs));
}

// Parts of an expert's rows that fit the caches together.
void add_row_chunks(const KernelChoice& choice, int64_t e, int64_t begin, int64_t end,
                    std::vector<BlockRange>& chunks) {
  const int64_t rows = end - begin, count = ceil_div(rows, choice.blocking.row_chunk);
  for (int64_t i = 0; i < count; ++i)
    chunks.push_back({e, begin + i * rows / count, begin + (i + 1) * rows / count, 0, 0});
}

// The last part of the work is cut finer, so that threads end together.
constexpr int64_t kTailShare = 8, kTailPieces = 4;

// Rows stay apart: a task is a chunk of an expert's rows × a range of outputs, largest first.
void run_apart(const KernelChoice& choice, const GroupedLinear& op, const Runtime& runtime) {
  const Routing& routing = *op.routing;
  const int64_t unit = segment_width(choice, op), outputs = op.w.rows(), units = ceil_div(outputs, unit);
  const int64_t wanted = task_pieces(choice, op, runtime);
  std::vector<BlockRange> chunks, tasks;
  for (int64_t e = 0; e < routing.experts; ++e) add_row_chunks(choice, e, routing.begin(e), routing.end(e), chunks);
  const auto rows = [](const BlockRange& r) { return r.row1 - r.row0; };
  std::stable_sort(chunks.begin(), chunks.end(),
                   [&](const BlockRange& a, const BlockRange& b) { return rows(a) > rows(b); });
  int64_t left = routing.routed();
  for (const BlockRange& chunk : chunks) {
    left -= rows(chunk);
    const bool tail = left < routing.routed() / kTailShare && rows(chunk) > choice.blocking.few_rows;
    const int64_t pieces = max64(1, min64(tail ? kTailPieces * wanted : wanted, units));
    for (int64_t piece = 0; piece < pieces; ++piece)
      tasks.push_back({chunk.expert, chunk.row0, chunk.row1, border(piece, pieces, outputs, unit),
                       border(piece + 1, pieces, outputs, unit)});
  }
  // Threads take tasks in turn.
  for (size_t i = 0, after = static_cast<size_t>(runtime.threads); after < tasks.size(); ++i, ++after)
    tasks[i].next = &tasks[after];
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

// Few rows in all: every row by itself first, then each token's are added up as SummedJobs does, experts ascending.
class CombinedRows {
 public:
  CombinedRows(const KernelChoice& choice, const GroupedLinear& op, Arena& arena)
      : op_(op), k_(*choice.kernels), acc_(accumulator_size(k_)), outputs_(op.w.rows()) {
    const Routing& routing = *op.routing;
    rows_ = static_cast<char*>(arena.take(routing.slots * outputs_ * acc_));
    position_of_ = arena.take_array<int64_t>(routing.slots);
    for (int64_t i = 0; i < routing.slots; ++i) position_of_[routing.sorted_scattered_idxs[i]] = i;
    if (op.bias.data == nullptr) return;
    bias_ = static_cast<char*>(arena.take(routing.experts * outputs_ * acc_));
    std::memset(bias_, 0, static_cast<size_t>(routing.experts * outputs_ * acc_));
    for (int64_t e = 0; e < routing.experts; ++e)
      if (routing.begin(e) < routing.end(e))
        k_.add_row[static_cast<int>(op.bias.dtype)](bias_ + e * outputs_ * acc_, op.bias.at(e, 0), op.bias.col_stride,
                                                    1.0, outputs_);
  }

  // The contraction alone, into rows by position.
  GroupedLinear apart() const {
    GroupedLinear apart = op_;
    apart.bias = {};
    apart.gates = nullptr;
    apart.scale = 1.0;
    apart.out = rows_;
    apart.out_dtype = accumulator_type(k_);
    apart.out_order = RowOrder::grouped;
    return apart;
  }

  void sum(int64_t token, Arena& arena) const {
    const Routing& routing = *op_.routing;
    int64_t* positions = arena.take_array<int64_t>(routing.top_k);
    std::copy_n(position_of_ + token * routing.top_k, routing.top_k, positions);
    std::sort(positions, positions + routing.top_k);
    char* total = static_cast<char*>(arena.take(outputs_ * acc_));
    std::memset(total, 0, static_cast<size_t>(outputs_ * acc_));
    for (int64_t j = 0; j < routing.top_k && positions[j] < routing.routed(); ++j) {
      const int64_t slot = routing.sorted_scattered_idxs[positions[j]];
      k_.add(total, rows_ + positions[j] * outputs_ * acc_, bias_of(positions[j]),
             op_.gates ? op_.scale * op_.gates[slot] : op_.scale, outputs_);
    }
    k_.store[static_cast<int>(op_.out_dtype)](static_cast<char*>(op_.out) + token * outputs_ * size_of(op_.out_dtype),
                                              total, nullptr, 1.0, outputs_);
  }

 private:
  const char* bias_of(int64_t position) const {
    if (bias_ == nullptr) return nullptr;
    const int32_t* ends = op_.routing->expert_offsets;
    return bias_ + (std::upper_bound(ends, ends + op_.routing->experts, position) - ends) * outputs_ * acc_;
  }

  const GroupedLinear& op_;
  const Kernels& k_;
  const int64_t acc_, outputs_;
  char *rows_, *bias_ = nullptr;
  int64_t* position_of_;
};

void run_combined(const KernelChoice& choice, const GroupedLinear& op, const Runtime& runtime) {
  Arena::Scope scope(runtime.arena());
  const CombinedRows rows(choice, op, runtime.arena());
  run_apart(choice, rows.apart(), runtime);
  for_each_task(runtime, op.routing->tokens(), [&](int64_t token, Arena& arena) { rows.sum(token, arena); });
}

// Rows of a token are summed: all experts' rows for a range of tokens × a range of outputs, in order. Such a job is
// done in steps, each about half as long as the one before. Up to twice as many jobs as threads are under way, and free
// threads take their next steps in turn: they end together even where one thread is slower.
class SummedJobs {
 public:
  SummedJobs(const KernelChoice& choice, const GroupedLinear& op, const Runtime& runtime)
      : choice_(choice), op_(op), k_(*choice.kernels), unit_(segment_width(choice, op)) {
    const Routing& routing = *op.routing;
    const int64_t outputs = op.w.rows(), tokens = routing.tokens(), units = ceil_div(outputs, unit_);
    const int64_t token_chunks = routing.stable ? max64(1, ceil_div(tokens, choice.blocking.token_chunk)) : 1;
    const int64_t wanted = max64(2 * runtime.threads, ceil_div(4 * outputs, choice.blocking.outputs));
    pieces_ = max64(1, min64(units, round_up(wanted, runtime.threads)));
    at_once_ = min64(token_chunks * pieces_, 2 * runtime.threads);
    steps_ = runtime.threads > 1 ? kSteps : 1;
    for (int64_t c = 0; c < token_chunks; ++c)
      chunks_.push_back(token_chunk(c * tokens / token_chunks, (c + 1) * tokens / token_chunks));
    const int64_t widest = ceil_div(units, pieces_) * unit_;
    sum_bytes_ = ceil_div(tokens, token_chunks) * widest * accumulator_size(k_);
    sums_ = static_cast<char*>(runtime.arena().take(at_once_ * sum_bytes_));
    done_ = std::vector<std::atomic<int64_t>>(static_cast<size_t>(at_once_));
  }

  int64_t tasks() const { return ceil_div(jobs(), at_once_) * steps_ * at_once_; }

  // Tasks are taken in order: what this one waits for is already being worked on.
  void run(int64_t task, Arena& arena) {
    const int64_t seat = task % at_once_, turn = task / at_once_;
    std::atomic<int64_t>& done = done_[static_cast<size_t>(seat)];
    while (done.load(std::memory_order_acquire) < turn) std::this_thread::yield();
    struct Finish {
      std::atomic<int64_t>& done;
      ~Finish() { done.fetch_add(1, std::memory_order_release); }
    } finish{done};
    const int64_t job = turn / steps_ * at_once_ + seat;
    if (job < jobs()) run_step(chunks_[static_cast<size_t>(job / pieces_)], job % pieces_, turn % steps_, seat, arena);
  }

 private:
  static constexpr int64_t kSteps = 5;

  struct TokenChunk {
    int64_t token0, token1;
    std::vector<BlockRange> blocks;     // all outputs
    std::vector<int64_t> step_borders;  // in `blocks`
  };

  int64_t jobs() const { return static_cast<int64_t>(chunks_.size()) * pieces_; }

  TokenChunk token_chunk(int64_t token0, int64_t token1) const {
    TokenChunk chunk{token0, token1, {}, {0}};
    int64_t rows = 0;
    for (int64_t e = 0; e < op_.routing->experts; ++e) {
      const auto [begin, end] = rows_of_tokens(*op_.routing, e, token0, token1);
      add_row_chunks(choice_, e, begin, end, chunk.blocks);
      rows += end - begin;
    }
    int64_t left = rows;
    for (size_t i = 0; i < chunk.blocks.size(); ++i) {
      const int64_t step = static_cast<int64_t>(chunk.step_borders.size());
      if (step < steps_ && left <= rows >> step) chunk.step_borders.push_back(static_cast<int64_t>(i));
      left -= chunk.blocks[i].row1 - chunk.blocks[i].row0;
    }
    chunk.step_borders.resize(static_cast<size_t>(steps_) + 1, static_cast<int64_t>(chunk.blocks.size()));
    return chunk;
  }

  void run_step(const TokenChunk& chunk, int64_t piece, int64_t step, int64_t seat, Arena& arena) const {
    const int64_t outputs = op_.w.rows(), acc = accumulator_size(k_);
    const int64_t out0 = border(piece, pieces_, outputs, unit_), out1 = border(piece + 1, pieces_, outputs, unit_);
    const int64_t width = out1 - out0;
    const TokenSums sums{sums_ + seat * sum_bytes_, chunk.token0, width, out0};
    if (step == 0) std::memset(sums.sums, 0, static_cast<size_t>((chunk.token1 - chunk.token0) * width * acc));
    const auto block = [&](int64_t i) {
      const BlockRange& all = chunk.blocks[static_cast<size_t>(i)];
      return BlockRange{all.expert, all.row0, all.row1, out0, out1};
    };
    const int64_t blocks = static_cast<int64_t>(chunk.blocks.size());
    for (int64_t i = chunk.step_borders[step]; i < chunk.step_borders[step + 1]; ++i) {
      const BlockRange next = block(min64(i + 1, blocks - 1));
      BlockRange now = block(i);
      if (i + 1 < blocks) now.next = &next;
      Arena::Scope scope(arena);
      run_block(choice_, op_, now, &sums, arena);
    }
    if (step < steps_ - 1) return;
    for (int64_t token = chunk.token0; token < chunk.token1; ++token)
      k_.store[static_cast<int>(op_.out_dtype)](
          static_cast<char*>(op_.out) + (token * outputs + out0) * size_of(op_.out_dtype),
          sums.sums + (token - chunk.token0) * width * acc, nullptr, 1.0, width);
  }

  const KernelChoice& choice_;
  const GroupedLinear& op_;
  const Kernels& k_;
  const int64_t unit_;
  int64_t pieces_, at_once_, steps_, sum_bytes_;
  std::vector<TokenChunk> chunks_;
  char* sums_;
  std::vector<std::atomic<int64_t>> done_;  // turns, by seat
};

void run_summed(const KernelChoice& choice, const GroupedLinear& op, const Runtime& runtime) {
  Arena::Scope scope(runtime.arena());
  SummedJobs jobs(choice, op, runtime);
  for_each_task(runtime, jobs.tasks(), [&](int64_t task, Arena& arena) { jobs.run(task, arena); });
}

}  // namespace

bool in_thin_passes(const KernelChoice& choice, const BlockRange& block) {
  return block.row1 - block.row0 <= choice.blocking.thin_rows;
}

bool uses_row_orientation(const GroupedLinear& op) { return rows_are_contiguous(op.w); }

int64_t segment_width(const KernelChoice& choice, const GroupedLinear& op) {
  if (uses_row_orientation(op)) return choice.blocking.segment;
  const Kernels& k = *choice.kernels;
  return k.weaves ? k.lanes * k.vecs : choice.blocking.strip;  // a woven panel at a time, whatever a strip is
}

int64_t dot_part_count(const KernelChoice& choice, const GroupedLinear& op) {
  return ceil_div(op.w.rows(), segment_width(choice, op));
}

void run_grouped_linear(const KernelChoice& choice, const GroupedLinear& op, const Runtime& runtime) {
  if (op.routing->slots == 0 || op.w.rows() == 0) return;
  if (op.out_order != RowOrder::token) {
    run_apart(choice, op, runtime);
  } else if (op.routing->top_k == 1) {  // sums of one row each
    GroupedLinear rows = op;
    rows.out_order = RowOrder::scattered;
    run_apart(choice, rows, runtime);
  } else if (op.routing->slots * op.w.rows() * accumulator_size(*choice.kernels) <= choice.blocking.combine_bytes) {
    run_combined(choice, op, runtime);
  } else {
    run_summed(choice, op, runtime);
  }
}

Matrix run_projection(const KernelChoice& choice, const Projection& op, Arena& arena, const Runtime& runtime) {
  const int64_t slots = op.routing->slots, rank = op.a.rows;
  void* u = arena.take(slots * rank * size_of(op.u_dtype));
  GroupedLinear linear{.routing = op.routing,
                       .x = op.x,
                       .w = {op.a},
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
