// Training's mHC, FP32: the forward and backward of entering and leaving a sublayer, each one pass over the streams.
// Streams X [T, H, D]; `dots` [T, (2+H)H] is fn @ flatten(X). The small functions of a token (gates, Sinkhorn) run for
// a vector of tokens at once, one a lane. After training_attention.h in each instruction set's namespace.

// Fetches the streams of two tokens on, to read or to write: the hardware's prefetcher starts anew with each page,
// which is a token or so.
template <int H, int Write = 0>
INLINE void fetch_streams(const float* x, int64_t dim) {
#pragma GCC unroll 8
  for (int i = 0; i < H; ++i) __builtin_prefetch(x + (2 * H + i) * dim, Write, 2);
}

// Columns (sums over rows i) or rows of C [H, H] divided by their sums, which are kept for the backward pass.
template <int H, bool Columns>
INLINE void normalise(Vec* c, float eps, Vec* sums) {
#pragma GCC unroll 8
  for (int a = 0; a < H; ++a) {
    Vec sum = splat(eps);
#pragma GCC unroll 8
    for (int b = 0; b < H; ++b) sum += c[Columns ? b * H + a : a * H + b];
    sums[a] = sum;
    const Vec inverse = 1.0f / sum;
#pragma GCC unroll 8
    for (int b = 0; b < H; ++b) c[Columns ? b * H + a : a * H + b] *= inverse;
  }
}
// Given y = x / (sum x + eps) in c: grad becomes (grad - <grad, y>) / sum, and c becomes x.
template <int H, bool Columns>
INLINE void normalise_backward(Vec* grad, Vec* c, const Vec* sums) {
#pragma GCC unroll 8
  for (int a = 0; a < H; ++a) {
    Vec inner = zero();
#pragma GCC unroll 8
    for (int b = 0; b < H; ++b) inner += grad[Columns ? b * H + a : a * H + b] * c[Columns ? b * H + a : a * H + b];
    const Vec inverse = 1.0f / sums[a];
#pragma GCC unroll 8
    for (int b = 0; b < H; ++b) {
      const int at = Columns ? b * H + a : a * H + b;
      grad[at] = (grad[at] - inner) * inverse;
      c[at] *= sums[a];
    }
  }
}

// The gates of up to kLanes tokens, one a lane. `sums` has room for 2 * iterations * H.
template <int H>
struct Gates {
  static constexpr int kCount = (2 + H) * H;
  Vec z[kCount], r, pre[H], post[H], soft[H * H], comb[H * H];

  void fill(const float* dot, const float* inverse_rms, int lanes) {
    float square[kCount][kLanes] = {}, rms[kLanes] = {};
    for (int lane = 0; lane < lanes; ++lane) {
      for (int i = 0; i < kCount; ++i) square[i][lane] = dot[lane * kCount + i];
      rms[lane] = inverse_rms[lane];
    }
    for (int i = 0; i < kCount; ++i) z[i] = load(square[i]);
    r = load(rms);
  }
  void compute(const float* base, const float* scale, int64_t iterations, float eps, Vec* sums) {
    for (int i = 0; i < H; ++i) {
      pre[i] = sigmoid(z[i] * r * scale[0] + base[i]);
      post[i] = sigmoid(z[H + i] * r * scale[1] + base[H + i]);
      Vec top = splat(-__builtin_inff()), total = zero();
      for (int j = 0; j < H; ++j) {
        const int at = 2 * H + i * H + j;
        const Vec v = soft[i * H + j] = z[at] * r * scale[2] + base[at];
        top = select(v > top, v, top);
      }
      for (int j = 0; j < H; ++j) total += soft[i * H + j] = exp_vec(soft[i * H + j] - top);
      const Vec inverse = 1.0f / total;
      for (int j = 0; j < H; ++j) soft[i * H + j] *= inverse;
    }
    for (int i = 0; i < H * H; ++i) comb[i] = soft[i] + eps;
    normalise<H, true>(comb, eps, sums);
    for (int64_t k = 1; k < iterations; ++k) {
      normalise<H, false>(comb, eps, sums + (2 * k - 1) * H);
      normalise<H, true>(comb, eps, sums + 2 * k * H);
    }
  }
};

