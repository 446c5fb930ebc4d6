// The C entry points of training's kernels, each run by a team. Attention, linear maps and experts are whole calls; the
// others cut `rows` into `parts`, and of a sum over rows each part has its own, one after another, to be added up by the
// caller.
#include "training.h"

#include <cstring>
#include <vector>

extern "C" const char* upwell_isa();

namespace upwell {
namespace {

const TrainingKernels& kernels() {
#if defined(__x86_64__)
  if (std::strncmp(upwell_isa(), "avx512", 6) == 0) return avx512::training;
  if (std::strcmp(upwell_isa(), "avx2") == 0) return avx2::training;
#endif
  return baseline::training;
}

template <class F>
void in_parts(int64_t rows, int64_t parts, F f) {
  struct Cut {
    int64_t rows, parts;
    F& f;
  } cut{rows, parts, f};
  run_team(
      [](Worker& worker, void* raw) {
        const Cut& all = *static_cast<Cut*>(raw);
        worker.units(all.parts, [&](int64_t part) {
          all.f(part, all.rows * part / all.parts, all.rows * (part + 1) / all.parts);
        });
      },
      &cut);
}

}  // namespace

// Kept from call to call: on some machines the first touch of a page costs more than all the work on it.
float* training_workspace(int64_t floats) {
  thread_local std::vector<float> kept;
  const size_t needed = size_t(floats + kTrainingLine);
  if (kept.size() < needed) kept.resize(needed);
  const auto at = reinterpret_cast<uintptr_t>(kept.data());
  return kept.data() + (64 - at % 64) % 64 / sizeof(float);
}

}  // namespace upwell

