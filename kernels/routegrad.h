// The C interface of the kernels: every launcher of every build (CUDA, simulator and its variants) in one table.
// Included by the .cu files and read by bindgen, so it includes <stdint.h> alone.
//
// A build is reached through one exported function that returns its table:
//   routegrad_cuda()  kernels compiled by nvcc; the pointers are device memory, the launch is asynchronous on `stream`
//   routegrad_sim()   the same sources on the SIMT simulator; host memory, the launch returns when it is done
//
// A launcher checks its arguments, launches, and returns a status. It never prints, allocates, synchronises, or reads
// device memory from the host. Arguments run: outputs, saved, inputs, sizes, scalars, stream.
#ifndef ROUTEGRAD_H
#define ROUTEGRAD_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

// 0 is success. Otherwise the low byte is a reason (routegrad_reason) and the bits above it say more: for an argument
// its 1-based place in the launcher's parameter list, for ROUTEGRAD_CUDA_ERROR the cudaError_t.
typedef int32_t routegrad_status;

typedef enum routegrad_reason {
  ROUTEGRAD_OK = 0,
  // An argument was refused before anything was launched.
  ROUTEGRAD_NULL_POINTER = 1,  // the pointer is null
  ROUTEGRAD_MISALIGNED = 2,    // the pointer is not 16-byte aligned
  ROUTEGRAD_NOT_MULTIPLE = 3,  // the size is not a multiple of 8 (bf16 rows must be whole 16-byte units)
  ROUTEGRAD_OUT_OF_RANGE = 4,  // the value lies outside what the kernel can do
  ROUTEGRAD_OVERFLOW = 5,      // a product of sizes does not fit its type
  // The launch itself failed; `describe` says why.
  ROUTEGRAD_CUDA_ERROR = 16,      // the CUDA runtime or driver refused
  ROUTEGRAD_BAD_TENSOR_MAP = 17,  // a TMA descriptor could not be encoded
  ROUTEGRAD_SIM_FAILED = 18,      // the simulator found a fault: deadlock, race, misuse of an instruction
} routegrad_reason;

// A cudaStream_t; ignored by the simulator.
typedef void* routegrad_stream;

// When an asynchronous copy or matrix product takes effect on the simulator.
typedef enum routegrad_sim_async {
  ROUTEGRAD_SIM_EARLY = 0,   // at the instruction
  ROUTEGRAD_SIM_LATE = 1,    // at the wait that needs it
  ROUTEGRAD_SIM_RANDOM = 2,  // anywhere between
} routegrad_sim_async;

// Which simulated thread runs next.
typedef enum routegrad_sim_order {
  ROUTEGRAD_SIM_FIFO = 0,
  ROUTEGRAD_SIM_LIFO = 1,
  ROUTEGRAD_SIM_SHUFFLED = 2,
} routegrad_sim_order;

// How the simulator runs; the environment variable ROUTEGRAD_SIM sets the same at start (kernels/sim/README.md).
typedef struct routegrad_sim_options {
  int32_t copies;           // routegrad_sim_async, for TMA and cp.async
  int32_t products;         // routegrad_sim_async, for wgmma
  int32_t order;            // routegrad_sim_order
  int32_t threads;          // OS threads among which the blocks of a launch are divided
  int32_t resident;         // blocks alive at once on one OS thread (at least a cluster's size)
  int32_t poison;           // 1: shared memory starts as NaN, in-flight accumulators read as NaN
  int32_t multiprocessors;  // what the launchers are told the GPU has
  int32_t arch;             // of the GPU: 10 · major + minor of its compute capability, 80, 86, 89, 90, 100 or 120
  uint64_t seed;  // of RANDOM and SHUFFLED
} routegrad_sim_options;

// What the launches since the last reset did; the sums do not depend on order or threads.
typedef struct routegrad_sim_counters {
  uint64_t launches;
  uint64_t blocks;
  uint64_t fiber_switches;
  uint64_t tensor_flops;  // 2·m·n·k of every wgmma and mma
  uint64_t bytes_read;    // of global memory, by TMA, cp.async and ld_global
  uint64_t bytes_written; // of global memory, by TMA and st_global
  uint64_t bank_conflicts;  // rows of ldmatrix and stmatrix that waited for another row of their matrix
} routegrad_sim_counters;

