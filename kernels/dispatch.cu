// dispatch: sorts the slots of a batch by expert, so that a grouped GEMM sees each expert's tokens as one run of rows.
//
// A slot is one place where a token may name an expert; slot s belongs to token s / W.
//   dispatch_choices  choices [T, K] int32   W = K; slot t·K + k names expert choices[t, k]
//   dispatch_positive scores [T, E] float    W = E; slot t·E + e names expert e where scores[t, e] > 0, else none (as a NaN
//                     does); without scores every slot names its expert
// Rows are the named slots in order (expert, slot): a stable counting sort, tokens ascend within an expert.
//   offsets [E + 1]   rows of expert e are offsets[e] … offsets[e + 1] − 1; offsets[E] is the number of rows
//   row_token [C], row_slot [C]   token and slot of each row; entries past offsets[E] are not written
//   slot_row [T·W]    row of each slot; −1 where the slot names no expert or its row does not fit
//   fault [1]         bits are set, never cleared: ROUTEGRAD_FAULT_EXPERT, a choice outside 0 … E − 1 (its slot has no
//                     row); ROUTEGRAD_FAULT_CAPACITY, more rows than C (offsets stop at C)
// All outputs are assigned, fault is or-ed. T >= 1, 1 <= K <= E <= 256, T·W < 2^31, C = row_capacity.
//
// Three kernels: count (per block and expert), scan (one block: starts of every block and expert), scatter. A lane's
// rank among equal experts of its warp comes from ballots, ranks across warps and blocks from prefix sums of integers,
// so the result is the same bytes on every run. The host never learns a count.
//
// Bytes, S = T·W slots, R rows: 12·S (4·S without scores) + 8·R + 8·G·E for G <= 256 blocks. FLOPs: none.
// Floor: bytes / 4.3e12 s; below about 1 MB the three launches cost more.
#include "common/ptx.cuh"

