// Eight floats: what a thread makes of 16 bytes of bf16, or of two loads of four floats.
#pragma once
#include "ptx_copy.cuh"

namespace ROUTEGRAD_VARIANT {

struct Eight {
  float value[8];
};
DEV Eight unpack(uint4 v) {
  return {{low_bf16(v.x), high_bf16(v.x), low_bf16(v.y), high_bf16(v.y), low_bf16(v.z), high_bf16(v.z), low_bf16(v.w),
           high_bf16(v.w)}};
}
DEV uint4 pack(const Eight& e) {
  const auto& v = e.value;
  return make_uint4(pack_bf16(v[0], v[1]), pack_bf16(v[2], v[3]), pack_bf16(v[4], v[5]), pack_bf16(v[6], v[7]));
}

// 8 elements at a 16-byte boundary of global memory.
DEV Eight load_eight(const bf16* from) { return unpack(ld_global(reinterpret_cast<const uint4*>(from))); }
DEV Eight load_eight_readonly(const bf16* from) {
  return unpack(ld_global_readonly(reinterpret_cast<const uint4*>(from)));
}
DEV void store_eight(bf16* to, const Eight& v) { st_global(reinterpret_cast<uint4*>(to), pack(v)); }

DEV Eight join(float4 a, float4 b) { return {{a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w}}; }

}  // namespace ROUTEGRAD_VARIANT
