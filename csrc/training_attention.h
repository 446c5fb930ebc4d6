// Training's attention. A block is a few queries with all their heads; its scores fill one small buffer and never
// leave the cache; the backward pass makes them again from the kept log-sums. Head norm and both rotations happen
// while queries, outputs and gradients are copied in and out. Included in each instruction set's namespace.

constexpr int kTileRows = 6;
constexpr int kTileVecs = VECTOR_BYTES == 64 ? 4 : 2;

// C [M, N vectors] (+)= A [M, depth] B [depth, N vectors], the tile in registers.
template <int M, int N>
INLINE void tile(const float* a, int64_t a_row, int64_t a_step, const float* b, int64_t b_row, float* c,
                 int64_t c_row, int64_t depth, bool add) {
  Vec sum[M][N];
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) sum[m][n] = add ? load(c + m * c_row + n * kLanes) : zero();
  for (int64_t k = 0; k < depth; ++k) {
    Vec right[N];
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) right[n] = load(b + k * b_row + n * kLanes);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const Vec left = splat(a[m * a_row + k * a_step]);
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) sum[m][n] += left * right[n];
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) store(c + m * c_row + n * kLanes, sum[m][n]);
}

template <int N>
static void product_panel(const float* a, int64_t a_row, int64_t a_step, const float* b, int64_t b_row, float* c,
                          int64_t c_row, int64_t rows, int64_t depth, bool add) {
  int64_t i = 0;
  for (; i + kTileRows <= rows; i += kTileRows)
    tile<kTileRows, N>(a + i * a_row, a_row, a_step, b, b_row, c + i * c_row, c_row, depth, add);
  a += i * a_row, c += i * c_row;
  switch (rows - i) {
    case 1: return tile<1, N>(a, a_row, a_step, b, b_row, c, c_row, depth, add);
    case 2: return tile<2, N>(a, a_row, a_step, b, b_row, c, c_row, depth, add);
    case 3: return tile<3, N>(a, a_row, a_step, b, b_row, c, c_row, depth, add);
    case 4: return tile<4, N>(a, a_row, a_step, b, b_row, c, c_row, depth, add);
    case 5: return tile<5, N>(a, a_row, a_step, b, b_row, c, c_row, depth, add);
  }
}

// C [rows, columns up to a whole vector] (+)= A [rows, depth] B [depth, columns]; A(i, k) at a[i * a_row + k * a_step].
static void product(const float* a, int64_t a_row, int64_t a_step, const float* b, int64_t b_row, float* c,
                    int64_t c_row, int64_t rows, int64_t columns, int64_t depth, bool add) {
  int64_t left = (columns + kLanes - 1) / kLanes;
  for (; left >= kTileVecs; left -= kTileVecs, b += kTileVecs * kLanes, c += kTileVecs * kLanes)
    product_panel<kTileVecs>(a, a_row, a_step, b, b_row, c, c_row, rows, depth, add);
  switch (left) {
    case 1: return product_panel<1>(a, a_row, a_step, b, b_row, c, c_row, rows, depth, add);
    case 2: return product_panel<2>(a, a_row, a_step, b, b_row, c, c_row, rows, depth, add);
    case 3: return product_panel<3>(a, a_row, a_step, b, b_row, c, c_row, rows, depth, add);
  }
}

