// FP4, FP8 and BF16 weights by dot products of BF16, which holds each code exactly: a chunk of 128 columns of a weight row
// becomes four vectors of BF16, in the order in which the codes come apart. Inputs, rounded, are laid out in that order.
// A lane holds columns of one scale, so a scale multiplies a chunk's sum. Decoded numbers are small by 2^-kSmall, so that
// this sum of eight products stays finite wherever the input and the scaled one are.

template <int64_t F>
constexpr int kSmall = F == kFP4 ? 8 : F == kFP8 ? 12 : 0;

INLINE VecI of_bytes(__m512i v) { return reinterpret_cast<VecI>(v); }

struct alignas(64) PairTables {
  uint16_t fp4[32] = {};          // a nibble's BF16, twice: the bit above it doesn't matter
  uint8_t high[128] = {}, low[128] = {};  // the bytes of an FP8 magnitude's BF16; its NaN is BF16's
  constexpr PairTables() {
    constexpr uint16_t of_code[8] = {0, 0x3f00, 0x3f80, 0x3fc0, 0x4000, 0x4040, 0x4080, 0x40c0};
    for (int i = 0; i < 32; ++i) fp4[i] = uint16_t((i & 7 ? of_code[i & 7] - (kSmall<kFP4> << 7) : 0) | (i & 8 ? 0x8000 : 0));
    for (int i = 0; i < 128; ++i) {
      int bits = i << 4;
      if (i >= 8) bits += 120 << 7;
      else if (i > 0) {  // a subnormal i * 2^-9
        const int top = i >= 4 ? 2 : i >= 2 ? 1 : 0;
        bits = (127 - 9 + top) << 7 | (i - (1 << top)) << (7 - top);
      }
      if (i > 0) bits -= kSmall<kFP8> << 7;
      if (i == 127) bits = 0x7fc0;
      high[i] = uint8_t(bits >> 8), low[i] = uint8_t(bits);
    }
  }
};
constexpr PairTables pair_tables;

// 128 weights of a row as pairs.
template <int64_t F>
INLINE void decode_pairs(const uint8_t* p, VecI (&parts)[4]) {
  if constexpr (F == kBF16) {
    for (int i = 0; i < 4; ++i) parts[i] = load_words(p + 64 * i);
  } else if constexpr (F == kFP8) {
    const __m512i high[2] = {_mm512_load_si512(pair_tables.high), _mm512_load_si512(pair_tables.high + 64)};
    const __m512i low[2] = {_mm512_load_si512(pair_tables.low), _mm512_load_si512(pair_tables.low + 64)};
    for (int i = 0; i < 2; ++i) {
      const __m512i codes = _mm512_loadu_si512(p + 64 * i);
      const __m512i tops = _mm512_ternarylogic_epi32(_mm512_permutex2var_epi8(high[0], codes, high[1]), codes,
                                                     _mm512_set1_epi8(int8_t(0x80)), 0xf8);  // a | (b & c)
      const __m512i rests = _mm512_permutex2var_epi8(low[0], codes, low[1]);
      parts[2 * i] = of_bytes(_mm512_unpacklo_epi8(rests, tops));
      parts[2 * i + 1] = of_bytes(_mm512_unpackhi_epi8(rests, tops));
    }
  } else {
    const __m512i table = _mm512_load_si512(pair_tables.fp4), codes = _mm512_loadu_si512(p);
    parts[0] = of_bytes(_mm512_permutexvar_epi16(codes, table));
    parts[1] = of_bytes(_mm512_permutexvar_epi16(_mm512_srli_epi16(codes, 4), table));
    parts[2] = of_bytes(_mm512_permutexvar_epi16(_mm512_srli_epi16(codes, 8), table));
    parts[3] = of_bytes(_mm512_permutexvar_epi16(_mm512_srli_epi16(codes, 12), table));
  }
}