// A bf16 tensor of rank 2 or 3 and one box of it, innermost dimension first; passed by host address.
typedef struct routegrad_unit_box {
  int32_t rank;
  int32_t extent[3];
  int32_t box[3];
  int32_t at[3];
  int32_t swizzle;  // 0 none, 1 128, 2 64, 3 32 bytes
} routegrad_unit_box;

// X(name, parameters): one row per launcher, grouped by source file. From this list come the declarations, the table,
// the argument names of error texts, and the checks of kernels/README.md and kernels/limits.txt.
#define ROUTEGRAD_LAUNCHERS(X) \
  ROUTEGRAD_UNIT_LAUNCHERS(X) \
  ROUTEGRAD_ROUTER_LAUNCHERS(X) \
  ROUTEGRAD_DISPATCH_LAUNCHERS(X) \
  ROUTEGRAD_GROUPED_GEMM_LAUNCHERS(X) \
  ROUTEGRAD_EXPERT_LAUNCHERS(X) \
  ROUTEGRAD_EXPERT_MEAN_LAUNCHERS(X) \
  ROUTEGRAD_COMBINE_LAUNCHERS(X) \
  ROUTEGRAD_GATE_GRADIENT_LAUNCHERS(X) \
  ROUTEGRAD_NORM_LAUNCHERS(X) \
  ROUTEGRAD_ATTENTION_LAUNCHERS(X) \
  ROUTEGRAD_CROSS_ENTROPY_LAUNCHERS(X) \
  ROUTEGRAD_SWIGLU_LAUNCHERS(X) \
  ROUTEGRAD_ROPE_LAUNCHERS(X) \
  ROUTEGRAD_EMBEDDING_LAUNCHERS(X) \
  ROUTEGRAD_ADAMW_LAUNCHERS(X) \
  ROUTEGRAD_STEP_LAUNCHERS(X) \
  ROUTEGRAD_TALLY_LAUNCHERS(X) \
  ROUTEGRAD_BALANCE_LAUNCHERS(X) \
  ROUTEGRAD_GATES_LAUNCHERS(X) \
  ROUTEGRAD_ROWS_LAUNCHERS(X) \
  ROUTEGRAD_QK_NORM_LAUNCHERS(X) \
  ROUTEGRAD_RANKS_LAUNCHERS(X)

// unit.cu: single instructions, for the tests of simulator and hardware.
#define ROUTEGRAD_UNIT_LAUNCHERS(X)                                                                                    \
  /* c[64, n] f32 = a[64, 64] b[64, n] in bf16; A is stored [64, 64], B [n, 64] (k contiguous) or [64, n] (mn major). */ \
  X(unit_wgmma, (float* c, const void* a, const void* b, int32_t n, int32_t a_mn_major, int32_t b_mn_major,            \
                 int32_t a_in_registers, int32_t swizzle, routegrad_stream stream))                                    \
  /* The bytes of one box as TMA lays them in shared memory; and the way back. */                                      \
  X(unit_tma_load, (void* out, const void* tensor, const routegrad_unit_box* box, routegrad_stream stream))            \
  X(unit_tma_store, (void* tensor, const void* in, const routegrad_unit_box* box, routegrad_stream stream))            \
  /* Clusters of two; out[2 clusters, rounds, 64, 64] = tensor[64 rounds, 64], half by half where a mask allows. */    \
  X(unit_multicast, (void* out, const void* tensor, int32_t rounds, int32_t clusters, int32_t mask0, int32_t mask1,    \
                     routegrad_stream stream))                                                                         \
  /* out[64, 64] = rows in[index], negative or past `columns`: zero; each 8 x 8 transposed when asked. */              \
  X(unit_gather, (void* out, const void* in, const int32_t* index, int32_t columns, int32_t transpose,                 \
                  int32_t by_mbarrier, routegrad_stream stream))                                                       \
  X(unit_softmax, (float* out, int32_t* warps_seen, const float* in, int32_t rows, int32_t columns,                    \
                   routegrad_stream stream))                                                                           \
  /* A kernel with fault number `fault` (kernels/unit_faults.cu); the CUDA build refuses to run it. */                 \
  X(unit_fault, (int32_t* out, int32_t fault, routegrad_stream stream))

// What the router makes of its logits.
typedef enum routegrad_score {
  ROUTEGRAD_SCORE_LOGITS = 0,
  ROUTEGRAD_SCORE_SOFTMAX = 1,
  ROUTEGRAD_SCORE_SIGMOID = 2,
  ROUTEGRAD_SCORE_RELU = 3,
} routegrad_score;

