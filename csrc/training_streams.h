// Training's mHC, FP32: the forward and backward of entering and leaving a sublayer, each one pass over the streams.
// Streams X [T, H, D]; `dots` [T, (2+H)H] is fn @ flatten(X). The small functions of a token (gates, Sinkhorn) run for
// a vector of tokens at once, one a lane. After training_attention.h in each instruction set's namespace.

// Fetches the streams of two tokens on: the hardware's prefetcher starts anew with each page, which is a token or so.
template <int H>
INLINE void fetch_streams(const float* x, int64_t dim) {
#pragma GCC unroll 8
  for (int i = 0; i < H; ++i) __builtin_prefetch(x + (2 * H + i) * dim, 0, 2);
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

// Of tokens [from, to), a tile: dots = fn x; `made` has room for the tile's rows of whole lines. The next tile's
// streams, read and written, are fetched meanwhile.
static void mix_products(const StreamsTraining& a, int64_t n, int64_t width, int64_t from, int64_t to, float* made) {
  const int64_t padded = whole_lines(n), count = to - from, first = (count + 1) / 2;
  const float* x = a.out + from * width;
  if (width % kLanes != 0) {
    for (int64_t t = 0; t < count; ++t)
      for (int64_t i = 0; i < n; ++i) a.dots[(from + t) * n + i] = dot(x + t * width, a.fn + i * width, width);
    return;
  }
  const float* read = a.y == nullptr ? a.out : a.x;
  auto part = [&](int64_t begin, int64_t rows, const float* ahead) {
    product({x + begin * width, a.turned, nullptr, nullptr, width, 1, padded, ahead + to * width, kTrainingLine},
            made + begin * padded, padded, rows, n, width, false);
  };
  part(0, first, read), part(first, count - first, a.out);
  for (int64_t t = 0; t < count; ++t) std::memcpy(a.dots + (from + t) * n, made + t * padded, sizeof(float) * n);
}
// grad_x += grad fn, grad_fn += grad^T x, of a tile: grad [tile, n], grad_x [tile, width]. The next tile's streams and
// past gradients are fetched meanwhile.
static void mix_products_backward(const StreamsTraining& a, const float* grad, float* grad_x, float* grad_fn, int64_t n,
                                  int64_t width, int64_t from, int64_t to) {
  const float* x = a.out + from * width;
  if (width % kLanes == 0) {
    product({grad, a.fn, nullptr, nullptr, n, 1, width, a.grad_past + to * width, kTrainingLine}, grad_x, width,
            to - from, width, n, true);
    product({grad, x, nullptr, nullptr, 1, n, width, a.out + to * width, kTrainingLine}, grad_fn, width, n, width,
            to - from, true);
    return;
  }
  for (int64_t t = 0; t < to - from; ++t)
    for (int64_t i = 0; i < n; ++i) {
      const float g = grad[t * n + i];
      float *gx = grad_x + t * width, *gf = grad_fn + i * width;
      map(gx, gx, width, [&](Vec v, int64_t k) { return v + g * load_at(a.fn + i * width, k, width); });
      map(gf, gf, width, [&](Vec v, int64_t k) { return v + g * load_at(x + t * width, k, width); });
    }
}

// Tokens [from, to), a tile, enter: dots, u, next_post, next_comb and inverse_rms are made.
template <int H>
static void enter_forward(const StreamsTraining& a, int64_t from, int64_t to, float* workspace) {
  Gates<H> gates;
  constexpr int n = Gates<H>::kCount;
  const int64_t dim = a.dim;
  alignas(64) float made[kMixTokens * ((n + kTrainingLine - 1) / kTrainingLine * kTrainingLine)];
  mix_products(a, n, H * dim, from, to, made);
  for (int64_t t = from; t < to; t += kLanes) {
    const int lanes = to - t < kLanes ? int(to - t) : kLanes;
    for (int lane = 0; lane < lanes; ++lane) {
      const float* xt = a.out + (t + lane) * H * dim;
      a.inverse_rms[t + lane] = 1.0f / std::sqrt(dot(xt, xt, H * dim) / float(H * dim) + a.rms_eps);
    }
    gates.fill(a.dots + t * n, a.inverse_rms + t, lanes);
    gates.compute(a.base, a.scale, a.iterations, a.eps, reinterpret_cast<Vec*>(workspace));
    for (int lane = 0; lane < lanes; ++lane) {
      const float* xt = a.out + (t + lane) * H * dim;
      float pre[H];
      for (int i = 0; i < H; ++i) {
        pre[i] = gates.pre[i][lane] + a.eps;
        a.next_post[(t + lane) * H + i] = 2.0f * gates.post[i][lane];
      }
      for (int i = 0; i < H * H; ++i) a.next_comb[(t + lane) * H * H + i] = gates.comb[i][lane];
      each_vector(dim, [&](int64_t k, int part) {
        Vec sum = zero();
#pragma GCC unroll 8
        for (int i = 0; i < H; ++i) sum += pre[i] * load_some(xt + i * dim + k, part);
        store_some(a.u + (t + lane) * dim + k, sum, part);
      });
    }
  }
}

// Gradients of the streams of tokens [from, to), a tile, from those of u [tile, D]: to grad_x [tile, h, D], grad_past
// (what comes to them by other ways) included. `of` is added to.
template <int H>
static void enter_backward(const StreamsTraining& a, const float* grad_u, float* grad_x, const StreamSums& of,
                           int64_t from, int64_t to, float* workspace) {
  Gates<H> gates;
  constexpr int n = Gates<H>::kCount;
  const int64_t dim = a.dim;
  Vec* sums = reinterpret_cast<Vec*>(workspace);
  float grad_dots[kMixTokens * n];
  for (int64_t t = from; t < to; t += kLanes) {
    const int lanes = to - t < kLanes ? int(to - t) : kLanes;
    float inner[H][kLanes] = {}, of_post[H][kLanes] = {}, of_comb[H * H][kLanes] = {};
    for (int lane = 0; lane < lanes; ++lane) {
      const float *xt = a.out + (t + lane) * H * dim, *gu = grad_u + (t + lane - from) * dim;
      Vec products[H] = {};
      each_vector(dim, [&](int64_t k, int part) {
        const Vec g = load_some(gu + k, part);
#pragma GCC unroll 8
        for (int i = 0; i < H; ++i) products[i] += g * load_some(xt + i * dim + k, part);
      });
      for (int i = 0; i < H; ++i) {
        inner[i][lane] = sum_lanes(products[i]);
        of_post[i][lane] = a.grad_next_post[(t + lane) * H + i];
      }
      for (int i = 0; i < H * H; ++i) of_comb[i][lane] = a.grad_next_comb[(t + lane) * H * H + i];
    }
    gates.fill(a.dots + t * n, a.inverse_rms + t, lanes);
    gates.compute(a.base, a.scale, a.iterations, a.eps, sums);
    Vec gz[n], gc[H * H];  // gradients of the pre-activations z * r * scale + base, and of comb
    for (int i = 0; i < H; ++i) {
      gz[i] = load(inner[i]) * gates.pre[i] * (1.0f - gates.pre[i]);
      gz[H + i] = load(of_post[i]) * 2.0f * gates.post[i] * (1.0f - gates.post[i]);
    }
    for (int i = 0; i < H * H; ++i) gc[i] = load(of_comb[i]);
    for (int64_t k = a.iterations - 1; k > 0; --k) {
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
      of.base[i] += sum_lanes(gz[i]);
      of_scale[part] += gz[i] * gates.z[i] * gates.r;
      grad_r += gz[i] * a.scale[part] * gates.z[i];
      store(of_dot[i], gz[i] * a.scale[part] * gates.r);
    }
    for (int part = 0; part < 3; ++part) of.scale[part] += sum_lanes(of_scale[part]);
    const Vec through_rms = grad_r * gates.r * gates.r * gates.r / float(-H * dim);
    for (int lane = 0; lane < lanes; ++lane) {
      const int64_t at = t + lane - from;
      for (int i = 0; i < n; ++i) grad_dots[at * n + i] = of_dot[i][lane];
      const float *xt = a.out + (t + lane) * H * dim, *past = a.grad_past + (t + lane) * H * dim;
      const float* gu = grad_u + at * dim;
      const float factor = through_rms[lane];
      float *gx = grad_x + at * H * dim, pre[H];
      for (int i = 0; i < H; ++i) pre[i] = gates.pre[i][lane] + a.eps;
      each_vector(dim, [&](int64_t k, int part) {
        const Vec g = load_some(gu + k, part);
#pragma GCC unroll 8
        for (int i = 0; i < H; ++i)
          store_some(gx + i * dim + k,
                     load_some(past + i * dim + k, part) + pre[i] * g + factor * load_some(xt + i * dim + k, part),
                     part);
      });
    }
  }
  mix_products_backward(a, grad_dots, grad_x, of.fn, n, H * dim, from, to);
}

// out_j = post_j y + sum_i comb[i, j] x_i
template <int H>
static void leave_forward(const float* x, const float* y, const float* post, const float* comb, float* out,
                          int64_t dim, int64_t from, int64_t to) {
  for (int64_t t = from; t < to; ++t) {
    const float *xt = x + t * H * dim, *p = post + t * H, *c = comb + t * H * H;
    each_vector(dim, [&](int64_t k, int part) {
      const Vec yk = load_some(y + t * dim + k, part);
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

constexpr Turn kNoTurn = {0, 1, nullptr, nullptr};

template <int H>
static void cross_forward(const StreamsTraining& a, int64_t from, int64_t to) {
  float* workspace = training_workspace(stream_workspace_floats(a));
  for (int64_t t = from, end; t < to; t = end) {
    end = t + kMixTokens < to ? t + kMixTokens : to;
    if (a.y != nullptr) leave_forward<H>(a.x, a.y, a.post, a.comb, a.out, a.dim, t, end);
    enter_forward<H>(a, t, end, workspace);
    if (a.norm != nullptr) train_norm_forward(a.u, a.norm, a.normed, a.norm_scale, a.dim, a.norm_eps, kNoTurn, t, end);
  }
}

template <int H>
static void cross_backward(const StreamsTraining& a, const StreamSums& sums, int64_t from, int64_t to) {
  float* workspace = training_workspace(stream_workspace_floats(a));
  const int64_t dim = a.dim, width = H * dim;
  float *of_u = workspace + gate_floats(a), *of_out = of_u + kMixTokens * dim;
  for (int64_t t = from, end; t < to; t = end) {
    end = t + kMixTokens < to ? t + kMixTokens : to;
    const float* grad_u = a.grad + t * dim;
    if (a.norm != nullptr) {
      train_norm_backward(a.u, a.norm, a.norm_scale, a.grad, of_u - t * dim, dim, kNoTurn, sums.norm, t, end);
      grad_u = of_u;
    }
    const bool leaves = a.y != nullptr;
    enter_backward<H>(a, grad_u, leaves ? of_out : a.grad_x + t * width, sums, t, end, workspace);
    if (leaves)
      leave_backward<H>(a.x, a.y, a.post, a.comb, of_out - t * width, a.grad_x, a.grad_y, a.grad_post, a.grad_comb, dim,
                        t, end);
  }
}

template <int H>
constexpr StreamKernels stream_kernels = {cross_forward<H>, cross_backward<H>, leave_forward<H>, leave_backward<H>};

const TrainingKernels training = {
    train_norm_forward, train_norm_backward, train_pool_forward, train_pool_backward, train_routing_forward,
    train_routing_backward, train_swiglu_forward, train_swiglu_backward, train_attention_forward,
    train_attention_backward, train_linear_forward, train_linear_backward, train_experts_forward,
    train_experts_backward, train_loss,
    {stream_kernels<1>, stream_kernels<2>, stream_kernels<3>, stream_kernels<4>}};
