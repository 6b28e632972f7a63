// ranks: what several ranks gathered into rows, added up.
//   rank_sums         out = sum of rows[r] over r, f32
//   rank_sums_f64     the same, f64
//   rank_sums_i32     the same, int32, modulo 2^32
//   rank_flags        a step's flags of all ranks: the least first token, the fault bits of all
//   load_shares       fractions[e] = load[e] / max(1, Σ load), sums in order of e
// Sums are formed in pairs: rows 0 and 1, 2 and 3, ...; then these sums in pairs, and so on; a row without a partner goes on
// to the next round. So sums over groups of 2^k consecutive ranks, added up by a second call, have the same bytes as one call.
// rows [ranks, stride], of which the first `elements` of each row count; out [elements], which may not overlap them.
// flags [layers, 2] and rows of as many int32 are those of step.cu; load [E] f64, fractions [E] f32, E <= 256.
// Every rank adds the same rows, so that all have the same bytes. Deterministic: no atomics.
// Bytes: rank_sums 4·(ranks + 1)·elements. FLOPs: none on tensor cores. Floor: bytes / 4.3e12 s.
#include "common/simt.cuh"

namespace ROUTEGRAD_VARIANT {
namespace {

constexpr int kThreads = 256;
constexpr int kMostRanks = 4096, kMaxExperts = 256;

// Rows that a thread reads at once, a power of two: as many as 40 registers allow.
template <class T>
constexpr int kGroup = sizeof(T) == 4 ? 8 : 2;
// Rounds in which the sums of n groups are added: the binary digits of n.
constexpr int rounds(int n) { return n == 0 ? 0 : 1 + rounds(n / 2); }
template <class T>
constexpr int kRounds = rounds(kMostRanks / kGroup<T>);

// An element a thread. partial[k] is the sum of 2^k consecutive groups that waits for its partner; it is in use where bit k of
// the number of groups read so far is set.
template <class T>
__global__ void __launch_bounds__(kThreads)
    rank_sums_kernel(T* out, const T* rows, int ranks, int64_t stride, int64_t elements) {
  const int64_t at = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (at >= elements) return;
  constexpr int kRows = kGroup<T>;
  const int groups = (ranks + kRows - 1) / kRows;
  T partial[kRounds<T>] = {}, sum = 0;
  for (int g = 0; g < groups; ++g) {
    const int left = ranks - g * kRows;
    T row[kRows];
#pragma unroll
    for (int i = 0; i < kRows; ++i) row[i] = i < left ? ld_global_readonly(rows + (g * kRows + i) * stride + at) : T{0};
#pragma unroll
    for (int width = 1; width < kRows; width *= 2)
#pragma unroll
      for (int i = 0; i < kRows; i += 2 * width)
        if (i + width < left) row[i] += row[i + width];
    sum = row[0];
    bool moves = true;
#pragma unroll
    for (int k = 0; k < kRounds<T>; ++k) {
      const bool waits = (g >> k & 1) != 0;
      if (moves && waits) sum = partial[k] + sum;
      if (moves && !waits) partial[k] = sum;
      moves = moves && waits;
    }
  }
  // What waits without a partner joins the sum of the groups before it.
  bool found = false;
#pragma unroll
  for (int k = 0; k < kRounds<T>; ++k) {
    if ((groups >> k & 1) == 0) continue;
    sum = found ? partial[k] + sum : partial[k];
    found = true;
  }
  st_global(out + at, sum);
}

__global__ void __launch_bounds__(kThreads) rank_flags_kernel(int32_t* flags, const int32_t* rows, int ranks, int layers) {
  const int layer = static_cast<int>(blockIdx.x) * kThreads + static_cast<int>(threadIdx.x);
  if (layer >= layers) return;
  int32_t token = INT32_MAX, fault = 0;
  for (int r = 0; r < ranks; ++r) {
    const int32_t* row = rows + (int64_t{r} * layers + layer) * 2;
    const int32_t other = ld_global_readonly(row);
    token = other < token ? other : token;
    fault |= ld_global_readonly(row + 1);
  }
  st_global(flags + 2 * layer, token);
  st_global(flags + 2 * layer + 1, fault);
}

__global__ void __launch_bounds__(kThreads) load_shares_kernel(float* fractions, const double* load, int experts) {
  double sum = 0;
  for (int e = 0; e < experts; ++e) sum += ld_global_readonly(load + e);
  const int e = static_cast<int>(threadIdx.x);
  if (e >= experts) return;
  st_global(fractions + e, static_cast<float>(ld_global_readonly(load + e) / (sum > 1 ? sum : 1)));
}

template <class T>
routegrad_status launch_sums(T* out, const T* rows, int32_t ranks, int64_t stride, int64_t elements,
                             routegrad_stream stream) {
  const dim3 grid(static_cast<uint32_t>((elements + kThreads - 1) / kThreads));
  return launch(rank_sums_kernel<T>, {grid, kThreads}, stream, out, rows, ranks, stride, elements);
}

}  // namespace

// Addresses of single elements within a tensor: no more than their own alignment.
#define REQUIRE_PRESENT(launcher, argument) REQUIRE(launcher, argument, (argument) != nullptr, ROUTEGRAD_NULL_POINTER)
#define REQUIRE_ROWS(launcher)                                                                                  \
  REQUIRE_PRESENT(launcher, out);                                                                               \
  REQUIRE_PRESENT(launcher, rows);                                                                              \
  REQUIRE(launcher, ranks, 1 <= ranks && ranks <= kMostRanks, ROUTEGRAD_OUT_OF_RANGE);                          \
  REQUIRE(launcher, elements, 1 <= elements && elements <= int64_t{1} << 36, ROUTEGRAD_OUT_OF_RANGE);           \
  REQUIRE(launcher, stride, elements <= stride && stride <= int64_t{1} << 40, ROUTEGRAD_OUT_OF_RANGE)

routegrad_status rank_sums(float* out, const float* rows, int32_t ranks, int64_t stride, int64_t elements,
                           routegrad_stream stream) {
  REQUIRE_ROWS(rank_sums);
  return launch_sums(out, rows, ranks, stride, elements, stream);
}

routegrad_status rank_sums_f64(double* out, const double* rows, int32_t ranks, int64_t stride, int64_t elements,
                               routegrad_stream stream) {
  REQUIRE_ROWS(rank_sums_f64);
  return launch_sums(out, rows, ranks, stride, elements, stream);
}

routegrad_status rank_sums_i32(int32_t* out, const int32_t* rows, int32_t ranks, int64_t stride, int64_t elements,
                               routegrad_stream stream) {
  REQUIRE_ROWS(rank_sums_i32);
  // Unsigned, so that a sum beyond 2^31 wraps around.
  return launch_sums(reinterpret_cast<uint32_t*>(out), reinterpret_cast<const uint32_t*>(rows), ranks, stride, elements,
                     stream);
}

routegrad_status rank_flags(int32_t* flags, const int32_t* rows, int32_t ranks, int32_t layers, routegrad_stream stream) {
  REQUIRE_PRESENT(rank_flags, flags);
  REQUIRE_PRESENT(rank_flags, rows);
  REQUIRE(rank_flags, ranks, 1 <= ranks && ranks <= kMostRanks, ROUTEGRAD_OUT_OF_RANGE);
  REQUIRE(rank_flags, layers, 1 <= layers && layers <= 4096, ROUTEGRAD_OUT_OF_RANGE);
  const dim3 grid(static_cast<uint32_t>((layers + kThreads - 1) / kThreads));
  return launch(rank_flags_kernel, {grid, kThreads}, stream, flags, rows, ranks, layers);
}

routegrad_status load_shares(float* fractions, const double* load, int32_t experts, routegrad_stream stream) {
  REQUIRE_PRESENT(load_shares, fractions);
  REQUIRE_PRESENT(load_shares, load);
  REQUIRE(load_shares, experts, 1 <= experts && experts <= kMaxExperts, ROUTEGRAD_OUT_OF_RANGE);
  return launch(load_shares_kernel, {dim3(1), kThreads}, stream, fractions, load, experts);
}

}  // namespace ROUTEGRAD_VARIANT
