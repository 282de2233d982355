// Small AMX programs for tests of the emulator: `probe NAME`. `right` and `subnormal` exit with 0; all others are wrong
// and must be killed before they get to their end.
#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

// In the file and not on the command line: compiler flags for instruction sets belong to CMakeLists.txt.
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("amx-tile,amx-bf16"))), apply_to = function)
#else
#pragma GCC target("amx-tile,amx-bf16")
#endif

typedef struct {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
} Config;

static uint16_t a[16][32], b[16][16][2];
static float c[16][16];

static float value(uint16_t bf16) {
  const uint32_t bits = (uint32_t)bf16 << 16;
  float v;
  memcpy(&v, &bits, sizeof v);
  return v;
}

static void set(Config* config, int tile, int rows, int bytes) {
  config->rows[tile] = (uint8_t)rows;
  config->row_bytes[tile] = (uint16_t)bytes;
}

// Tiles 0: C [m][n], 1: A [m][k pairs], 2: B [k][n]
static Config product_shapes(int m, int n, int k) {
  Config config = {.palette = 1};
  set(&config, 0, m, 4 * n);
  set(&config, 1, m, 4 * k);
  set(&config, 2, k, 4 * n);
  return config;
}

// volatile: the compiler does not know what the instruction reads.
static void load_config(const Config* config) {
  volatile Config held = *config;
  asm volatile("ldtilecfg %0" ::"m"(held) : "memory");
}

static void fill(void) {
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 32; ++j) {
      a[i][j] = (uint16_t)(0x3e00 + rand() % 0x300 + (rand() % 2 << 15));
      b[i][j / 2][j % 2] = (uint16_t)(0x3e00 + rand() % 0x300 + (rand() % 2 << 15));
      c[i][j / 2] = value((uint16_t)(0x3e00 + rand() % 0x300)) / 3;
    }
}

static float expected(int i, int j, int k) {
  float even = 0, odd = 0;
  for (int p = 0; p < k; ++p) {
    even = fmaf(value(a[i][2 * p]), value(b[p][j][0]), even);
    odd = fmaf(value(a[i][2 * p + 1]), value(b[p][j][1]), odd);
  }
  return c[i][j] + (even + odd);
}

// Every combination of sizes, in several forms of addressing.
static int right(void) {
  for (int m = 1; m <= 16; ++m)
    for (int n = 1; n <= 16; n += 3)
      for (int k = 1; k <= 16; ++k) {
        fill();
        float out[16][16];
        memset(out, 0x7f, sizeof out);
        const Config config = product_shapes(m, n, k);
        Config back;
        load_config(&config);
        asm volatile("sttilecfg %0" : "=m"(back)::"memory");
        if (memcmp(&back, &config, sizeof back)) return 1;
        register char* base __asm__("r13") = (char*)a;
        register long quarter __asm__("r12") = 16;
        asm volatile("tileloadd (%0,%1,4), %%tmm1" ::"r"(base), "r"(quarter) : "memory");
        asm volatile("tileloaddt1 0x1234(%0,%1,1), %%tmm2" ::"r"((uintptr_t)b - 0x1234), "r"(64L) : "memory");
        asm volatile("tileloadd -8(%0,%1,2), %%tmm0" ::"r"((char*)c + 8), "r"(32L) : "memory");
        asm volatile("tdpbf16ps %tmm2, %tmm1, %tmm0");
        asm volatile("tilestored %%tmm0, (%0,%1,8)" ::"r"(out), "r"(8L) : "memory");
        for (int i = 0; i < 16; ++i)
          for (int j = 0; j < 16; ++j) {
            const float want = expected(i, j, k);
            const uint32_t untouched = 0x7f7f7f7f;
            if (memcmp(&out[i][j], i < m && j < n ? (const void*)&want : &untouched, 4)) return 1;
          }
        asm volatile("tileloadd (%0), %%tmm1" ::"r"(a) : "memory");  // no index: the same row again and again
        asm volatile("tilestored %%tmm1, (%0,%1,1)" ::"r"(out), "r"(64L) : "memory");
        for (int i = 0; i < m; ++i)
          if (memcmp(out[i], a[0], (size_t)(4 * k))) return 1;
      }
  asm volatile("tilerelease");
  return 0;
}

// Subnormal operands and subnormal results are zeros.
static int subnormal(void) {
  const Config config = product_shapes(1, 1, 1);
  float out[1] = {1};
  load_config(&config);
  a[0][0] = 0x0040, a[0][1] = 0x1000, b[0][0][0] = 0x3f80, b[0][0][1] = 0x1000;
  asm volatile("tilezero %tmm0");
  asm volatile("tileloadd (%0,%1,1), %%tmm1" ::"r"(a), "r"(64L) : "memory");
  asm volatile("tileloadd (%0,%1,1), %%tmm2" ::"r"(b), "r"(64L) : "memory");
  asm volatile("tdpbf16ps %tmm2, %tmm1, %tmm0");
  asm volatile("tilestored %%tmm0, (%0,%1,1)" ::"r"(out), "r"(64L) : "memory");
  return out[0] != 0;
}

static void wrong(const char* name) {
  Config config = product_shapes(16, 16, 16);
  const int unconfigured = !strcmp(name, "unconfigured");
  if (!strcmp(name, "rows")) set(&config, 1, 8, 64);
  if (!strcmp(name, "columns")) set(&config, 0, 16, 32);
  if (!strcmp(name, "depth")) set(&config, 1, 16, 32);
  if (!strcmp(name, "no_pairs")) set(&config, 1, 16, 62);
  if (!strcmp(name, "unused_tile")) set(&config, 2, 0, 0);
  if (!strcmp(name, "too_large")) set(&config, 2, 17, 64);
  if (!strcmp(name, "no_rows")) set(&config, 2, 0, 64);
  if (!strcmp(name, "palette")) config.palette = 2;
  if (!strcmp(name, "reserved")) config.reserved[3] = 1;
  if (!unconfigured) load_config(&config);
  if (!strcmp(name, "released")) asm volatile("tilerelease");
  if (!strcmp(name, "same_tile")) asm volatile(".byte 0xc4, 0xe2, 0x72, 0x5c, 0xc1");  // tdpbf16ps %tmm1, %tmm1, %tmm0
  asm volatile("tdpbf16ps %tmm2, %tmm1, %tmm0");
}

int main(int argc, char** argv) {
  if (argc != 2) return 2;
  if (!strcmp(argv[1], "right")) return right();
  if (!strcmp(argv[1], "subnormal")) return subnormal();
  wrong(argv[1]);
  return 0;
}

#ifdef __clang__
#pragma clang attribute pop
#endif
