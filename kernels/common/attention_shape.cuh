// What the attention kernels share: sizes, which keys a row sees, which tile next, and tensor maps.
//
// qkv [B·S, (H + 2 Hkv)·d]: a row holds the query heads, the key heads, then the value heads. Query head i belongs to key
// head i / (H / Hkv). Row r of a sequence sees the keys first_key[r] … r (null: 0 … r); first_key [B·S], positions in the
// row's own sequence, must not decrease within a sequence. Where it exceeds r, the row sees nothing.
#pragma once
#include "gemm_epilogue.cuh"
#include "ring.cuh"
#include "warp.cuh"

namespace ROUTEGRAD_VARIANT {

constexpr int kAttentionThreads = 384;  // one producer warpgroup and two consumers
constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
// 1 / √d, and the same for powers of two.
template <int D>
constexpr float kScoreScale = D == 64 ? 0.125f : 0.08838834764831845f;
template <int D>
constexpr float kExponentScale = kScoreScale<D> * kLog2E;

struct AttentionShape {
  const int32_t* first_key;  // [B, S], or null
  int sequences, sequence;   // B, S
  int heads, key_value_heads;

  DEV int key_head(int head) const { return head / (heads / key_value_heads); }
  // The first key that `row` sees; rows past the last count as the last.
  DEV int first_visible(int in_sequence, int row) const {
    if (!first_key) return 0;
    const int64_t at = static_cast<int64_t>(in_sequence) * sequence + min(row, sequence - 1);
    return max(ld_global_readonly(first_key + at), 0);
  }
  // One more than the last row that sees `key`, or less than `key` where none does.
  DEV int rows_end(int in_sequence, int key) const {
    int low = 0, high = sequence;
    while (first_key && low < high) {
      const int middle = (low + high) / 2;
      if (first_visible(in_sequence, middle) <= key)
        low = middle + 1;
      else
        high = middle;
    }
    return high;
  }
};

// The order of tiles: each block takes a list of its own, in which no work is waited for. Heads come in sections whose
// keys and values stay in L2 together; within a section the longest tiles go first. Blocks take the tiles of a turn in
// rising and in falling order by turns, which evens out their sums.
struct AttentionOrder {
  int tiles, heads, pairs;  // tiles of a head; heads of a sequence; heads of all sequences
  int section;              // pairs that share L2
  bool last_is_longest;     // tile number, else the first

