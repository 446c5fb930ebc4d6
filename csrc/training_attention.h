// Training's attention. A block is a few queries with all their heads; its scores fill one small buffer and never
// leave the cache; the backward pass makes them again from the kept log-sums. Head norm and both rotations happen
// while queries, outputs and gradients are copied in and out. Included in each instruction set's namespace.

constexpr int kTileRows = 6;
constexpr int kTileVecs = VECTOR_BYTES == 64 ? 4 : 2;
constexpr int64_t kPanelColumns = kTileVecs * kLanes;
constexpr float kLog2E = 1.44269504f, kLn2 = 0.693147181f;  // weights are made as powers of two

// Two products into one sum, of the same shape: the second pair is null where there is one only. With each step goes a
// line of memory that is needed soon, fetched to L2: `ahead` moves on by ahead_step.
struct Factors {
  const float *a, *b, *a2, *b2;
  int64_t a_row, a_step, b_row;
  const float* ahead;
  int64_t ahead_step;
  void move(int64_t rows, int64_t columns) {
    a += rows * a_row, b += columns;
    if (a2 != nullptr) a2 += rows * a_row, b2 += columns;
  }
};

// C [M, N vectors] (+)= A [M, depth] B [depth, N vectors], the tile in registers.
template <int M, int N>
INLINE void tile(Factors& f, float* c, int64_t c_row, int64_t depth, bool add) {
  Vec sum[M][N];
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 16
    for (int n = 0; n < N; ++n) sum[m][n] = add ? load(c + m * c_row + n * kLanes) : zero();
  const float* ahead = f.ahead;
  auto steps = [&](const float* a, const float* b) {
    for (int64_t k = 0; k < depth; ++k, ahead += f.ahead_step) {
      Vec right[N];
      __builtin_prefetch(ahead, 0, 2);
#pragma GCC unroll 16
      for (int n = 0; n < N; ++n) right[n] = load(b + k * f.b_row + n * kLanes);
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) {
        const Vec left = splat(a[m * f.a_row + k * f.a_step]);
#pragma GCC unroll 16
        for (int n = 0; n < N; ++n) sum[m][n] += left * right[n];
      }
    }
  };
  steps(f.a, f.b);
  if (f.a2 != nullptr) steps(f.a2, f.b2);
  f.ahead = ahead;
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 16
    for (int n = 0; n < N; ++n) store(c + m * c_row + n * kLanes, sum[m][n]);
}

template <int N>
static const float* product_panel(Factors f, float* c, int64_t c_row, int64_t rows, int64_t depth, bool add) {
  constexpr int most = N * 2 > kTileVecs ? kTileRows : 2 * kTileRows;  // a narrow panel leaves registers for more rows
  for (int64_t tiles = (rows + most - 1) / most; tiles > 0; --tiles) {
    const int64_t count = (rows + tiles - 1) / tiles;
    switch (count) {
#define UPWELL_ROWS(r)                                                 \
  case r:                                                              \
    if constexpr (r <= most) tile<r, N>(f, c, c_row, depth, add);      \
    break;
      UPWELL_ROWS(1) UPWELL_ROWS(2) UPWELL_ROWS(3) UPWELL_ROWS(4) UPWELL_ROWS(5) UPWELL_ROWS(6)
      UPWELL_ROWS(7) UPWELL_ROWS(8) UPWELL_ROWS(9) UPWELL_ROWS(10) UPWELL_ROWS(11) UPWELL_ROWS(12)
#undef UPWELL_ROWS
    }
    f.move(count, 0), c += count * c_row, rows -= count;
  }
  return f.ahead;
}

// C [rows, columns up to a whole vector] (+)= A [rows, depth] B [depth, columns]; A(i, k) at a[i * a_row + k * a_step].
static void product(Factors f, float* c, int64_t c_row, int64_t rows, int64_t columns, int64_t depth, bool add) {
  int64_t left = (columns + kLanes - 1) / kLanes;
  for (; left >= kTileVecs; left -= kTileVecs, f.move(0, kPanelColumns), c += kPanelColumns)
    f.ahead = product_panel<kTileVecs>(f, c, c_row, rows, depth, add);
  switch (left) {
    case 1: product_panel<1>(f, c, c_row, rows, depth, add); break;
    case 2: product_panel<2>(f, c, c_row, rows, depth, add); break;
    case 3: product_panel<3>(f, c, c_row, rows, depth, add); break;
  }
}
static void product(const float* a, int64_t a_row, int64_t a_step, const float* b, int64_t b_row, float* c,
                    int64_t c_row, int64_t rows, int64_t columns, int64_t depth, bool add) {
  product({a, b, nullptr, nullptr, a_row, a_step, b_row, b, 0}, c, c_row, rows, columns, depth, add);
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
#if VECTOR_BYTES == 64
  v = larger(v, __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7));
  v = larger(v, __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11));
  v = larger(v, __builtin_shufflevector(v, v, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13));
