// A place in a ring of stages, and the parity of the round: what an mbarrier of the stage is waited for with.
#pragma once
#include "simt.cuh"

namespace ROUTEGRAD_VARIANT {

// For loops that go on from where they were.
template <int STAGES>
struct Ring {
  int stage = 0;
  uint32_t parity = 0;
  DEV void advance() {
    if (++stage == STAGES) stage = 0, parity ^= 1;
  }
  DEV void skip(int steps) {
    const int to = stage + steps;
    parity ^= to / STAGES & 1;
    stage = to % STAGES;
  }
};

// For loops that count: the place after NUMBER `number` of steps. Signed and unsigned counters compile differently.
template <int STAGES, class NUMBER>
struct RingStep {
  int stage;
  uint32_t parity;
  DEV explicit RingStep(NUMBER number) : stage(static_cast<int>(number % STAGES)), parity(number / STAGES & 1) {}
};

}  // namespace ROUTEGRAD_VARIANT