// Which random numbers router_sample draws: a place in device memory, so that a captured step draws new ones.
typedef struct routegrad_draws {
  uint64_t seed;
  uint64_t step;         // below 2^32
  uint64_t first_token;  // of the launch, in the global batch
} routegrad_draws;

// router.cu, router_backward.cu, router_sample.cu: shapes and formulas stand in the files' headers.
#define ROUTEGRAD_ROUTER_LAUNCHERS(X)                                                                                  \
  X(router_forward, (float* scores, float* log_sum_exp, int32_t* choices, float* partials, int32_t* first_non_finite,  \
                     const void* x, const float* w, const float* selection_bias, int64_t tokens, int32_t experts,      \
                     int32_t hidden, int32_t choices_per_token, int32_t score, routegrad_stream stream))               \
  /* On the host: floats of `partials`. */                                                                             \
  X(router_partials, (uint64_t* floats, int64_t tokens, int32_t experts))                                              \
  /* statistics [2 E + 2]: mean score and tokens of each expert, mean lse², mean entropy. */                           \
  X(router_statistics,                                                                                                 \
    (float* statistics, const float* partials, int64_t tokens, int32_t experts, routegrad_stream stream))              \
  X(router_backward, (void* dx, float* dz, float* dw_partials, const float* scores, const float* log_sum_exp,          \
                      const float* dscores, const float* dmean, const float* dlse2, const void* x, const float* w,     \
                      int64_t tokens, int32_t experts, int32_t hidden, int32_t score, int32_t accumulate,              \
                      routegrad_stream stream))                                                                        \
  X(router_weight_gradient, (float* dw, const float* dw_partials, int64_t tokens, int32_t experts, int32_t hidden,     \
                             int32_t accumulate, routegrad_stream stream))                                             \
  X(router_sample, (int32_t* experts_chosen, float* factors, int32_t* kept, int32_t* choices, const float* logits,     \
                    const routegrad_draws* draws, int64_t tokens, int32_t experts, int32_t stages, int32_t layer,      \
                    double epsilon, double threshold, float untrusted, routegrad_stream stream))                       \
  /* On the host: floats of `dw_partials`. */                                                                          \
  X(router_backward_workspace, (uint64_t* floats, int64_t tokens, int32_t experts, int32_t hidden))

// Bits that dispatch sets in its `fault` word: the step must not be applied.
typedef enum routegrad_fault {
  ROUTEGRAD_FAULT_EXPERT = 1,    // a choice outside 0 ... E - 1
  ROUTEGRAD_FAULT_CAPACITY = 2,  // more rows than row_capacity
} routegrad_fault;

// dispatch.cu: rows sorted by expert, and the maps between tokens, slots and rows. Shapes stand in the file's header.
#define ROUTEGRAD_DISPATCH_LAUNCHERS(X)                                                                           \
  X(dispatch_choices,                                                                                             \
    (int32_t* offsets, int32_t* row_token, int32_t* row_slot, int32_t* slot_row, int32_t* fault, void* workspace, \
     const int32_t* choices, int64_t tokens, int32_t experts, int32_t choices_per_token, int64_t row_capacity,    \
     routegrad_stream stream))                                                                                    \
  X(dispatch_positive,                                                                                            \
    (int32_t* offsets, int32_t* row_token, int32_t* row_slot, int32_t* slot_row, int32_t* fault, void* workspace, \
     const float* scores, int64_t tokens, int32_t experts, int64_t row_capacity, routegrad_stream stream))        \
  /* On the host: bytes of `workspace` for `width` slots a token (choices_per_token, or experts with scores). */ \
  X(dispatch_workspace, (uint64_t* bytes, int64_t tokens, int32_t experts, int32_t width))

// The three products of a grouped linear layer with W [E, n, k], and the three that carry an expert's elementwise part:
// gate and up (n = 2F, k = D), down (n = D, k = F), and the gradient of the down projection's input (n = D, k = F).
typedef enum routegrad_gemm_product {
  ROUTEGRAD_GEMM_FORWARD = 0,
  ROUTEGRAD_GEMM_INPUT_GRADIENT = 1,
  ROUTEGRAD_GEMM_WEIGHT_GRADIENT = 2,
  ROUTEGRAD_GEMM_SWIGLU_FORWARD = 3,
  ROUTEGRAD_GEMM_DOWN_FORWARD = 4,
  ROUTEGRAD_GEMM_SWIGLU_BACKWARD = 5,
  ROUTEGRAD_GEMM_HEAD_FORWARD = 6,  // logits in f32, one group
} routegrad_gemm_product;