#elif VECTOR_BYTES == 32
  v = larger(v, __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3));
  v = larger(v, __builtin_shufflevector(v, v, 2, 3, 0, 1, 6, 7, 4, 5));
#else
  v = larger(v, __builtin_shufflevector(v, v, 2, 3, 0, 1));
#endif
  return larger(v, swap_pairs(v))[0];
}
// out[i] = <a_i, b_i> of rows a and b, while the rows after them, the next block's, are fetched.
static void row_dots(const float* a, int64_t a_row, const float* b, int64_t b_row, int64_t dim, int64_t rows,
                     float* out) {
  int64_t i = 0;
  for (; i + 4 <= rows && dim % kLanes == 0; i += 4, a += 4 * a_row, b += 4 * b_row) {
    Vec sum[4] = {};
    for (int64_t k = 0; k < dim; k += kLanes)
#pragma GCC unroll 4
      for (int n = 0; n < 4; ++n) {
        __builtin_prefetch(a + (rows + n) * a_row + k, 0, 2);
        __builtin_prefetch(b + (rows + n) * b_row + k, 0, 2);
        sum[n] += load(a + n * a_row + k) * load(b + n * b_row + k);
      }
    sum_four(sum[0], sum[1], sum[2], sum[3], out + i);
  }
  for (; i < rows; ++i, a += a_row, b += b_row) out[i] = dot(a, b, dim);
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
  float *norms, *sums, *sinks;
  // The chunk at hand: sequence, first window key, window keys, entries.
  int64_t sequence = 0, low = 0, near_count = 0, far_count = 0;
  // The block at hand: tokens [begin, end), first window key, counts of keys, where entries' scores begin.
  int64_t begin = 0, end = 0, rows = 0, first = 0, near = 0, far = 0, far_at = 0;

  AttentionBlocks(const AttentionTraining& call, float* workspace)
      : a(call), tiling(call), heads(call.heads), dim(call.dim), padded(tiling.padded_dim),
        scale(kLog2E / std::sqrt(float(call.dim))) {
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
    norms = take(most), sums = take(most), sinks = take(most);
    c = take(tiling.tokens * whole_lines(a.rope)), s = take(tiling.tokens * whole_lines(a.rope));
    for (int64_t row = 0; row < most; ++row) sinks[row] = a.sink[row % heads] * kLog2E;
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
        first = oldest(begin);
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
  int64_t oldest(int64_t t) const { return t < tiling.window ? 0 : t - tiling.window + 1; }
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
    const float* x = a.q + token() * heads * dim;
    row_dots(x, dim, x, dim, dim, rows, norms);
    map(norms, norms, rows, [&](Vec v, int64_t) { return 1.0f / square_root(v / float(dim) + float(a.eps)); });
    for (int64_t row = 0; row < rows; ++row) copy_row(x + row * dim, q + row * padded, norms[row] * scale, row);
  }
  void copy_row(const float* x, float* to, float factor, int64_t row) {
    map(to, x, dim, [&](Vec v, int64_t) { return v * factor; });
    const int64_t at = row / heads * whole_lines(a.rope);
    turn(to + dim - a.rope, c + at, s + at, a.rope);
    for (int64_t k = dim; k < padded; ++k) to[k] = 0.0f;
  }
  // x (queries or gradients of outputs) times every key that a token sees, into `to`.
  void multiply_keys(const float* x, float* to) {
    const int64_t width = tiling.score_width;
    for (int64_t j = 0; j < near; j += kPanelColumns)  // a panel of keys stays in L1 for all tokens
      for (int64_t t = begin; t < end; ++t) {
        const int64_t row = (t - begin) * heads, key = oldest(t), left = t + 1 - key - j;
        if (left > 0)
          product(x + row * padded, padded, 1, near_turned + (key - low) + j, tiling.near_width,
                  to + row * width + (key - first) + j, width, heads, left < kPanelColumns ? left : kPanelColumns, dim,
                  false);
      }
    if (far) product(x, padded, 1, far_turned, tiling.far_width, to + far_at, width, rows, far, dim, false);
  }
  // -inf where a query doesn't see a key, padding included.
  void hide() {
    const float none = -__builtin_inff();
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t t = begin + row / heads;
      float* x = scores + row * tiling.score_width;
      for (int64_t j = 0; j < oldest(t) - first; ++j) x[j] = none;
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
  // Adds scores^T grad + slopes^T q to the keys' gradients.
  void add_key_grads() {
    const int64_t width = tiling.score_width;
    product({scores, grad, slopes, q, 1, width, padded, q, 0}, near_grads + (first - low) * padded, padded, near,
            padded, rows, true);
    if (far)
      product({scores + far_at, grad, slopes + far_at, q, 1, width, padded, q, 0}, far_grads, padded, far, padded, rows,
              true);
  }
  // Scores become 2^(score - highest); `sums` are theirs and the sink's; their logarithms are handed out.
  void soften() {
    float* log_sums = a.log_sum + token() * heads;
    for (int64_t row = 0; row < rows; ++row) {
      float* x = scores + row * tiling.score_width;
      Vec most = splat(sinks[row]), total = zero();
      const int64_t end = used();
      for (int64_t j = 0; j < end; j += kLanes) most = larger(load(x + j), most);
      const float top = max_lanes(most);
      for (int64_t j = 0; j < end; j += kLanes) {
        const Vec v = exp2_below(load(x + j) - top);
        total += v;
        store(x + j, v);
      }
      sums[row] = sum_lanes(total);
      log_sums[row] = top;
    }
    map(sums, sums, rows, [&](Vec sum, int64_t i) {
      return sum + exp2_below(load_at(sinks, i, rows) - load_at(log_sums, i, rows));
    });
    for (int64_t row = 0; row < rows; ++row) log_sums[row] += std::log2(sums[row]);
  }
  // Scores become weights, and `slopes` (gradients of weights) those of scores; the sink's gradients are added.
  void harden(float* grad_sink) {
    const float* log_sums = a.log_sum + token() * heads;
    for (int64_t row = 0; row < rows; ++row) {
      float *x = scores + row * tiling.score_width, *slope = slopes + row * tiling.score_width;
      const float log_sum = log_sums[row], mean = sums[row] * kLn2;
      for (int64_t j = 0, end = used(); j < end; j += kLanes) {
        const Vec p = exp2_below(load(x + j) - log_sum);
        store(x + j, p);
        store(slope + j, p * (load(slope + j) * kLn2 - mean));
      }
    }
    map(sums, sums, rows, [&](Vec mean, int64_t i) {
      return mean * exp2_below(load_at(sinks, i, rows) - load_at(log_sums, i, rows));
    });
    for (int64_t row = 0; row < rows; ++row) grad_sink[row % heads] -= sums[row];
  }
  void put_outputs() {
    for (int64_t row = 0; row < rows; ++row) {
      float* to = a.out + (token() * heads + row) * dim;
      const float factor = 1.0f / sums[row];
      map(to, made + row * padded, dim, [&](Vec v, int64_t k) {
        __builtin_prefetch(to + rows * dim + k, 1, 2);  // the next block's place
        return v * factor;
      });
      const int64_t at = row / heads * whole_lines(a.rope);
      turn_back(to + dim - a.rope, c + at, s + at, a.rope);
    }
  }
  // Gradients of outputs, turned; `sums` becomes <gradient, output>, which is also the mean slope under the softmax.
  void copy_gradients() {
    const float* g = a.grad + token() * heads * dim;
    row_dots(g, dim, a.out + token() * heads * dim, dim, dim, rows, sums);
    for (int64_t row = 0; row < rows; ++row) copy_row(g + row * dim, grad + row * padded, 1.0f, row);
  }
  // From gradients of normed and turned queries to raw ones'.
  void put_query_grads() {
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t at = row / heads * whole_lines(a.rope);
      turn_back(made + row * padded + dim - a.rope, c + at, s + at, a.rope);
    }
    const float* x = a.q + token() * heads * dim;
    row_dots(made, padded, x, dim, dim, rows, sums);
    for (int64_t row = 0; row < rows; ++row) {
      const float r = norms[row], through_norm = sums[row] / dim * r * r, factor = r * scale;
      const float *g = made + row * padded, *in = x + row * dim;
      float* to = a.grad_q + (token() * heads + row) * dim;
      map(to, g, dim, [&](Vec v, int64_t i) {
        __builtin_prefetch(to + rows * dim + i, 1, 2);
        return (v - load_at(in, i, dim) * through_norm) * factor;
      });
    }
  }
};

