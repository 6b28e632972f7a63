// The host side of a grouped product: refusing arguments, TMA descriptors, choosing and launching a tile.
#pragma once
#include "epilogue_store_bf16.cuh"
#include "epilogue_store_f32.cuh"
#include "gemm_plan.cuh"
#include "gemm_tile.cuh"
#include "mma_launch.cuh"

namespace ROUTEGRAD_VARIANT {

constexpr int64_t kMaxRows = INT32_MAX - 4096;  // so that a row past the last tile is still an int
constexpr int kMaxWidth = 1 << 24, kMaxExperts = 1 << 16;

// A row-major bf16 array of `groups` matrices [rows, width], read in boxes of 64 columns.
inline routegrad_status operand_map(TensorMap* map, const void* base, int64_t width, int64_t rows, int64_t groups,
                                    int box_rows) {
  const auto pitch = static_cast<uint64_t>(width) * 2;
  return make_tensor_map<3>(map,
                            {base,
                             Element::Bf16,
                             {static_cast<uint64_t>(width), static_cast<uint64_t>(rows), static_cast<uint64_t>(groups)},
                             {pitch, pitch * static_cast<uint64_t>(rows)},
                             {64, static_cast<uint32_t>(box_rows), 1},
                             Swizzle::Span128});
}

// An epilogue's bf16 array [rows, parts, width] in boxes of 64 rows and BOX columns of a part.
template <int BOX = 64>
routegrad_status output_map(TensorMap* map, const void* base, int64_t width, int parts, int64_t rows) {
  const auto pitch = static_cast<uint64_t>(width) * 2;
  return make_tensor_map<3>(map,
                            {base,
                             Element::Bf16,
                             {static_cast<uint64_t>(width), static_cast<uint64_t>(parts), static_cast<uint64_t>(rows)},
                             {pitch, pitch * static_cast<uint64_t>(parts)},
                             {BOX, 1, 64},
                             BOX == 64 ? Swizzle::Span128 : Swizzle::Span64});
}
template <int BOX = 64>
routegrad_status make_output(Bf16Output* output, void* base, int64_t width, int parts, int64_t rows) {
  *output = {{}, static_cast<bf16*>(base), static_cast<int>(width), parts};
  return output_map<BOX>(&output->map, base, width, parts, rows);
}

// The f32 matrices [groups, rows, width].
inline routegrad_status make_f32_output(StoreF32* store, float* base, int64_t width, int64_t rows, int64_t groups,
                                        bool accumulate) {
  *store = {{}, {}, static_cast<int>(width), accumulate};
  const auto pitch = static_cast<uint64_t>(width) * 4, height = static_cast<uint64_t>(rows);
  return make_tensor_map<3>(&store->map, {base,
                                          Element::F32,
                                          {static_cast<uint64_t>(width), height, static_cast<uint64_t>(groups)},
                                          {pitch, pitch * height},
                                          {32, 64, 1},
                                          Swizzle::Span128});
}

template <int PRODUCT, Gather GATHER, int SHAPE, class Epilogue>
routegrad_status launch_tile(const GemmArguments& arguments, const Epilogue& epilogue, routegrad_stream stream) {
  constexpr bool kRaggedDepth = PRODUCT == ROUTEGRAD_GEMM_WEIGHT_GRADIENT;
  constexpr TileShape kShape = kTileShapes[SHAPE];
  constexpr Major kMajorB = b_is_mn_major(PRODUCT) ? Major::MN : Major::K;
  using T = GemmTraits<kShape.row_blocks, kShape.columns, kShape.pingpong, tile_stages(kShape, PRODUCT),
                       kRaggedDepth ? Major::MN : Major::K, kMajorB, kRaggedDepth, GATHER, Epilogue>;
  static_assert(shared_bytes<GemmShared<T>> <= 227 * 1024);
  const ProductSizes& p = arguments.sizes;
  const auto columns = static_cast<int>(p.columns), depth = static_cast<int>(p.depth), rows = static_cast<int>(p.rows);
  GemmOperand a{{}, static_cast<const bf16*>(arguments.a), arguments.a_rows, kRaggedDepth ? rows : depth};
  GemmOperand b{{}, static_cast<const bf16*>(arguments.b), arguments.b_rows, kMajorB == Major::MN ? columns : depth};
  b.up_row = columns / 2;
  routegrad_status status = operand_map(&a.map, a.data, a.width, arguments.a_height, 1, 64);
  if (status == ROUTEGRAD_OK)
    status = operand_map(&b.map, b.data, b.width, arguments.b_height, kRaggedDepth ? 1 : p.groups,
                         kMajorB == Major::MN ? 64 : T::kTileColumns);
  if (status != ROUTEGRAD_OK) return status;
  const int schedule_columns = Epilogue::kGateUp ? columns / 2 : columns;
  typename T::Schedule schedule{arguments.offsets, p.groups, rows, schedule_columns, depth};
  if constexpr (kRaggedDepth) schedule.skip_empty = arguments.skip_empty;
  const int64_t tiles = most_tiles(kShape, p), room = multiprocessors();
  const auto blocks = static_cast<uint32_t>(tiles < room ? tiles : room);
  return launch(gemm_kernel<T>, {dim3(blocks), kGemmThreads, shared_bytes<GemmShared<T>>}, stream, a, b, epilogue,
                schedule);
}

inline bool tile_exists(int tile, int product) {
  if (tile == ROUTEGRAD_TILE_AUTO) return true;
  if constexpr (kForAmpere)
    if (!on_hopper()) return find_mma_tile(tile) != nullptr;
  for (const TileShape& t : kTileShapes)
    if (t.tile == tile) return tile_serves(t, product);
  return false;
}

// The product with `tile`, one that tile_exists, or the one that is chosen.
template <int PRODUCT, Gather GATHER, int SHAPE = 0, class Epilogue>
routegrad_status launch_gemm(const GemmArguments& arguments, const Epilogue& epilogue, int tile,
                             routegrad_stream stream) {
  if constexpr (kForAmpere && Epilogue::kForMma && SHAPE == 0)
    if (!on_hopper()) return launch_mma<PRODUCT>(arguments, epilogue, tile, stream);
  if (tile == ROUTEGRAD_TILE_AUTO) tile = choose_tile(PRODUCT, arguments.sizes, multiprocessors()).tile;
  if constexpr (tile_serves(kTileShapes[SHAPE], PRODUCT))
    if (tile == kTileShapes[SHAPE].tile) return launch_tile<PRODUCT, GATHER, SHAPE>(arguments, epilogue, stream);
  if constexpr (SHAPE + 1 < kTileShapeCount)
    return launch_gemm<PRODUCT, GATHER, SHAPE + 1>(arguments, epilogue, tile, stream);
  else
    return ROUTEGRAD_OUT_OF_RANGE;
}

// Tiles and the steps between them are counted in 32 bits.
inline bool tiles_fit(const ProductSizes& p) {
  for (const TileShape& t : kTileShapes)
    if (most_tiles(t, p) > INT32_MAX / 2) return false;
  return true;
}

}  // namespace ROUTEGRAD_VARIANT