namespace ROUTEGRAD_VARIANT {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kMaxExperts = 256, kMaxBlocks = 256;
constexpr int kSlotsPerBlock = 256;  // 32 of a warp, while there are fewer than kMaxBlocks blocks

// The cut of all slots into one run per warp, runs in order of (block, warp).
struct Slots {
  int64_t count;
  int width;  // slots of a token
  int blocks;
  int64_t run;  // slots of a warp, a multiple of 32
};

Slots cut_slots(int64_t tokens, int width) {
  Slots slots{tokens * width, width, 0, 0};
  const int64_t wanted = (slots.count + kSlotsPerBlock - 1) / kSlotsPerBlock;
  slots.blocks = static_cast<int>(wanted < kMaxBlocks ? wanted : kMaxBlocks);
  const int64_t warps = static_cast<int64_t>(slots.blocks) * kWarps;
  slots.run = ((slots.count + warps - 1) / warps + 31) / 32 * 32;
  return slots;
}

// What a slot names: an expert, or `experts` for none.
struct Choices {
  static constexpr bool kMayNameNone = false;
  const int32_t* choices;
  int experts;
  DEV int expert(int64_t slot) const { return ld_global_readonly(choices + slot); }
};
struct Positive {
  static constexpr bool kMayNameNone = true;
  const float* scores;
  int experts;
  DEV int expert(int64_t slot) const {
    const bool named = scores == nullptr || ld_global_readonly(scores + slot) > 0;
    return named ? static_cast<int>(static_cast<uint32_t>(slot) % experts) : experts;
  }
};

// Lanes of the warp that name the same expert. Nine ballots at most: one per bit of 0 … E.
DEV uint32_t lanes_with(int expert, int experts) {
  uint32_t same = ~0u;
  for (int bit = 1; bit <= experts; bit <<= 1) {
    const uint32_t set = __ballot_sync(~0u, (expert & bit) != 0);
    same &= expert & bit ? set : ~set;
  }
  return same;
}

struct DispatchShared {
  int32_t counts[kWarps][kMaxExperts];
};

// Calls visit(slot, expert, rank among the warp's run plus the warp's start) for every slot of this warp's run that
// names an expert, and reject(slot) for the others; leaves start + count in `counts`. All lanes stay together.
template <class Source, class Visit, class Reject>
DEV void rank_run(const Source& source, const Slots& slots, int32_t* counts, Visit visit, Reject reject) {
  const int lane = threadIdx.x % 32;
  const int64_t first = (static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32) * slots.run;
  const int64_t last = first + slots.run < slots.count ? first + slots.run : slots.count;
  for (int64_t base = first; base < last; base += 32) {
    const int64_t slot = base + lane;
    const int named = slot < last ? source.expert(slot) : source.experts;
    const bool valid = 0 <= named && named < source.experts;
    const int expert = valid ? named : source.experts;
    const uint32_t same = lanes_with(expert, source.experts);
    const int rank = __popc(same & ((1u << lane) - 1));
    const int start = valid ? counts[expert] : 0;
    __syncwarp();
    if (valid && rank == 0) counts[expert] = start + __popc(same);
    __syncwarp();
    if (valid) visit(slot, expert, start + rank);
    if (!valid && slot < last) reject(slot);
  }
}

DEV void clear_counts(DispatchShared& s) {
  for (int i = threadIdx.x; i < kWarps * kMaxExperts; i += kThreads) s.counts[i / kMaxExperts][i % kMaxExperts] = 0;
  __syncthreads();
}

// block_counts[b, e] = slots of block b that name expert e.
template <class Source>
__global__ void __launch_bounds__(kThreads)
    dispatch_count(int32_t* block_counts, int32_t* fault, const Source source, const Slots slots) {
  DYNAMIC_SHARED(DispatchShared, s);
  clear_counts(s);
  rank_run(
      source, slots, s.counts[threadIdx.x / 32], [](int64_t, int, int) {},
      [&](int64_t) {
        if (!Source::kMayNameNone) atomicOr(fault, ROUTEGRAD_FAULT_EXPERT);
      });
  __syncthreads();
  for (int e = threadIdx.x; e < source.experts; e += kThreads) {
    int32_t sum = 0;
    for (int warp = 0; warp < kWarps; ++warp) sum += s.counts[warp][e];
    block_counts[static_cast<int64_t>(blockIdx.x) * source.experts + e] = sum;
  }
}

struct ScanShared {
  int32_t warp_totals[kWarps];
};

// Thread e turns block_counts[·, e] into the number of slots of e in earlier blocks; then offsets from the totals.
__global__ void __launch_bounds__(kThreads)
    dispatch_scan(int32_t* offsets, int32_t* block_counts, int32_t* fault, int blocks, int experts, int32_t capacity) {
  DYNAMIC_SHARED(ScanShared, s);
  const int e = threadIdx.x, lane = e % 32, warp = e / 32;
  int32_t total = 0;
  if (e < experts) {
    // Loads of a batch are under way together: one at a time, the walk would cost a memory latency per block.
    constexpr int kBatch = 32;
    for (int first = 0; first < blocks; first += kBatch) {
      int32_t counts[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i)
        counts[i] = first + i < blocks ? ld_global(block_counts + (first + i) * experts + e) : 0;
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        if (first + i < blocks) st_global(block_counts + (first + i) * experts + e, total);
        total += counts[i];
      }
    }
  }
  int32_t through = total;  // of the experts up to and with e
  for (int distance = 1; distance < 32; distance <<= 1) {
    const int32_t below = __shfl_up_sync(~0u, through, distance);
    if (lane >= distance) through += below;
  }
  if (lane == 31) s.warp_totals[warp] = through;
  __syncthreads();
  for (int w = 0; w < warp; ++w) through += s.warp_totals[w];
  if (e < experts) offsets[e + 1] = through < capacity ? through : capacity;
  if (e == 0) offsets[0] = 0;
  if (e == experts - 1 && through > capacity) atomicOr(fault, ROUTEGRAD_FAULT_CAPACITY);
}

// Writes both maps. A row past the capacity is past offsets[E] and is written nowhere.
template <class Source>
__global__ void __launch_bounds__(kThreads)
    dispatch_scatter(int32_t* row_token, int32_t* row_slot, int32_t* slot_row, const int32_t* offsets,
                     const int32_t* block_starts, const Source source, const Slots slots, int32_t capacity) {
  DYNAMIC_SHARED(DispatchShared, s);
  const int warp = threadIdx.x / 32;
  const auto ignore = [](int64_t) {};
  clear_counts(s);
  rank_run(source, slots, s.counts[warp], [](int64_t, int, int) {}, ignore);
  __syncthreads();
  for (int e = threadIdx.x; e < source.experts; e += kThreads) {
    int32_t start = offsets[e] + block_starts[static_cast<int64_t>(blockIdx.x) * source.experts + e];
    for (int w = 0; w < kWarps; ++w) {
      const int32_t count = s.counts[w][e];
      s.counts[w][e] = start;
      start += count;
    }
  }
  __syncthreads();
  rank_run(
      source, slots, s.counts[warp],
      [&](int64_t slot, int, int row) {
        const bool fits = row < capacity;
        st_global(slot_row + slot, fits ? row : -1);
        if (fits) {
          st_global(row_token + row, static_cast<int32_t>(static_cast<uint32_t>(slot) / slots.width));
          st_global(row_slot + row, static_cast<int32_t>(slot));
        }
      },
      [&](int64_t slot) { st_global(slot_row + slot, -1); });
}

