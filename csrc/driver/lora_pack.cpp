#include "driver/lora_pack.h"

#include <cstring>

#include "driver/strided.h"

namespace moelora {
namespace {

int64_t magnitude(int64_t stride) { return stride < 0 ? -stride : stride; }

// Experts apart in memory: row by row.
void copy_by_expert(const Kernels& k, const Experts& src, const Routing& routing, char* dst, const Runtime& runtime) {
  const int64_t size = size_of(k.compute);
  for_each_task(runtime, src.experts, [&](int64_t e, Arena&) {
    if (routing.begin(e) == routing.end(e)) return;
    const Matrix m = src[e];
    for (int64_t r = 0; r < m.rows; ++r)
      k.convert[static_cast<int>(m.dtype)](dst + (e * m.rows + r) * m.cols * size, m.at(r, 0), m.cols, m.col_stride);
  });
}

// Experts next to each other, as in PEFT's B: a transpose of [rows · cols, E], which reads memory in order. It goes
// through a buffer whose rows are an odd number of cache lines apart: the experts' own rows would share cache sets.
void copy_transposed(const Kernels& k, const Experts& src, char* dst, const Runtime& runtime) {
  constexpr int64_t kPositions = 256;
  const int64_t size = size_of(k.compute), all = src.rows * src.cols;
  const Matrix first = src[0];
  for_each_task(runtime, ceil_div(all, kPositions), [&](int64_t task, Arena& arena) {
    const int64_t begin = task * kPositions, count = min64(kPositions, all - begin), pitch = copy_pitch(k, count);
    const void** positions = arena.take_array<const void*>(count);
    for (int64_t i = 0; i < count; ++i) positions[i] = first.at((begin + i) / src.cols, (begin + i) % src.cols);
    char* turned = static_cast<char*>(arena.take(src.experts * pitch));
    k.transpose_in[static_cast<int>(src.dtype)](
        turned, pitch / size, {positions, count, 0, src.experts, src.expert_stride, nullptr, 0}, nullptr);
    for (int64_t e = 0; e < src.experts; ++e)
      std::memcpy(dst + (e * all + begin) * size, turned + e * pitch, static_cast<size_t>(count * size));
  });
}

}  // namespace

Experts compact_lora(const KernelChoice& choice, const Experts& src, const Routing& routing, Arena& arena,
                     const Runtime& runtime) {
  const Kernels& k = *choice.kernels;
  if (src.col_stride == 1 || src.cols == 1) return src;
  char* dst = static_cast<char*>(arena.take(src.experts * src.rows * src.cols * size_of(k.compute)));
  const bool experts_adjacent = magnitude(src.expert_stride) < magnitude(src.col_stride) &&
                                magnitude(src.expert_stride) < magnitude(src.row_stride);
  if (experts_adjacent)
    copy_transposed(k, src, dst, runtime);
  else
    copy_by_expert(k, src, routing, dst, runtime);
  return {dst, k.compute, src.experts, src.rows, src.cols, src.rows * src.cols, src.cols, 1};
}

}  // namespace moelora