template <int64_t F>
static void lay_out_paired(Inputs& in, const float* x, int64_t ldx) {
  constexpr int64_t chunk = 128;
  const int64_t chunks = (in.n + chunk - 1) / chunk;
  in.row_bytes = chunks * 2 * chunk + kRowShift;
  in.fits = true;
  for (int64_t c = 0; c < in.t; ++c, x += ldx) {
    auto* out = reinterpret_cast<int32_t*>(in.space + c * in.row_bytes);
    for (int64_t base = 0; base < chunks * chunk; base += chunk, out += chunk / 2) {
      Vec v[8];
      VecI parts[4];
      for (int i = 0; i < 8; ++i) v[i] = base + i * kLanes < in.n ? load_at(x + base, i * kLanes, in.n - base) : zero();
      if constexpr (F == kFP4) {  // each fourth column
        Vec four[8];
        every_pth<4>(v, four);
        every_pth<4>(v + 4, four + 4);
        for (int i = 0; i < 4; ++i) parts[i] = round_neighbours(four[i], four[4 + i]);
      } else {
        for (int i = 0; i < 4; ++i) parts[i] = round_neighbours(v[2 * i], v[2 * i + 1]);
        if constexpr (F == kFP8)  // each second eight
          for (int i = 0; i < 4; i += 2) {
            const auto a = reinterpret_cast<__m512i>(parts[i]), b = reinterpret_cast<__m512i>(parts[i + 1]);
            parts[i] = of_bytes(_mm512_shuffle_i64x2(a, b, 0x88)), parts[i + 1] = of_bytes(_mm512_shuffle_i64x2(a, b, 0xdd));
          }
      }
      for (int i = 0; i < 4; ++i) store(reinterpret_cast<float*>(out + i * kLanes), reinterpret_cast<Vec>(parts[i]));
    }
  }
}

// acc[r][c] += a chunk of R weight rows times C input rows. `ahead`: bytes to prefetch ahead.
template <int64_t F, int R, int C>
INLINE void paired_chunk(const Rows& w, int64_t col, int64_t ahead, const Inputs& in, int64_t c0, Vec (&acc)[R][C]) {
  constexpr int kBytesOfRow = 512 / kParts<F>;
  VecI parts[R][4];
  Vec factor[R];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    const uint8_t* p = w.data + r * w.row_bytes + col * 4 / kParts<F>;
    for (int i = 0; i < kBytesOfRow; i += 64) __builtin_prefetch(p + ahead + i, 0, 2);  // into L2: L1 holds the inputs
    decode_pairs<F>(p, parts[r]);
    if constexpr (F == kFP8) factor[r] = splat(power_of_two(int(w.scale[col / 128]) - 127 + kSmall<F>));
    if constexpr (F == kFP4) factor[r] = lane_scales(w.scale + r * w.row_scales + col / 32, kSmall<F>);
  }
#pragma GCC unroll 8
  for (int c = 0; c < C; ++c) {
    VecI x[4];
    for (int k = 0; k < 4; ++k) x[k] = load(in.row<int32_t>(c0 + c) + col / 2 + k * kLanes);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      Vec sum = F == kBF16 ? acc[r][c] : zero();
      for (int k = 0; k < 4; ++k) sum = multiply_add(sum, x[k], parts[r][k]);
      acc[r][c] = F == kBF16 ? sum : acc[r][c] + sum * factor[r];
    }
  }
}

// From so many input rows on, weights are decoded into L1 and multiplied from there.
template <int64_t F>
constexpr int kTiledRows = F == kBF16 ? 9 : 6;
constexpr int kTileColumns = 1024;

// One row's columns [col, col + count) as pairs times their scales, padded with zeros to whole chunks. Returns whether it
// met FP8's NaN, which comes out as something else.
template <int64_t F>
INLINE bool decode_scaled(const Rows& w, int64_t col, int64_t count, int64_t ahead, int32_t* out) {
  constexpr int kBytesOfChunk = 512 / kParts<F>;
  __mmask64 nan = 0;
  for (int64_t i = 0; i < count; i += 128, col += 128, out += 64) {
    const uint8_t *p = w.data + col * 4 / kParts<F>, *scale = w.scale + (F == kFP8 ? col / 128 : col / 32);
    uint8_t padded[kBytesOfChunk], scales[4];
    if (count - i < 128) {  // what follows may not be there to read
      __builtin_memset(padded, 0, sizeof padded);
      __builtin_memcpy(padded, p, size_t((count - i) * 4 / kParts<F>));
      if (F == kFP4) __builtin_memcpy(scales, scale, size_t((count - i) / 32));
      p = padded;
      if (F == kFP4) scale = scales;
    } else {
      for (int k = 0; k < kBytesOfChunk; k += 64) __builtin_prefetch(p + ahead + k, 0, 2);
    }
    VecI parts[4];
    decode_pairs<F>(p, parts);
    if constexpr (F == kFP8)
      for (int k = 0; k < kBytesOfChunk; k += 64) {
        const __m512i magnitudes = _mm512_and_si512(_mm512_loadu_si512(p + k), _mm512_set1_epi8(0x7f));
        nan |= _mm512_cmpeq_epi8_mask(magnitudes, _mm512_set1_epi8(0x7f));
      }
    if constexpr (F != kBF16) {
      // The scale's exponent, added to that of each number but 0.
      __m512i up;
      if constexpr (F == kFP8) up = _mm512_set1_epi16(int16_t((*scale - 127 + kSmall<F>) << 7));
      else {
        const __m512i both = _mm512_srli_epi32(reinterpret_cast<__m512i>(byte_scales(scale)), 16);
        up = _mm512_sub_epi16(_mm512_or_si512(both, _mm512_slli_epi32(both, 16)), _mm512_set1_epi16((127 - kSmall<F>) << 7));
      }
      for (int k = 0; k < 4; ++k) {
        const auto v = reinterpret_cast<__m512i>(parts[k]);
        parts[k] = of_bytes(_mm512_mask_add_epi16(v, _mm512_test_epi16_mask(v, _mm512_set1_epi16(0x7fff)), v, up));
      }
    }
    for (int k = 0; k < 4; ++k) store(reinterpret_cast<float*>(out + k * kLanes), reinterpret_cast<Vec>(parts[k]));
  }
  return nan != 0;
}