template <class Source>
routegrad_status dispatch(int32_t* offsets, int32_t* row_token, int32_t* row_slot, int32_t* slot_row, int32_t* fault,
                          int32_t* block_counts, const Source& source, const Slots& slots, int64_t row_capacity,
                          routegrad_stream stream) {
  const auto grid = dim3(static_cast<uint32_t>(slots.blocks));
  const auto capacity = static_cast<int32_t>(row_capacity);
  const LaunchShape shape{grid, kThreads, shared_bytes<DispatchShared>};
  routegrad_status status = launch(dispatch_count<Source>, shape, stream, block_counts, fault, source, slots);
  if (status == ROUTEGRAD_OK)
    status = launch(dispatch_scan, {dim3(1), kThreads, shared_bytes<ScanShared>}, stream, offsets, block_counts, fault,
                    slots.blocks, source.experts, capacity);
  if (status == ROUTEGRAD_OK)
    status = launch(dispatch_scatter<Source>, shape, stream, row_token, row_slot, slot_row, offsets, block_counts,
                    source, slots, capacity);
  return status;
}

}  // namespace

// What both forms refuse.
#define REQUIRE_DISPATCH(launcher)                                                            \
  REQUIRE_POINTER(launcher, offsets);                                                         \
  REQUIRE_POINTER(launcher, row_token);                                                       \
  REQUIRE_POINTER(launcher, row_slot);                                                        \
  REQUIRE_POINTER(launcher, slot_row);                                                        \
  REQUIRE_POINTER(launcher, fault);                                                           \
  REQUIRE_POINTER(launcher, workspace);                                                       \
  REQUIRE(launcher, tokens, tokens >= 1, ROUTEGRAD_OUT_OF_RANGE);                             \
  REQUIRE(launcher, experts, 1 <= experts && experts <= kMaxExperts, ROUTEGRAD_OUT_OF_RANGE); \
  REQUIRE(launcher, row_capacity, 1 <= row_capacity && row_capacity <= INT32_MAX, ROUTEGRAD_OUT_OF_RANGE)

routegrad_status dispatch_workspace(uint64_t* bytes, int64_t tokens, int32_t experts, int32_t width) {
  REQUIRE(dispatch_workspace, bytes, bytes != nullptr, ROUTEGRAD_NULL_POINTER);
  REQUIRE(dispatch_workspace, tokens, tokens >= 1, ROUTEGRAD_OUT_OF_RANGE);
  REQUIRE(dispatch_workspace, experts, 1 <= experts && experts <= kMaxExperts, ROUTEGRAD_OUT_OF_RANGE);
  REQUIRE(dispatch_workspace, width, 1 <= width && width <= experts, ROUTEGRAD_OUT_OF_RANGE);
  REQUIRE(dispatch_workspace, tokens, tokens <= INT32_MAX / width, ROUTEGRAD_OVERFLOW);
  *bytes = sizeof(int32_t) * static_cast<uint64_t>(cut_slots(tokens, width).blocks) * static_cast<uint64_t>(experts);
  return ROUTEGRAD_OK;
}

routegrad_status dispatch_choices(int32_t* offsets, int32_t* row_token, int32_t* row_slot, int32_t* slot_row,
                                  int32_t* fault, void* workspace, const int32_t* choices, int64_t tokens,
                                  int32_t experts, int32_t choices_per_token, int64_t row_capacity,
                                  routegrad_stream stream) {
  REQUIRE_DISPATCH(dispatch_choices);
  REQUIRE_POINTER(dispatch_choices, choices);
  REQUIRE(dispatch_choices, choices_per_token, 1 <= choices_per_token && choices_per_token <= experts,
          ROUTEGRAD_OUT_OF_RANGE);
  REQUIRE(dispatch_choices, tokens, tokens <= INT32_MAX / choices_per_token, ROUTEGRAD_OVERFLOW);
  return dispatch(offsets, row_token, row_slot, slot_row, fault, static_cast<int32_t*>(workspace),
                  Choices{choices, experts}, cut_slots(tokens, choices_per_token), row_capacity, stream);
}

routegrad_status dispatch_positive(int32_t* offsets, int32_t* row_token, int32_t* row_slot, int32_t* slot_row,
                                   int32_t* fault, void* workspace, const float* scores, int64_t tokens,
                                   int32_t experts, int64_t row_capacity, routegrad_stream stream) {
  REQUIRE_DISPATCH(dispatch_positive);
  REQUIRE(dispatch_positive, tokens, tokens <= INT32_MAX / experts, ROUTEGRAD_OVERFLOW);
  return dispatch(offsets, row_token, row_slot, slot_row, fault, static_cast<int32_t*>(workspace),
                  Positive{scores, experts}, cut_slots(tokens, experts), row_capacity, stream);
}

}  // namespace ROUTEGRAD_VARIANT
