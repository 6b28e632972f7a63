// balance: the scalars of a step's loss. The auxiliary loss of a layer (Switch Transformer, arXiv 2101.03961, eq. 4), and
// the sum of all losses:
//   auxiliary_loss             loss = E Σ_i f_i P_i
//   auxiliary_loss_backward    dmean[i] = dloss E f_i
//   weighted_sum               out = Σ_k c_k s_k
//   weighted_sum_backward      dterms[k] = dout c_k
// mean (P), dmean [E], fractions (f) [E], coefficients (c) [N], loss, out and their gradients [1]: f32. What changes from
// step to step lies in device memory, so that a captured step reads it anew. terms and dterms are N addresses of scalars
// in device memory, in an array of the host's that the launch copies. 1 <= E <= 256, 1 <= N <= 128. All assigned.
//
// One warp each, sums in f64: lane l adds its elements l, l + 32, … in order, then the lanes are added pairwise.
// Deterministic. Bytes: 8·E + 8 or 12·N + 8. FLOPs: none on tensor cores. Floor: that of a launch.
#include "common/simt.cuh"
#include "common/warp.cuh"

namespace ROUTEGRAD_VARIANT {
namespace {

constexpr int kMaxExperts = 256, kMostTerms = 128;

template <class T>
struct Scalars {
  T* at[kMostTerms];
};
template <class T>
Scalars<T> scalars(T* const* from, int count) {
  Scalars<T> to{};
  for (int k = 0; k < count; ++k) to.at[k] = from[k];
  return to;
}

__global__ void __launch_bounds__(32)
    auxiliary_loss_kernel(float* loss, const float* mean, const float* fractions, int experts) {
  double sum = 0;
  for (int i = static_cast<int>(threadIdx.x); i < experts; i += 32)
    sum += static_cast<double>(ld_global_readonly(fractions + i)) * ld_global_readonly(mean + i);
  sum = sum_of_warp(sum);
  if (threadIdx.x == 0) st_global(loss, static_cast<float>(experts * sum));
}

__global__ void __launch_bounds__(32)
    auxiliary_loss_backward_kernel(float* dmean, const float* dloss, const float* fractions, int experts) {
  const float scale = ld_global_readonly(dloss) * static_cast<float>(experts);
  for (int i = static_cast<int>(threadIdx.x); i < experts; i += 32)
    st_global(dmean + i, scale * ld_global_readonly(fractions + i));
}

__global__ void __launch_bounds__(32)
    weighted_sum_kernel(float* out, const __grid_constant__ Scalars<const float> terms, const float* coefficients,
                        int count) {
  double sum = 0;
  for (int k = static_cast<int>(threadIdx.x); k < count; k += 32)
    sum += static_cast<double>(ld_global_readonly(coefficients + k)) * ld_global_readonly(terms.at[k]);
  sum = sum_of_warp(sum);
  if (threadIdx.x == 0) st_global(out, static_cast<float>(sum));
}

__global__ void __launch_bounds__(32)
    weighted_sum_backward_kernel(const __grid_constant__ Scalars<float> dterms, const float* dout,
                                 const float* coefficients, int count) {
  const float scale = ld_global_readonly(dout);
  for (int k = static_cast<int>(threadIdx.x); k < count; k += 32)
    st_global(dterms.at[k], scale * ld_global_readonly(coefficients + k));
}

}  // namespace

#define REQUIRE_SCALAR(launcher, argument) REQUIRE(launcher, argument, (argument) != nullptr, ROUTEGRAD_NULL_POINTER)
#define REQUIRE_SCALARS(launcher, argument)                                                               \
  REQUIRE_SCALAR(launcher, argument);                                                                     \
  REQUIRE(launcher, count, 1 <= count && count <= kMostTerms, ROUTEGRAD_OUT_OF_RANGE);                    \
  for (int k = 0; k < count; ++k) REQUIRE(launcher, argument, (argument)[k] != nullptr, ROUTEGRAD_NULL_POINTER)

routegrad_status auxiliary_loss(float* loss, const float* mean, const float* fractions, int32_t experts,
                                routegrad_stream stream) {
  REQUIRE_SCALAR(auxiliary_loss, loss);
  REQUIRE_POINTER(auxiliary_loss, mean);
  REQUIRE_POINTER(auxiliary_loss, fractions);
  REQUIRE(auxiliary_loss, experts, 1 <= experts && experts <= kMaxExperts, ROUTEGRAD_OUT_OF_RANGE);
  return launch(auxiliary_loss_kernel, {dim3(1), 32}, stream, loss, mean, fractions, experts);
}

routegrad_status auxiliary_loss_backward(float* dmean, const float* dloss, const float* fractions, int32_t experts,
                                         routegrad_stream stream) {
  REQUIRE_POINTER(auxiliary_loss_backward, dmean);
  REQUIRE_SCALAR(auxiliary_loss_backward, dloss);
  REQUIRE_POINTER(auxiliary_loss_backward, fractions);
  REQUIRE(auxiliary_loss_backward, experts, 1 <= experts && experts <= kMaxExperts, ROUTEGRAD_OUT_OF_RANGE);
  return launch(auxiliary_loss_backward_kernel, {dim3(1), 32}, stream, dmean, dloss, fractions, experts);
}

routegrad_status weighted_sum(float* out, const float* const* terms, const float* coefficients, int32_t count,
                              routegrad_stream stream) {
  REQUIRE_SCALAR(weighted_sum, out);
  REQUIRE_SCALARS(weighted_sum, terms);
  REQUIRE_POINTER(weighted_sum, coefficients);
  return launch(weighted_sum_kernel, {dim3(1), 32}, stream, out, scalars(terms, count), coefficients, count);
}

routegrad_status weighted_sum_backward(float* const* dterms, const float* dout, const float* coefficients, int32_t count,
                                       routegrad_stream stream) {
  REQUIRE_SCALARS(weighted_sum_backward, dterms);
  REQUIRE_SCALAR(weighted_sum_backward, dout);
  REQUIRE_POINTER(weighted_sum_backward, coefficients);
  return launch(weighted_sum_backward_kernel, {dim3(1), 32}, stream, scalars(dterms, count), dout, coefficients, count);
}

}  // namespace ROUTEGRAD_VARIANT
