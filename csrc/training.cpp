// The C entry points of training's kernels, each run by a team. Attention, linear maps and experts are whole calls; the
// others cut `rows` into `parts`, and a sum over rows comes with room for each part's own, one after another.
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

// A sum over rows, of n floats: each part's own, [parts, n], and the total.
struct Sum {
  float *parts, *total;
  int64_t n;
  float* of(int64_t part) const { return parts + part * n; }
};
constexpr int64_t kSumFloats = 2048;  // added up at a time

void add_up(const Sum& sum, int64_t parts, int64_t from, int64_t to) {
  std::memcpy(sum.total + from, sum.parts + from, sizeof(float) * size_t(to - from));
  for (int64_t part = 1; part < parts; ++part)
    for (int64_t k = from; k < to; ++k) sum.total[k] += sum.of(part)[k];
}

// f(part, from, to) for each part of the rows once in the team; then the parts' sums, which begin at 0, are added up.
template <class F>
void in_parts(int64_t rows, int64_t parts, const Sum* sums, int64_t count, F f) {
  struct Cut {
    int64_t rows, parts, count;
    const Sum* sums;
    F& f;
  } cut{rows, parts, count, sums, f};
  run_team(
      [](Worker& worker, void* raw) {
        const Cut& all = *static_cast<Cut*>(raw);
        worker.units(all.parts, [&](int64_t part) {
          for (int64_t i = 0; i < all.count; ++i)
            std::memset(all.sums[i].of(part), 0, sizeof(float) * size_t(all.sums[i].n));
          all.f(part, all.rows * part / all.parts, all.rows * (part + 1) / all.parts);
        });
        if (all.count == 0) return;
        worker.barrier();
        for (int64_t i = 0; i < all.count; ++i) {
          const Sum& sum = all.sums[i];
          worker.units((sum.n + kSumFloats - 1) / kSumFloats, [&](int64_t unit) {
            const int64_t from = unit * kSumFloats, left = sum.n - from;
            add_up(sum, all.parts, from, from + (left < kSumFloats ? left : kSumFloats));
          });
        }
      },
      &cut);
}
template <class F>
void in_parts(int64_t rows, int64_t parts, F f) {
  in_parts(rows, parts, nullptr, 0, f);
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

void upwell_train_pool_backward(const upwell::PoolTraining* call, float* ape_parts, float* grad_ape, int64_t rows,
                                int64_t parts) {
  const upwell::Sum sum{ape_parts, grad_ape, call->ratio * call->width};
  upwell::in_parts(rows, parts, &sum, 1, [&](int64_t part, int64_t from, int64_t to) {
    upwell::kernels().pool_backward(*call, sum.of(part), from, to);
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
                                float* grad_x, int64_t dim, const upwell::Turn* turn, float* weight_parts,
                                float* grad_weight, int64_t rows, int64_t parts) {
  const upwell::Sum sum{weight_parts, grad_weight, dim};
  upwell::in_parts(rows, parts, &sum, 1, [&](int64_t part, int64_t from, int64_t to) {
    upwell::kernels().norm_backward(x, weight, scale, grad, grad_x, dim, *turn, sum.of(part), from, to);
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

void upwell_train_cross_forward(const upwell::StreamsTraining* call, int64_t rows, int64_t parts) {
  upwell::in_parts(rows, parts, [&](int64_t, int64_t from, int64_t to) {
    upwell::kernels().streams[call->streams - 1].cross_forward(*call, from, to);
  });
}

void upwell_train_cross_backward(const upwell::StreamsTraining* call, float* fn_parts, float* base_parts,
                                 float* scale_parts, float* norm_parts, float* grad_fn, float* grad_base,
                                 float* grad_scale, float* grad_norm, int64_t rows, int64_t parts) {
  const int64_t n = (2 + call->streams) * call->streams, weights = n * call->streams * call->dim;
  const upwell::Sum sums[] = {{fn_parts, grad_fn, weights}, {base_parts, grad_base, n}, {scale_parts, grad_scale, 3},
                              {norm_parts, grad_norm, call->norm == nullptr ? 0 : call->dim}};
  upwell::in_parts(rows, parts, sums, 4, [&](int64_t part, int64_t from, int64_t to) {
    const upwell::StreamSums own{sums[0].of(part), sums[1].of(part), sums[2].of(part), sums[3].of(part)};
    upwell::kernels().streams[call->streams - 1].cross_backward(*call, own, from, to);
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
