// Products of BF16 operands, summed in FP32: twice the multiply-adds an instruction where the CPU has dot products of
// BF16, half the bytes of FP32 panels everywhere. Weights and inputs lie in pairs of neighbouring columns, a pair a lane.

// A row [n] as pairs of neighbours, padded with zeros to whole vectors: row_pairs(n) of them.
INLINE int64_t row_pairs(int64_t n) { return (n + 2 * kLanes - 1) / (2 * kLanes) * kLanes; }
INLINE void round_row(const float* row, int64_t n, int32_t* out) {
  for (int64_t i = 0; i < n; i += 2 * kLanes, out += kLanes) {
    const Vec a = load_at(row, i, n), b = n - i > kLanes ? load_at(row, i + kLanes, n) : zero();
    store(reinterpret_cast<float*>(out), reinterpret_cast<Vec>(round_neighbours(a, b)));
  }
}

// x [t, n] into in.space: t <= kPairRows rows of pairs.
static void lay_out_pairs(Inputs& in, const float* x, int64_t ldx) {
  in.row_bytes = 4 * row_pairs(in.n) + 64;  // rows of 4 KiB would share the same sets of L1
  in.fits = true;
  for (int64_t c = 0; c < in.t; ++c, x += ldx) round_row(x, in.n, reinterpret_cast<int32_t*>(in.space + c * in.row_bytes));
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
                         int64_t ldo, int32_t* tile, float* buffer, Inputs& in, int phase, const void* next) {
  const bool packed = m.format == kPairs;
  if (!packed) pack_pairs(m, first, width, tile, buffer);
  const auto* panel = static_cast<const int32_t*>(panel_of(m, first));
  for (int64_t i = 0; i < t; i += kPairRows) {
    prepare(in, kPairs, Meets::kPairs, x + i * ldx, ldx, t - i < kPairRows ? t - i : kPairRows, m.cols, phase);
    const auto* rows = in.row<int32_t>(0);
    const int64_t ld = in.row_bytes / 4, pairs = (m.cols + 1) / 2;
    if (packed) times_tile<kPanel>(rows, ld, in.t, panel, pairs, next, out + i * ldo, ldo, width);
    else times_tile<kTile>(rows, ld, in.t, tile, pairs, tile, out + i * ldo, ldo, width);
  }
}
