// Attention of one query over rows that lie anywhere: the window's ring, this call's latents, blocks of entries.
// Lanes are heads, so softmax needs no sum across lanes, and every row read serves kLanes heads.

// x [rope], pairs turned by their angles; turn [2 rope]: the cosines, each twice, then the sines, as -sin, sin.
INLINE void rotate(float* x, const float* turn, int64_t rope, float sign) {
  int64_t i = 0;
  for (; i + kLanes <= rope; i += kLanes) {
    const Vec v = load(x + i);
    store(x + i, v * load(turn + i) + swap_pairs(v) * load(turn + rope + i) * sign);
  }
  for (; i < rope; i += 2) {
    const float a = x[i], b = x[i + 1], c = turn[i], s = turn[rope + i + 1] * sign;
    x[i] = a * c - b * s;
    x[i + 1] = a * s + b * c;
  }
}

// Not inlined: its R pointers need the registers. Returns the larger of `best` and the scores.
template <int R>
static __attribute__((noinline)) Vec score_rows(const float* const* rows, const float* qt, int64_t dim, float* out, Vec best) {
  Vec acc[R];
  const float* r[R];
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i) acc[i] = zero(), r[i] = rows[i];
  for (int64_t k = 0; k < dim; ++k, qt += kLanes) {
    const Vec q = load(qt);
    for (int i = 0; i < R; ++i) acc[i] += splat(r[i][k]) * q;
  }
  for (int i = 0; i < R; ++i) {
    store(out + i * kLanes, acc[i]);
    best = select(acc[i] > best, acc[i], best);
  }
  return best;
}

template <int H, int V>
INLINE void weigh_rows(const float* const* rows, int64_t n, const float* probs, int64_t offset, int part, float* out,
                       int64_t ldo, bool add) {
  Vec acc[H][V] = {};
  for (int64_t j = 0; j < n; ++j) {
    const float* row = rows[j] + offset;
    Vec values[V];
    for (int v = 0; v < V; ++v) values[v] = part ? load_part(row + v * kLanes, part) : load(row + v * kLanes);
    for (int h = 0; h < H; ++h) {
      const Vec p = splat(probs[j * kLanes + h]);
      for (int v = 0; v < V; ++v) acc[h][v] += p * values[v];
    }
  }
  for (int h = 0; h < H; ++h)
    for (int v = 0; v < V; ++v) {
      float* o = out + h * ldo + v * kLanes;
      if (part) store_part(o, add ? acc[h][v] + load_part(o, part) : acc[h][v], part);
      else store(o, add ? acc[h][v] + load(o) : acc[h][v]);
    }
}

template <int H>
static void weigh(const float* const* rows, int64_t n, const float* probs, int64_t dim, float* out, bool add) {
  constexpr int V = kLanes == 8 ? 2 : 4;
  int64_t d = 0;
  for (; d + V * kLanes <= dim; d += V * kLanes) weigh_rows<H, V>(rows, n, probs, d, 0, out + d, dim, add);
  for (; d + kLanes <= dim; d += kLanes) weigh_rows<H, 1>(rows, n, probs, d, 0, out + d, dim, add);
  if (d < dim) weigh_rows<H, 1>(rows, n, probs, d, int(dim - d), out + d, dim, add);
}

// q [heads, dim] into qt [dim, kLanes]: normed, scaled by dim^-1/2, the last rope dims rotated. Missing heads are zero.
static void query_lanes(const float* q, int heads, int64_t dim, float eps, const float* turn, int64_t rope, float* qt) {
  Vec square{};
  for (int64_t k = 0; k < dim; k += kLanes) {
    Vec a[kLanes] = {};
    for (int h = 0; h < heads; ++h) a[h] = load_at(q + h * dim, k, dim);
    transpose(a);
    for (int i = 0; i < kLanes && k + i < dim; ++i) {
      store(qt + (k + i) * kLanes, a[i]);
      square += a[i] * a[i];
    }
  }
  float root[kLanes];
  store(root, square / float(dim) + eps);
  for (int i = 0; i < kLanes; ++i) root[i] = std::sqrt(root[i]);
  const Vec factor = (1.0f / std::sqrt(float(dim))) / load(root);
  for (int64_t k = 0; k < dim - rope; ++k) store(qt + k * kLanes, load(qt + k * kLanes) * factor);
  for (int64_t i = 0; i < rope; i += 2) {
    float* at = qt + (dim - rope + i) * kLanes;
    const Vec a = load(at) * factor, b = load(at + kLanes) * factor;
    const float c = turn[i], s = turn[rope + i + 1];
    store(at, a * c - b * s);
    store(at + kLanes, a * s + b * c);
  }
}

// Sums of one query's heads over part of its rows: out [heads, dim] of exp(score - best) row, with best and total.
struct Partial {
  Vec best, total;
};
constexpr int64_t kRowBlock = 64;  // rows that stay in L1 while all heads are summed over them

// qt from query_lanes; scores [n * kLanes]: scratch. `best` to begin with (the sink, or -inf).
static Partial attend_rows(const float* qt, int heads, int64_t dim, const float* const* rows, int64_t n, Vec best,
                           float* scores, float* out) {
  int64_t j = 0;
  for (; j + 8 <= n; j += 8) {
    for (int64_t i = j + 16; i < n && i < j + 24; ++i)  // rows lie anywhere: no hardware foresees them
      for (int64_t k = 0; k < dim; k += 16) __builtin_prefetch(rows[i] + k);
    best = score_rows<8>(rows + j, qt, dim, scores + j * kLanes, best);
  }
  for (; j < n; ++j) best = score_rows<1>(rows + j, qt, dim, scores + j * kLanes, best);
  Vec total{};
  for (j = 0; j < n; ++j) {
    const Vec p = exp_below(load(scores + j * kLanes) - best);
    total += p;
    store(scores + j * kLanes, p);
  }
  for (j = 0; j == 0 || j < n; j += kRowBlock) {
    const int64_t count = n - j < kRowBlock ? n - j : kRowBlock;
    int h = 0;
    for (; h + 4 <= heads; h += 4) weigh<4>(rows + j, count, scores + j * kLanes + h, dim, out + h * dim, j > 0);
    for (; h < heads; ++h) weigh<1>(rows + j, count, scores + j * kLanes + h, dim, out + h * dim, j > 0);
  }
  return {best, total};
}

// out [heads, dim] times factor, rotated back.
INLINE void finish_heads(float* out, int heads, int64_t dim, Vec factor, const float* turn, int64_t rope) {
  for (int h = 0; h < heads; ++h) {
    const float f = factor[h];
    map(out + h * dim, out + h * dim, dim, [&](Vec v, int64_t) { return v * f; });
    rotate(out + h * dim + dim - rope, turn, rope, -1.0f);
  }
}

// heads <= kLanes heads of one query q [heads, dim] over n rows -> out [heads, dim]. qt [dim * kLanes], scores: scratch.
static void attend_query(const float* q, int heads, int64_t dim, float eps, const float* turn, int64_t rope,
                         const float* sink, const float* const* rows, int64_t n, float* qt, float* scores, float* out) {
  query_lanes(q, heads, dim, eps, turn, rope, qt);
  const Vec sinks = load_part(sink, heads);
  const Partial sum = attend_rows(qt, heads, dim, rows, n, sinks, scores, out);
  finish_heads(out, heads, dim, 1.0f / (sum.total + exp_below(sinks - sum.best)), turn, rope);
}