// x [n], pairs as complex numbers, times the turn: c = (cos, cos) and s = (-sin, sin) of each pair, whole lines.
INLINE void turn(float* x, const float* c, const float* s, int64_t n) {
  map(x, x, n, [&](Vec v, int64_t i) { return v * load(c + i) + swap_pairs(v) * load(s + i); });
}
INLINE void turn_back(float* x, const float* c, const float* s, int64_t n) {
  map(x, x, n, [&](Vec v, int64_t i) { return v * load(c + i) - swap_pairs(v) * load(s + i); });
}
INLINE float head_scale(const float* x, int64_t n, float eps) { return 1.0f / std::sqrt(dot(x, x, n) / n + eps); }
INLINE float max_lanes(Vec v) {
  float top = v[0];
  for (int i = 1; i < kLanes; ++i) top = v[i] > top ? v[i] : top;
  return top;
}
INLINE int64_t whole_vectors(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

// The blocks of a range of tokens, and the buffers they share.
struct AttentionBlocks {
  const AttentionTraining& a;
  const AttentionTiling tiling;
  const int64_t heads, dim, padded;
  const float scale;
  float *near_keys, *far_keys, *near_turned, *far_turned;  // keys as rows, and transposed
  float *near_grads, *far_grads;
  float *q, *grad, *made, *scores, *slopes, *c, *s;
  float *per_row;
  // The chunk at hand: sequence, first window key, window keys, entries.
  int64_t sequence = 0, low = 0, near_count = 0, far_count = 0;
  // The block at hand: tokens [begin, end), first window key, counts of keys, where entries' scores begin.
  int64_t begin = 0, end = 0, rows = 0, first = 0, near = 0, far = 0, far_at = 0;

  AttentionBlocks(const AttentionTraining& call, float* workspace)
      : a(call), tiling(call), heads(call.heads), dim(call.dim), padded(tiling.padded_dim),
        scale(1.0f / std::sqrt(float(call.dim))) {
    const int64_t most = tiling.tokens * heads;
    auto take = [&](int64_t floats) {
      float* part = workspace;
      workspace += whole_lines(floats);
      return part;
    };
    near_keys = take(tiling.near * padded), far_keys = take(a.entry_count * padded);
    near_grads = take(tiling.near * padded), far_grads = take(a.entry_count * padded);
    near_turned = take(dim * tiling.near_width), far_turned = take(dim * tiling.far_width);
    q = take(most * padded), grad = take(most * padded), made = take(most * padded);
    scores = take(most * tiling.score_width), slopes = take(most * tiling.score_width);
    per_row = take(most);
    c = take(tiling.tokens * whole_lines(a.rope)), s = take(tiling.tokens * whole_lines(a.rope));
  }

  void copy_keys(const float* from, int64_t count, float* keys, float* turned, int64_t width) {
    for (int64_t j = 0; j < count; ++j) {
      for (int64_t k = 0; k < dim; ++k) keys[j * padded + k] = turned[k * width + j] = from[j * dim + k];
      for (int64_t k = dim; k < padded; ++k) keys[j * padded + k] = 0.0f;
    }
    for (int64_t k = 0; k < dim; ++k)
      for (int64_t j = count; j < count + kLanes; ++j) turned[k * width + j] = 0.0f;
  }

  // Runs f for each block of tokens [from, to) of all sequences; after(…) once a chunk.
  template <class F, class G>
  void each(int64_t from, int64_t to, F f, G after) {
    while (from < to) {
      sequence = from / a.steps;
      const int64_t start = from % a.steps;
      int64_t stop = start + tiling.chunk;
      if (stop > a.steps) stop = a.steps;
      if (stop > start + to - from) stop = start + to - from;
      low = start < tiling.window ? 0 : start - tiling.window + 1;
      near_count = stop - low;
      far_count = visible(stop);
      copy_keys(a.kv + (sequence * a.steps + low) * dim, near_count, near_keys, near_turned, tiling.near_width);
      if (far_count)
        copy_keys(a.entries + sequence * a.entry_count * dim, far_count, far_keys, far_turned, tiling.far_width);
      for (begin = start; begin < stop; begin = end) {
        end = begin + tiling.tokens < stop ? begin + tiling.tokens : stop;
        rows = (end - begin) * heads;
        first = begin < tiling.window ? 0 : begin - tiling.window + 1;
        near = end - first;
        far = visible(end);
        far_at = whole_vectors(near);
        angles();
        f();
      }
      after();
      from += stop - start;
    }
  }
  int64_t visible(int64_t tokens) const {
    if (a.ratio == 0) return 0;
    return tokens / a.ratio < a.entry_count ? tokens / a.ratio : a.entry_count;
  }
  int64_t token() const { return sequence * a.steps + begin; }
  int64_t used() const { return far_at + whole_vectors(far); }

  void angles() {
    const int64_t width = whole_lines(a.rope), pairs = a.rope / 2;
    for (int64_t t = 0; t < end - begin; ++t)
      for (int64_t i = 0; i < pairs; ++i) {
        const float cosine = a.cos[(token() + t) * pairs + i], sine = a.sin[(token() + t) * pairs + i];
        c[t * width + 2 * i] = c[t * width + 2 * i + 1] = cosine;
        s[t * width + 2 * i] = -sine, s[t * width + 2 * i + 1] = sine;
      }
  }
  // Queries normed, scaled and rotated into q.
  void copy_queries() {
    for (int64_t row = 0; row < rows; ++row) {
      const float* x = a.q + (token() * heads + row) * dim;
      const float factor = head_scale(x, dim, float(a.eps)) * scale;
      copy_row(x, q + row * padded, factor, row);
    }
  }
  void copy_row(const float* x, float* to, float factor, int64_t row) {
    map(to, x, dim, [&](Vec v, int64_t) { return v * factor; });
    const int64_t at = row / heads * whole_lines(a.rope);
    turn(to + dim - a.rope, c + at, s + at, a.rope);
    for (int64_t k = dim; k < padded; ++k) to[k] = 0.0f;
  }
  // x (queries or gradients of outputs) times every key, into `to`.
  void multiply_keys(const float* x, float* to) {
    const int64_t width = tiling.score_width;
    product(x, padded, 1, near_turned + (first - low), tiling.near_width, to, width, rows, near, dim, false);
    if (far) product(x, padded, 1, far_turned, tiling.far_width, to + far_at, width, rows, far, dim, false);
  }
  // -inf where a query doesn't see a key, padding included.
  void hide() {
    const float none = -__builtin_inff();
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t t = begin + row / heads;
      float* x = scores + row * tiling.score_width;
      const int64_t oldest = (t < tiling.window ? 0 : t - tiling.window + 1) - first;
      for (int64_t j = 0; j < oldest; ++j) x[j] = none;
      for (int64_t j = t + 1 - first; j < far_at; ++j) x[j] = none;
      for (int64_t j = far_at + visible(t + 1); j < used(); ++j) x[j] = none;
    }
  }
  // weights [rows, keys] times the keys, into `made`.
  void sum_keys(const float* weights) {
    const int64_t width = tiling.score_width;
    product(weights, width, 1, near_keys + (first - low) * padded, padded, made, padded, rows, padded, near, false);
    if (far) product(weights + far_at, width, 1, far_keys, padded, made, padded, rows, padded, far, true);
  }
  // Adds weights^T x to the keys' gradients.
  void add_key_grads(const float* weights, const float* x) {
    const int64_t width = tiling.score_width;
    product(weights, 1, width, x, padded, near_grads + (first - low) * padded, padded, near, padded, rows, true);
    if (far) product(weights + far_at, 1, width, x, padded, far_grads, padded, far, padded, rows, true);
  }
};

