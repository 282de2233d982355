// Performs AMX instructions on an x86-64 CPU that has none, and counts them. To be preloaded (LD_PRELOAD).
//
// Such a CPU answers a tile instruction with SIGILL. The handler here decodes it, performs it as the manual's
// pseudo-code says on a tile file of the thread, and steps over it. What the manual forbids (a tile that is not
// configured, shapes that do not fit, reserved bits) is reported on stderr and kills the process with SIGILL: a wrong
// program must not pass.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <immintrin.h>
#include <signal.h>
#include <stdint.h>
#include <string.h>
#include <ucontext.h>
#include <unistd.h>

enum { kTiles = 8, kRows = 16, kRowBytes = 64 };

// What LDTILECFG reads.
typedef struct {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
} Config;

typedef struct {
  _Alignas(64) uint8_t tile[kTiles][kRows][kRowBytes];
  Config config;
  int configured;
} State;

static __thread State state __attribute__((tls_model("initial-exec")));

// Of all threads since the last reset; `live`: threads that hold a configuration now.
typedef struct {
  int64_t configs, releases, zeros, loads, stores, products, live;
} Counts;

static Counts counts;
static void count(int64_t* what, int64_t by) { __atomic_add_fetch(what, by, __ATOMIC_RELAXED); }

#define EXPORT __attribute__((visibility("default")))

// Programs look for this symbol to learn that tile instructions work.
EXPORT const int moelora_amx_emulated = 1;

EXPORT void moelora_amx_counts(Counts* out) { *out = counts; }

EXPORT void moelora_amx_reset(void) {
  const int64_t live = counts.live;
  memset(&counts, 0, sizeof counts);
  counts.live = live;
}

// --- decoding

enum { kNone, k66, kF3, kF2 };  // VEX.pp

typedef struct {
  int opcode, prefix, reg, rm, third;  // ModRM.reg and .rm with their VEX bits; VEX.vvvv
  int is_memory, has_sib;
  uint8_t* address;  // without the index
  int64_t stride;    // index · scale
  int length;
} Instruction;

static const int kRegisters[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                                   REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};

static int32_t read_i32(const uint8_t* at) {
  int32_t v;
  memcpy(&v, at, sizeof v);
  return v;
}

// Fills in address, stride and length; `at` is the ModRM byte, `before` the bytes in front of it.
static void decode_memory(const uint8_t* at, int before, int vex_x, int vex_b, const greg_t* regs, Instruction* ins) {
  const int mod = at[0] >> 6;
  int length = 1, base = (at[0] & 7) | vex_b << 3, index = 4;
  int scale = 0, no_base = mod == 0 && (at[0] & 7) == 5;
  const int relative = no_base;
  ins->has_sib = (at[0] & 7) == 4;
  if (ins->has_sib) {
    base = (at[1] & 7) | vex_b << 3;
    index = (at[1] >> 3 & 7) | vex_x << 3;
    scale = at[1] >> 6;
    no_base = mod == 0 && (at[1] & 7) == 5;
    length = 2;
  }
  int64_t address = no_base ? 0 : regs[kRegisters[base]];
  if (mod == 1) {
    address += (int8_t)at[length];
    length += 1;
  } else if (mod == 2 || no_base) {
    address += read_i32(at + length);
    length += 4;
  }
  ins->length = before + length;
  if (relative) address += regs[REG_RIP] + ins->length;
  ins->address = (uint8_t*)address;
  ins->stride = index == 4 ? 0 : (int64_t)((uint64_t)regs[kRegisters[index]] << scale);
}

// Whether an instruction of ours stands at RIP: VEX.128.0F38.W0 49, 4B or 5C.
static int decode(const greg_t* regs, Instruction* ins) {
  const uint8_t* at = (const uint8_t*)regs[REG_RIP];
  if (at[0] != 0xC4 || (at[1] & 0x1F) != 2 || (at[2] & 0x84) != 0) return 0;
  ins->opcode = at[3];
  if (ins->opcode != 0x49 && ins->opcode != 0x4B && ins->opcode != 0x5C) return 0;
  const int vex_r = !(at[1] & 0x80), vex_x = !(at[1] & 0x40), vex_b = !(at[1] & 0x20);
  ins->prefix = at[2] & 3;
  ins->third = ~(at[2] >> 3) & 15;
  ins->reg = (at[4] >> 3 & 7) | vex_r << 3;
  ins->rm = (at[4] & 7) | vex_b << 3;
  ins->is_memory = at[4] >> 6 != 3;
  ins->length = 5;
  if (ins->is_memory) decode_memory(at + 4, 4, vex_x, vex_b, regs, ins);
  return 1;
}