// fn [n, width], `turned` its transpose [width, n up to whole lines]; x [count, width] -> out rows of whole lines.
static void mix_products(const float* x, const float* fn, const float* turned, float* out, int64_t n, int64_t width,
                         int64_t count) {
  const int64_t padded = whole_lines(n);
  if (width % kLanes == 0) return product(x, width, 1, turned, padded, out, padded, count, n, width, false);
  for (int64_t t = 0; t < count; ++t)
    for (int64_t i = 0; i < n; ++i) out[t * padded + i] = dot(x + t * width, fn + i * width, width);
}
// grad_x += grad fn, grad_fn += grad^T x: grad [count, n], x [count, width].
static void mix_products_backward(const float* x, const float* fn, const float* grad, float* grad_x, float* grad_fn,
                                  int64_t n, int64_t width, int64_t count) {
  if (width % kLanes == 0) {
    product(grad, n, 1, fn, width, grad_x, width, count, width, n, true);
    return product(grad, 1, n, x, width, grad_fn, width, n, width, count, true);
  }
  for (int64_t t = 0; t < count; ++t)
    for (int64_t i = 0; i < n; ++i) {
      const float g = grad[t * n + i];
      float *gx = grad_x + t * width, *gf = grad_fn + i * width;
      map(gx, gx, width, [&](Vec v, int64_t k) { return v + g * load_at(fn + i * width, k, width); });
      map(gf, gf, width, [&](Vec v, int64_t k) { return v + g * load_at(x + t * width, k, width); });
    }
}

// u [T, D], post [T, H], comb [T, H, H], inverse_rms [T].
template <int H>
static void enter_forward(const float* x, const float* fn, const float* turned, const float* base,
                          const float* scale, float* dots, float* u, float* post, float* comb, float* inverse_rms,
                          int64_t dim, int64_t iterations, float eps, float norm_eps, int64_t from, int64_t to,
                          float* workspace) {
  Gates<H> gates;
  constexpr int n = Gates<H>::kCount;
  Vec* sums = reinterpret_cast<Vec*>(workspace);
  alignas(64) float made[kMixTokens * ((n + kTrainingLine - 1) / kTrainingLine * kTrainingLine)];
  for (int64_t t = from; t < to; t += kLanes) {
    if ((t - from) % kMixTokens == 0) {
      const int64_t count = to - t < kMixTokens ? to - t : kMixTokens;
      mix_products(x + t * H * dim, fn, turned, made, n, H * dim, count);
      for (int64_t k = 0; k < count; ++k)
        std::memcpy(dots + (t + k) * n, made + k * whole_lines(n), sizeof(float) * n);
    }
    const int lanes = to - t < kLanes ? int(to - t) : kLanes;
    for (int lane = 0; lane < lanes; ++lane) {
      const float* xt = x + (t + lane) * H * dim;
      inverse_rms[t + lane] = 1.0f / std::sqrt(dot(xt, xt, H * dim) / float(H * dim) + norm_eps);
    }
    gates.fill(dots + t * n, inverse_rms + t, lanes);
    gates.compute(base, scale, iterations, eps, sums);
    for (int lane = 0; lane < lanes; ++lane) {
      const float* xt = x + (t + lane) * H * dim;
      float pre[H];
      for (int i = 0; i < H; ++i) {
        pre[i] = gates.pre[i][lane] + eps;
        post[(t + lane) * H + i] = 2.0f * gates.post[i][lane];
      }
      for (int i = 0; i < H * H; ++i) comb[(t + lane) * H * H + i] = gates.comb[i][lane];
      each_vector(dim, [&](int64_t k, int part) {
        Vec sum = zero();
#pragma GCC unroll 8
        for (int i = 0; i < H; ++i) sum += pre[i] * load_some(xt + i * dim + k, part);
        store_some(u + (t + lane) * dim + k, sum, part);
      });
    }
  }
}

