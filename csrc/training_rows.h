// Training's operations row by row, FP32: RMSNorm and SwiGLU, forward and backward in one pass each.
// Included in each instruction set's namespace.

// f(k, part) for each vector of a row of `dim` floats, part of it at the end.
template <class F>
INLINE void each_vector(int64_t dim, F f) {
  int64_t k = 0;
  for (; k + kLanes <= dim; k += kLanes) f(k, kLanes);
  if (k < dim) f(k, int(dim - k));
}
INLINE Vec load_some(const float* p, int part) { return part == kLanes ? load(p) : load_part(p, part); }
INLINE void store_some(float* p, Vec v, int part) {
  if (part == kLanes) store(p, v);
  else store_part(p, v, part);
}

// Pairs of x as complex numbers, turned by a row's angles, or back.
INLINE void turn_row(float* x, const Turn& turn, int64_t row, float direction) {
  const int64_t pairs = turn.pairs, at = row % turn.rows * pairs;
  for (int64_t i = 0; i < pairs; ++i) {
    const float a = x[2 * i], b = x[2 * i + 1], cosine = turn.cos[at + i], sine = turn.sin[at + i] * direction;
    x[2 * i] = a * cosine - b * sine, x[2 * i + 1] = a * sine + b * cosine;
  }
}

// x, out [rows, dim], the last 2 * turn.pairs of out turned; weight [dim] or null; scale [rows]: 1 / rms, kept for the
// backward pass.
static void train_norm_forward(const float* x, const float* weight, float* out, float* scale, int64_t dim, float eps,
                               const Turn& turn, int64_t from, int64_t to) {
  for (int64_t row = from; row < to; ++row) {
    const float* in = x + row * dim;
    const float r = scale[row] = 1.0f / std::sqrt(dot(in, in, dim) / float(dim) + eps);
    if (weight == nullptr) map(out + row * dim, in, dim, [&](Vec v, int64_t) { return v * r; });
    else map(out + row * dim, in, dim, [&](Vec v, int64_t i) { return v * r * load_at(weight, i, dim); });
    if (turn.pairs > 0) turn_row(out + (row + 1) * dim - 2 * turn.pairs, turn, row, 1.0f);
  }
}

// grad_weight [dim] is added to (unused without a weight).
static void train_norm_backward(const float* x, const float* weight, const float* scale, const float* grad,
                                float* grad_x, int64_t dim, const Turn& turn, float* grad_weight, int64_t from,
                                int64_t to) {
  for (int64_t row = from; row < to; ++row) {
    const float *in = x + row * dim, *g = grad + row * dim;
    if (turn.pairs > 0) {
      float* turned = training_workspace(dim);
      std::memcpy(turned, g, sizeof(float) * dim);
      turn_row(turned + dim - 2 * turn.pairs, turn, row, -1.0f);
      g = turned;
    }
    const float r = scale[row];
    float mean;
    if (weight == nullptr) {
      mean = dot(g, in, dim) / float(dim) * r * r;
      map(grad_x + row * dim, g, dim, [&](Vec v, int64_t i) { return (v - load_at(in, i, dim) * mean) * r; });
      continue;
    }
    Vec sum = zero();
    map(grad_weight, grad_weight, dim, [&](Vec total, int64_t i) {
      const Vec product = load_at(g, i, dim) * load_at(in, i, dim);
      sum += product * load_at(weight, i, dim);
      return total + product * r;
    });
    mean = sum_lanes(sum) / float(dim) * r * r;
    map(grad_x + row * dim, g, dim, [&](Vec v, int64_t i) {
      return (v * load_at(weight, i, dim) - load_at(in, i, dim) * mean) * r;
    });
  }
}

INLINE Vec at_most(Vec v, float limit) { return select(v > limit, splat(limit), v); }
INLINE Vec within(Vec v, float limit) { return select(v < -limit, splat(-limit), at_most(v, limit)); }

// out = silu(min(gate, limit)) * clamp(up, -limit, limit) * weight. Rows of gate and up are `row` floats apart;
// out [rows, dim]; weights [rows] or null.
static void train_swiglu_forward(const float* gate, const float* up, int64_t row, const float* weights, float limit,
                                 float* out, int64_t dim, int64_t from, int64_t to) {
  for (int64_t t = from; t < to; ++t) {
    const float weight = weights == nullptr ? 1.0f : weights[t];
    const float* u = up + t * row;
    map(out + t * dim, gate + t * row, dim, [&](Vec v, int64_t i) {
      const Vec g = at_most(v, limit);
      return g * sigmoid(g) * within(load_at(u, i, dim), limit) * weight;
    });
  }
}

// grad [rows, dim] is the gradient of out. Makes those of gate and up (rows `grad_row` apart) and, where wanted, the
// forward value once more in `hidden` [rows, dim] and the weights' gradient [rows].
static void train_swiglu_backward(const float* gate, const float* up, int64_t row, const float* weights, float limit,
                                  const float* grad, float* grad_gate, float* grad_up, int64_t grad_row,
                                  float* hidden, float* grad_weights, int64_t dim, int64_t from, int64_t to) {
  for (int64_t t = from; t < to; ++t) {
    const float weight = weights == nullptr ? 1.0f : weights[t];
    const float *gates = gate + t * row, *ups = up + t * row, *g = grad + t * dim;
    float* to_up = grad_up + t * grad_row;
    Vec sum = zero();
    map(grad_gate + t * grad_row, gates, dim, [&](Vec raw_gate, int64_t i) {
      const Vec clipped = at_most(raw_gate, limit), raw_up = load_at(ups, i, dim), inner = within(raw_up, limit);
      const Vec s = sigmoid(clipped), silu = clipped * s, slope = load_at(g, i, dim) * weight;
      const int part = dim - i < kLanes ? int(dim - i) : kLanes;
      const Vec of_up = select((raw_up <= limit) & (raw_up >= -limit), slope * silu, zero());
      store_some(to_up + i, of_up, part);
      const Vec value = silu * inner;
      sum += value * load_at(g, i, dim);
      if (hidden != nullptr) store_some(hidden + t * dim + i, value * weight, part);
      return select(raw_gate <= limit, slope * inner * (s + silu * (1.0f - s)), zero());
    });
    if (grad_weights != nullptr) grad_weights[t] = sum_lanes(sum);
  }
}
