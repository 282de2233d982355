#include "driver/drivers.h"

namespace moelora {
namespace {

constexpr int64_t kRowsPerTask = 16;

}  // namespace

void glu(const KernelChoice& choice, const Matrix& h, const GluArgs& args, void* y, const Runtime& runtime) {
  const int64_t width = h.cols / 2, pitch = width * size_of(h.dtype);
  for_each_task(runtime, ceil_div(h.rows, kRowsPerTask), [&](int64_t task, Arena&) {
    for (int64_t row = task * kRowsPerTask; row < min64((task + 1) * kRowsPerTask, h.rows); ++row)
      choice.kernels->glu[static_cast<int>(h.dtype)](static_cast<char*>(y) + row * pitch, h.at(row, 0), h.col_stride,
                                                     width, args);
  });
}

void glu_backward(const KernelChoice& choice, const Matrix& dy, const Matrix& h, const GluArgs& args, void* dh,
                  const Runtime& runtime) {
  const int64_t width = h.cols / 2, pitch = h.cols * size_of(h.dtype);
  for_each_task(runtime, ceil_div(h.rows, kRowsPerTask), [&](int64_t task, Arena&) {
    for (int64_t row = task * kRowsPerTask; row < min64((task + 1) * kRowsPerTask, h.rows); ++row)
      choice.kernels->glu_backward[static_cast<int>(h.dtype)](static_cast<char*>(dh) + row * pitch, dy.at(row, 0),
                                                              dy.col_stride, h.at(row, 0), h.col_stride, width, args);
  });
}

}  // namespace moelora