// sums [4][C] += four weight rows times C input rows, `steps` vectors of pairs each.
template <int C>
static void paired_tile(const int32_t* w, const int32_t* x, int64_t ldx, int64_t steps, Vec* sums) {
  Vec acc[4][C];
  copy_sums<4, C>(sums, acc[0]);
  const int32_t* x3 = x + 3 * ldx;
  const int64_t l1 = ldx, l2 = 2 * ldx;
  for (int64_t k = 0; k < steps; ++k, w += kLanes, x += kLanes, x3 += kLanes) {
    VecI rows[4];
    for (int r = 0; r < 4; ++r) rows[r] = held(load(w + r * (kTileColumns / 2)));
#define UPWELL_STEP(c, at)                                                                      \
  if constexpr (C > (c)) {                                                                      \
    const VecI v = held(load(at));                                                              \
    for (int r = 0; r < 4; ++r) acc[r][(c) % C] = multiply_add(acc[r][(c) % C], v, rows[r]);    \
  }
    UPWELL_STEP(0, x) UPWELL_STEP(1, x + l1) UPWELL_STEP(2, x + l2)
    UPWELL_STEP(3, x3) UPWELL_STEP(4, x3 + l1) UPWELL_STEP(5, x3 + l2)
#undef UPWELL_STEP
  }
  copy_sums<4, C>(acc[0], sums);
}

template <int64_t F>
// Returns whether FP8's NaN was met: then out isn't what it should be.
__attribute__((noinline)) static bool paired_tiles(const Matrix& m, int64_t first, int width, const Inputs& in, float* out, int64_t ldo) {
  alignas(64) int32_t decoded[4][kTileColumns / 2];
  alignas(64) Vec sums[4 * kPairRows];
  const int64_t n = m.cols, row_bytes = n * 4 / kParts<F>, row_scales = F == kFP8 ? 0 : n / 32, t = in.t;
  const auto* data = static_cast<const uint8_t*>(m.data) + first * row_bytes;
  const uint8_t* scale = F == kFP8 ? m.scale + first / 128 * ((n + 127) / 128) : m.scale + first * row_scales;
  const int64_t groups = (t + 5) / 6;
  bool nan = false;
  for (int r = 0; r < width; r += 4) {
    for (int64_t i = 0; i < 4 * t; ++i) sums[i] = zero();
    for (int64_t from = 0; from < n; from += kTileColumns) {
      const int64_t count = n - from < kTileColumns ? n - from : kTileColumns, steps = (count + 127) / 128 * 4;
      for (int i = 0; i < 4; ++i)  // a missing row: the last again
        nan |= decode_scaled<F>({data + min64(r + i, width - 1) * row_bytes, scale + min64(r + i, width - 1) * row_scales, 0, 0},
                                from, count, 4 * row_bytes, decoded[i]);
      const int64_t ld = in.row_bytes / 4;
      const int32_t* x = in.row<int32_t>(0) + from / 2;
      Vec* s = sums;
      for (int64_t g = 0, c = 0; g < groups; ++g) {
        const int64_t count = t / groups + (g < t % groups);
        switch (count) {
#define UPWELL_TILE(C) case C: paired_tile<C>(decoded[0], x + c * ld, ld, steps, s); break;
          UPWELL_TILE(1) UPWELL_TILE(2) UPWELL_TILE(3) UPWELL_TILE(4) UPWELL_TILE(5) UPWELL_TILE(6)
#undef UPWELL_TILE
        }
        c += count, s += 4 * count;
      }
    }
    Vec* s = sums;
    for (int64_t g = 0, c = 0; g < groups; ++g) {
      const int64_t count = t / groups + (g < t % groups);
      for (int64_t i = 0; i < count; ++i) {
        float four[4];
        sum_four(s[i], s[count + i], s[2 * count + i], s[3 * count + i], four);
        for (int k = 0; k < 4 && r + k < width; ++k) out[(c + i) * ldo + r + k] = four[k];
      }
      c += count, s += 4 * count;
    }
  }
  return nan;
}