// The output tile of a block and how its two consumer warpgroups share it: cooperative, both on one tile; pingpong, each
// on its own, one multiplying while the other stores.
typedef enum routegrad_gemm_tile {
  ROUTEGRAD_TILE_AUTO = 0,  // what grouped_gemm_plan says
  ROUTEGRAD_TILE_COOPERATIVE_128X256 = 1,
  ROUTEGRAD_TILE_COOPERATIVE_256X128 = 2,
  ROUTEGRAD_TILE_COOPERATIVE_256X176 = 3,
  ROUTEGRAD_TILE_PINGPONG_128X128 = 4,
  ROUTEGRAD_TILE_PINGPONG_128X176 = 5,
  ROUTEGRAD_TILE_MMA_128X128 = 6,  // on GPUs without wgmma, and there alone
  ROUTEGRAD_TILE_MMA_256X128 = 7,
} routegrad_gemm_tile;

typedef struct routegrad_gemm_plan {
  int32_t tile;         // routegrad_gemm_tile
  int32_t tile_rows;    // of the output
  int32_t tile_columns;
  int32_t stages;       // k-tiles of 64 in flight
  int32_t blocks;       // the grid: at most one per multiprocessor
  int32_t reserved;
  int64_t clocks;       // the estimate by which the tile was chosen
} routegrad_gemm_plan;

// grouped_gemm.cu: row r belongs to expert e when offsets[e] <= r < offsets[e + 1]. Formulas stand in the file's header.
#define ROUTEGRAD_GROUPED_GEMM_LAUNCHERS(X)                                                                           \
  X(grouped_gemm_forward,                                                                                             \
    (void* out, const void* x, const void* w, const int32_t* offsets, const int32_t* row_token, int64_t rows,         \
     int64_t x_rows, int32_t experts, int32_t n, int32_t k, int32_t tile, routegrad_stream stream))                   \
  X(grouped_gemm_input_gradient,                                                                                      \
    (void* dx, const void* dout, const void* w, const int32_t* offsets, const int32_t* row_token, int64_t rows,       \
     int64_t dout_rows, int32_t experts, int32_t n, int32_t k, int32_t tile, routegrad_stream stream))                \
  X(grouped_gemm_weight_gradient,                                                                                     \
    (float* dw, const void* dout, const void* x, const int32_t* offsets, const int32_t* dout_row_token,               \
     const int32_t* x_row_token, int64_t rows, int64_t dout_rows, int64_t x_rows, int32_t experts, int32_t n,         \
     int32_t k, int32_t accumulate, int32_t tile, routegrad_stream stream))                                           \
  X(sum_parts, (float* out, const float* parts, int32_t count, int64_t elements, int32_t accumulate,                  \
                routegrad_stream stream))                                                                             \
  /* On the host: the tile and grid for a product (routegrad_gemm_product) of these sizes, a pure function. */        \
  X(grouped_gemm_plan, (routegrad_gemm_plan* plan, int32_t product, int64_t rows, int32_t experts, int32_t n,         \
                        int32_t k, int32_t multiprocessors))

// grouped_swiglu.cu, grouped_down.cu: an expert's two projections with what stands between and after them. F is `ffn`, D
// is `hidden`; formulas stand in the files' headers.
#define ROUTEGRAD_EXPERT_LAUNCHERS(X)                                                                                 \
  X(grouped_swiglu_forward,                                                                                           \
    (void* h, void* a, const void* x, const void* w, const int32_t* offsets, const int32_t* row_token, int64_t rows,  \
     int64_t x_rows, int32_t experts, int32_t ffn, int32_t hidden, int32_t tile, routegrad_stream stream))            \
  X(grouped_down_forward,                                                                                             \
    (void* out, float* column_sums, const void* a, const void* w, const float* gates, const int32_t* offsets,         \
     const int32_t* row_token, int64_t rows, int64_t tokens, int32_t experts, int32_t hidden, int32_t ffn,            \
     int32_t tile, routegrad_stream stream))                                                                          \
  X(grouped_swiglu_backward,                                                                                          \
    (void* dh, void* scaled_a, float* dots, const void* dout, const void* w, const void* h, const float* gates,       \
     const int32_t* offsets, const int32_t* row_token, const int32_t* dout_row_token, int64_t rows,                   \
     int64_t dout_rows, int32_t experts, int32_t hidden, int32_t ffn, int32_t dot_columns, int32_t tile,              \
     routegrad_stream stream))                                                                                        \
  /* On the host: how many parts the dots of a row have with this tile on the current device. */                       \
  X(grouped_swiglu_dot_columns, (int32_t* columns, int64_t rows, int32_t experts, int32_t hidden, int32_t ffn,        \
                                 int32_t tile))