  struct Place {
    int tile, head, sequence;
  };
  DEV bool at(int turn, Place& place) const {
    const int blocks = gridDim.x, block = blockIdx.x;
    const int index = turn * blocks + (turn % 2 ? blocks - 1 - block : block);
    if (index >= tiles * pairs) return false;
    const int first = index / (tiles * section) * section, count = min(section, pairs - first);
    const int within = index - first * tiles, rank = within / count, pair = first + within % count;
    place = {last_is_longest ? tiles - 1 - rank : rank, pair % heads, pair / heads};
    return true;
  }
};

// For tiles of 128 rows. `sharing` heads of `heads` a sequence read the same `bytes` again and again; 24 MiB of those are
// half of an H100's L2.
inline AttentionOrder attention_order(const AttentionShape& shape, int heads, int sharing, int64_t bytes,
                                      bool last_is_longest) {
  const int pairs = shape.sequences * heads;
  const int64_t fit = (int64_t{24} << 20) / bytes * sharing;
  const int section = fit < sharing ? sharing : fit < pairs ? static_cast<int>(fit) : pairs;
  return {ceil_div(shape.sequence, 128), heads, pairs, section, last_is_longest};
}

// Rows of a matrix [B·S, width], in boxes of 64 rows of one sequence and 64 columns: what lies past a sequence's end reads
// as zero, and is not written.
inline routegrad_status sequence_map(TensorMap* map, const void* base, const AttentionShape& shape, int64_t width) {
  const auto pitch = static_cast<uint64_t>(width) * 2;
  return make_tensor_map<3>(map, {base,
                                  Element::Bf16,
                                  {static_cast<uint64_t>(width), static_cast<uint64_t>(shape.sequence),
                                   static_cast<uint64_t>(shape.sequences)},
                                  {pitch, pitch * static_cast<uint64_t>(shape.sequence)},
                                  {64, 64, 1},
                                  Swizzle::Span128});
}

// ROWS rows and D columns of a head, for products of either major: boxes of the same columns follow each other.
template <int D, int ROWS>
DEV void load_head(bf16* tile, const TensorMap* map, uint64_t* full, int column, int row, int in_sequence) {
#pragma unroll
  for (int c = 0; c < D; c += 64)
#pragma unroll
    for (int r = 0; r < ROWS; r += 64) tma_load_3d(tile + c * ROWS + r * 64, map, full, column + c, row + r, in_sequence);
}

// One lane of each warp tells that the warp has read what `empty` guards.
DEV void release(uint64_t* empty) {
  if (threadIdx.x % 32 == 0) mbar_arrive(empty);
}

// Whose turn it is to issue products: the other consumer warpgroup then works on its scores. Barrier 3 + w: w's turn.
constexpr int kTurnBarrier = 3;
DEV void first_turn(int warpgroup) {
  if (warpgroup == 1) named_bar_arrive(kTurnBarrier, 256);
}
DEV void begin_turn(int warpgroup) { named_bar_sync(kTurnBarrier + warpgroup, 256); }
DEV void end_turn(int warpgroup) { named_bar_arrive(kTurnBarrier + (warpgroup ^ 1), 256); }

// Scores of 64 rows by COLUMNS columns lie in a fragment: d[4 j + 2 h + e] of thread t belongs to fragment_row(h) and
// column 8 j + fragment_column() + e.
DEV int fragment_row(int h) { return threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4 + 8 * h; }
DEV int fragment_column() { return threadIdx.x % 4 * 2; }

// Scores of columns outside low[h] … high[h] become -inf; the first column has the number `first`.
template <int R>
DEV void mask_scores(float (&d)[R], const int (&low)[2], const int (&high)[2], int first) {
  const int mine = first + fragment_column();
#pragma unroll
  for (int i = 0; i < R; ++i) {
    const int column = i / 4 * 8 + i % 2, h = i / 2 % 2;
    if (column < low[h] - mine || column > high[h] - mine) d[i] = -INFINITY;
  }
}
// The operands A of a product whose depth is the fragment's columns, 16 a time.
template <int R>
DEV void pack_operand(uint32_t (&a)[R / 8][4], const float (&d)[R]) {
#pragma unroll
  for (int i = 0; i < R / 2; ++i) a[i / 4][i % 4] = pack_bf16(d[2 * i], d[2 * i + 1]);
}

// 64 rows of a head leave by TMA as bf16(factor[h] · d), through the warpgroup's staging buffers.
template <int D>
DEV void store_head(Staging& staging, const TensorMap* map, const float (&d)[D / 2], const float (&factor)[2], int column,
                    int row, int in_sequence) {
#pragma unroll
  for (int box = 0; box < D / 64; ++box) {
    uint8_t* const buffer = staging.acquire();
    const auto pair = [&](int j, int h) {
      const float* const v = d + 32 * box + 4 * j + 2 * h;
      return pack_bf16(v[0] * factor[h], v[1] * factor[h]);
    };
#pragma unroll
    for (int j = 0; j < 8; j += 2)
      staging.put(buffer, j, pair(j, 0), pair(j, 1), pair(j + 1, 0), pair(j + 1, 1));
    staging.publish();
    if (staging.issuer()) tma_store_3d(map, buffer, column + 64 * box, row, in_sequence);
    staging.commit();
  }
}

}  // namespace ROUTEGRAD_VARIANT

// What every launcher of attention refuses.
#define REQUIRE_ATTENTION(launcher)                                                                                     \
  REQUIRE_POINTER(launcher, qkv);                                                                                       \
  if (first_key) REQUIRE_POINTER(launcher, first_key);                                                                  \
  REQUIRE(launcher, tokens, 1 <= tokens && tokens <= INT32_MAX - 4096, ROUTEGRAD_OUT_OF_RANGE);                         \
  REQUIRE(launcher, sequence, 1 <= sequence && sequence <= tokens && tokens % sequence == 0, ROUTEGRAD_OUT_OF_RANGE);   \
  REQUIRE(launcher, heads, 1 <= heads && heads <= 1024, ROUTEGRAD_OUT_OF_RANGE);                                        \
  REQUIRE(launcher, key_value_heads, 1 <= key_value_heads && heads % key_value_heads == 0, ROUTEGRAD_OUT_OF_RANGE);     \
  REQUIRE(launcher, head_width, head_width == 64 || head_width == 128, ROUTEGRAD_OUT_OF_RANGE);                         \
  REQUIRE(launcher, tokens, (tokens / 64 + tokens / sequence) * heads <= INT32_MAX / 2, ROUTEGRAD_OVERFLOW);            \
  if (multiprocessors() < 1) return ROUTEGRAD_CUDA_ERROR | 100 << 8 /* cudaErrorNoDevice */
