// The indexer: scores of entries, and the exact choice of the best.

// Keys [n rows, c] at `rows`, n <= kTile, into tile [c, kTile]; missing rows repeat the last.
static void key_tile(const float* const* rows, int n, int64_t c, float* tile) {
  for (int half = 0; half < kTile; half += kLanes)
    for (int64_t k = 0; k < c; k += kLanes) {
      Vec a[kLanes];
      for (int i = 0; i < kLanes; ++i) a[i] = load_at(rows[half + i < n ? half + i : n - 1], k, c);
      transpose(a);
      for (int i = 0; i < kLanes && k + i < c; ++i) store(tile + (k + i) * kTile + half, a[i]);
    }
}

template <int H>
INLINE void index_heads(const float* q, const float* w, int64_t c, const float* tile, Vec& s0, Vec& s1) {
  Vec a0[H] = {}, a1[H] = {};
  for (int64_t k = 0; k < c; ++k) {
    const Vec b0 = load(tile + k * kTile), b1 = load(tile + k * kTile + kLanes);
    for (int h = 0; h < H; ++h) {
      const Vec v = splat(q[h * c + k]);
      a0[h] += v * b0;
      a1[h] += v * b1;
    }
  }
  for (int h = 0; h < H; ++h) {
    s0 += select(a0[h] < 0.0f, zero(), a0[h]) * w[h];
    s1 += select(a1[h] < 0.0f, zero(), a1[h]) * w[h];
  }
}

// s[e] = sum_h w[h] relu(q_h . k_e) for one tile of keys.
static void index_tile(const float* q, const float* w, int64_t heads, int64_t c, const float* tile, float* out) {
  Vec s0{}, s1{};
  int64_t h = 0;
  for (; h + 4 <= heads; h += 4) index_heads<4>(q + h * c, w + h, c, tile, s0, s1);
  for (; h < heads; ++h) index_heads<1>(q + h * c, w + h, c, tile, s0, s1);
  store(out, s0);
  store(out + kLanes, s1);
}

// The same of integers, T: int32_t, pairs of 16 bits (index_shorts.h), or uint32_t, four bytes (attention_bytes.h), whose keys
// have kAdded added.
INLINE VecI first_sums(const int32_t*) { return VecI{}; }
INLINE VecI first_sums(const uint32_t* q) { return VecI{} - int32_t(kAdded) * head_of(q).sum; }
INLINE VecI add_products(VecI sums, VecI q, VecI keys) { return dot_pairs(sums, q, keys); }
INLINE VecI add_products(VecI sums, VecQ q, VecQ keys) { return dot_bytes(sums, q, keys); }

// H heads, rows of `row` words, with a tile of keys [steps, kTile].
template <int H, class T>
INLINE void integer_heads(const T* q, int64_t row, const float* factor, int64_t steps, const T* keys, Vec& s0, Vec& s1) {
  VecI a0[H], a1[H];
  for (int h = 0; h < H; ++h) a0[h] = a1[h] = first_sums(q + h * row);
  for (int64_t k = 0; k < steps; ++k) {
    const Lanes<T> b0 = load(keys + k * kTile), b1 = load(keys + k * kTile + kLanes);
    for (int h = 0; h < H; ++h) {
      const Lanes<T> v = Lanes<T>{} + q[h * row + k];
      a0[h] = add_products(a0[h], v, b0);
      a1[h] = add_products(a1[h], v, b1);
    }
  }
  for (int h = 0; h < H; ++h) {
    s0 += whole(a0[h] > 0 ? a0[h] : VecI{}) * factor[h];
    s1 += whole(a1[h] > 0 ? a1[h] : VecI{}) * factor[h];
  }
}

