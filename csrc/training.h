// Training's attention, FP32, whole sequences from position 0: what the forward and the backward kernel are given.
#pragma once
#include <cstdint>

#include "team.h"

namespace upwell {

float* training_workspace(int64_t floats);  // this thread's, aligned to cache lines

// All tensors contiguous; B sequences of S tokens, H heads of d dims, of which the last r are rotary. A unit of work is
// `span` tokens of one sequence, at least a window and a chunk (AttentionTiling). The layout is mirrored by
// ops/attention_native.py.
struct AttentionTraining {
  int64_t batch, steps, heads, dim, rope, window, ratio, entry_count, span;
  double eps;
  const float *q;        // [B, S, H, d], before the heads' norm and the rotation
  const float *kv;       // [B, S, d]
  const float *entries;  // [B, N, d]; entry w is seen from token (w + 1) * ratio - 1 on
  const float *sink;     // [H]
  const float *cos, *sin;  // [B, S, r/2]
  float *out;              // [B, S, H, d], rotated back
  float *log_sum;          // [B, S, H]: log of the softmax's sum, the sink's share included
  // Backward only.
  const float *grad;  // of out
  float *grad_q, *grad_kv, *grad_entries, *grad_sink;  // of q, kv, entries and sink
  float *shared;  // scratch, what each span adds to others' gradients: see shared_floats

  int64_t spans() const { return (steps + span - 1) / span; }  // of a sequence
  // A span's gradients of the keys before it [window - 1, d], of the entries [N, d] and of the sink [H].
  int64_t shared_floats() const { return (window - 1 + entry_count) * dim + heads; }
};

constexpr int64_t kTrainingLine = 16;  // floats of a cache line, a multiple of every instruction set's lanes

inline int64_t whole_lines(int64_t n) { return (n + kTrainingLine - 1) / kTrainingLine * kTrainingLine; }
// A row length in an odd number of cache lines: columns spread over all cache sets.
inline int64_t odd_lines(int64_t n) { return (n + kTrainingLine - 1) / kTrainingLine * kTrainingLine | kTrainingLine; }

// Sizes of the parts that a call is cut into.
struct AttentionTiling {
  int64_t window, chunk, tokens, padded_dim, near, near_width, far_width, score_width;