static void train_attention_forward(const AttentionTraining& a, int64_t from, int64_t to, float* workspace) {
  AttentionBlocks b(a, workspace);
  b.each(from, to, [&] {
    b.copy_queries();
    b.multiply_keys(b.q, b.scores);
    b.hide();
    float* inverse = b.per_row;
    for (int64_t row = 0; row < b.rows; ++row) {
      float* x = b.scores + row * b.tiling.score_width;
      const float sink = a.sink[row % b.heads];
      Vec most = splat(sink), total = zero();
      for (int64_t j = 0; j < b.used(); j += kLanes) {
        const Vec v = load(x + j);
        most = select(v > most, v, most);
      }
      const float top = max_lanes(most);
      for (int64_t j = 0; j < b.used(); j += kLanes) {
        const Vec v = exp_vec(load(x + j) - top);
        total += v;
        store(x + j, v);
      }
      const float sum = sum_lanes(total) + std::exp(sink - top);
      inverse[row] = 1.0f / sum;
      a.log_sum[b.token() * b.heads + row] = top + std::log(sum);
    }
    b.sum_keys(b.scores);
    for (int64_t row = 0; row < b.rows; ++row) {
      float* to = a.out + (b.token() * b.heads + row) * b.dim;
      const float factor = inverse[row];
      map(to, b.made + row * b.padded, b.dim, [&](Vec v, int64_t) { return v * factor; });
      const int64_t at = row / b.heads * whole_lines(a.rope);
      turn_back(to + b.dim - a.rope, b.c + at, b.s + at, a.rope);
    }
  }, [] {});
}