// Gradients of x, grad_past (what comes to x by other ways) included; this range's sums for fn, base and scale are
// added to theirs.
template <int H>
static void enter_backward(const float* x, const float* fn, const float* base, const float* scale, const float* dots,
                           const float* inverse_rms, const float* grad_u, const float* grad_post,
                           const float* grad_comb, const float* grad_past, float* grad_x, int64_t dim,
                           int64_t iterations, float eps, float* grad_fn, float* grad_base, float* grad_scale,
                           int64_t from, int64_t to, float* workspace) {
  Gates<H> gates;
  constexpr int n = Gates<H>::kCount;
  Vec* sums = reinterpret_cast<Vec*>(workspace);
  float grad_dots[kMixTokens * n];
  int64_t done = from;  // tokens before it have their products with fn
  for (int64_t t = from; t < to; t += kLanes) {
    const int lanes = to - t < kLanes ? int(to - t) : kLanes;
    float inner[H][kLanes] = {}, of_post[H][kLanes] = {}, of_comb[H * H][kLanes] = {};
    for (int lane = 0; lane < lanes; ++lane) {
      const float *xt = x + (t + lane) * H * dim, *gu = grad_u + (t + lane) * dim;
      const float* past = grad_past + (t + lane) * H * dim;  // soon needed too
      Vec products[H] = {};
      each_vector(dim, [&](int64_t k, int part) {
        const Vec g = load_some(gu + k, part);
        fetch_streams<H>(xt + k, dim);
        for (int i = 0; i < H; ++i) __builtin_prefetch(past + i * dim + k, 0, 2);
#pragma GCC unroll 8
        for (int i = 0; i < H; ++i) products[i] += g * load_some(xt + i * dim + k, part);
      });
      for (int i = 0; i < H; ++i) {
        inner[i][lane] = sum_lanes(products[i]);
        of_post[i][lane] = grad_post[(t + lane) * H + i];
      }
      for (int i = 0; i < H * H; ++i) of_comb[i][lane] = grad_comb[(t + lane) * H * H + i];
    }
    gates.fill(dots + t * n, inverse_rms + t, lanes);
    gates.compute(base, scale, iterations, eps, sums);
    Vec gz[n], gc[H * H];  // gradients of the pre-activations z * r * scale + base, and of comb
    for (int i = 0; i < H; ++i) {
      gz[i] = load(inner[i]) * gates.pre[i] * (1.0f - gates.pre[i]);
      gz[H + i] = load(of_post[i]) * 2.0f * gates.post[i] * (1.0f - gates.post[i]);
    }
    for (int i = 0; i < H * H; ++i) gc[i] = load(of_comb[i]);
    for (int64_t k = iterations - 1; k > 0; --k) {
      normalise_backward<H, true>(gc, gates.comb, sums + 2 * k * H);
      normalise_backward<H, false>(gc, gates.comb, sums + (2 * k - 1) * H);
    }
    normalise_backward<H, true>(gc, gates.comb, sums);
    for (int i = 0; i < H; ++i) {
      Vec mean = zero();
      for (int j = 0; j < H; ++j) mean += gc[i * H + j] * gates.soft[i * H + j];
      for (int j = 0; j < H; ++j) gz[2 * H + i * H + j] = gates.soft[i * H + j] * (gc[i * H + j] - mean);
    }
    Vec grad_r = zero(), of_scale[3] = {};
    float of_dot[n][kLanes];
    for (int i = 0; i < n; ++i) {
      const int part = i < H ? 0 : i < 2 * H ? 1 : 2;
      grad_base[i] += sum_lanes(gz[i]);
      of_scale[part] += gz[i] * gates.z[i] * gates.r;
      grad_r += gz[i] * scale[part] * gates.z[i];
      store(of_dot[i], gz[i] * scale[part] * gates.r);
    }
    for (int part = 0; part < 3; ++part) grad_scale[part] += sum_lanes(of_scale[part]);
    const Vec through_rms = grad_r * gates.r * gates.r * gates.r / float(-H * dim);
    for (int lane = 0; lane < lanes; ++lane) {
      for (int i = 0; i < n; ++i) grad_dots[(t + lane - done) * n + i] = of_dot[i][lane];
      const float *xt = x + (t + lane) * H * dim, *gu = grad_u + (t + lane) * dim;
      const float* past = grad_past + (t + lane) * H * dim;
      float *gx = grad_x + (t + lane) * H * dim, pre[H];
      const float factor = through_rms[lane];
      for (int i = 0; i < H; ++i) pre[i] = gates.pre[i][lane] + eps;
      each_vector(dim, [&](int64_t k, int part) {
        const Vec g = load_some(gu + k, part);
#pragma GCC unroll 8
        for (int i = 0; i < H; ++i)
          store_some(gx + i * dim + k,
                     load_some(past + i * dim + k, part) + pre[i] * g + factor * load_some(xt + i * dim + k, part),
                     part);
      });
    }
    if (t + lanes - done == kMixTokens || t + lanes == to) {
      mix_products_backward(x + done * H * dim, fn, grad_dots, grad_x + done * H * dim, grad_fn, n, H * dim,
                            t + lanes - done);
      done = t + lanes;
    }
  }
}

