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

// What is multiplied is T: float; int32_t, pairs of BF16 (simd.h), where a CPU multiplies twice as many of them; or
// uint32_t, four integers of a row in INT8 (attention_bytes.h).
template <class T>
constexpr int64_t kEach = kOfIntegers<T> ? 4 : kOfPairs<T> ? 2 : 1;  // rows that lie in one for the sums

// kTwo: for at most half as many heads as lanes. Head h has lanes 2h and 2h + 1: of a query those are even and odd columns,
// of scores even and odd rows. So no lane is idle where there are few heads, as for ranks that share them.
template <bool kTwo, class T>
constexpr bool kTurns = kTwo && kEach<T> == 1;  // numerators of two rows take turns in lanes; of more they are one number
template <bool kTwo, class T>
INLINE Lanes<T> across(const T* p) {  // p[0] in all lanes, or p[0] and p[1] in turn
  if constexpr (kTwo) {
    typedef int64_t Doubles __attribute__((vector_size(VECTOR_BYTES)));
    int64_t both;
    __builtin_memcpy(&both, p, 8);
    return reinterpret_cast<Lanes<T>>(Doubles{} + both);
  } else {
    return *p - Lanes<T>{};
  }
}

// R rows times the heads of q [steps, kLanes] into R vectors of scores, or half as many. Not inlined: its R pointers need
// the registers. factor: of integers, what a head's are worth.
template <int R, bool kTwo, class T>
static __attribute__((noinline)) void score_rows(const T* const* rows, const T* q, int64_t steps, Vec factor, float* out) {
  [[maybe_unused]] constexpr int kPer = kTwo ? 2 : 1;
  Sums<T> acc[R];
  const T* r[R];
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i) acc[i] = Sums<T>{}, r[i] = rows[i];
  for (int64_t k = 0; k < steps; ++k, q += kLanes) {
    const Lanes<T> heads = load(q);
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) acc[i] = multiply_add(acc[i], across<kTwo>(r[i] + (kTwo ? 2 * k : k)), heads);
  }
#pragma GCC unroll 8
  for (int i = 0; i < R; i += kPer, out += kLanes) {
    Sums<T> v = acc[i];
    if constexpr (kTwo) v = take_turns(v, acc[i + 1]) + swap_pairs(take_turns(acc[i + 1], v));
    if constexpr (kOfIntegers<T>) store(out, worth<kTwo>(v, factor, r + i));
    else store(out, v);
  }
}

// H heads' sums over n rows, of which each T holds one or more, by probs as attend_as has them. scale [H]: of integers,
// what the heads' are worth.
template <int H, int V, bool kTwo, class T>
INLINE void weigh_columns(const T* const* rows, int64_t n, const T* probs, [[maybe_unused]] const float* scale, int64_t offset,
                          int part, float* out, int64_t ldo, bool add) {
  Sums<T> acc[H][V] = {};
  for (int64_t j = 0; j < n; ++j) {
    const T* row = rows[j] + offset;
    const T* p = kTurns<kTwo, T> ? probs + j / 2 * kLanes + j % 2 : probs + j * (kTwo ? kLanes / 2 : kLanes);
    Lanes<T> values[V];
    for (int v = 0; v < V; ++v) {
      if constexpr (kEach<T> > 1) values[v] = load(row + v * kLanes);  // padded
      else values[v] = part ? load_part(row + v * kLanes, part) : load(row + v * kLanes);
    }
    for (int h = 0; h < H; ++h) {
      const Lanes<T> weight = across<false>(p + (kTurns<kTwo, T> ? 2 * h : h));
      for (int v = 0; v < V; ++v) {
        if constexpr (kOfIntegers<T>) acc[h][v] = multiply_add(acc[h][v], values[v], weight);
        else acc[h][v] = multiply_add(acc[h][v], weight, values[v]);
      }
    }
  }
#pragma GCC unroll 4
  for (int h = 0; h < H; ++h)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      float* o = out + h * ldo + v * kLanes;
      Vec sum;
      if constexpr (kOfIntegers<T>) sum = whole(acc[h][v]) * scale[h];
      else sum = acc[h][v];
      if (part) store_part(o, add ? sum + load_part(o, part) : sum, part);
      else store(o, add ? sum + load(o) : sum);
    }
}

template <int H, bool kTwo, class T>
static void weigh(const T* const* rows, int64_t n, const T* probs, const float* scale, int64_t dim, float* out, bool add) {
  constexpr int V = kLanes == 8 ? 2 : 4;
  int64_t d = 0;
  for (; d + V * kLanes <= dim; d += V * kLanes) weigh_columns<H, V, kTwo>(rows, n, probs, scale, d, 0, out + d, dim, add);
  for (; d + kLanes <= dim; d += kLanes) weigh_columns<H, 1, kTwo>(rows, n, probs, scale, d, 0, out + d, dim, add);
  if (d < dim) weigh_columns<H, 1, kTwo>(rows, n, probs, scale, d, int(dim - d), out + d, dim, add);
}