// grad_kv [B, S, d], grad_entries [B, N, d] and grad_sink [H] are added to: one set for each range of tokens.
static void train_attention_backward(const AttentionTraining& a, float* grad_kv, float* grad_entries,
                                     float* grad_sink, int64_t from, int64_t to, float* workspace) {
  AttentionBlocks b(a, workspace);
  std::memset(b.near_grads, 0, sizeof(float) * b.tiling.near * b.padded);
  std::memset(b.far_grads, 0, sizeof(float) * a.entry_count * b.padded);
  b.each(from, to, [&] {
    b.copy_queries();
    b.multiply_keys(b.q, b.scores);
    b.hide();
    float* inner = b.per_row;  // <gradient, output>, which is also the mean slope under the softmax
    const int64_t first_row = b.token() * b.heads;
    for (int64_t row = 0; row < b.rows; ++row) {
      const float* g = a.grad + (first_row + row) * b.dim;
      inner[row] = dot(g, a.out + (first_row + row) * b.dim, b.dim);
      b.copy_row(g, b.grad + row * b.padded, 1.0f, row);
    }
    b.multiply_keys(b.grad, b.slopes);
    for (int64_t row = 0; row < b.rows; ++row) {
      float* x = b.scores + row * b.tiling.score_width;
      float* slope = b.slopes + row * b.tiling.score_width;
      const float log_sum = a.log_sum[first_row + row], mean = inner[row];
      for (int64_t j = 0; j < b.used(); j += kLanes) {
        const Vec p = exp_vec(load(x + j) - log_sum);
        store(x + j, p);
        store(slope + j, p * (load(slope + j) - mean));
      }
      grad_sink[row % b.heads] -= std::exp(a.sink[row % b.heads] - log_sum) * mean;
    }
    b.add_key_grads(b.scores, b.grad);
    b.add_key_grads(b.slopes, b.q);
    b.sum_keys(b.slopes);
    for (int64_t row = 0; row < b.rows; ++row) {
      float* g = b.made + row * b.padded;
      const int64_t at = row / b.heads * whole_lines(a.rope);
      turn_back(g + b.dim - a.rope, b.c + at, b.s + at, a.rope);
      const float* x = a.q + (first_row + row) * b.dim;
      const float r = head_scale(x, b.dim, float(a.eps));
      const float through_norm = dot(g, x, b.dim) / b.dim * r * r, factor = r * b.scale;
      map(a.grad_q + (first_row + row) * b.dim, g, b.dim,
          [&](Vec v, int64_t i) { return (v - load_at(x, i, b.dim) * through_norm) * factor; });
    }
  }, [&] {
    auto hand_over = [&](float* sums, int64_t count, float* grads) {
      for (int64_t j = 0; j < count; ++j) {
        for (int64_t k = 0; k < b.dim; ++k) grads[j * b.dim + k] += sums[j * b.padded + k];
        std::memset(sums + j * b.padded, 0, sizeof(float) * b.padded);
      }
    };
    hand_over(b.near_grads, b.near_count, grad_kv + (b.sequence * a.steps + b.low) * b.dim);
    hand_over(b.far_grads, b.far_count, grad_entries + b.sequence * a.entry_count * b.dim);
  });
}
