// Products of BF16 operands, summed in FP32: twice the multiply-adds an instruction where the CPU has dot products of
// BF16, half the bytes of FP32 panels everywhere. Weights and inputs lie in pairs of neighbouring columns, a pair a lane.

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
#if UPWELL_BF16_DOTS
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
    const auto* rows = in.row<int32_t>(0);
    const int64_t ld = in.row_bytes / 4, pairs = (m.cols + 1) / 2;
    if (packed) times_tile<kPanel>(rows, ld, in.t, panel, pairs, out + i * ldo, ldo, width);
    else times_tile<kTile>(rows, ld, in.t, tile, pairs, out + i * ldo, ldo, width);
  }
}
