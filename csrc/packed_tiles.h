// Many input rows times packed weights: four weight rows are decoded into L1, scales included, a block of columns at a
// time, and multiplied from there with up to kTileInputs input rows at once. T: float, or int32_t for pairs of BF16.

constexpr int kTiledFloats = kManyRegisters ? 12 : 6;  // FP4 and FP8 in FP32: from so many input rows on
constexpr int kTileWords = 512;  // of a weight row's block
constexpr int kTileInputs = kManyRegisters ? 6 : 2;

// sums [4][C] += four weight rows times C input rows, `steps` vectors each. ahead: bytes from the weights to what is fetched.
template <int C, class T>
static void packed_tile(const uint8_t* const (&w)[4], int64_t ahead, const T* x, int64_t ldx, int64_t steps, Vec* sums) {
  Vec acc[4][C];
  copy_sums<4, C>(sums, acc[0]);
  const T* x3 = x + 3 * ldx;
  const int64_t l1 = ldx, l2 = 2 * ldx;
  for (int64_t at = 0; at < steps * VECTOR_BYTES; at += VECTOR_BYTES, x += kLanes, x3 += kLanes) {
    Lanes<T> rows[4];
    for (int r = 0; r < 4; ++r) {
      if (ahead) __builtin_prefetch(w[r] + at + ahead, 0, 2);
      rows[r] = held(reinterpret_cast<Lanes<T>>(load_words(w[r] + at)));
    }
#define UPWELL_STEP(c, at)                                                                      \
  if constexpr (C > (c)) {                                                                      \
    const Lanes<T> v = held(load(at));                                                          \
    for (int r = 0; r < 4; ++r) acc[r][(c) % C] = multiply_add(acc[r][(c) % C], v, rows[r]);    \
  }
    UPWELL_STEP(0, x) UPWELL_STEP(1, x + l1) UPWELL_STEP(2, x + l2)
    UPWELL_STEP(3, x3) UPWELL_STEP(4, x3 + l1) UPWELL_STEP(5, x3 + l2)
#undef UPWELL_STEP
  }
  copy_sums<4, C>(acc[0], sums);
}

// Weight rows [first, first + width) times all input rows. Returns whether FP8's NaN was met: then out isn't right.
template <int64_t F, class T>
__attribute__((noinline)) static bool packed_tiles(const Matrix& m, int64_t first, int width, const Inputs& in, float* out,
                                                   int64_t ldo) {
  constexpr int64_t per = kOfPairs<T> ? 2 : 1, chunk = kOfPairs<T> ? kPairChunk : kParts<F> * kLanes;
  alignas(64) T decoded[4][kTileWords];
  alignas(64) Vec sums[4 * (kOfPairs<T> ? kPairRows : kPackedRows)];
  const int64_t n = m.cols, t = in.t, ld = in.row_bytes / 4;
  const Rows rows = rows_at<F>(m, first);
  VecI nan{};
  auto groups = [&](auto f) {  // of up to kTileInputs input rows: f(first, count, their sums)
    const int64_t most = (t + kTileInputs - 1) / kTileInputs;
    for (int64_t g = 0, c = 0, end; g < most; ++g, c = end) end = t * (g + 1) / most, f(c, end - c, sums + 4 * c);
  };
  for (int r = 0; r < width; r += 4) {
    for (int64_t i = 0; i < 4 * t; ++i) sums[i] = zero();
    for (int64_t from = 0; from < n; from += kTileWords * per) {
      const int64_t columns = min64(kTileWords * per, n - from), steps = (columns + chunk - 1) / chunk * chunk / per / kLanes;
      const bool as_they_lie = kOfPairs<T> && F == kBF16 && columns % chunk == 0;
      const uint8_t* w[4];
      for (int i = 0; i < 4; ++i) {
        const Rows row = rows.at(min64(r + i, width - 1));  // a missing row: the last again
        w[i] = as_they_lie ? row.data + 2 * from : reinterpret_cast<const uint8_t*>(decoded[i]);
        if (!as_they_lie) decode_scaled<F>(row, from, columns, 4 * row.row_bytes, decoded[i], nan);
      }
      // What comes next: the next columns of these rows, or the next rows.
      const int64_t ahead = !as_they_lie ? 0 : from + columns < n ? 2 * columns : 4 * rows.row_bytes - 2 * from;
      groups([&](int64_t c, int64_t count, Vec* own) {
        const T* x = in.row<T>(c) + from / per;
        switch (count) {
#define UPWELL_TILE(C)                                                                                \
  case C:                                                                                             \
    if constexpr (C <= kTileInputs) packed_tile<C, T>(w, c == 0 ? ahead : 0, x, ld, steps, own);        \
    break;
          UPWELL_TILE(1) UPWELL_TILE(2) UPWELL_TILE(3) UPWELL_TILE(4) UPWELL_TILE(5) UPWELL_TILE(6)
#undef UPWELL_TILE
        }
      });
    }
    groups([&](int64_t c, int64_t count, const Vec* own) {
      for (int64_t i = 0; i < count; ++i) {
        float four[4];
        sum_four(own[i], own[count + i], own[2 * count + i], own[3 * count + i], four);
        for (int k = 0; k < 4 && r + k < width; ++k)
          out[(c + i) * ldo + r + k] = kOfPairs<T> ? four[k] : four[k] * in.back[c + i][0] * in.back[c + i][1];
      }
    });
  }
  return any_nan(nan);
}