// f(span) for each span once in the team, the later ones of a sequence, which see more entries, first: `span` is its
// number among all, and its tokens are [from, to) of all sequences'.
template <class F>
static void each_span(Worker& worker, const AttentionTraining& a, F f) {
  const int64_t spans = a.spans();
  worker.units(a.batch * spans, [&](int64_t unit) {
    const int64_t sequence = unit % a.batch, number = spans - 1 - unit / a.batch, begin = number * a.span;
    const int64_t from = sequence * a.steps + begin, left = a.steps - begin;
    f(sequence * spans + number, from, from + (left < a.span ? left : a.span));
  });
}

static void train_attention_forward(Worker& worker, void* argument) {
  const auto& a = *static_cast<const AttentionTraining*>(argument);
  AttentionBlocks b(a, training_workspace(AttentionTiling(a).workspace_floats(a)));
  each_span(worker, a, [&](int64_t, int64_t from, int64_t to) {
    b.each(from, to, [&] {
      b.copy_queries();
      b.multiply_keys(b.q, b.scores);
      b.hide();
      b.soften();
      b.sum_keys(b.scores);
      b.put_outputs();
    }, [] {});
  });
}

// A span writes the gradients of its own keys; those of keys before it, of entries and of the sink go to its part of
// `shared`, and are added up when all spans are through.
static void train_attention_backward(Worker& worker, void* argument) {
  const auto& a = *static_cast<const AttentionTraining*>(argument);
  const int64_t dim = a.dim, before = (a.window - 1) * dim, entries = a.entry_count * dim, spans = a.spans();
  AttentionBlocks b(a, training_workspace(AttentionTiling(a).workspace_floats(a)));
  each_span(worker, a, [&](int64_t span, int64_t from, int64_t to) {
    float *grad_before = a.shared + span * a.shared_floats(), *grad_entries = grad_before + before;
    float* grad_sink = grad_entries + entries;
    std::memset(grad_entries, 0, sizeof(float) * (entries + a.heads));
    std::memset(b.near_grads, 0, sizeof(float) * b.tiling.near * b.padded);
    std::memset(b.far_grads, 0, sizeof(float) * a.entry_count * b.padded);
    int64_t known = from;  // tokens before it have gradients already
    b.each(from, to, [&] {
      b.copy_queries();
      b.multiply_keys(b.q, b.scores);
      b.hide();
      b.copy_gradients();
      b.multiply_keys(b.grad, b.slopes);
      b.harden(grad_sink);
      b.add_key_grads();
      b.sum_keys(b.slopes);
      b.put_query_grads();
    }, [&] {
      const int64_t low = b.sequence * a.steps + b.low;
      for (int64_t j = 0; j < b.near_count; ++j) {
        float *row = b.near_grads + j * b.padded, *to_kv = a.grad_kv + (low + j) * dim;
        if (low + j < from) copy_floats(row, dim, grad_before + (low + j - from + a.window - 1) * dim);
        else if (low + j < known) add_floats(row, dim, to_kv);
        else copy_floats(row, dim, to_kv);
        std::memset(row, 0, sizeof(float) * b.padded);
      }
      known = low + b.near_count;
      for (int64_t j = 0; j < b.far_count; ++j) {
        add_floats(b.far_grads + j * b.padded, dim, grad_entries + j * dim);
        std::memset(b.far_grads + j * b.padded, 0, sizeof(float) * b.padded);
      }
    });
  });
  worker.barrier();
  worker.units(a.batch * spans + 1, [&](int64_t unit) {
    const float* own = a.shared + unit * a.shared_floats();
    if (unit == a.batch * spans) {
      std::memset(a.grad_sink, 0, sizeof(float) * a.heads);
      for (own = a.shared; unit > 0; --unit, own += a.shared_floats())
        add_floats(own + before + entries, a.heads, a.grad_sink);
      return;
    }
    const int64_t number = unit % spans, sequence = unit / spans, begin = number * a.span;
    const int64_t count = a.window - 1 < begin ? a.window - 1 : begin;
    add_floats(own + before - count * dim, count * dim, a.grad_kv + (sequence * a.steps + begin - count) * dim);
    if (number > 0) return;
    float* grad_entries = a.grad_entries + sequence * entries;
    copy_floats(own + before, entries, grad_entries);
    for (int64_t i = 1; i < spans; ++i) add_floats(own + i * a.shared_floats() + before, entries, grad_entries);
  });
}
