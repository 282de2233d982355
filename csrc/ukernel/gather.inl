// Strided rows as unit-stride ones.
#pragma once

#include <cstdint>

namespace {

// `count` elements of a row with any stride, as a pointer to unit-stride ones.
template <class T>
inline const T* gathered(T* buffer, const T* src, int64_t stride, int64_t count) {
  if (stride == 1) return src;
  for (int64_t i = 0; i < count; ++i) buffer[i] = src[i * stride];
  return buffer;
}

}  // namespace