// What a row counts in an expert's mean, and what the sum is divided by.
typedef enum routegrad_weighting {
  ROUTEGRAD_WEIGHTING_PLAIN = 0,  // every row counts 1; divided by the number of rows
  ROUTEGRAD_WEIGHTING_SUM_P = 1,  // a row counts its gate; divided by the sum of the gates
  ROUTEGRAD_WEIGHTING_COUNT = 2,  // a row counts its gate; divided by the number of rows
} routegrad_weighting;

// expert_mean.cu: sums of the experts' outputs, and the default vectors that are their moving average.
#define ROUTEGRAD_EXPERT_MEAN_LAUNCHERS(X)                                                                            \
  X(expert_sums, (float* sums, float* masses, const float* column_sums, const float* gates, const int32_t* offsets,   \
                  const int32_t* row_token, int64_t rows, int64_t tokens, int32_t experts, int32_t hidden,            \
                  routegrad_stream stream))                                                                           \
  X(expert_mean_update, (float* average, const float* sums, const float* masses, const float* beta, int32_t experts,  \
                         int32_t hidden, int32_t weighting, routegrad_stream stream))                                 \
  X(expert_mean, (float* average, const float* column_sums, const float* gates, const int32_t* offsets,               \
                  const int32_t* row_token, const float* beta, int64_t rows, int64_t tokens, int32_t experts,         \
                  int32_t hidden, int32_t weighting, routegrad_stream stream))

// combine.cu: every token's sum of its rows, and of the default vectors of the experts that it did not choose.
#define ROUTEGRAD_COMBINE_LAUNCHERS(X)                                                                                \
  X(combine, (void* y, const void* rows_in, const float* gates, const int32_t* slot_row, const int32_t* choices,      \
              const float* vectors, int64_t tokens, int64_t rows, int32_t experts, int32_t hidden, int32_t slots,     \
              int32_t accumulate, routegrad_stream stream))

// gate_gradient.cu: the gradient of every gate, with default vectors from one reading of dy, which is sorted on the way.
#define ROUTEGRAD_GATE_GRADIENT_LAUNCHERS(X)                                                                          \
  X(default_dots, (float* dgates, void* g_rows, const void* g, const float* vectors, const int32_t* slot_row,         \
                   int64_t tokens, int64_t rows, int32_t experts, int32_t hidden, int32_t slots, routegrad_stream stream)) \
  X(gate_gradient, (float* dgates, const float* dots, const int32_t* slot_row, const int32_t* choices,                \
                    int64_t tokens, int64_t rows, int32_t experts, int32_t slots, int32_t dot_columns, int32_t keep,  \
                    routegrad_stream stream))

// norm.cu: RMSNorm (no bias) and LayerNorm of each row with the residual add before it, and their gradients.
#define ROUTEGRAD_NORM_LAUNCHERS(X)                                                                                   \
  X(norm_forward, (void* y, void* sum, const void* x, const void* residual, const void* weight, const void* bias,     \
                   int64_t rows, int32_t hidden, float eps, routegrad_stream stream))                                 \
  X(norm_backward, (void* dx, float* partials, const void* dy, const void* skip, const void* x, const void* weight,   \
                    int64_t rows, int32_t hidden, int32_t layernorm, float eps, routegrad_stream stream))             \
  X(norm_weight_gradient, (float* gradient, const float* partials, int64_t rows, int32_t hidden, int32_t accumulate,  \
                           routegrad_stream stream))                                                                  \
  /* On the host: floats of `partials` for one parameter; a LayerNorm has two. */                                     \
  X(norm_partials, (uint64_t* floats, int64_t rows, int32_t hidden))

