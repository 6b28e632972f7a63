// The draws of src/tensor/random.rs: Philox4x32-10 (Salmon, Moraes, Dror and Shaw, SC 2011), a pure function of seed, purpose,
// step, layer and index.
#pragma once
#include "simt.cuh"

namespace ROUTEGRAD_VARIANT {

struct Philox {
  uint32_t key[2], step, purpose_and_layer;

  struct Words {
    uint32_t at[4];
  };
  DEV Words words(uint64_t index) const {
    uint32_t c0 = static_cast<uint32_t>(index), c1 = static_cast<uint32_t>(index >> 32), c2 = step, c3 = purpose_and_layer;
    uint32_t k0 = key[0], k1 = key[1];
#pragma unroll
    for (int round = 0; round < 10; ++round) {
      const uint64_t p = uint64_t{0xD2511F53} * c0, q = uint64_t{0xCD9E8D57} * c2;
      c0 = static_cast<uint32_t>(q >> 32) ^ c1 ^ k0;
      c1 = static_cast<uint32_t>(q);
      c2 = static_cast<uint32_t>(p >> 32) ^ c3 ^ k1;
      c3 = static_cast<uint32_t>(p);
      k0 += 0x9E3779B9, k1 += 0xBB67AE85;
    }
    return {{c0, c1, c2, c3}};
  }
};

}  // namespace ROUTEGRAD_VARIANT
