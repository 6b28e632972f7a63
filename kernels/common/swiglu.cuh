// SwiGLU of one element in f32: a = silu(g) u with silu(g) = g σ(g), σ(g) = 1 / (1 + exp(-g)). exp and the quotient are
// the hardware's approximations, some 4 units in the last place of f32 together; for g below -126 ln 2 they give σ = 0.
#pragma once
#include "ptx_math.cuh"

namespace ROUTEGRAD_VARIANT {

DEV float sigmoid(float g) { return __fdividef(1.0f, 1.0f + exp2_approximate(g * -1.44269504f)); }

struct Swiglu {
  float silu, slope;  // silu(g) and its derivative σ(g) (1 + g (1 − σ(g)))
  DEV explicit Swiglu(float g) {
    const float s = sigmoid(g);
    silu = g * s;
    slope = s * (1.0f + g * (1.0f - s));
  }
};

}  // namespace ROUTEGRAD_VARIANT