// attention.cu, attention_backward.cu: causal attention on the fused projection.
#define ROUTEGRAD_ATTENTION_LAUNCHERS(X)                                                                              \
  X(attention_forward, (void* out, float* log_sum_exp, const void* qkv, const int32_t* first_key, int64_t tokens,     \
                        int32_t sequence, int32_t heads, int32_t key_value_heads, int32_t head_width,                 \
                        routegrad_stream stream))                                                                     \
  X(attention_backward, (void* dqkv, float* workspace, const void* dout, const void* qkv, const void* out,            \
                         const float* log_sum_exp, const int32_t* first_key, const float* cosines,                    \
                         const float* sines, int64_t tokens, int32_t sequence, int32_t heads,                         \
                         int32_t key_value_heads, int32_t head_width, routegrad_stream stream))                       \
  /* On the host: floats of `workspace`. */                                                                            \
  X(attention_backward_workspace, (uint64_t* floats, int64_t tokens, int32_t sequence, int32_t heads))

// cross_entropy.cu: the output head's logits and loss.
#define ROUTEGRAD_CROSS_ENTROPY_LAUNCHERS(X)                                                                          \
  X(head_logits, (float* logits, float* statistics, const void* x, const void* w, int64_t tokens, int32_t vocabulary, \
                  int32_t hidden, int32_t tile, routegrad_stream stream))                                             \
  X(cross_entropy_rows, (float* losses, void* dlogits, const float* logits, const float* statistics,                  \
                         const int32_t* targets, int64_t tokens, int32_t vocabulary, float factor,                    \
                         routegrad_stream stream))                                                                    \
  X(cross_entropy_mean, (float* loss, const float* losses, int64_t tokens, float factor, routegrad_stream stream))     \
  X(gradient_scale, (void* out, const void* in, const float* factor, int64_t elements, int32_t bf16_elements,         \
                     int32_t accumulate, routegrad_stream stream))

// swiglu.cu: the activation of dense layers.
#define ROUTEGRAD_SWIGLU_LAUNCHERS(X)                                                                         \
  X(swiglu_forward, (void* a, const void* h, int64_t rows, int32_t ffn, routegrad_stream stream))             \
  X(swiglu_backward,                                                                                          \
    (void* dh, const void* da, const void* h, int64_t rows, int32_t ffn, routegrad_stream stream))

// rope.cu: rotation of queries and keys by their positions; back turns by the opposite angles.
#define ROUTEGRAD_ROPE_LAUNCHERS(X)                                                                                    \
  X(rope, (void* y, const void* x, const float* cosines, const float* sines, int64_t tokens, int32_t sequence,         \
           int32_t heads, int32_t key_value_heads, int32_t head_width, int32_t back, routegrad_stream stream))         \
  X(qkv_rope_forward, (void* out, const void* x, const void* w, const float* cosines, const float* sines,              \
                       int64_t tokens, int32_t sequence, int32_t heads, int32_t key_value_heads, int32_t head_width,   \
                       int32_t hidden, int32_t tile, routegrad_stream stream))

// embedding.cu: rows of a table by id, the tokens' order by id, and the table's gradient.
#define ROUTEGRAD_EMBEDDING_LAUNCHERS(X)                                                                              \
  X(embedding_forward, (void* y, const void* w, const int32_t* ids, int64_t tokens, int32_t vocabulary,               \
                        int32_t hidden, routegrad_stream stream))                                                     \
  X(embedding_order, (int32_t* order, int32_t* keys, const int32_t* previous, const int32_t* row_token,               \
                      const int32_t* ids, int64_t tokens, int32_t vocabulary, int32_t shift, int32_t whole,           \
                      routegrad_stream stream))                                                                       \
  X(embedding_gradient, (float* dw, float* parts, const void* dy, const int32_t* order, const int32_t* keys,          \
                         int64_t tokens, int32_t vocabulary, int32_t hidden, int32_t accumulate,                      \
                         routegrad_stream stream))                                                                    \
  /* On the host: floats of `parts`. */                                                                               \
  X(embedding_parts, (uint64_t* floats, int64_t tokens, int32_t hidden))

// A parameter with its moments and gradient, in device memory. Its value is whole, or split into upper and lower.
typedef struct routegrad_parameter {
  float* whole;           // null where it is split
  uint16_t* upper;        // bf16
  int16_t* lower;
  void* first;            // moments, f32 or bf16
  void* second;
  const float* gradient;  // null: 0
  int64_t elements;
  int64_t first_block;    // of its blocks of 8192 numbers, among those of all parameters
  int32_t decays;
  int32_t reserved;
} routegrad_parameter;

// What the host tells an optimizer step.
typedef struct routegrad_step_settings {
  double rate;
  double clip;  // largest norm of the gradient; 0: any
  double beta1;
  double beta2;
  double eps;
  double weight_decay;
} routegrad_step_settings;