// factor [heads]: w times what a unit of a head is worth; step [kTile]: what the keys' are.
template <class T>
static void integer_tile_scores(const T* q, int64_t row, const float* factor, int64_t heads, int64_t steps, const T* keys,
                                const float* step, float* out) {
  Vec s0{}, s1{};
  int64_t h = 0;
  for (; h + 4 <= heads; h += 4) integer_heads<4>(q + h * row, row, factor + h, steps, keys, s0, s1);
  for (; h < heads; ++h) integer_heads<1>(q + h * row, row, factor + h, steps, keys, s0, s1);
  store(out, s0 * load(step));
  store(out + kLanes, s1 * load(step + kLanes));
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

// The k best of n experts by score, and bias where there is one, the best first.
template <class Index>
static void best_experts(const float* scores, const float* bias, int64_t n, int64_t k, Index* chosen) {
  for (int64_t i = 0; i < k; ++i) {
    int64_t best = INT64_MIN;
    for (int64_t e = 0; e < n; ++e) {
      bool taken = false;
      for (int64_t j = 0; j < i; ++j) taken |= chosen[j] == e;
      const int64_t key = rank_key(bias == nullptr ? scores[e] : scores[e] + bias[e], e);
      if (!taken && key > best) best = key, chosen[i] = Index(e);
    }
  }
}

INLINE float unordered(int32_t key) {  // the inverse of `ordered`
  const int32_t bits = key ^ ((key >> 31) & 0x7fffffff);
  float x;
  __builtin_memcpy(&x, &bits, 4);
  return x;
}

struct Cut {  // `above` <= k keys exceed `bound`; where fewer than k do, the rest are equal to it
  int64_t bound, above;
};

// Turns scores [n], k < n, padded to whole vectors, into ordered keys and finds where the k best end, by halving the
// range of values; each fourth time that of the keys, as values may be many magnitudes apart.
static Cut cut_best(float* scores, int64_t n, int64_t k) {
  auto* keys = reinterpret_cast<int32_t*>(scores);
  const int64_t padded = (n + kLanes - 1) / kLanes * kLanes;
  for (int64_t i = n; i < padded; ++i) scores[i] = -__builtin_inff();
  VecI low = VecI{} + INT32_MAX, high = VecI{} + INT32_MIN;
  for (int64_t i = 0; i < padded; i += kLanes) {
    const VecI bits = reinterpret_cast<VecI>(load(scores + i) + 0.0f), key = bits ^ ((bits >> 31) & 0x7fffffff);
    store(scores + i, reinterpret_cast<Vec>(key));
    low = key < low ? key : low;
    high = key > high ? key : high;
  }
  for (int64_t i = n; i < padded; ++i) keys[i] = INT32_MIN;
  int64_t below = INT32_MAX, top = INT32_MIN;
  for (int i = 0; i < kLanes; ++i) below = low[i] < below ? low[i] : below, top = high[i] > top ? high[i] : top;
  --below;
  int64_t above_top = 0;  // more than k exceed `below`, fewer than k exceed `top`
  for (int step = 1; top - below > 1; ++step) {
    int64_t middle = below + (top - below) / 2;
    if (step % 4) {
      const int64_t halfway = ordered(0.5f * unordered(int32_t(below)) + 0.5f * unordered(int32_t(top)));
      if (halfway > below && halfway < top) middle = halfway;
    }
    const VecI bound = VecI{} + int32_t(middle);
    VecI count{};
    for (int64_t i = 0; i < padded; i += kLanes) count -= load(keys + i) > bound;
    int64_t above = 0;
    for (int i = 0; i < kLanes; ++i) above += count[i];
    if (above > k) below = middle;
    else top = middle, above_top = above;
    if (above == k) break;
  }
  return {top, above_top};
}

// Indices of the k best of scores [n], k < n, ascending. The scores' place is overwritten.
static void select_best(float* scores, int64_t n, int64_t k, int32_t* picks) {
  const Cut cut = cut_best(scores, n, k);
  const auto* keys = reinterpret_cast<int32_t*>(scores);
  int64_t equals = k - cut.above;  // of those equal to the bound, the first ones are taken
  const VecI bound = VecI{} + int32_t(cut.bound);
  for (int64_t i = 0; i < n; i += kLanes) {
    const VecI key = load(keys + i);
    unsigned more = lane_bits(key > bound);
    for (unsigned same = equals > 0 ? lane_bits(key == bound) : 0; same != 0 && equals > 0; same &= same - 1, --equals)
      more |= same & -same;
    for (; more != 0; more &= more - 1) *picks++ = int32_t(i + __builtin_ctz(more));
  }
}
