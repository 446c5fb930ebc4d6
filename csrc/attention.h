// Attention of one query over rows that lie anywhere: the window's ring, this call's latents, blocks of entries.
// Lanes are heads, so softmax needs no sum across lanes, and every row read serves kLanes heads.

INLINE void rotate(float* x, const float* cos, const float* sin, int64_t rope, float sign) {
  for (int64_t i = 0; i < rope / 2; ++i) {
    const float a = x[2 * i], b = x[2 * i + 1], s = sign * sin[i];
    x[2 * i] = a * cos[i] - b * s;
    x[2 * i + 1] = a * s + b * cos[i];
  }
}

template <int R>
INLINE void score_rows(const float* const* rows, const float* qt, int64_t dim, float scale, float* out, Vec& best) {
  Vec acc[R] = {};
  const float* r[R];
  for (int i = 0; i < R; ++i) r[i] = rows[i];
  for (int64_t k = 0; k < dim; ++k) {
    const Vec q = load(qt + k * kLanes);
    for (int i = 0; i < R; ++i) acc[i] += splat(r[i][k]) * q;
  }
  for (int i = 0; i < R; ++i) {
    const Vec s = acc[i] * scale;
    store(out + i * kLanes, s);
    best = select(s > best, s, best);
  }
}

template <int H, int V>
INLINE void weigh_rows(const float* const* rows, int64_t n, const float* probs, int64_t offset, int part, float* out,
                       int64_t ldo, const float* scale) {
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
      const Vec o = acc[h][v] * scale[h];
      if (part) store_part(out + h * ldo + v * kLanes, o, part);
      else store(out + h * ldo + v * kLanes, o);
    }
}

template <int H>
static void weigh(const float* const* rows, int64_t n, const float* probs, int64_t dim, float* out, const float* scale) {
  int64_t d = 0;
  for (; d + 4 * kLanes <= dim; d += 4 * kLanes) weigh_rows<H, 4>(rows, n, probs, d, 0, out + d, dim, scale);
  for (; d + kLanes <= dim; d += kLanes) weigh_rows<H, 1>(rows, n, probs, d, 0, out + d, dim, scale);
  if (d < dim) weigh_rows<H, 1>(rows, n, probs, d, int(dim - d), out + d, dim, scale);
}

// heads <= kLanes heads of one query: q [heads, dim] (normed and rotated here), out [heads, dim] (rotated back).
// qt [dim * kLanes], scores [n * kLanes], row [dim]: scratch.
static void attend_query(const float* q, int heads, int64_t dim, float eps, const float* cos, const float* sin,
                         int64_t rope, const float* sink, const float* const* rows, int64_t n, float* qt, float* scores,
                         float* row, float* out) {
  for (int64_t k = 0; k < dim * kLanes; ++k) qt[k] = 0.0f;
  for (int h = 0; h < heads; ++h) {
    rms_norm(row, q + h * dim, nullptr, dim, eps);
    rotate(row + dim - rope, cos, sin, rope, 1.0f);
    for (int64_t k = 0; k < dim; ++k) qt[k * kLanes + h] = row[k];
  }
  const Vec sinks = load_part(sink, heads);
  Vec best = sinks;
  const float scale = 1.0f / std::sqrt(float(dim));
  int64_t j = 0;
  for (; j + 8 <= n; j += 8) score_rows<8>(rows + j, qt, dim, scale, scores + j * kLanes, best);
  for (; j < n; ++j) score_rows<1>(rows + j, qt, dim, scale, scores + j * kLanes, best);
  Vec total = exp_vec(sinks - best);
  for (j = 0; j < n; ++j) {
    const Vec p = exp_vec(load(scores + j * kLanes) - best);
    total += p;
    store(scores + j * kLanes, p);
  }
  const Vec inverse = 1.0f / total;
  int h = 0;
  float factors[kLanes];
  store(factors, inverse);
  for (; h + 4 <= heads; h += 4) weigh<4>(rows, n, scores + h, dim, out + h * dim, factors + h);
  for (; h < heads; ++h) weigh<1>(rows, n, scores + h, dim, out + h * dim, factors + h);
  for (h = 0; h < heads; ++h) rotate(out + h * dim + dim - rope, cos, sin, rope, -1.0f);
}

// ---- indexer ----

// s[e] = sum_h w[h] relu(q_h . k_e) for one packed tile of keys [c, kTile].
INLINE void index_tile(const float* q, const float* w, int64_t heads, int64_t c, const float* tile, float* out) {
  Vec s0{}, s1{};
  for (int64_t h = 0; h < heads; h += 4) {
    const int count = heads - h < 4 ? int(heads - h) : 4;
    Vec a0[4] = {}, a1[4] = {};
    const float* rows[4];
    for (int i = 0; i < 4; ++i) rows[i] = q + (h + (i < count ? i : 0)) * c;
    for (int64_t k = 0; k < c; ++k) {
      const Vec b0 = load(tile + k * kTile), b1 = load(tile + k * kTile + kLanes);
      for (int i = 0; i < 4; ++i) {
        const Vec v = splat(rows[i][k]);
        a0[i] += v * b0;
        a1[i] += v * b1;
      }
    }
    for (int i = 0; i < count; ++i) {
      s0 += select(a0[i] < 0.0f, zero(), a0[i]) * w[h + i];
      s1 += select(a1[i] < 0.0f, zero(), a1[i]) * w[h + i];
    }
  }
  store(out, s0);
  store(out + kLanes, s1);
}

INLINE int32_t ordered(float x) {  // FP32 order as signed-integer order, -0 equal to 0
  x += 0.0f;
  int32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  return bits ^ ((bits >> 31) & 0x7fffffff);
}
INLINE int64_t rank_key(float score, int64_t index) {  // larger is better; of equals the lower index
  return (int64_t(ordered(score)) << 32) | (0x7fffffff - index);
}

// Moves the k largest of keys [n] to the front.
static void partition_largest(int64_t* keys, int64_t n, int64_t k) {
  int64_t lo = 0, hi = n - 1;
  while (lo < hi) {
    const int64_t pivot = keys[lo + (hi - lo) / 2];
    int64_t i = lo, j = hi;
    while (i <= j) {
      while (keys[i] > pivot) ++i;
      while (keys[j] < pivot) --j;
      if (i <= j) {
        const int64_t t = keys[i];
        keys[i++] = keys[j];
        keys[j--] = t;
      }
    }
    if (k - 1 <= j) hi = j;
    else if (k - 1 >= i) lo = i;
    else return;
  }
}

// Indices of the k best of scores [n], k <= n, in no order. keys: scratch of 2k + 64.
static void select_best(const float* scores, int64_t n, int64_t k, int64_t* keys, int32_t* picks) {
  const int64_t room = 2 * k + 64;
  int64_t held = 0, bound = INT64_MIN;
  for (int64_t e = 0; e < n; ++e) {
    const int64_t key = rank_key(scores[e], e);
    keys[held] = key;
    held += key > bound;
    if (held == room) {
      partition_largest(keys, held, k);
      held = k;
      bound = keys[0];
      for (int64_t i = 1; i < k; ++i) bound = keys[i] < bound ? keys[i] : bound;
    }
  }
  if (held > k) partition_largest(keys, held, k);
  for (int64_t i = 0; i < k; ++i) picks[i] = int32_t(0x7fffffff - (keys[i] & 0x7fffffff));
}
