// TMA descriptors, made on the host and passed to kernels as `const __grid_constant__ TensorMap`.
#pragma once
#include "simt.cuh"

namespace ROUTEGRAD_VARIANT {

// How a box lies in shared memory: 16-byte chunks of each row XORed by the row, so that column reads hit all banks.
// The numbers are those of the wgmma descriptor. The span is the length of a row, in bytes.
enum class Swizzle : uint32_t { None = 0, Span128 = 1, Span64 = 2, Span32 = 3 };
HOST_DEV constexpr uint32_t span_bytes(Swizzle s) {
  return s == Swizzle::Span128 ? 128 : s == Swizzle::Span64 ? 64 : s == Swizzle::Span32 ? 32 : 16;
}

enum class Element : uint32_t { Bf16, F32 };
HOST_DEV constexpr uint32_t element_bytes(Element e) { return e == Element::Bf16 ? 2 : 4; }

// A tensor in global memory and the box that one instruction moves, innermost dimension first.
template <int RANK>
struct TensorView {
  const void* base;                  // 16-byte aligned
  Element element;
  uint64_t extent[RANK];             // elements
  uint64_t stride_bytes[RANK - 1];   // of dimensions 1 and up; multiples of 16
  uint32_t box[RANK];                // elements, 1 to 256
  Swizzle swizzle = Swizzle::None;   // with a swizzle, the inner box is exactly its span
};

#ifdef __CUDACC__
using TensorMapEncoder = decltype(&cuTensorMapEncodeTiled);
inline TensorMapEncoder tensor_map_encoder() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found;
  const cudaError_t error =
      cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
  return error == cudaSuccess && found == cudaDriverEntryPointSuccess
             ? reinterpret_cast<TensorMapEncoder>(function)
             : nullptr;
}
#endif

// Fills `map`; ROUTEGRAD_OK or ROUTEGRAD_BAD_TENSOR_MAP.
template <int RANK>
routegrad_status make_tensor_map(TensorMap* map, const TensorView<RANK>& view) {
  if constexpr (kForAmpere)
    if (!on_hopper()) return ROUTEGRAD_OK;  // nothing reads it
#ifdef __CUDACC__
  static const TensorMapEncoder encode = tensor_map_encoder();
  if (!encode) return ROUTEGRAD_BAD_TENSOR_MAP;
  constexpr CUtensorMapSwizzle swizzles[] = {CU_TENSOR_MAP_SWIZZLE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                             CU_TENSOR_MAP_SWIZZLE_64B, CU_TENSOR_MAP_SWIZZLE_32B};
  uint32_t element_stride[RANK];
  for (uint32_t& s : element_stride) s = 1;
  const CUtensorMapDataType type =
      view.element == Element::Bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT32;
  static_assert(sizeof(cuuint64_t) == sizeof(uint64_t) && sizeof(cuuint32_t) == sizeof(uint32_t));
  const CUresult result =
      encode(map, type, RANK, const_cast<void*>(view.base), reinterpret_cast<const cuuint64_t*>(view.extent),
             reinterpret_cast<const cuuint64_t*>(view.stride_bytes), view.box, element_stride,
             CU_TENSOR_MAP_INTERLEAVE_NONE, swizzles[static_cast<uint32_t>(view.swizzle)],
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? ROUTEGRAD_OK : ROUTEGRAD_BAD_TENSOR_MAP;
#else
  return sim::encode_tensor_map(map, view.base, RANK, element_bytes(view.element), view.extent, view.stride_bytes,
                                view.box, view.swizzle == Swizzle::None ? 0 : span_bytes(view.swizzle))
             ? ROUTEGRAD_OK
             : ROUTEGRAD_BAD_TENSOR_MAP;
#endif
}

}  // namespace ROUTEGRAD_VARIANT
