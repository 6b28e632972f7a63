// Warpgroup matrix products: D[64, N] f32 += A[64, 16] bf16 · B[16, N] bf16, asynchronous, issued by all 128 threads.
//
// Use, per k-tile:  mbar_wait; wgmma_fence(d); wgmma<N>(d, ...) for each k16; wgmma_commit; wgmma_wait<0>(d).
// The accumulators of a product in flight must not be touched: they are the caller's again after a wgmma_wait that names
// them. Naming them matters to both machines: the GPU's compiler may otherwise move a use above the wait, and the
// simulator hands the values back only there.
//
// Accumulator fragment: thread t of the warpgroup holds, in d[4 j + 2 h + e], row 16 (t / 32) + (t % 32) / 4 + 8 h and
// column 8 j + 2 (t % 4) + e.
#pragma once
#include "ptx_sync.cuh"
#include "tensor_map.cuh"

namespace ROUTEGRAD_VARIANT {

// Which dimension of an operand is contiguous: K, or the other one (M of A, N of B).
enum class Major { K = 0, MN = 1 };

// Bytes between the start of a tile and its k16-th step of 16 along k, for a tile of `rows` (m or n) by `depth` (k)
// elements that TMA laid down one box per atom, an atom being one swizzle span wide.
//   K-major:  an atom is `rows` rows of one span of k; atoms follow each other along k.
//   MN-major: an atom is `depth` rows (one per k) of one span of m or n; atoms follow each other along m or n.
template <Major MAJOR, Swizzle SWIZZLE>
HOST_DEV constexpr uint32_t wgmma_step_bytes(int k16, int rows) {
  constexpr int span = span_bytes(SWIZZLE), steps = span / 32;  // k16 steps in a K-major span
  return MAJOR == Major::MN ? 16 * span * k16 : k16 / steps * rows * span + k16 % steps * 32;
}

// The descriptor of one k16 step of a swizzled tile in shared memory. The tile starts at a multiple of 8 spans.
// PTX ISA, "Matrix descriptor": start, leading and stride byte offsets in units of 16, swizzle in bits 62 and 63.
template <Major MAJOR, Swizzle SWIZZLE = Swizzle::Span128>
DEV uint64_t wgmma_descriptor(const void* tile, int k16, int rows, int depth,
                              [[maybe_unused]] Where at = Where::current()) {
  static_assert(SWIZZLE != Swizzle::None);
  constexpr uint32_t span = span_bytes(SWIZZLE);
  const uint32_t start = shared_address(tile, at) + wgmma_step_bytes<MAJOR, SWIZZLE>(k16, rows);
  ON_SIM(if (shared_address(tile, at) % (8 * span)) sim::fail("wgmma operand tile is not aligned to 8 swizzle spans", at);)
  const uint32_t leading = MAJOR == Major::K ? 16 : span * depth;  // to the next atom; unused when K-major
  const uint32_t stride = 8 * span;                                // to the next 8 rows
  return static_cast<uint64_t>((start & 0x3ffff) >> 4) | static_cast<uint64_t>(leading >> 4) << 16 |
         static_cast<uint64_t>(stride >> 4) << 32 | static_cast<uint64_t>(SWIZZLE) << 62;
}

// Tells the compiler that the registers change here, so that no use of them moves across.
template <int R>
DEV void pin_registers([[maybe_unused]] float (&d)[R]) {
#ifdef __CUDACC__
#pragma unroll
  for (int i = 0; i < R; ++i) asm volatile("" : "+f"(d[i])::"memory");
#endif
}

// Before the first product, and whenever registers of one (accumulators, or A in registers) were touched since.
DEV void wgmma_fence([[maybe_unused]] Where at = Where::current()) {
  ON_GPU(asm volatile("wgmma.fence.sync.aligned;" ::: "memory");)
  ON_SIM(sim::wgmma_fence(at);)
}
template <int R>
DEV void wgmma_fence(float (&d)[R], [[maybe_unused]] Where at = Where::current()) {
  pin_registers(d);
  wgmma_fence(at);
}
DEV void wgmma_commit([[maybe_unused]] Where at = Where::current()) {
  ON_GPU(asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");)
  ON_SIM(sim::wgmma_commit(at);)
}
// Waits for all but the last KEEP groups, whose operands may then be overwritten.
template <int KEEP>
DEV void wgmma_wait([[maybe_unused]] Where at = Where::current()) {
  ON_GPU(asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(KEEP) : "memory");)
  ON_SIM(sim::wgmma_wait(KEEP, at);)
}
// The same, and takes back accumulators: every product on them is among those waited for.
template <int KEEP, int R>
DEV void wgmma_wait(float (&d)[R], [[maybe_unused]] Where at = Where::current()) {
  wgmma_wait<KEEP>(at);
  pin_registers(d);
  ON_SIM(sim::wgmma_take(d, R, at);)
}
// For a warpgroup that holds several tiles of accumulators.
template <int KEEP, int TILES, int R>
DEV void wgmma_wait(float (&d)[TILES][R], [[maybe_unused]] Where at = Where::current()) {
  wgmma_wait<KEEP>(at);
#pragma unroll
  for (int i = 0; i < TILES; ++i) {
    pin_registers(d[i]);
    ON_SIM(sim::wgmma_take(d[i], R, at);)
  }
}

#ifdef __CUDACC__
// The register list of an instruction ("%0, ..., %(R-1)") and its operands, for the widths that kernels use.
#define ROUTEGRAD_REGS_8 "%0,%1,%2,%3,%4,%5,%6,%7"
#define ROUTEGRAD_REGS_16 ROUTEGRAD_REGS_8 ",%8,%9,%10,%11,%12,%13,%14,%15"
#define ROUTEGRAD_REGS_32 ROUTEGRAD_REGS_16 ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define ROUTEGRAD_REGS_48 ROUTEGRAD_REGS_32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47"
#define ROUTEGRAD_REGS_64 ROUTEGRAD_REGS_48 ",%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define ROUTEGRAD_REGS_88 ROUTEGRAD_REGS_64 \
  ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84,%85,%86,%87"
#define ROUTEGRAD_REGS_128 ROUTEGRAD_REGS_88 \
  ",%88,%89,%90,%91,%92,%93,%94,%95,%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111" \
  ",%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"
#define ROUTEGRAD_ACC8(i) \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define ROUTEGRAD_ACC_8 ROUTEGRAD_ACC8(0)
#define ROUTEGRAD_ACC_16 ROUTEGRAD_ACC_8, ROUTEGRAD_ACC8(8)
#define ROUTEGRAD_ACC_32 ROUTEGRAD_ACC_16, ROUTEGRAD_ACC8(16), ROUTEGRAD_ACC8(24)
#define ROUTEGRAD_ACC_48 ROUTEGRAD_ACC_32, ROUTEGRAD_ACC8(32), ROUTEGRAD_ACC8(40)
#define ROUTEGRAD_ACC_64 ROUTEGRAD_ACC_48, ROUTEGRAD_ACC8(48), ROUTEGRAD_ACC8(56)
#define ROUTEGRAD_ACC_88 ROUTEGRAD_ACC_64, ROUTEGRAD_ACC8(64), ROUTEGRAD_ACC8(72), ROUTEGRAD_ACC8(80)
#define ROUTEGRAD_ACC_128 \
  ROUTEGRAD_ACC_88, ROUTEGRAD_ACC8(88), ROUTEGRAD_ACC8(96), ROUTEGRAD_ACC8(104), ROUTEGRAD_ACC8(112), ROUTEGRAD_ACC8(120)
// A in shared memory. R: accumulator registers; then the operand numbers of: descriptor a, descriptor b, scale-d,
// transpose a, transpose b.
#define ROUTEGRAD_WGMMA_SHARED(N, R, A, B, S, TA, TB)                                                           \
  if constexpr (COLUMNS == N)                                                                                   \
    asm volatile("{ .reg .pred p; setp.ne.b32 p, %" #S ", 0;\n"                                                 \
                 "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" ROUTEGRAD_REGS_##R "}, %" #A      \
                 ", %" #B ", p, 1, 1, %" #TA ", %" #TB "; }"                                                    \
                 : ROUTEGRAD_ACC_##R                                                                            \
                 : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)), "n"(static_cast<int>(A_MAJOR)),           \
                   "n"(static_cast<int>(B_MAJOR))                                                               \
                 : "memory");
