// E4M3 codes by tables of bytes, on AVX2 and wider: bf16(code · scale) without a product for each. All normal codes of
// a significand are the same number but for powers of two, which rounding does not see while nothing leaves the normal
// range: the sign and the upper three bits of the exponent are added to the number of the lower four bits.
#pragma once

#include <immintrin.h>

#include "ukernel/ukernel.h"

namespace {

// To bf16, as fp32, of numbers far from both ends: one so much larger leaves 8 bits of the significand when it is
// added.
inline __m256 round_ordinary_to_bf16(__m256 v) {
  const __m256 power = _mm256_and_ps(v, _mm256_castsi256_ps(_mm256_set1_epi32(0x7f800000)));
  const __m256 larger = _mm256_set1_ps(0x1.8p16f);
  return _mm256_fnmadd_ps(power, larger, _mm256_fmadd_ps(power, larger, v));
}

// The numbers of one scale, by bytes. In 32-bit parts of `normal`: low and high bytes of significands 0 … 3 at exponent
// 0, those at exponent 1, then all of significands 4 … 7.  In `subnormal`, of each four parts the last two: low and
// high bytes of what codes below 8 differ by from this.
struct E4m3Numbers {
  __m256i normal, subnormal;

  // An ordinary scale but 0.
  explicit E4m3Numbers(float scale) {
    const __m256 factor = _mm256_set1_ps(scale);
    const auto numbers = [factor](__m256 v) __attribute__((always_inline)) {
      return _mm256_castps_si256(round_ordinary_to_bf16(_mm256_mul_ps(v, factor)));
    };
    const __m256i least =
        numbers(_mm256_setr_ps(0x1p-7f, 0x1.2p-7f, 0x1.4p-7f, 0x1.6p-7f, 0x1.8p-7f, 0x1.ap-7f, 0x1.cp-7f, 0x1.ep-7f));
    const __m256i below =
        numbers(_mm256_setr_ps(0.0f, 0x1p-9f, 0x1p-8f, 0x1.8p-8f, 0x1p-7f, 0x1.4p-7f, 0x1.8p-7f, 0x1.cp-7f));
    const __m256i twice = _mm256_add_epi32(least, _mm256_set1_epi32(0x00800000));
    const __m256i by_bytes = _mm256_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15,  //
                                              0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    normal = _mm256_shuffle_epi8(_mm256_or_si256(_mm256_srli_epi32(least, 16), twice), by_bytes);
    subnormal = _mm256_shuffle_epi8(_mm256_xor_si256(least, below), by_bytes);
  }
};

// B: vec, vectors of bytes; spread(__m256i, four parts of it): these in each 16 bytes; load(const uint8_t*): kBytes of
// them, in the order in which `unpack` instructions bring 32-bit numbers in order; bit_and, bit_xor, add, most, lookup;
// set1; upper_nibbles, any_negative, all_negative
template <class B>
class E4m3Codes {
 public:
  using vec = typename B::vec;
  static constexpr int64_t kBytes = B::kBytes;

  explicit E4m3Codes(const E4m3Numbers& n)
      : low_(B::template spread<0, 4, 2, 6>(n.normal)),
        high_(B::template spread<1, 5, 3, 7>(n.normal)),
        low_below_(B::template spread<2, 6, 2, 6>(n.subnormal)),
        high_below_(B::template spread<3, 7, 3, 7>(n.subnormal)) {}

  // From here on these numbers; `met_nan` is of codes before, too.
  [[gnu::always_inline]] void use(const E4m3Numbers& n) {
    const vec most = most_;
    *this = E4m3Codes(n);
    most_ = most;
  }

  // The bytes of their numbers. Of the codes that are NaN others.
  [[gnu::always_inline]] void bytes(const uint8_t* codes, vec& low, vec& high) { bytes(B::load(codes), low, high); }
  [[gnu::always_inline]] void bytes(vec all, vec& low, vec& high) {
    const vec size = B::bit_and(all, B::set1(0x7f));
    most_ = B::most(most_, size);
    // Beyond 127, which the lookup makes 0 of, for all but those below 8.
    const vec below = B::add(size, B::set1(0x78));
    const vec upper = B::lookup(B::sign_and_exponent(), B::upper_nibbles(all));
    low = B::lookup(low_, size);
    high = B::add(B::lookup(high_, size), upper);
    if (B::all_negative(below)) [[likely]]
      return;  // weights below a 28672th of the largest are few
    low = B::bit_xor(low, B::lookup(low_below_, below));
    high = B::bit_xor(high, B::lookup(high_below_, below));
  }
  // Whether one of those that went by since this was last asked was NaN.
  bool met_nan() {
    const vec most = most_;
    most_ = B::set1(0);
    return B::any_negative(B::add(most, B::set1(1)));
  }

 private:
  vec low_, high_, low_below_, high_below_, most_ = B::set1(0);
};

}  // namespace