// --- the instructions; each returns what is wrong, or NULL

static const char* release(void) {
  if (state.configured) count(&counts.live, -1);
  memset(&state, 0, sizeof state);
  count(&counts.releases, 1);
  return NULL;
}

static const char* load_config(const Config* from) {
  Config c;
  memcpy(&c, from, sizeof c);
  if (c.palette == 0) return release();
  if (c.palette != 1) return "LDTILECFG: palette above 1";
  if (c.start_row != 0) return "LDTILECFG: start_row is not 0";
  for (int i = 0; i < 14; ++i)
    if (c.reserved[i]) return "LDTILECFG: reserved bytes are not 0";
  for (int i = 0; i < 16; ++i) {
    if (i >= kTiles && (c.row_bytes[i] || c.rows[i])) return "LDTILECFG: reserved bytes are not 0";
    if (c.row_bytes[i] > kRowBytes || c.rows[i] > kRows) return "LDTILECFG: a tile is too large";
    if (!c.row_bytes[i] != !c.rows[i]) return "LDTILECFG: a tile has rows without bytes, or bytes without rows";
  }
  if (!state.configured) count(&counts.live, 1);
  memset(state.tile, 0, sizeof state.tile);
  state.config = c;
  state.configured = 1;
  count(&counts.configs, 1);
  return NULL;
}

static const char* store_config(Config* to) {
  *to = state.config;
  return NULL;
}

static const char* check_tile(int t) {
  if (!state.configured) return "a tile instruction without a configuration";
  if (t >= kTiles) return "there are eight tiles";
  if (state.config.rows[t] == 0) return "the tile is not configured";
  return NULL;
}

static const char* zero(const Instruction* ins) {
  if (ins->rm != 0) return "TILEZERO: ModRM.rm is not 0";
  const char* wrong = check_tile(ins->reg);
  if (wrong) return wrong;
  memset(state.tile[ins->reg], 0, sizeof state.tile[0]);
  count(&counts.zeros, 1);
  return NULL;
}

static const char* move(const Instruction* ins, int to_memory) {
  const int t = ins->reg;
  const char* wrong = check_tile(t);
  if (wrong) return wrong;
  if (!ins->has_sib) return "tile loads and stores need a SIB byte";
  const int rows = state.config.rows[t];
  const size_t bytes = state.config.row_bytes[t];
  if (!to_memory) memset(state.tile[t], 0, sizeof state.tile[0]);
  for (int i = 0; i < rows; ++i) {
    uint8_t* memory = ins->address + i * ins->stride;
    if (to_memory)
      memcpy(memory, state.tile[t][i], bytes);
    else
      memcpy(state.tile[t][i], memory, bytes);
  }
  count(to_memory ? &counts.stores : &counts.loads, 1);
  return NULL;
}

// c[m][n] += Σ_k a[m][k].even · b[k][n].even + Σ_k a[m][k].odd · b[k][n].odd, each sum a chain of fused multiply-adds.
// AVX2 in halves, as this is for CPUs without AVX-512, too.
__attribute__((target("avx2,fma"))) static void multiply(uint8_t (*c)[kRowBytes], uint8_t (*a)[kRowBytes],
                                                         uint8_t (*b)[kRowBytes], int rows, int pairs) {
  const __m256i high = _mm256_set1_epi32((int)0xffff0000);
  for (int m = 0; m < rows; ++m)
    for (int half = 0; half < kRowBytes; half += kRowBytes / 2) {
      __m256 even = _mm256_setzero_ps(), odd = _mm256_setzero_ps();
      for (int k = 0; k < pairs; ++k) {
        const __m256i left = _mm256_set1_epi32(read_i32(a[m] + 4 * k));
        const __m256i right = _mm256_load_si256((const __m256i*)(b[k] + half));
        even = _mm256_fmadd_ps(_mm256_castsi256_ps(_mm256_slli_epi32(left, 16)),
                               _mm256_castsi256_ps(_mm256_slli_epi32(right, 16)), even);
        odd = _mm256_fmadd_ps(_mm256_castsi256_ps(_mm256_and_si256(left, high)),
                              _mm256_castsi256_ps(_mm256_and_si256(right, high)), odd);
      }
      float* sums = (float*)(c[m] + half);
      _mm256_store_ps(sums, _mm256_add_ps(_mm256_load_ps(sums), _mm256_add_ps(even, odd)));
    }
}