// q [heads, dim] into qt [dim, kLanes]: normed, scaled by dim^-1/2, the last rope dims rotated. Missing heads are zero.
static void query_lanes(const float* q, int heads, int64_t dim, float eps, const float* turn, int64_t rope, float* qt) {
  Vec square{};
  for (int64_t k = 0; k < dim; k += kLanes) {
    Vec a[kLanes];
#pragma GCC unroll 16
    for (int h = 0; h < kLanes; ++h) a[h] = h < heads ? load_at(q + h * dim, k, dim) : zero();
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

// qt [dim, kLanes] of query_lanes as score_rows takes it, in place, and its factor. Returns the steps. Of integers scores
// are exponents of two.
template <bool kTwo, class T>
static int64_t lay_out_query(float* qt, int64_t dim, [[maybe_unused]] Vec& factor) {
  int64_t n = dim;
  auto join = [&](auto both) {
    n /= 2;
    for (int64_t k = 0; k < n; ++k) store(qt + k * kLanes, both(load(qt + 2 * k * kLanes), load(qt + (2 * k + 1) * kLanes)));
  };
  if constexpr (kOfPairs<T>) {
    for (; n % 4; ++n) store(qt + n * kLanes, zero());
    join([](Vec even, Vec odd) { return reinterpret_cast<Vec>(round_pairs(even, odd)); });
  }
  if constexpr (kOfIntegers<T>) {
    n = round_lanes(qt, dim, kTwo ? 2 : 1, factor);
    factor *= kLog2e;
    if (kTwo) factor = low_turns(factor, factor);
  }
  if constexpr (kTwo) join([](Vec even, Vec odd) { return low_turns(even, odd); });
  return n;
}

// Sums of one query's heads over part of its rows: out [heads, dim] of exp(score - best) row, with best and total.
struct Partial {
  Vec best, total;
};
constexpr int64_t kRowBlock = 64;  // rows that stay in L1 while all heads are summed over them

// Memory that is read next, fetched bit by bit while there is much to compute.
struct Coming {
  const char *at = nullptr, *end = nullptr;

  int64_t share(int64_t parts) const { return ((end - at) / 64 + parts - 1) / max64(parts, 1); }  // lines, of so many
  void fetch(int64_t lines) {
    for (; lines > 0 && at < end; --lines, at += 64) __builtin_prefetch(at, 0, 2);
  }
};

// What one query reads. rows: each by itself, for the scores; columns: the same for the sums, or kEach rows in one.
template <class T>
struct RowsRead {
  const T *const *rows, *const *columns;
  int64_t n;
  int hidden = 0;  // rows that aren't the query's, though they lie among its own
  int64_t hides[8] = {};
  Coming coming;  // of the next query

  RowsRead part(int64_t first, int64_t count) const {
    RowsRead own{rows + first, columns + first / kEach<T>, count};
    for (int i = 0; i < hidden; ++i)
      if (hides[i] >= first && hides[i] < first + count) own.hides[own.hidden++] = hides[i] - first;
    return own;
  }
};

// qt [(dim + kLanes) kLanes] from query_lanes, changed; scores [(n + 1) kLanes]: scratch. `best` to begin with (the sink,
// or -inf).
template <bool kTwo, class T>
static Partial attend_as(float* qt, int heads, int64_t dim, const RowsRead<T>& read, Vec best, float* scores, float* out) {
  constexpr int kRows = 8, kPer = kTwo ? 2 : 1, kStep = kTurns<kTwo, T> ? 2 : 1;
  Vec factor{};
  const int64_t steps = lay_out_query<kTwo, T>(qt, dim, factor), n = read.n;
  const auto* q = reinterpret_cast<const T*>(qt);
  Coming coming = read.coming;
  int64_t j = 0;
  for (const int64_t share = coming.share(n / kRows * 2); j + kRows <= n; j += kRows) {
    coming.fetch(share);
    for (int64_t i = j + 16; kEach<T> == 1 && i < n && i < j + 24; ++i)  // rows lie anywhere: no hardware foresees them
      for (int64_t k = 0; k < dim; k += 16) __builtin_prefetch(read.rows[i] + k);
    score_rows<kRows, kTwo>(read.rows + j, q, steps, factor, scores + j / kPer * kLanes);
  }
  for (; j < n; j += kPer) {
    const T* last[2] = {read.rows[j], read.rows[min64(j + 1, n - 1)]};
    score_rows<kPer, kTwo>(last, q, steps, factor, scores + j / kPer * kLanes);
  }
  auto hide = [&](int64_t row) {
    const Vec none = splat(-__builtin_inff());
    float* at = scores + row / kPer * kLanes;
    store(at, !kTwo ? none : row % 2 ? take_turns(load(at), none) : take_turns(none, load(at)));
  };
  for (int i = 0; i < read.hidden; ++i) hide(read.hides[i]);
  if (kTwo && n % 2) hide(n);
  best = larger(best, splat(-3e38f));  // where every row is hidden
  if constexpr (kOfIntegers<T>) best *= kLog2e;  // as scores are
  if constexpr (kTwo) best = low_turns(best, best);
  Vec bests[4] = {best, best, best, best};  // one alone would wait for itself
  const int64_t vectors_in_all = (n + kPer - 1) / kPer;
  for (j = 0; j + 4 <= vectors_in_all; j += 4)
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) bests[i] = larger(load(scores + (j + i) * kLanes), bests[i]);
  for (; j < vectors_in_all; ++j) bests[0] = larger(load(scores + j * kLanes), bests[0]);
  best = larger(larger(bests[0], bests[1]), larger(bests[2], bests[3]));
  if constexpr (kTwo) best = larger(swap_pairs(best), best);
  Vec total{};
  const int64_t share = coming.share((n + kRowBlock - 1) / kRowBlock * (heads / 4));
  for (j = 0; j == 0 || j < n; j += kRowBlock) {
    const int64_t count = min64(n - j, kRowBlock), vectors = (count + kPer - 1) / kPer;
    float *p = scores + j / kPer * kLanes, scale[kLanes] = {};
    [[maybe_unused]] Vec most = splat(1e-30f);
    for (int64_t i = 0; i < vectors; ++i) {
      Vec e = load(p + i * kLanes) - best;
      e = kOfIntegers<T> ? exp2_below(e) : exp_below(e);
      total += e;
      if constexpr (kOfIntegers<T>) {
        e *= steps_of_rows<kTwo>(read.rows + j + i * kPer);
        most = larger(e, most);
      }
      store(p + i * kLanes, e);
    }
    if constexpr (kOfPairs<T>)  // of neighbouring rows
      for (int64_t i = 0; i < vectors; i += 2) {
        const Vec a = load(p + i * kLanes), b = i + 1 < vectors ? load(p + (i + 1) * kLanes) : zero();
        store(p + i / 2 * kLanes, reinterpret_cast<Vec>(kTwo ? round_neighbours(a, b) : round_pairs(a, b)));
      }
    if constexpr (kOfIntegers<T>) round_numerators<kTwo>(p, vectors, most, scale);
    const auto* probs = reinterpret_cast<const T*>(p);
    const T* const* columns = read.columns + j / kEach<T>;
    const int64_t joined = (count + kEach<T> - 1) / kEach<T>;
    int h = 0;
    for (; h + 4 <= heads; h += 4) {
      coming.fetch(share);
      weigh<4, kTwo>(columns, joined, probs + h * kStep, scale + h, dim, out + h * dim, j > 0);
    }
    for (; h < heads; ++h) weigh<1, kTwo>(columns, joined, probs + h * kStep, scale + h, dim, out + h * dim, j > 0);
  }
  if constexpr (kOfIntegers<T>) best *= 1.0f / kLog2e;
  if constexpr (kTwo) total = every_second(total + swap_pairs(total)), best = every_second(best);
  return {best, total};
}

template <class T>
static Partial attend_rows(float* qt, int heads, int64_t dim, const RowsRead<T>& read, Vec best, float* scores, float* out) {
  const bool two = heads <= kLanes / 2 && dim % 2 == 0;
  return (two ? attend_as<true, T> : attend_as<false, T>)(qt, heads, dim, read, best, scores, out);
}

// out [heads, dim] times factor, rotated back.
INLINE void finish_heads(float* out, int heads, int64_t dim, Vec factor, const float* turn, int64_t rope) {
  for (int h = 0; h < heads; ++h) {
    const float f = factor[h];
    map(out + h * dim, out + h * dim, dim, [&](Vec v, int64_t) { return v * f; });
    rotate(out + h * dim + dim - rope, turn, rope, -1.0f);
  }
}

// heads <= kLanes heads of one query q [heads, dim] over what it reads -> out [heads, dim]. qt, scores as for attend_as.
template <class T>
static void attend_query(const float* q, int heads, int64_t dim, float eps, const float* turn, int64_t rope,
                         const float* sink, const RowsRead<T>& read, float* qt, float* scores, float* out) {
  query_lanes(q, heads, dim, eps, turn, rope, qt);
  const Vec sinks = load_part(sink, heads);
  const Partial sum = attend_rows(qt, heads, dim, read, sinks, scores, out);
  finish_heads(out, heads, dim, 1.0f / (sum.total + exp_below(sinks - sum.best)), turn, rope);
}
