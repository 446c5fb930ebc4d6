// Products of BF16 operands, summed in FP32: twice the multiply-adds an instruction where the CPU has dot products of
// BF16, half the bytes of FP32 panels everywhere. Weights and inputs lie in pairs of neighbouring columns, a pair a lane.

// acc += the products of both columns of a pair.
INLINE Vec dot_pairs(Vec acc, VecI x, VecI w) {
#ifdef UPWELL_BF16_DOTS
  __m512bh a, b;
  __builtin_memcpy(&a, &x, 64);
  __builtin_memcpy(&b, &w, 64);
  return reinterpret_cast<Vec>(_mm512_dpbf16_ps(reinterpret_cast<__m512>(acc), a, b));
#else
  acc += reinterpret_cast<Vec>(x << 16) * reinterpret_cast<Vec>(w << 16);
  return acc + reinterpret_cast<Vec>(x & int32_t(0xffff0000)) * reinterpret_cast<Vec>(w & int32_t(0xffff0000));
#endif
}

// Two vectors of floats, those of even columns and of odd ones, as pairs.
INLINE VecI round_pairs(Vec even, Vec odd) {
  auto rounded = [](Vec v) {
    const VecI bits = reinterpret_cast<VecI>(v);
    return select(v != v, reinterpret_cast<Vec>(bits | 0x400000), reinterpret_cast<Vec>(bits + 0x7fff + (bits >> 16 & 1)));
  };
  const VecI low = reinterpret_cast<VecI>(rounded(even)), high = reinterpret_cast<VecI>(rounded(odd));
  return (low >> 16 & 0xffff) | (high & int32_t(0xffff0000));
}

constexpr int64_t kPairRows = 2 * kPackedRows;  // rows that are rounded together: what Inputs::space holds

// x [t, n] into in.space: t <= kPairRows rows of pairs.
static void lay_out_pairs(Inputs& in, const float* x, int64_t ldx) {
  const int64_t chunk = 2 * kLanes, padded = (in.n + chunk - 1) / chunk * chunk;
  in.row_bytes = 2 * padded + 64;  // rows of 4 KiB would share the same sets of L1
  in.fits = true;
  for (int64_t c = 0; c < in.t; ++c, x += ldx) {
    auto* out = reinterpret_cast<float*>(in.space + c * in.row_bytes);
    for (int64_t i = 0; i < in.n; i += chunk) {
      const int64_t left = in.n - i;
      const Vec a = load_at(x + i, 0, left), b = left > kLanes ? load_at(x + i + kLanes, 0, left - kLanes) : zero();
#ifdef UPWELL_BF16_DOTS
      const __m512bh both = _mm512_cvtne2ps_pbh(reinterpret_cast<__m512>(b), reinterpret_cast<__m512>(a));
      __builtin_memcpy(out + i / 2, &both, 64);
#else
      const Vec in_row[2] = {a, b};
      Vec apart[2];
      every_pth<2>(in_row, apart);
      store(out + i / 2, reinterpret_cast<Vec>(round_pairs(apart[0], apart[1])));
#endif
    }
  }
}

// MR input rows of pairs times kTile weight rows [pairs, LDB, 2]. U steps at once where MR alone leaves the multipliers
// waiting for their own results.
template <int MR, int LDB, int U>
INLINE void pair_steps(const char* x, int64_t row_bytes, const int32_t* b, int64_t pairs, Vec (&out0)[MR], Vec (&out1)[MR]) {
  Vec acc0[U][MR] = {}, acc1[U][MR] = {};
  const int64_t ld = row_bytes / 4;
  const auto* x0 = reinterpret_cast<const int32_t*>(x);
  const int32_t *x4 = x0 + 4 * ld, *x8 = x0 + 8 * ld;
  const int64_t l1 = ld, l2 = 2 * ld, l3 = 3 * ld;
#define UPWELL_STEP(row, value)                                \
  if (MR > (row)) {                                            \
    const VecI v = (value) - VecI{};                           \
    acc0[u][(row) % MR] = dot_pairs(acc0[u][(row) % MR], v, b0); \
    acc1[u][(row) % MR] = dot_pairs(acc1[u][(row) % MR], v, b1); \
  }
#define UPWELL_STEPS                                                                                              \
  UPWELL_STEP(0, x0[u]) UPWELL_STEP(1, x0[l1 + u]) UPWELL_STEP(2, x0[l2 + u]) UPWELL_STEP(3, x0[l3 + u])          \
  UPWELL_STEP(4, x4[u]) UPWELL_STEP(5, x4[l1 + u]) UPWELL_STEP(6, x4[l2 + u]) UPWELL_STEP(7, x4[l3 + u])          \
  UPWELL_STEP(8, x8[u]) UPWELL_STEP(9, x8[l1 + u]) UPWELL_STEP(10, x8[l2 + u]) UPWELL_STEP(11, x8[l3 + u])
  int64_t k = 0;
  for (; k + U <= pairs; k += U, b += U * LDB, x0 += U, x4 += U, x8 += U)
#pragma GCC unroll 8
    for (int u = 0; u < U; ++u) {
      if (MR <= kFewRows) __builtin_prefetch(b + u * LDB + kAhead), __builtin_prefetch(b + u * LDB + kAhead + kLanes);
      const VecI b0 = load_ints(b + u * LDB), b1 = load_ints(b + u * LDB + kLanes);
      UPWELL_STEPS
    }
  if (U > 1)
    for (; k < pairs; ++k, b += LDB, ++x0, ++x4, ++x8) {
      constexpr int u = 0;
      const VecI b0 = load_ints(b), b1 = load_ints(b + kLanes);
      UPWELL_STEPS
    }
#undef UPWELL_STEPS
#undef UPWELL_STEP
  for (int r = 0; r < MR; ++r) {
    for (int u = 1; u < U; ++u) acc0[0][r] += acc0[u][r], acc1[0][r] += acc1[u][r];
    out0[r] = acc0[0][r], out1[r] = acc1[0][r];
  }
}