  explicit AttentionTiling(const AttentionTraining& a) {
    window = a.window < a.steps ? a.window : a.steps;
    chunk = window < 128 ? 128 : window;            // queries that share one copy of their keys
    tokens = a.heads < 64 ? 64 / a.heads : 1;       // queries a block: some 64 rows
    padded_dim = whole_lines(a.dim);
    near = window - 1 + chunk;
    near_width = odd_lines(near + kTrainingLine);
    far_width = odd_lines(a.entry_count + kTrainingLine);
    score_width = odd_lines(whole_lines(window - 1 + tokens) + whole_lines(a.entry_count) + kTrainingLine);
  }
  int64_t workspace_floats(const AttentionTraining& a) const {
    const int64_t rows = tokens * a.heads, keys = near + a.entry_count;
    return 2 * keys * padded_dim + a.dim * (near_width + far_width) + 3 * rows * padded_dim +
           2 * rows * score_width + 2 * tokens * whole_lines(a.rope) + 3 * rows + 16 * kTrainingLine;
  }
};

// y [T, out] = x [T, in] weight^T [out, in]; rows of x and y may be any distance apart. In the backward pass y is the
// gradient of y. Mirrored by ops/linear_autograd.py.
struct LinearMap {
  const float *x, *weight;
  float *y, *grad_x, *grad_weight;  // null where no gradient is wanted
  int64_t in, out, x_row, y_row, grad_x_row;
  int64_t adds;  // to grad_x: 0 nothing, 1 to what the map before, of the same x, makes of it, 2 to what is there
};
struct LinearTraining {
  int64_t tokens, count;
  const LinearMap* maps;
};

// A mixture of experts: T tokens of D dims, each with k of E experts of I dims, and a shared one. Rows are the T * k
// pairs of token and expert, sorted by expert. Mirrored by ops/moe_native.py.
struct ExpertsTraining {
  int64_t tokens, k, experts, dim, inter, shared_inter;
  double limit;
  const float* x;                        // [T, D]
  const int64_t *source, *back, *bounds;  // a row's token; a pair's row; where each expert's rows begin, [E + 1]
  const float* row_weights;              // [T * k]
  const float *w13, *w2;                 // [E, 2I, D], [E, D, I]
  const float *shared_w1, *shared_w3, *shared_w2;
  float* inner;         // [T * k, 2I]: what w1 and w3 made, kept for the backward pass
  float* shared_inner;  // [T, 2 * shared I]
  float* outs;          // [T * k, D]: scratch
  float* y;             // [T, D]: the output; backward: the gradient of x
  // Backward only.
  const float* grad;  // [T, D]
  float *grad_w13, *grad_w2, *grad_weights, *grad_shared_w1, *grad_shared_w3, *grad_shared_w2;  // weights: of pairs
  float *grad_row_weights, *shared_hidden, *shared_grad_inner;  // [T * k], [T, shared I], [T, 2 * shared I]: scratch
};

// The mean cross-entropy of the tokens that count, from the head's inputs: logits = x weight^T. Mirrored by
// ops/loss_autograd.py.
struct LossTraining {
  int64_t tokens, dim, vocab, block;  // block: tokens whose logits there is room for
  float share;                        // of a token in the mean
  const float *x, *weight;            // [T, D], [V, D]
  const int64_t* targets;             // [T]; negative: doesn't count
  float* logits;                      // [block, V up to an odd number of lines]: scratch
  float *losses, *grad_x, *grad_weight;  // [T], [T, D], [V, D]
};

// Angles by which rows' last 2 * pairs values are turned, pairs as complex numbers: cos and sin [rows, pairs], of which a
// table with fewer rows is repeated.
struct Turn {
  int64_t pairs, rows;
  const float *cos, *sin;
};

// The compressor's pooling of B sequences of S tokens, N windows of `ratio` tokens each. A row is a window. Mirrored by
// ops/compress_native.py.
struct PoolTraining {
  int64_t steps, windows, ratio, dim, width;  // width: dim, or 2 * dim where windows overlap
  const float *kv, *gate;                     // [B, S, width]
  const float* ape;                           // [ratio, width]
  float* out;                                 // [B, N, dim]
  // Backward only.
  const float* grad;          // of out
  float *grad_kv, *grad_gate;  // [B, S, width]
};

// The router: a token's k of E experts. Mirrored by ops/routing_native.py.
struct RoutingTraining {
  int64_t experts, k;
  float scaling;
  const float *logits, *bias;  // [T, E]; [E] or null
  const int64_t* given;        // [T, k]: the experts, where a table gives them, or null
  float* scores;               // [T, E], kept for the backward pass
  int64_t* chosen;             // [T, k]
  float* weights;              // [T, k]
  // Backward only.
  const float* grad;   // of weights
  float* grad_logits;  // [T, E]
};

// mHC between sublayers: T tokens' h streams of D dims leave one sublayer and enter the next, whose input is normed.
// n = (2 + h) h. Mirrored by ops/hc_autograd.py.
struct StreamsTraining {
  int64_t streams, dim, iterations;
  float eps, rms_eps, norm_eps;
  const float *x, *y, *post, *comb;  // what leaves: [T, h, D], [T, D], [T, h], [T, h, h]; null at the first sublayer
  float* out;                        // [T, h, D], what enters: made, or given where nothing leaves
  const float *fn, *turned, *base, *scale;  // [n, hD], its transpose [hD, n up to whole lines], [n], [3]
  float *dots, *u, *next_post, *next_comb, *inverse_rms;  // [T, n], [T, D], [T, h], [T, h, h], [T]
  const float* norm;          // [D], or null: no norm
  float *normed, *norm_scale;  // [T, D], [T]
  // Backward only. `grad` is of `normed`, or of u without a norm; grad_past is what comes to `out` by other ways.
  const float *grad, *grad_next_post, *grad_next_comb, *grad_past;
  float *grad_x, *grad_y, *grad_post, *grad_comb;  // where nothing leaves, grad_x is of `out`, and the rest null
};
struct StreamSums {
  float *fn, *base, *scale, *norm;  // gradients, added to
};
// For one number of streams.
struct StreamKernels {
  void (*cross_forward)(const StreamsTraining&, int64_t from, int64_t to);
  void (*cross_backward)(const StreamsTraining&, const StreamSums&, int64_t from, int64_t to);
  // The last sublayer is only left: y [T, D] -> out [T, h, D]
  void (*leave_forward)(const float* x, const float* y, const float* post, const float* comb, float* out, int64_t dim,
                        int64_t from, int64_t to);
  void (*leave_backward)(const float* x, const float* y, const float* post, const float* comb, const float* grad,
                         float* grad_x, float* grad_y, float* grad_post, float* grad_comb, int64_t dim, int64_t from,
                         int64_t to);
};
// Tokens that go through a stream kernel together: a tile. What one reads, makes and fetches for the next fits L2.
constexpr int64_t kMixTokens = 16;
constexpr int64_t kMaxStreams = 4;  // ops/hc_autograd.py knows it too

inline int64_t gate_floats(const StreamsTraining& a) { return 2 * a.iterations * a.streams * kTrainingLine; }
inline int64_t stream_workspace_floats(const StreamsTraining& a) {
  return gate_floats(a) + kMixTokens * whole_lines(a.dim) * (1 + a.streams);
}

// Every function but the whole calls takes a range of rows, so that the caller can cut the work in parts.
struct TrainingKernels {
  void (*norm_forward)(const float* x, const float* weight, float* out, float* scale, int64_t dim, float eps,
                       const Turn& turn, int64_t from, int64_t to);
  void (*norm_backward)(const float* x, const float* weight, const float* scale, const float* grad, float* grad_x,
                        int64_t dim, const Turn& turn, float* grad_weight, int64_t from, int64_t to);
  void (*pool_forward)(const PoolTraining&, int64_t from, int64_t to);
  void (*pool_backward)(const PoolTraining&, float* grad_ape, int64_t from, int64_t to);
  void (*routing_forward)(const RoutingTraining&, int64_t from, int64_t to);
  void (*routing_backward)(const RoutingTraining&, int64_t from, int64_t to);
  void (*swiglu_forward)(const float* gate, const float* up, int64_t row, const float* weights, float limit,
                         float* out, int64_t dim, int64_t from, int64_t to);
  void (*swiglu_backward)(const float* gate, const float* up, int64_t row, const float* weights, float limit,
                          const float* grad, float* grad_gate, float* grad_up, int64_t grad_row, float* hidden,
                          float* grad_weights, int64_t dim, int64_t from, int64_t to);
  // Whole calls.
  Body attention_forward, attention_backward, linear_forward, linear_backward, experts_forward, experts_backward, loss;
  StreamKernels streams[kMaxStreams];  // for 1 .. kMaxStreams streams
};

namespace baseline { extern const TrainingKernels training; }
#if defined(__x86_64__)
namespace avx2 { extern const TrainingKernels training; }
namespace avx512 { extern const TrainingKernels training; }
#endif

}  // namespace upwell
