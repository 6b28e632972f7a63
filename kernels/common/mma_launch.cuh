// The host side of a product on GPUs without wgmma.
#pragma once
#include "gemm_plan.cuh"
#include "mma_tile.cuh"

namespace ROUTEGRAD_VARIANT {

struct GemmArguments {
  const void *a, *b;
  const int32_t *a_rows, *b_rows;  // gather
  int64_t a_height, b_height;      // rows of the arrays (b: of one group)
  const int32_t* offsets;
  ProductSizes sizes;
  bool skip_empty = false;  // RaggedK
};

template <int PRODUCT, int SHAPE, class Epilogue>
routegrad_status launch_mma_tile(const GemmArguments& arguments, const Epilogue& epilogue, routegrad_stream stream) {
  constexpr bool kRaggedDepth = PRODUCT == ROUTEGRAD_GEMM_WEIGHT_GRADIENT;
  constexpr TileShape kShape = kMmaTileShapes[SHAPE];
  constexpr Major kMajorB = b_is_mn_major(PRODUCT) ? Major::MN : Major::K;
  using T = MmaTraits<kShape.row_blocks, kMmaStages, kRaggedDepth ? Major::MN : Major::K, kMajorB, kRaggedDepth, Epilogue>;
  static_assert(sizeof(MmaShared<T>) == mma_stage_bytes(kShape) * kMmaStages, "buffers fit where the stages are");
  const ProductSizes& p = arguments.sizes;
  const auto columns = static_cast<int>(p.columns), depth = static_cast<int>(p.depth), rows = static_cast<int>(p.rows);
  const MmaOperand a{static_cast<const bf16*>(arguments.a),      arguments.a_rows,
                     static_cast<int>(arguments.a_height), kRaggedDepth ? rows : depth, false, 0};
  const MmaOperand b{static_cast<const bf16*>(arguments.b),      arguments.b_rows,
                     static_cast<int>(arguments.b_height), kMajorB == Major::MN ? columns : depth, !kRaggedDepth,
                     columns / 2};
  typename T::Schedule schedule{arguments.offsets, p.groups, rows, Epilogue::kGateUp ? columns / 2 : columns, depth};
  if constexpr (kRaggedDepth) schedule.skip_empty = arguments.skip_empty;
  const int64_t tiles = most_tiles(kShape, p), room = multiprocessors();
  const auto blocks = static_cast<uint32_t>(tiles < room ? tiles : room);
  return launch(mma_gemm_kernel<T>, {dim3(blocks), kMmaThreads, shared_bytes<MmaShared<T>>}, stream, a, b, epilogue,
                schedule);
}

template <int PRODUCT, class Epilogue>
routegrad_status launch_mma(const GemmArguments& arguments, const Epilogue& epilogue, int tile, routegrad_stream stream) {
  if (tile == ROUTEGRAD_TILE_AUTO) tile = choose_tile(PRODUCT, arguments.sizes, multiprocessors()).tile;
  return tile == kMmaTileShapes[0].tile ? launch_mma_tile<PRODUCT, 0>(arguments, epilogue, stream)
                                        : launch_mma_tile<PRODUCT, 1>(arguments, epilogue, stream);
}

}  // namespace ROUTEGRAD_VARIANT