// A product of `rows` rows, at most kMaxRows, by `groups` matrices [n_times · n, k], by the names that the launcher's
// arguments have. TMA: 2^40 bytes.
#define REQUIRE_PRODUCT(launcher, product_, rows, groups, n, k, n_times)                        \
  REQUIRE(launcher, n, 1 <= n && n <= kMaxWidth, ROUTEGRAD_OUT_OF_RANGE);                       \
  REQUIRE_MULTIPLE_OF_8(launcher, n);                                                           \
  REQUIRE(launcher, k, 1 <= k && k <= kMaxWidth, ROUTEGRAD_OUT_OF_RANGE);                       \
  REQUIRE_MULTIPLE_OF_8(launcher, k);                                                           \
  REQUIRE(launcher, k, int64_t{n_times} * (n) * (k) <= (int64_t{1} << 36), ROUTEGRAD_OVERFLOW); \
  REQUIRE(launcher, rows, tiles_fit(product_sizes(product_, rows, groups, (n_times) * (n), k)), ROUTEGRAD_OVERFLOW)
#define REQUIRE_TILE(launcher, product_)                                                  \
  REQUIRE(launcher, tile, tile_exists(tile, product_), ROUTEGRAD_OUT_OF_RANGE);           \
  if (multiprocessors() < 1) return ROUTEGRAD_CUDA_ERROR | 100 << 8 /* cudaErrorNoDevice */
#define REQUIRE_GEMM_SIZES(launcher, product_, n, k, n_times)                                 \
  REQUIRE(launcher, rows, 1 <= rows && rows <= kMaxRows, ROUTEGRAD_OUT_OF_RANGE);             \
  REQUIRE(launcher, experts, 1 <= experts && experts <= kMaxExperts, ROUTEGRAD_OUT_OF_RANGE); \
  REQUIRE_PRODUCT(launcher, product_, rows, experts, n, k, n_times)
#define REQUIRE_GEMM_LAUNCH(launcher, product_, n, k, n_times)                            \
  REQUIRE_GEMM_SIZES(launcher, product_, n, k, n_times);                                  \
  REQUIRE(launcher, offsets, offsets != nullptr || experts == 1, ROUTEGRAD_NULL_POINTER); \
  REQUIRE_TILE(launcher, product_)
// An array that is not gathered holds every row of the product.
#define REQUIRE_HEIGHT(launcher, height, row_token)                                                        \
  REQUIRE(launcher, height, 1 <= height && height <= kMaxRows && (row_token != nullptr || height >= rows), \
          ROUTEGRAD_OUT_OF_RANGE)