extern "C" {

void upwell_train_linear_forward(upwell::LinearTraining* call) {
  upwell::run_team(upwell::kernels().linear_forward, call);
}
void upwell_train_linear_backward(upwell::LinearTraining* call) {
  upwell::run_team(upwell::kernels().linear_backward, call);
}
void upwell_train_experts_forward(upwell::ExpertsTraining* call) {
  upwell::run_team(upwell::kernels().experts_forward, call);
}
void upwell_train_experts_backward(upwell::ExpertsTraining* call) {
  upwell::run_team(upwell::kernels().experts_backward, call);
}

void upwell_train_loss(upwell::LossTraining* call) { upwell::run_team(upwell::kernels().loss, call); }

void upwell_train_attention_forward(upwell::AttentionTraining* call) {
  upwell::run_team(upwell::kernels().attention_forward, call);
}
void upwell_train_attention_backward(upwell::AttentionTraining* call) {
  upwell::run_team(upwell::kernels().attention_backward, call);
}

void upwell_train_pool_forward(const upwell::PoolTraining* call, int64_t rows, int64_t parts) {
  upwell::in_parts(rows, parts,
                   [&](int64_t, int64_t from, int64_t to) { upwell::kernels().pool_forward(*call, from, to); });
}

void upwell_train_pool_backward(const upwell::PoolTraining* call, float* grad_ape, int64_t rows, int64_t parts) {
  upwell::in_parts(rows, parts, [&](int64_t part, int64_t from, int64_t to) {
    upwell::kernels().pool_backward(*call, grad_ape + part * call->ratio * call->width, from, to);
  });
}

void upwell_train_routing_forward(const upwell::RoutingTraining* call, int64_t rows, int64_t parts) {
  upwell::in_parts(rows, parts,
                   [&](int64_t, int64_t from, int64_t to) { upwell::kernels().routing_forward(*call, from, to); });
}

void upwell_train_routing_backward(const upwell::RoutingTraining* call, int64_t rows, int64_t parts) {
  upwell::in_parts(rows, parts,
                   [&](int64_t, int64_t from, int64_t to) { upwell::kernels().routing_backward(*call, from, to); });
}

// Counting sort of `pairs` (token, place) by expert: each sorted row's token and weight, each pair's row, and where each
// of n experts' rows begin.
void upwell_train_group(const int64_t* chosen, const float* weights, int64_t k, int64_t n, int64_t pairs,
                        int64_t* source, int64_t* back, int64_t* bounds, float* row_weights) {
  std::memset(bounds, 0, sizeof(int64_t) * size_t(n + 1));
  for (int64_t p = 0; p < pairs; ++p) ++bounds[chosen[p] + 1];
  for (int64_t e = 0; e < n; ++e) bounds[e + 1] += bounds[e];
  std::vector<int64_t> next(bounds, bounds + n);
  for (int64_t p = 0; p < pairs; ++p) {
    const int64_t row = back[p] = next[size_t(chosen[p])]++;
    source[row] = p / k, row_weights[row] = weights[p];
  }
}

void upwell_train_norm_forward(const float* x, const float* weight, float* out, float* scale, int64_t dim, float eps,
                               const upwell::Turn* turn, int64_t rows, int64_t parts) {
  upwell::in_parts(rows, parts, [&](int64_t, int64_t from, int64_t to) {
    upwell::kernels().norm_forward(x, weight, out, scale, dim, eps, *turn, from, to);
  });
}

void upwell_train_norm_backward(const float* x, const float* weight, const float* scale, const float* grad,
                                float* grad_x, int64_t dim, const upwell::Turn* turn, float* grad_weight, int64_t rows,
                                int64_t parts) {
  upwell::in_parts(rows, parts, [&](int64_t part, int64_t from, int64_t to) {
    upwell::kernels().norm_backward(x, weight, scale, grad, grad_x, dim, *turn, grad_weight + part * dim, from, to);
  });
}

void upwell_train_swiglu_forward(const float* gate, const float* up, int64_t row, const float* weights, float limit,
                                 float* out, int64_t dim, int64_t rows, int64_t parts) {
  upwell::in_parts(rows, parts, [&](int64_t, int64_t from, int64_t to) {
    upwell::kernels().swiglu_forward(gate, up, row, weights, limit, out, dim, from, to);
  });
}

void upwell_train_swiglu_backward(const float* gate, const float* up, int64_t row, const float* weights, float limit,
                                  const float* grad, float* grad_gate, float* grad_up, int64_t grad_row,
                                  float* hidden, float* grad_weights, int64_t dim, int64_t rows, int64_t parts) {
  upwell::in_parts(rows, parts, [&](int64_t, int64_t from, int64_t to) {
    upwell::kernels().swiglu_backward(gate, up, row, weights, limit, grad, grad_gate, grad_up, grad_row, hidden,
                                      grad_weights, dim, from, to);
  });
}

void upwell_train_enter_forward(int64_t streams, const float* x, const float* fn, const float* turned,
                                const float* base, const float* scale, float* dots, float* u, float* post,
                                float* comb, float* inverse_rms, int64_t dim, int64_t iterations, float eps,
                                float norm_eps, int64_t rows, int64_t parts) {
  upwell::in_parts(rows, parts, [&](int64_t, int64_t from, int64_t to) {
    upwell::kernels().streams[streams - 1].enter_forward(
        x, fn, turned, base, scale, dots, u, post, comb, inverse_rms, dim, iterations, eps, norm_eps, from, to,
        upwell::training_workspace(upwell::stream_workspace_floats(streams, iterations)));
  });
}

void upwell_train_enter_backward(int64_t streams, const float* x, const float* fn, const float* base,
                                 const float* scale, const float* dots, const float* inverse_rms,
                                 const float* grad_u, const float* grad_post, const float* grad_comb,
                                 const float* grad_past, float* grad_x, int64_t dim, int64_t iterations, float eps,
                                 float* grad_fn, float* grad_base, float* grad_scale, int64_t rows, int64_t parts) {
  const int64_t n = (2 + streams) * streams, weights = n * streams * dim;
  upwell::in_parts(rows, parts, [&](int64_t part, int64_t from, int64_t to) {
    upwell::kernels().streams[streams - 1].enter_backward(
        x, fn, base, scale, dots, inverse_rms, grad_u, grad_post, grad_comb, grad_past, grad_x, dim, iterations, eps,
        grad_fn + part * weights, grad_base + part * n, grad_scale + part * 3, from, to,
        upwell::training_workspace(upwell::stream_workspace_floats(streams, iterations)));
  });
}

// Leaving a sublayer and entering the next: streams x become `out`, a few tokens at a time.
void upwell_train_cross_forward(int64_t streams, const float* x, const float* y, const float* post, const float* comb,
                                float* out, const float* fn, const float* turned, const float* base,
                                const float* scale, float* dots, float* u, float* next_post, float* next_comb,
                                float* inverse_rms, int64_t dim, int64_t iterations, float eps, float norm_eps,
                                int64_t rows, int64_t parts) {
  const upwell::StreamKernels& kernels = upwell::kernels().streams[streams - 1];
  upwell::in_parts(rows, parts, [&](int64_t, int64_t from, int64_t to) {
    float* workspace = upwell::training_workspace(upwell::stream_workspace_floats(streams, iterations));
    for (int64_t t = from, end; t < to; t = end) {
      end = t + upwell::kMixTokens < to ? t + upwell::kMixTokens : to;
      kernels.leave_forward(x, y, post, comb, out, dim, t, end);
      kernels.enter_forward(out, fn, turned, base, scale, dots, u, next_post, next_comb, inverse_rms, dim, iterations,
                            eps, norm_eps, t, end, workspace);
    }
  });
}

void upwell_train_cross_backward(int64_t streams, const float* x, const float* y, const float* post, const float* comb,
                                 const float* out, const float* fn, const float* base, const float* scale,
                                 const float* dots, const float* inverse_rms, const float* grad_u,
                                 const float* grad_next_post, const float* grad_next_comb, const float* grad_past,
                                 float* grad_x, float* grad_y, float* grad_post, float* grad_comb, int64_t dim,
                                 int64_t iterations, float eps, float* grad_fn, float* grad_base, float* grad_scale,
                                 int64_t rows, int64_t parts) {
  const upwell::StreamKernels& kernels = upwell::kernels().streams[streams - 1];
  const int64_t n = (2 + streams) * streams, width = streams * dim;
  upwell::in_parts(rows, parts, [&](int64_t part, int64_t from, int64_t to) {
    const int64_t own = upwell::stream_workspace_floats(streams, iterations);
    float* workspace = upwell::training_workspace(own + upwell::kMixTokens * width);
    for (int64_t t = from, end; t < to; t = end) {
      end = t + upwell::kMixTokens < to ? t + upwell::kMixTokens : to;
      float* grad_out = workspace + own - t * width;
      kernels.enter_backward(out, fn, base, scale, dots, inverse_rms, grad_u, grad_next_post, grad_next_comb,
                             grad_past, grad_out, dim, iterations, eps, grad_fn + part * n * width,
                             grad_base + part * n, grad_scale + part * 3, t, end, workspace);
      kernels.leave_backward(x, y, post, comb, grad_out, grad_x, grad_y, grad_post, grad_comb, dim, t, end);
    }
  });
}

void upwell_train_leave_forward(int64_t streams, const float* x, const float* y, const float* post, const float* comb,
                                float* out, int64_t dim, int64_t rows, int64_t parts) {
  upwell::in_parts(rows, parts, [&](int64_t, int64_t from, int64_t to) {
    upwell::kernels().streams[streams - 1].leave_forward(x, y, post, comb, out, dim, from, to);
  });
}

void upwell_train_leave_backward(int64_t streams, const float* x, const float* y, const float* post,
                                 const float* comb, const float* grad, float* grad_x, float* grad_y,
                                 float* grad_post, float* grad_comb, int64_t dim, int64_t rows, int64_t parts) {
  upwell::in_parts(rows, parts, [&](int64_t, int64_t from, int64_t to) {
    upwell::kernels().streams[streams - 1].leave_backward(x, y, post, comb, grad, grad_x, grad_y, grad_post, grad_comb,
                                                          dim, from, to);
  });
}
}