// A in registers: operand numbers of the four registers of a, descriptor b, scale-d, transpose b.
#define ROUTEGRAD_WGMMA_REGISTERS(N, R, A0, A1, A2, A3, B, S, TB)                                               \
  if constexpr (COLUMNS == N)                                                                                   \
    asm volatile("{ .reg .pred p; setp.ne.b32 p, %" #S ", 0;\n"                                                 \
                 "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" ROUTEGRAD_REGS_##R "}, {%" #A0    \
                 ", %" #A1 ", %" #A2 ", %" #A3 "}, %" #B ", p, 1, 1, %" #TB "; }"                               \
                 : ROUTEGRAD_ACC_##R                                                                            \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(accumulate)),       \
                   "n"(static_cast<int>(B_MAJOR))                                                               \
                 : "memory");
#endif

// Widths that exist here; the instruction has every multiple of 8 up to 256.
template <int COLUMNS>
constexpr bool kWgmmaWidth = COLUMNS == 16 || COLUMNS == 32 || COLUMNS == 64 || COLUMNS == 96 || COLUMNS == 128 ||
                             COLUMNS == 176 || COLUMNS == 256;

// D = A B, plus D when `accumulate`; A and B by descriptor.
template <int COLUMNS, Major A_MAJOR = Major::K, Major B_MAJOR = Major::K>
DEV void wgmma(float (&d)[COLUMNS / 2], uint64_t a, uint64_t b, bool accumulate,
               [[maybe_unused]] Where at = Where::current()) {
  static_assert(kWgmmaWidth<COLUMNS>);
#ifdef __CUDACC__
  ROUTEGRAD_WGMMA_SHARED(16, 8, 8, 9, 10, 11, 12)
  ROUTEGRAD_WGMMA_SHARED(32, 16, 16, 17, 18, 19, 20)
  ROUTEGRAD_WGMMA_SHARED(64, 32, 32, 33, 34, 35, 36)
  ROUTEGRAD_WGMMA_SHARED(96, 48, 48, 49, 50, 51, 52)
  ROUTEGRAD_WGMMA_SHARED(128, 64, 64, 65, 66, 67, 68)
  ROUTEGRAD_WGMMA_SHARED(176, 88, 88, 89, 90, 91, 92)
  ROUTEGRAD_WGMMA_SHARED(256, 128, 128, 129, 130, 131, 132)
#else
  sim::wgmma(d, COLUMNS, {a, A_MAJOR == Major::MN}, {b, B_MAJOR == Major::MN}, accumulate, at);
#endif
}

