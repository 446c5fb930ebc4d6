// mHC with gradients, FP32: the forward and backward of entering and leaving a sublayer, each one pass over the
// streams. Plain PyTorch makes some 120 small operators of the Sinkhorn iterations alone; training felt that most.
// Streams X [T, h, D]; `dot` [T, (2+h)h] is fn @ flatten(X), made by a matrix product outside.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("O3", "associative-math", "no-signed-zeros", "no-trapping-math", "no-math-errno")
#endif
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__)
#define UPWELL_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define UPWELL_CLONES
#endif

namespace {

constexpr int kMaxStreams = 8;
constexpr int kMaxIterations = 64;

inline float sigmoid(float x) { return 1.0f / (1.0f + std::exp(-x)); }

// Normalises columns (sum over rows i) or rows of C [h, h]; keeps the divisors for the backward pass.
inline void normalise(float* c, int h, bool columns, float eps, float* divisors) {
  for (int a = 0; a < h; ++a) {
    float sum = eps;
    for (int b = 0; b < h; ++b) sum += columns ? c[b * h + a] : c[a * h + b];
    divisors[a] = sum;
    float inverse = 1.0f / sum;
    for (int b = 0; b < h; ++b) (columns ? c[b * h + a] : c[a * h + b]) *= inverse;
  }
}

// Backward of y = x / (sum x + eps), given y (recomputable) and the divisors: dx = (dy - <dy, y>) / divisor.
inline void normalise_backward(float* grad, float* c, int h, bool columns, const float* divisors) {
  for (int a = 0; a < h; ++a) {
    float inner = 0.0f;
    for (int b = 0; b < h; ++b) {
      int at = columns ? b * h + a : a * h + b;
      inner += grad[at] * c[at];
    }
    float inverse = 1.0f / divisors[a];
    for (int b = 0; b < h; ++b) {
      int at = columns ? b * h + a : a * h + b;
      grad[at] = (grad[at] - inner) * inverse;
      c[at] *= divisors[a];  // back to the value before this step
    }
  }
}

inline void softmax_rows(const float* logits, float* out, int h) {
  for (int i = 0; i < h; ++i) {
    float top = logits[i * h];
    for (int j = 1; j < h; ++j) top = std::max(top, logits[i * h + j]);
    float sum = 0.0f;
    for (int j = 0; j < h; ++j) sum += out[i * h + j] = std::exp(logits[i * h + j] - top);
    for (int j = 0; j < h; ++j) out[i * h + j] /= sum;
  }
}

}  // namespace