template <int MR, int LDB>
static void pair_rows(const char* x, int64_t row_bytes, const int32_t* b, int64_t pairs, float* out, int64_t ldo, int width) {
  Vec v0[MR], v1[MR];
  pair_steps<MR, LDB, MR == 1 ? 4 : MR < 4 ? 2 : 1>(x, row_bytes, b, pairs, v0, v1);
  store_tile<MR>(v0, v1, out, ldo, width);
}

// The input rows that are laid out, times kTile weight rows [pairs, LDB, 2].
template <int LDB>
static void times_pairs(const Inputs& in, const int32_t* tile, float* out, int64_t ldo, int width) {
  const char* x = in.space;
  const int64_t pairs = (in.n + 1) / 2, tiles = (in.t + kRowTile - 1) / kRowTile;
  for (int64_t i = 0; i < tiles; ++i) {
    const int64_t rows = in.t / tiles + (i < in.t % tiles);
    switch (rows) {
#define UPWELL_ROWS(r)                                                                                        \
  case r:                                                                                                     \
    if constexpr (r <= kRowTile) pair_rows<r, LDB>(x, in.row_bytes, tile, pairs, out, ldo, width);            \
    break;
      UPWELL_ROWS(1) UPWELL_ROWS(2) UPWELL_ROWS(3) UPWELL_ROWS(4) UPWELL_ROWS(5) UPWELL_ROWS(6)
      UPWELL_ROWS(7) UPWELL_ROWS(8) UPWELL_ROWS(9) UPWELL_ROWS(10) UPWELL_ROWS(11) UPWELL_ROWS(12)
#undef UPWELL_ROWS
    }
    x += rows * in.row_bytes, out += rows * ldo;
  }
}

// Rows [first, first + width) of m as pairs [pairs, kTile, 2]; missing rows and columns are zero.
static void pack_pairs(const Matrix& m, int64_t first, int width, int32_t* tile, float* buffer) {
  const int64_t n = m.cols, pairs = (n + 1) / 2;
  for (int r = 0; r < kTile; ++r) {
    if (r >= width) {
      for (int64_t k = 0; k < pairs; ++k) tile[k * kTile + r] = 0;
      continue;
    }
    const float* w = weight_row(m, first + r, buffer);
    for (int64_t k = 0; k < n / 2; ++k)
      tile[k * kTile + r] = int32_t(round_to_bf16(w[2 * k]) | uint32_t(round_to_bf16(w[2 * k + 1])) << 16);
    if (n % 2) tile[n / 2 * kTile + r] = round_to_bf16(w[n - 1]);
  }
}

// out [t, width] = x [t, cols] times weight rows [first, first + width), in BF16. tile: scratch where m isn't in pairs.
static void pair_product(const Matrix& m, int64_t first, int width, const float* x, int64_t ldx, int64_t t, float* out,
                         int64_t ldo, int32_t* tile, float* buffer, Inputs& in, int phase) {
  const bool packed = m.format == kPairs;
  if (!packed) pack_pairs(m, first, width, tile, buffer);
  const auto* panel = static_cast<const int32_t*>(m.data) + first / kPanel * kPanel * ((m.cols + 1) / 2) + first % kPanel;
  for (int64_t i = 0; i < t; i += kPairRows) {
    prepare(in, kPairs, x + i * ldx, ldx, t - i < kPairRows ? t - i : kPairRows, m.cols, phase);
    if (packed) times_pairs<kPanel>(in, panel, out + i * ldo, ldo, width);
    else times_pairs<kTile>(in, tile, out + i * ldo, ldo, width);
  }
}