// The same with A [64, 16] in registers: a[2 kh + h] of thread t holds row 16 (t / 32) + (t % 32) / 4 + 8 h, columns
// 2 (t % 4) + 8 kh (low half) and the next. They must stay untouched until the wait.
template <int COLUMNS, Major B_MAJOR = Major::K>
DEV void wgmma_a_registers(float (&d)[COLUMNS / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate,
                           [[maybe_unused]] Where at = Where::current()) {
  static_assert(kWgmmaWidth<COLUMNS>);
#ifdef __CUDACC__
  ROUTEGRAD_WGMMA_REGISTERS(16, 8, 8, 9, 10, 11, 12, 13, 14)
  ROUTEGRAD_WGMMA_REGISTERS(32, 16, 16, 17, 18, 19, 20, 21, 22)
  ROUTEGRAD_WGMMA_REGISTERS(64, 32, 32, 33, 34, 35, 36, 37, 38)
  ROUTEGRAD_WGMMA_REGISTERS(96, 48, 48, 49, 50, 51, 52, 53, 54)
  ROUTEGRAD_WGMMA_REGISTERS(128, 64, 64, 65, 66, 67, 68, 69, 70)
  ROUTEGRAD_WGMMA_REGISTERS(176, 88, 88, 89, 90, 91, 92, 93, 94)
  ROUTEGRAD_WGMMA_REGISTERS(256, 128, 128, 129, 130, 131, 132, 133, 134)
#else
  sim::wgmma_a_registers(d, COLUMNS, a, {b, B_MAJOR == Major::MN}, accumulate, at);
#endif
}

}  // namespace ROUTEGRAD_VARIANT