static const char* product(const Instruction* ins) {
  const int c = ins->reg, a = ins->rm, b = ins->third;
  if (c == a || c == b || a == b) return "TDPBF16PS: the three tiles are not distinct";
  const char* wrong = check_tile(c);
  if (!wrong) wrong = check_tile(a);
  if (!wrong) wrong = check_tile(b);
  if (wrong) return wrong;
  const Config* s = &state.config;
  if (s->row_bytes[a] % 4 || s->row_bytes[b] % 4 || s->row_bytes[c] % 4) return "TDPBF16PS: rows of no whole pairs";
  if (s->rows[a] != s->rows[c]) return "TDPBF16PS: A and C differ in rows";
  if (s->row_bytes[b] != s->row_bytes[c]) return "TDPBF16PS: B and C differ in columns";
  if (s->row_bytes[a] / 4 != s->rows[b]) return "TDPBF16PS: A's pairs are not B's rows";
  const unsigned before = _mm_getcsr();
  _mm_setcsr(0x1f80 | 0x8040);  // to nearest; subnormals are zero, in and out
  multiply(state.tile[c], state.tile[a], state.tile[b], s->rows[a], s->row_bytes[a] / 4);
  _mm_setcsr(before);
  count(&counts.products, 1);
  return NULL;
}

static const char* perform(const Instruction* ins) {
  if (ins->opcode == 0x5C) {
    if (ins->is_memory || ins->prefix != kF3) return "not TDPBF16PS, which alone is emulated";
    return product(ins);
  }
  if (ins->third != 0) return "VEX.vvvv is not 1111";
  if (ins->opcode == 0x4B) {
    if (!ins->is_memory || ins->prefix == kNone) return "opcode 4B without memory or without a prefix";
    return move(ins, ins->prefix == kF3);
  }
  if (!ins->is_memory && ins->prefix == kF2) return zero(ins);
  if (ins->reg != 0) return "opcode 49: ModRM.reg is not 0";
  if (!ins->is_memory) return ins->prefix == kNone && ins->rm == 0 ? release() : "opcode 49: unknown form";
  // Here the index is part of the address.
  void* memory = ins->address + ins->stride;
  if (ins->prefix == kNone) return load_config(memory);
  return ins->prefix == k66 ? store_config(memory) : "opcode 49: unknown form";
}

// --- the signal

typedef int (*SigactionFunction)(int, const struct sigaction*, struct sigaction*);
static struct sigaction others;  // what the program wants done about SIGILL

static int real_sigaction(int signal, const struct sigaction* action, struct sigaction* old) {
  static SigactionFunction real;
  if (!real) real = (SigactionFunction)dlsym(RTLD_NEXT, "sigaction");
  return real(signal, action, old);
}

// Returning to the instruction then ends the process as it would have without this library.
static void let_it_die(void) {
  struct sigaction standard = {.sa_handler = SIG_DFL};
  real_sigaction(SIGILL, &standard, NULL);
}

static void say(const char* text) {
  if (write(STDERR_FILENO, text, strlen(text)) < 0) return;
}

static void on_illegal_instruction(int signal, siginfo_t* info, void* context) {
  greg_t* regs = ((ucontext_t*)context)->uc_mcontext.gregs;
  Instruction ins = {0};
  if (!decode(regs, &ins)) {
    if (others.sa_flags & SA_SIGINFO)
      others.sa_sigaction(signal, info, context);
    else if (others.sa_handler == SIG_DFL || others.sa_handler == SIG_IGN)
      let_it_die();
    else
      others.sa_handler(signal);
    return;
  }
  // A signal costs far more than an instruction: those that follow directly are performed as well.
  const char* wrong;
  do {
    wrong = perform(&ins);
    if (!wrong) regs[REG_RIP] += ins.length;
  } while (!wrong && decode(regs, &ins));
  if (!wrong) return;
  say("AMX emulator: ");
  say(wrong);
  say("\n");
  let_it_die();
}

// Handlers that programs install for SIGILL (faulthandler does) come after ours.
EXPORT int sigaction(int signal, const struct sigaction* action, struct sigaction* old) {
  if (signal != SIGILL) return real_sigaction(signal, action, old);
  const struct sigaction before = others;
  if (action) others = *action;
  if (old) *old = before;
  return 0;
}

EXPORT sighandler_t signal(int number, sighandler_t handler) {
  struct sigaction action = {.sa_handler = handler, .sa_flags = SA_RESTART}, old;
  return sigaction(number, &action, &old) == 0 ? old.sa_handler : SIG_ERR;
}

__attribute__((constructor)) static void install(void) {
  struct sigaction action = {.sa_sigaction = on_illegal_instruction, .sa_flags = SA_SIGINFO | SA_NODEFER};
  sigemptyset(&action.sa_mask);
  real_sigaction(SIGILL, &action, &others);
}