// What became of it.
typedef struct routegrad_step_outcome {
  uint64_t updates;   // accepted so far
  double norm;        // of the gradient, before clipping
  double losses[3];   // cross-entropy, auxiliary, z
  int32_t accepted;
  int32_t layer;      // the first MoE layer that raised a flag; -1
  int32_t token;      // its first token whose logits were not finite, in the global batch; INT32_MAX
  int32_t fault;      // its routegrad_fault bits
  float coefficients[2][7];  // of parameters that do not and that do decay: beta1, beta2, rate, second_scale, eps, keep, scale
} routegrad_step_outcome;

// A tensor that a step may change, of 4-byte words, as it was before the step and as it is.
typedef struct routegrad_state {
  uint32_t* committed;
  uint32_t* pending;
  int64_t words;
} routegrad_state;

// adamw.cu: the optimizer's update of all parameters, and the sums of squares of their gradients.
#define ROUTEGRAD_ADAMW_LAUNCHERS(X)                                                                                  \
  X(adamw_update, (const routegrad_parameter* parameters, const int32_t* block_parameter,                             \
                   const routegrad_step_outcome* outcome, int64_t blocks, int32_t bf16_moments,                       \
                   routegrad_stream stream))                                                                          \
  X(square_sums, (double* parts, const routegrad_parameter* parameters, const int32_t* block_parameter,               \
                  int64_t blocks, routegrad_stream stream))

// step.cu: what stands around the update.
#define ROUTEGRAD_STEP_LAUNCHERS(X)                                                                                   \
  X(losses_add, (double* sums, const float* cross_entropy, const float* auxiliary, const float* z, double share,      \
                 int32_t first, routegrad_stream stream))                                                             \
  X(step_decide, (routegrad_step_outcome* outcome, const routegrad_step_settings* settings, const double* losses,     \
                  const int32_t* flags, const double* parts, int64_t count, int32_t layers, routegrad_stream stream)) \
  X(state_commit, (const routegrad_state* states, const routegrad_step_outcome* outcome, int32_t count,               \
                   int64_t most_words, routegrad_stream stream))

// layer_tally.cu: what a MoE layer counts.
#define ROUTEGRAD_TALLY_LAUNCHERS(X)                                                                                  \
  X(layer_tally, (double* stats, double* load, int32_t* flags, float* fractions, const int32_t* offsets,              \
                  const int32_t* first_non_finite, const int32_t* fault, const float* mean_entropy,                   \
                  const double* entropy_parts, int64_t tokens, int64_t first_token, int32_t parts, int32_t experts,   \
                  int32_t trains, int32_t first_of_stats, int32_t first_of_step, int32_t over_step,                   \
                  routegrad_stream stream))                                                                           \
  X(share_entropy, (double* parts, const float* scores, int64_t tokens, int32_t experts, routegrad_stream stream))    \
  X(lossfree_update, (float* bias, const double* load, int32_t experts, float rate, routegrad_stream stream))         \
  X(remoe_fractions, (float* fractions, const float* lambda, const int32_t* offsets, int64_t slots, int32_t experts,  \
                      routegrad_stream stream))                                                                       \
  X(remoe_update, (float* lambda, const double* load, int32_t layers, int32_t experts, int32_t top_k, double factor,  \
                   routegrad_stream stream))

// balance.cu: the auxiliary loss, and the sum of the losses. terms and dterms are arrays of the host's.
#define ROUTEGRAD_BALANCE_LAUNCHERS(X)                                                                                 \
  X(auxiliary_loss,                                                                                                    \
    (float* loss, const float* mean, const float* fractions, int32_t experts, routegrad_stream stream))                \
  X(auxiliary_loss_backward,                                                                                           \
    (float* dmean, const float* dloss, const float* fractions, int32_t experts, routegrad_stream stream))              \
  X(weighted_sum,                                                                                                      \
    (float* out, const float* const* terms, const float* coefficients, int32_t count, routegrad_stream stream))        \
  X(weighted_sum_backward,                                                                                             \
    (float* const* dterms, const float* dout, const float* coefficients, int32_t count, routegrad_stream stream))