// out_j = post_j y + sum_i comb[i, j] x_i
template <int H>
static void leave_forward(const float* x, const float* y, const float* post, const float* comb, float* out,
                          int64_t dim, int64_t from, int64_t to) {
  for (int64_t t = from; t < to; ++t) {
    const float *xt = x + t * H * dim, *p = post + t * H, *c = comb + t * H * H;
    each_vector(dim, [&](int64_t k, int part) {
      const Vec yk = load_some(y + t * dim + k, part);
      fetch_streams<H>(xt + k, dim);
      fetch_streams<H, 1>(out + t * H * dim + k, dim);
      Vec in[H];
#pragma GCC unroll 8
      for (int i = 0; i < H; ++i) in[i] = load_some(xt + i * dim + k, part);
#pragma GCC unroll 8
      for (int j = 0; j < H; ++j) {
        Vec sum = p[j] * yk;
#pragma GCC unroll 8
        for (int i = 0; i < H; ++i) sum += c[i * H + j] * in[i];
        store_some(out + (t * H + j) * dim + k, sum, part);
      }
    });
  }
}

template <int H>
static void leave_backward(const float* x, const float* y, const float* post, const float* comb, const float* grad,
                           float* grad_x, float* grad_y, float* grad_post, float* grad_comb, int64_t dim, int64_t from,
                           int64_t to) {
  // Nobody reads it before the sublayer's own backward pass is through: whole lines go to memory unread.
  const bool past_cache = dim % kTrainingLine == 0 && reinterpret_cast<uintptr_t>(grad_x) % 64 == 0;
  for (int64_t t = from; t < to; ++t) {
    const float *xt = x + t * H * dim, *p = post + t * H, *c = comb + t * H * H;
    Vec of_post[H] = {}, of_comb[H * H] = {};
    each_vector(dim, [&](int64_t k, int part) {
      const Vec yk = load_some(y + t * dim + k, part);
      fetch_streams<H>(xt + k, dim);
      Vec g[H], of_y = zero();
#pragma GCC unroll 8
      for (int j = 0; j < H; ++j) {
        g[j] = load_some(grad + (t * H + j) * dim + k, part);
        of_y += p[j] * g[j];
        of_post[j] += yk * g[j];
      }
      store_some(grad_y + t * dim + k, of_y, part);
#pragma GCC unroll 8
      for (int i = 0; i < H; ++i) {
        const Vec in = load_some(xt + i * dim + k, part);
        Vec of_x = zero();
#pragma GCC unroll 8
        for (int j = 0; j < H; ++j) {
          of_x += c[i * H + j] * g[j];
          of_comb[i * H + j] += in * g[j];
        }
        float* to = grad_x + (t * H + i) * dim + k;
        if (past_cache) store_past_cache(to, of_x);
        else store_some(to, of_x, part);
      }
    });
    for (int j = 0; j < H; ++j) grad_post[t * H + j] = sum_lanes(of_post[j]);
    for (int i = 0; i < H * H; ++i) grad_comb[t * H * H + i] = sum_lanes(of_comb[i]);
  }
  finish_past_cache();
}

template <int H>
constexpr StreamKernels stream_kernels = {enter_forward<H>, enter_backward<H>, leave_forward<H>, leave_backward<H>};

const TrainingKernels training = {
    train_norm_forward, train_norm_backward, train_pool_forward, train_pool_backward, train_routing_forward,
    train_routing_backward, train_swiglu_forward, train_swiglu_backward, train_attention_forward,
    train_attention_backward, train_linear_forward, train_linear_backward, train_experts_forward,
    train_experts_backward, train_loss,
    {stream_kernels<1>, stream_kernels<2>, stream_kernels<3>, stream_kernels<4>}};