extern "C" {

// u [T, D], post [T, h], comb [T, h, h], inverse_rms [T] for tokens begin..end.
UPWELL_CLONES
void upwell_hc_enter_forward(const float* x, const float* dot, const float* base, const float* scale, float* u,
                             float* post, float* comb, float* inverse_rms, int64_t begin, int64_t end, int h,
                             int64_t dim, int iterations, float eps, float norm_eps) {
  const int n = (2 + h) * h;
  for (int64_t t = begin; t < end; ++t) {
    const float* xt = x + t * h * dim;
    float square = 0.0f;
    for (int64_t k = 0; k < h * dim; ++k) square += xt[k] * xt[k];
    const float r = 1.0f / std::sqrt(square / (h * dim) + norm_eps);
    inverse_rms[t] = r;
    const float* z = dot + t * n;
    float pre[kMaxStreams], logits[kMaxStreams * kMaxStreams], c[kMaxStreams * kMaxStreams], divisors[kMaxStreams];
    for (int i = 0; i < h; ++i) {
      pre[i] = sigmoid(z[i] * r * scale[0] + base[i]) + eps;
      post[t * h + i] = 2.0f * sigmoid(z[h + i] * r * scale[1] + base[h + i]);
    }
    for (int i = 0; i < h * h; ++i) logits[i] = z[2 * h + i] * r * scale[2] + base[2 * h + i];
    softmax_rows(logits, c, h);
    for (int i = 0; i < h * h; ++i) c[i] += eps;
    normalise(c, h, true, eps, divisors);
    for (int k = 1; k < iterations; ++k) {
      normalise(c, h, false, eps, divisors);
      normalise(c, h, true, eps, divisors);
    }
    std::memcpy(comb + t * h * h, c, sizeof(float) * h * h);
    float* ut = u + t * dim;
    for (int64_t k = 0; k < dim; ++k) ut[k] = pre[0] * xt[k];
    for (int i = 1; i < h; ++i)
      for (int64_t k = 0; k < dim; ++k) ut[k] += pre[i] * xt[i * dim + k];
  }
}

// Gradients of x (without the part through `dot`), dot, and this range's sums for base [n] and scale [3] (added).
UPWELL_CLONES
void upwell_hc_enter_backward(const float* x, const float* dot, const float* base, const float* scale,
                              const float* inverse_rms, const float* grad_u, const float* grad_post,
                              const float* grad_comb, float* grad_x, float* grad_dot, float* grad_base,
                              float* grad_scale, int64_t begin, int64_t end, int h, int64_t dim, int iterations,
                              float eps) {
  const int n = (2 + h) * h;
  for (int64_t t = begin; t < end; ++t) {
    const float* xt = x + t * h * dim;
    const float* gu = grad_u + t * dim;
    const float* z = dot + t * n;
    const float r = inverse_rms[t];
    float gz[(2 + kMaxStreams) * kMaxStreams];  // gradient of the pre-activations z * r * scale + base
    float pre[kMaxStreams];
    for (int i = 0; i < h; ++i) {
      float inner = 0.0f;
      for (int64_t k = 0; k < dim; ++k) inner += gu[k] * xt[i * dim + k];
      const float s = sigmoid(z[i] * r * scale[0] + base[i]);
      pre[i] = s + eps;
      gz[i] = inner * s * (1.0f - s);
      const float p = sigmoid(z[h + i] * r * scale[1] + base[h + i]);
      gz[h + i] = grad_post[t * h + i] * 2.0f * p * (1.0f - p);
    }
    float logits[kMaxStreams * kMaxStreams], soft[kMaxStreams * kMaxStreams], c[kMaxStreams * kMaxStreams];
    float divisors[2 * kMaxIterations][kMaxStreams];
    for (int i = 0; i < h * h; ++i) logits[i] = z[2 * h + i] * r * scale[2] + base[2 * h + i];
    softmax_rows(logits, soft, h);
    for (int i = 0; i < h * h; ++i) c[i] = soft[i] + eps;
    int steps = 0;
    normalise(c, h, true, eps, divisors[steps++]);
    for (int k = 1; k < iterations; ++k) {
      normalise(c, h, false, eps, divisors[steps++]);
      normalise(c, h, true, eps, divisors[steps++]);
    }
    float gc[kMaxStreams * kMaxStreams];
    std::memcpy(gc, grad_comb + t * h * h, sizeof(float) * h * h);
    while (steps > 0) {
      --steps;
      normalise_backward(gc, c, h, steps % 2 == 0, divisors[steps]);
    }
    for (int i = 0; i < h; ++i) {
      float inner = 0.0f;
      for (int j = 0; j < h; ++j) inner += gc[i * h + j] * soft[i * h + j];
      for (int j = 0; j < h; ++j) gz[2 * h + i * h + j] = soft[i * h + j] * (gc[i * h + j] - inner);
    }
    float grad_r = 0.0f;
    for (int i = 0; i < n; ++i) {
      const int part = i < h ? 0 : i < 2 * h ? 1 : 2;
      grad_base[i] += gz[i];
      grad_scale[part] += gz[i] * z[i] * r;
      grad_dot[t * n + i] = gz[i] * scale[part] * r;
      grad_r += gz[i] * scale[part] * z[i];
    }
    const float through_rms = -grad_r * r * r * r / (h * dim);
    float* gx = grad_x + t * h * dim;
    for (int i = 0; i < h; ++i)
      for (int64_t k = 0; k < dim; ++k) gx[i * dim + k] = pre[i] * gu[k] + through_rms * xt[i * dim + k];
  }
}

// out_j = post_j y + sum_i comb[i, j] x_i
UPWELL_CLONES
void upwell_hc_leave_forward(const float* x, const float* y, const float* post, const float* comb, float* out,
                             int64_t begin, int64_t end, int h, int64_t dim) {
  for (int64_t t = begin; t < end; ++t) {
    const float* xt = x + t * h * dim;
    const float* yt = y + t * dim;
    for (int j = 0; j < h; ++j) {
      float* to = out + (t * h + j) * dim;
      const float p = post[t * h + j];
      for (int64_t k = 0; k < dim; ++k) to[k] = p * yt[k];
      for (int i = 0; i < h; ++i) {
        const float c = comb[(t * h + i) * h + j];
        for (int64_t k = 0; k < dim; ++k) to[k] += c * xt[i * dim + k];
      }
    }
  }
}

UPWELL_CLONES
void upwell_hc_leave_backward(const float* x, const float* y, const float* post, const float* comb, const float* grad,
                              float* grad_x, float* grad_y, float* grad_post, float* grad_comb, int64_t begin,
                              int64_t end, int h, int64_t dim) {
  for (int64_t t = begin; t < end; ++t) {
    const float* xt = x + t * h * dim;
    const float* yt = y + t * dim;
    const float* g = grad + t * h * dim;
    float* gy = grad_y + t * dim;
    for (int j = 0; j < h; ++j) {
      const float p = post[t * h + j];
      float inner = 0.0f;
      for (int64_t k = 0; k < dim; ++k) {
        inner += yt[k] * g[j * dim + k];
        gy[k] = (j ? gy[k] : 0.0f) + p * g[j * dim + k];
      }
      grad_post[t * h + j] = inner;
    }
    for (int i = 0; i < h; ++i) {
      float* gx = grad_x + (t * h + i) * dim;
      for (int j = 0; j < h; ++j) {
        const float c = comb[(t * h + i) * h + j];
        float inner = 0.0f;
        for (int64_t k = 0; k < dim; ++k) {
          inner += xt[i * dim + k] * g[j * dim + k];
          gx[k] = (j ? gx[k] : 0.0f) + c * g[j * dim + k];
        }
        grad_comb[(t * h + i) * h + j] = inner;
      }
    }
  }
}

}  // extern "C"