// gates.cu: gates of chosen and of sampled experts, and the gradients of what they are made of.
#define ROUTEGRAD_GATES_LAUNCHERS(X)                                                                                   \
  X(selected_gates, (float* w, const float* p, const int32_t* slot_row, const int32_t* choices, int64_t tokens,        \
                     int64_t rows, int32_t experts, int32_t slots, int32_t renormalize, routegrad_stream stream))      \
  X(selected_gates_backward,                                                                                           \
    (float* dp, const float* dw, const float* p, const int32_t* slot_row, const int32_t* choices, int64_t tokens,      \
     int64_t rows, int32_t experts, int32_t slots, int32_t renormalize, int32_t through, routegrad_stream stream))     \
  X(sampled_gates, (float* w, const float* factors, const float* logits, const int32_t* experts_chosen,                \
                    const int32_t* kept, int64_t tokens, int32_t experts, int32_t stages, routegrad_stream stream))    \
  X(sampled_gates_backward,                                                                                            \
    (float* dz, const float* dw, const float* logits, const int32_t* experts_chosen, const int32_t* kept,              \
     int64_t tokens, int32_t experts, int32_t stages, float estimator, routegrad_stream stream))

// rows.cu: arithmetic of whole rows, sums of columns, rows behind a sigmoid gate.
#define ROUTEGRAD_ROWS_LAUNCHERS(X)                                                                                    \
  X(row_arithmetic, (void* out, const void* a, const void* b, int64_t rows, int64_t b_rows, int32_t width,             \
                     int32_t multiply, routegrad_stream stream))                                                       \
  X(column_sums, (float* parts, const void* x, const void* y, const float* scales, int64_t rows, int32_t width,        \
                  int64_t pitch, int32_t piece, int32_t runs, routegrad_stream stream))                                \
  X(gated_rows, (void* y, float* gates, const void* x, const void* w, const void* v, int64_t rows, int32_t width,      \
                 routegrad_stream stream))                                                                             \
  X(gated_rows_backward, (void* dx, void* dv, float* dscores, const void* dy, const float* gates, const void* v,       \
                          const void* w, int64_t rows, int32_t width, int32_t accumulate, routegrad_stream stream))

// qk_norm.cu: RMSNorm of pieces of rows; copies without w.
#define ROUTEGRAD_QK_NORM_LAUNCHERS(X)                                                                                 \
  X(qk_norm, (void* y, float* scales, const void* x, const void* w, int64_t rows, int32_t pieces, int32_t width,       \
              int64_t pitch, float eps, routegrad_stream stream))                                                      \
  X(qk_norm_backward,                                                                                                  \
    (void* dx, const float* scales, const void* dy, const void* x, const void* w, int64_t rows, int32_t pieces,        \
     int32_t width, int64_t pitch, routegrad_stream stream))

// ranks.cu: rows that ranks gathered, added up in pairs.
#define ROUTEGRAD_RANKS_LAUNCHERS(X)                                                                                   \
  X(rank_sums, (float* out, const float* rows, int32_t ranks, int64_t stride, int64_t elements,                        \
                routegrad_stream stream))                                                                              \
  X(rank_sums_f64, (double* out, const double* rows, int32_t ranks, int64_t stride, int64_t elements,                  \
                    routegrad_stream stream))                                                                          \
  X(rank_sums_i32, (int32_t* out, const int32_t* rows, int32_t ranks, int64_t stride, int64_t elements,                \
                    routegrad_stream stream))                                                                          \
  X(rank_flags, (int32_t* flags, const int32_t* rows, int32_t ranks, int32_t layers, routegrad_stream stream))         \
  X(load_shares, (float* fractions, const double* load, int32_t experts, routegrad_stream stream))

typedef struct routegrad_launchers {
  const char* build;  // "cuda", "sim", "sim-race", "sim-asan"
  // Writes the text of a failed launcher's status, cut to `capacity` bytes with its final zero. Call it on the thread
  // that got the status, before the next launch there.
  void (*describe)(const char* launcher, routegrad_status status, char* text, uint64_t capacity);
  // Null in the CUDA build.
  void (*sim_get_options)(routegrad_sim_options* options);
  routegrad_status (*sim_set_options)(const routegrad_sim_options* options);
  void (*sim_take_counters)(routegrad_sim_counters* counters);  // reads and resets
#define ROUTEGRAD_MEMBER(name, parameters) routegrad_status(*name) parameters;
  ROUTEGRAD_LAUNCHERS(ROUTEGRAD_MEMBER)
#undef ROUTEGRAD_MEMBER
} routegrad_launchers;

const routegrad_launchers* routegrad_cuda(void);
const routegrad_launchers* routegrad_sim(void);

#ifdef __cplusplus
}
#endif
#endif
