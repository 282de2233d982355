#include "driver/epilogue.h"

#include <cstring>

namespace moelora {
namespace {

constexpr int64_t kRowsAhead = 12;

void prefetch(const char* from, int64_t bytes) {
  for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(from + at);
  asm volatile("");  // gcc drops calls of functions that only prefetch: they have no effect that it knows of
}

}  // namespace

Epilogue::Epilogue(const KernelChoice& choice, const GroupedLinear& op, const BlockRange& range, const TokenSums* sums,
                   Arena& arena)
    : k_(*choice.kernels), op_(op), sums_(sums), segment_(segment_width(choice, op)) {
  if (op.bias.data == nullptr) return;
  const int64_t n = range.out1 - range.out0;
  const int64_t bytes = n * accumulator_size(k_);
  char* bias = static_cast<char*>(arena.take(bytes));
  std::memset(bias, 0, static_cast<size_t>(bytes));
  k_.add_row[static_cast<int>(op.bias.dtype)](bias, op.bias.at(range.expert, range.out0), op.bias.col_stride, 1.0, n);
  bias_ = bias;
  bias_out0_ = range.out0;
}

void Epilogue::expect(int64_t position, int64_t rows, int64_t out0, int64_t width) const {
  for (int64_t i = 0; i < min64(rows, kRowsAhead); ++i) fetch(position + i, out0, width);
}

void Epilogue::operator()(int64_t position, int64_t rows, const char* c, int64_t pitch, int64_t out0,
                          int64_t width) const {
  for (int64_t i = 0; i < rows; ++i) {
    if (i + kRowsAhead < rows) fetch(position + i + kRowsAhead, out0, width);
    finish(position + i, c + i * pitch, out0, width);
  }
}

char* Epilogue::sum_of(int64_t slot, int64_t out0) const {
  const int64_t token = slot / op_.routing->top_k - sums_->token0;
  return sums_->sums + (token * sums_->width + out0 - sums_->out0) * accumulator_size(k_);
}

// Sums and the rows of `dot` lie anywhere, and are too many for L2.
void Epilogue::fetch(int64_t position, int64_t out0, int64_t width) const {
  const Routing& routing = *op_.routing;
  if (sums_) prefetch(sum_of(routing.sorted_scattered_idxs[position], out0), width * accumulator_size(k_));
  if (op_.dot == nullptr || op_.dot->matrix.col_stride != 1) return;
  const Matrix& m = op_.dot->matrix;
  prefetch(m.at(routing.row(op_.dot->order, position), out0), width * size_of(m.dtype));
}

void Epilogue::finish(int64_t position, const char* c, int64_t out0, int64_t width) const {
  const Routing& routing = *op_.routing;
  const int64_t slot = routing.sorted_scattered_idxs[position];
  const double factor = op_.gates ? op_.scale * op_.gates[slot] : op_.scale;
  const char* bias = bias_ ? bias_ + (out0 - bias_out0_) * accumulator_size(k_) : nullptr;
  if (op_.dot) {
    const Matrix& m = op_.dot->matrix;
    op_.dot_parts[out0 / segment_ * routing.slots + slot] =
        k_.dot[static_cast<int>(m.dtype)](c, m.at(routing.row(op_.dot->order, position), out0), m.col_stride, width);
  }
  if (sums_) {
    k_.add(sum_of(slot, out0), c, bias, factor, width);
  } else {
    const int64_t row = routing.row(op_.out_order, position);
    char* out = static_cast<char*>(op_.out) + (row * op_.w.rows() + out0) * size_of(op_.out_dtype);
    k_.store[static_cast<int>(op_.out_dtype)](out, c, bias, factor, width);
  }
}

}  // namespace moelora
