// Every emulated intrinsic as a function on memory. Compiled twice, with the real instructions and with the emulation,
// for tests/test_wide_emulation.py to compare.
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

namespace {

struct Input {
  char a[64], b[64], c[64];
  uint64_t mask;
};

template <class V>
V as(const char* from) {
  V v;
  memcpy(&v, from, sizeof v);
  return v;
}
template <class V>
void put(char* to, V v) {
  memcpy(to, &v, sizeof v);
}

// One of them is null. `registers` writes to 64 bytes; `memory` loads from `at` to them, or stores Input::a to `at`.
struct Operation {
  const char* name;
  void (*registers)(const Input& in, char* out);
  void (*memory)(const Input& in, char* at, char* out);
};

// clang-format off
#define RESULT(name, expression) {#name, [](const Input& in, char* out) { put(out, expression); }, nullptr},
#define NONE(name) {#name, [](const Input&, char* out) { put(out, name()); }, nullptr},
#define VALUE(name, T) RESULT(name, name(as<T>(in.a)))
#define UNARY(name, A) RESULT(name, name(as<A>(in.a)))
#define BINARY(name, A, B) RESULT(name, name(as<A>(in.a), as<B>(in.b)))
#define TERNARY(name, A, B, C) RESULT(name, name(as<A>(in.a), as<B>(in.b), as<C>(in.c)))
#define NUMBERED(name, A, n) RESULT(name, name(as<A>(in.a), n))
#define BLEND(name, M, V) RESULT(name, name(static_cast<M>(in.mask), as<V>(in.a), as<V>(in.b)))
#define LOAD(name) {#name, nullptr, [](const Input&, char* at, char* out) { put(out, name(at)); }},
#define STORE(name, A) {#name, nullptr, [](const Input& in, char* at, char*) { name(at, as<A>(in.a)); }},
#define MASKED_LOAD(name, M) \
  {#name, nullptr, [](const Input& in, char* at, char* out) { put(out, name(static_cast<M>(in.mask), at)); }},
#define MASKED_STORE(name, M, A) \
  {#name, nullptr, [](const Input& in, char* at, char*) { name(at, static_cast<M>(in.mask), as<A>(in.a)); }},
#define SHIFT(name) \
  NUMBERED(name, __m512i, 0) NUMBERED(name, __m512i, 1) NUMBERED(name, __m512i, 4) NUMBERED(name, __m512i, 15) \
  NUMBERED(name, __m512i, 16) NUMBERED(name, __m512i, 31) NUMBERED(name, __m512i, 32) \
  NUMBERED(name, __m512i, 63) NUMBERED(name, __m512i, 64)

const Operation kOperations[] = {
  UNARY(_mm512_castps_si512, __m512)
  UNARY(_mm512_castsi512_ps, __m512i)
  UNARY(_mm512_castps_pd, __m512)
  UNARY(_mm512_castpd_ps, __m512d)
  UNARY(_mm512_castps512_ps256, __m512)
  UNARY(_mm512_castsi512_si256, __m512i)
  RESULT(_mm512_castsi256_si512, _mm512_castsi512_si256(_mm512_castsi256_si512(as<__m256i>(in.a))))
  NUMBERED(_mm512_extractf32x8_ps, __m512, 0)
  NUMBERED(_mm512_extractf32x8_ps, __m512, 1)
  RESULT(_mm512_inserti64x4, _mm512_inserti64x4(as<__m512i>(in.a), as<__m256i>(in.b), 0))
  RESULT(_mm512_inserti64x4, _mm512_inserti64x4(as<__m512i>(in.a), as<__m256i>(in.b), 1))

  UNARY(_mm512_broadcast_i64x4, __m256i)
  UNARY(_mm512_broadcast_i32x4, __m128i)
  BINARY(_mm512_srlv_epi16, __m512i, __m512i)
  RESULT(_mm512_srlv_epi16, _mm512_srlv_epi16(as<__m512i>(in.a), _mm512_and_si512(as<__m512i>(in.b), _mm512_set1_epi16(15))))

  NONE(_mm512_setzero_ps)
  NONE(_mm512_setzero_si512)
  VALUE(_mm512_set1_ps, float)
  VALUE(_mm512_set1_epi8, char)
  VALUE(_mm512_set1_epi16, short)
  VALUE(_mm512_set1_epi32, int)
  UNARY(_mm512_broadcastd_epi32, __m128i)
  RESULT(_mm512_setr_epi32, _mm512_setr_epi32(in.a[0], 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, -14, in.a[1]))
  RESULT(_mm512_setr_ps, _mm512_setr_ps(as<float>(in.a), 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, -14, as<float>(in.b)))
  RESULT(_mm512_set_epi16, _mm512_set_epi16(in.a[0], 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19,
                                            20, 21, 22, 23, 24, 25, 26, 27, 28, 29, -30, in.a[1]))

  BINARY(_mm512_add_ps, __m512, __m512)
  BINARY(_mm512_sub_ps, __m512, __m512)
  BINARY(_mm512_mul_ps, __m512, __m512)
  TERNARY(_mm512_fmadd_ps, __m512, __m512, __m512)
  UNARY(_mm512_reduce_add_ps, __m512)
  BINARY(_mm512_add_epi8, __m512i, __m512i)
  BINARY(_mm512_add_epi16, __m512i, __m512i)
  BINARY(_mm512_add_epi32, __m512i, __m512i)
  BINARY(_mm512_min_epu32, __m512i, __m512i)
  BINARY(_mm512_max_epu8, __m512i, __m512i)
  BINARY(_mm512_shuffle_epi8, __m512i, __m512i)
  BINARY(_mm512_xor_si512, __m512i, __m512i)
  BINARY(_mm512_unpacklo_epi8, __m512i, __m512i)
  BINARY(_mm512_unpackhi_epi8, __m512i, __m512i)
  BINARY(_mm512_unpacklo_epi16, __m512i, __m512i)
  BINARY(_mm512_unpackhi_epi16, __m512i, __m512i)
  BINARY(_mm512_max_epu32, __m512i, __m512i)
  BINARY(_mm512_and_si512, __m512i, __m512i)
  BINARY(_mm512_andnot_si512, __m512i, __m512i)
  BINARY(_mm512_or_si512, __m512i, __m512i)
  SHIFT(_mm512_slli_epi16)
  SHIFT(_mm512_slli_epi32)
  SHIFT(_mm512_slli_epi64)
  SHIFT(_mm512_srli_epi16)
  SHIFT(_mm512_srli_epi32)
  SHIFT(_mm512_srli_epi64)

  BINARY(_mm512_unpacklo_ps, __m512, __m512)
  BINARY(_mm512_unpackhi_ps, __m512, __m512)
  BINARY(_mm512_unpacklo_pd, __m512d, __m512d)
  BINARY(_mm512_unpackhi_pd, __m512d, __m512d)
  BINARY(_mm512_unpacklo_epi32, __m512i, __m512i)
  BINARY(_mm512_unpackhi_epi32, __m512i, __m512i)
  BINARY(_mm512_unpacklo_epi64, __m512i, __m512i)
  BINARY(_mm512_unpackhi_epi64, __m512i, __m512i)
  RESULT(_mm512_shuffle_i32x4, _mm512_shuffle_i32x4(as<__m512i>(in.a), as<__m512i>(in.b), 0x88))
  RESULT(_mm512_shuffle_i32x4, _mm512_shuffle_i32x4(as<__m512i>(in.a), as<__m512i>(in.b), 0xdd))
  RESULT(_mm512_shuffle_i32x4, _mm512_shuffle_i32x4(as<__m512i>(in.a), as<__m512i>(in.b), 0x1b))
  BINARY(_mm512_permutexvar_epi16, __m512i, __m512i)
  BINARY(_mm512_permutexvar_epi32, __m512i, __m512i)
  BINARY(_mm512_permutexvar_ps, __m512i, __m512)
  TERNARY(_mm512_permutex2var_epi16, __m512i, __m512i, __m512i)
  TERNARY(_mm512_permutex2var_epi32, __m512i, __m512i, __m512i)

  UNARY(_mm512_cvtepi32_ps, __m512i)
  UNARY(_mm512_cvtepu8_epi16, __m256i)
  UNARY(_mm512_cvtepu8_epi32, __m128i)
  UNARY(_mm512_cvtepi8_epi32, __m128i)
  UNARY(_mm512_cvtepu8_epi64, __m128i)
  UNARY(_mm512_cvtepu16_epi32, __m256i)
  UNARY(_mm512_cvtepi32_epi16, __m512i)
  UNARY(_mm512_cvtph_ps, __m256i)
  NUMBERED(_mm512_cvtps_ph, __m512, _MM_FROUND_TO_NEAREST_INT)
  RESULT(_mm512_cmp_ps_mask, _mm512_cmp_ps_mask(as<__m512>(in.a), as<__m512>(in.b), _CMP_UNORD_Q))
  RESULT(_mm512_cmp_ps_mask, _mm512_cmp_ps_mask(as<__m512>(in.a), as<__m512>(in.b), _CMP_LT_OS))

  UNARY(_mm512_movepi8_mask, __m512i)
  BINARY(_mm512_cmpeq_epi16_mask, __m512i, __m512i)
  BINARY(_mm512_cmpeq_epi32_mask, __m512i, __m512i)

  RESULT(_mm512_mask_mov_epi32, _mm512_mask_mov_epi32(as<__m512i>(in.a), static_cast<__mmask16>(in.mask), as<__m512i>(in.b)))
  BLEND(_mm512_mask_blend_epi8, __mmask64, __m512i)
  BLEND(_mm512_mask_blend_epi16, __mmask32, __m512i)
  BLEND(_mm512_mask_blend_epi32, __mmask16, __m512i)
  BLEND(_mm512_mask_blend_ps, __mmask16, __m512)

  UNARY(_mm512_cvtneps_pbh, __m512)
  BINARY(_mm512_cvtne2ps_pbh, __m512, __m512)
  TERNARY(_mm256_dpbf16_ps, __m256, __m256bh, __m256bh)
  TERNARY(_mm512_dpbf16_ps, __m512, __m512bh, __m512bh)

  LOAD(_mm512_loadu_ps)
  LOAD(_mm512_loadu_si512)
  LOAD(_mm512_load_ps)
  LOAD(_mm512_load_si512)
  STORE(_mm512_storeu_ps, __m512)
  STORE(_mm512_storeu_si512, __m512i)
  STORE(_mm512_store_ps, __m512)
  STORE(_mm512_store_si512, __m512i)
  MASKED_LOAD(_mm_maskz_loadu_epi8, __mmask16)
  MASKED_LOAD(_mm256_maskz_loadu_epi8, __mmask32)
  MASKED_LOAD(_mm512_maskz_loadu_epi8, __mmask64)
  MASKED_LOAD(_mm256_maskz_loadu_epi16, __mmask16)
  MASKED_LOAD(_mm512_maskz_loadu_epi16, __mmask32)
  MASKED_LOAD(_mm512_maskz_loadu_ps, __mmask16)
  MASKED_STORE(_mm256_mask_storeu_epi16, __mmask16, __m256i)
  MASKED_STORE(_mm512_mask_storeu_epi16, __mmask32, __m512i)
  MASKED_STORE(_mm512_mask_storeu_ps, __mmask16, __m512)
};
// clang-format on

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT const int operations = sizeof kOperations / sizeof *kOperations;

EXPORT const char* name_of(int operation) { return kOperations[operation].name; }

EXPORT int on_memory(int operation) { return kOperations[operation].memory != nullptr; }

EXPORT void on_registers(int operation, int64_t n, const Input* in, char (*out)[64]) {
  for (int64_t i = 0; i < n; ++i) kOperations[operation].registers(in[i], out[i]);
}

EXPORT void at_memory(int operation, const Input* in, char* at, char* out) {
  kOperations[operation].memory(*in, at, out);
}

// Whether this CPU has what the other copy is compiled for.
EXPORT int has_real_instructions() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512bf16");
}
