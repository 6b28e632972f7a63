// qkv_rope_forward: the fused projection of queries, keys and values with rotary position embedding in its epilogue.
//   out = turn(x Wᵀ): query and key heads are turned as rope.cu turns them, at position row mod S; values are not
// x [T, D] bf16, W [(H + 2 KV)·d, D] bf16, cosines and sines [S, d/2] f32, out [T, (H + 2 KV)·d] bf16, assigned. d is 64 or
// 128, D a multiple of 8, pointers 16-byte aligned. Sums and angles in f32: out is rounded once, where product and rope.cu
// one after the other round twice.
//
// A tile's columns are whole heads, and both elements of a pair lie in one thread's accumulators: nothing moves.
// Deterministic: each element belongs to one tile, a tile's sum runs in one order.
// FLOPs: 2·T·N·D with N = (H + 2 KV)·d. Bytes: 2·(T·D + N·D + T·N). Floor: max(FLOPs / 790e12, bytes / 4.3e12) s. It saves
// rope's pass of 4·T·N bytes.
#include "common/gemm_launch.cuh"
#include "common/rope_fragment.cuh"

namespace ROUTEGRAD_VARIANT {
namespace {

constexpr int kProduct = ROUTEGRAD_GEMM_DOWN_FORWARD;  // its tiles are whole heads, too

template <int WIDTH>
struct TurnAndStore : PlainEpilogue {
  StoreBf16 rows;
  RopeTables tables;
  int sequence, turned_columns;

  template <int COLUMNS, class Port>
  DEV void store(const float (&d)[COLUMNS / 2], const Fragment& at, Port& staging) const {
    static_assert(COLUMNS % WIDTH == 0, "tiles are whole heads");
    float turned[COLUMNS / 2];
#pragma unroll
    for (int i = 0; i < COLUMNS / 2; ++i) turned[i] = d[i];
    // Rows that are not stored have a position too.
    const int position[2] = {at.row(0) % sequence, at.row(1) % sequence};
    turn_heads<WIDTH>(turned, tables, position, (turned_columns - at.first_column) / WIDTH, 1.0f);
    rows.template store<COLUMNS>(turned, at, staging);
  }
};

template <int WIDTH>
routegrad_status launch_turned(void* out, const GemmArguments& arguments, const RopeTables& tables, int sequence,
                               int turned_columns, int tile, routegrad_stream stream) {
  TurnAndStore<WIDTH> epilogue{};
  epilogue.tables = tables;
  epilogue.sequence = sequence;
  epilogue.turned_columns = turned_columns;
  const ProductSizes& p = arguments.sizes;
  if (const auto status = make_output(&epilogue.rows.out, out, p.columns, 1, p.rows)) return status;
  return launch_gemm<kProduct, Gather::None>(arguments, epilogue, tile, stream);
}

}  // namespace

routegrad_status qkv_rope_forward(void* out, const void* x, const void* w, const float* cosines, const float* sines,
                                  int64_t tokens, int32_t sequence, int32_t heads, int32_t key_value_heads,
                                  int32_t head_width, int32_t hidden, int32_t tile, routegrad_stream stream) {
  REQUIRE_POINTER(qkv_rope_forward, out);
  REQUIRE_POINTER(qkv_rope_forward, x);
  REQUIRE_POINTER(qkv_rope_forward, w);
  REQUIRE_POINTER(qkv_rope_forward, cosines);
  REQUIRE_POINTER(qkv_rope_forward, sines);
  REQUIRE(qkv_rope_forward, tokens, 1 <= tokens && tokens <= kMaxRows, ROUTEGRAD_OUT_OF_RANGE);
  REQUIRE(qkv_rope_forward, sequence, 1 <= sequence && sequence <= kMaxPositions, ROUTEGRAD_OUT_OF_RANGE);
  REQUIRE(qkv_rope_forward, heads, 1 <= heads && heads <= 1024, ROUTEGRAD_OUT_OF_RANGE);
  REQUIRE(qkv_rope_forward, key_value_heads, 1 <= key_value_heads && heads % key_value_heads == 0, ROUTEGRAD_OUT_OF_RANGE);
  REQUIRE(qkv_rope_forward, head_width, head_width == 64 || head_width == 128, ROUTEGRAD_OUT_OF_RANGE);
  const int columns = (heads + 2 * key_value_heads) * head_width;
  REQUIRE(qkv_rope_forward, hidden, 1 <= hidden && hidden <= kMaxWidth, ROUTEGRAD_OUT_OF_RANGE);
  REQUIRE_MULTIPLE_OF_8(qkv_rope_forward, hidden);
  REQUIRE(qkv_rope_forward, hidden, int64_t{columns} * hidden <= (int64_t{1} << 36), ROUTEGRAD_OVERFLOW);
  const ProductSizes sizes = product_sizes(kProduct, tokens, 1, columns, hidden);
  REQUIRE(qkv_rope_forward, tokens, tiles_fit(sizes), ROUTEGRAD_OVERFLOW);
  REQUIRE_TILE(qkv_rope_forward, kProduct);
  const GemmArguments arguments{x, w, nullptr, nullptr, tokens, columns, nullptr, sizes};
  const int turned_columns = (heads + key_value_heads) * head_width;
  return head_width == 64
             ? launch_turned<64>(out, arguments, {cosines, sines}, sequence, turned_columns, tile, stream)
             : launch_turned<128>(out, arguments, {cosines, sines}, sequence, turned_columns, tile, stream);
}

}  // namespace ROUTEGRAD_VARIANT
