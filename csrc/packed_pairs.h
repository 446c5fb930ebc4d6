// FP4, FP8 and BF16 weights by dot products of BF16, which holds each code exactly: a chunk of a weight row becomes four
// vectors of BF16, in the order in which the codes come apart. Inputs, rounded, are laid out in that order.
//
// Few input rows are multiplied in registers (AVX-512 only): a lane holds columns of one scale, so a scale multiplies a
// chunk's sum. Decoded numbers are small by 2^-kSmall, so that this sum of eight products stays finite wherever the input
// and the scaled one are. More rows: packed_tiles.h.

constexpr bool kPairsInRegisters = VECTOR_BYTES == 64;
template <int64_t F>
constexpr int kTiledRows = kPairsInRegisters && F == kBF16 ? 8 : 6;  // from so many on
template <int64_t F>
constexpr int kChunkBytes = kPairChunk * 4 / kParts<F>;
template <int64_t F>
constexpr int kSmall = F == kFP4 ? 8 : F == kFP8 ? 12 : 0;

constexpr int bf16_of_fp4(int code) {
  constexpr int of_code[8] = {0, 0x3f00, 0x3f80, 0x3fc0, 0x4000, 0x4040, 0x4080, 0x40c0};
  return (code & 7 ? of_code[code & 7] - (kSmall<kFP4> << 7) : 0) | (code & 8 ? 0x8000 : 0);
}
constexpr int bf16_of_fp8(int magnitude) {
  if (magnitude == 0) return 0;
  if (magnitude == 127) return 0x7fc0;
  if (magnitude >= 8) return (magnitude << 4) + ((120 - kSmall<kFP8>) << 7);
  const int top = magnitude >= 4 ? 2 : magnitude >= 2 ? 1 : 0;  // a subnormal, magnitude * 2^-9
  return (127 - 9 + top - kSmall<kFP8>) << 7 | (magnitude - (1 << top)) << (7 - top);
}
struct alignas(64) PairTables {
  uint16_t fp4[32] = {};  // twice: the bit above a nibble doesn't matter
  alignas(64) uint8_t fp8_high[128] = {}, fp8_low[128] = {};  // bytes
  uint8_t fp4_high[16] = {}, fp4_low[16] = {};
  constexpr PairTables() {
    for (int i = 0; i < 32; ++i) fp4[i] = uint16_t(bf16_of_fp4(i & 15));
    for (int i = 0; i < 16; ++i) fp4_high[i] = uint8_t(bf16_of_fp4(i) >> 8), fp4_low[i] = uint8_t(bf16_of_fp4(i));
    for (int i = 0; i < 128; ++i) fp8_high[i] = uint8_t(bf16_of_fp8(i) >> 8), fp8_low[i] = uint8_t(bf16_of_fp8(i));
  }
};
constexpr PairTables pair_tables;

#if defined(__aarch64__)
INLINE void zip_bytes(uint8x16_t low, uint8x16_t high, VecI* out) {
  out[0] = VecI(vreinterpretq_s32_u8(vzip1q_u8(low, high))), out[1] = VecI(vreinterpretq_s32_u8(vzip2q_u8(low, high)));
}
// v plus `up`, an exponent in BF16's place, for each number but 0.
INLINE VecI scaled(VecI v, VecI up) {
  const uint16x8_t n = vreinterpretq_u16_s32(int32x4_t(v));
  const uint16x8_t more = vandq_u16(vreinterpretq_u16_s32(int32x4_t(up)), vtstq_u16(n, vdupq_n_u16(0x7fff)));
  return VecI(vreinterpretq_s32_u16(vaddq_u16(n, more)));
}
// A weight row's chunk: of FP8's NaN comes something finite.
template <int64_t F>
INLINE void decode_pairs(const uint8_t* p, VecI (&parts)[4]) {
  if constexpr (F == kBF16) {
    for (int i = 0; i < 4; ++i) parts[i] = load_words(p + VECTOR_BYTES * i);
  } else if constexpr (F == kFP8) {
    const uint8x16_t high = vld1q_u8(pair_tables.fp8_high), low = vld1q_u8(pair_tables.fp8_low);
    for (int i = 0; i < 2; ++i) {
      const uint8x16_t code = vld1q_u8(p + 16 * i), magnitude = vandq_u8(code, vdupq_n_u8(0x7f));
      const uint8x16_t few = vcltq_u8(magnitude, vdupq_n_u8(8));  // zero and subnormals: by a look-up
      const uint8x16_t top = vaddq_u8(vshrq_n_u8(magnitude, 4), vdupq_n_u8((120 - kSmall<kFP8>) / 2));
      const uint8x16_t tops = vbslq_u8(few, vqtbl1q_u8(high, magnitude), top);
      const uint8x16_t rests = vbslq_u8(few, vqtbl1q_u8(low, magnitude), vshlq_n_u8(magnitude, 4));
      zip_bytes(rests, vorrq_u8(tops, vandq_u8(code, vdupq_n_u8(0x80))), parts + 2 * i);
    }
  } else {
    const uint8x16_t high = vld1q_u8(pair_tables.fp4_high), low = vld1q_u8(pair_tables.fp4_low), codes = vld1q_u8(p);
    const uint8x16_t even = vandq_u8(codes, vdupq_n_u8(15)), odd = vshrq_n_u8(codes, 4);
    zip_bytes(vqtbl1q_u8(low, even), vqtbl1q_u8(high, even), parts);
    zip_bytes(vqtbl1q_u8(low, odd), vqtbl1q_u8(high, odd), parts + 2);
  }
}
// Inputs of a chunk in that order.
template <int64_t F>
INLINE void order_pairs(const Vec (&v)[8], VecI (&parts)[4]) {
  if constexpr (F == kFP4) {
    Vec apart[8];
    for (int i = 0; i < 8; i += 2) every_pth<2>(v + i, apart + i);
    for (int i = 0; i < 4; ++i) parts[i] = round_neighbours(apart[i % 2 * 4 + i / 2], apart[i % 2 * 4 + i / 2 + 2]);
  } else {
    for (int i = 0; i < 4; ++i) parts[i] = round_neighbours(v[2 * i], v[2 * i + 1]);
  }
}
// The exponents of a chunk's scales, in BF16's place in each half of a lane.
template <int64_t F>
INLINE VecI scale_exponents(const uint8_t* scale) {
  return VecI(vreinterpretq_s32_u16(vdupq_n_u16(uint16_t((*scale - 127 + kSmall<F>) << 7))));
}
#else
INLINE VecI scaled(VecI v, VecI up) {
  const auto n = reinterpret_cast<__m512i>(v);
  return reinterpret_cast<VecI>(
      _mm512_mask_add_epi16(n, _mm512_test_epi16_mask(n, _mm512_set1_epi16(0x7fff)), n, reinterpret_cast<__m512i>(up)));
}
template <int64_t F>
INLINE void decode_pairs(const uint8_t* p, VecI (&parts)[4]) {
  __m512i out[4];
  if constexpr (F == kBF16) {
    for (int i = 0; i < 4; ++i) out[i] = _mm512_loadu_si512(p + 64 * i);
  } else if constexpr (F == kFP8) {
    const __m512i high[2] = {_mm512_load_si512(pair_tables.fp8_high), _mm512_load_si512(pair_tables.fp8_high + 64)};
    const __m512i low[2] = {_mm512_load_si512(pair_tables.fp8_low), _mm512_load_si512(pair_tables.fp8_low + 64)};
    for (int i = 0; i < 2; ++i) {
      const __m512i codes = _mm512_loadu_si512(p + 64 * i);
      const __m512i tops = _mm512_ternarylogic_epi32(_mm512_permutex2var_epi8(high[0], codes, high[1]), codes,
                                                     _mm512_set1_epi8(int8_t(0x80)), 0xf8);  // a | (b & c)
      const __m512i rests = _mm512_permutex2var_epi8(low[0], codes, low[1]);
      out[2 * i] = _mm512_unpacklo_epi8(rests, tops), out[2 * i + 1] = _mm512_unpackhi_epi8(rests, tops);
    }
  } else {
    const __m512i table = _mm512_load_si512(pair_tables.fp4), codes = _mm512_loadu_si512(p);
    out[0] = _mm512_permutexvar_epi16(codes, table);
    out[1] = _mm512_permutexvar_epi16(_mm512_srli_epi16(codes, 4), table);
    out[2] = _mm512_permutexvar_epi16(_mm512_srli_epi16(codes, 8), table);
    out[3] = _mm512_permutexvar_epi16(_mm512_srli_epi16(codes, 12), table);
  }
  for (int i = 0; i < 4; ++i) parts[i] = reinterpret_cast<VecI>(out[i]);
}
template <int64_t F>
INLINE void order_pairs(const Vec (&v)[8], VecI (&parts)[4]) {
  if constexpr (F == kFP4) {  // each fourth column
    Vec four[8];
    every_pth<4>(v, four);
    every_pth<4>(v + 4, four + 4);
    for (int i = 0; i < 4; ++i) parts[i] = round_neighbours(four[i], four[4 + i]);
  } else {
    for (int i = 0; i < 4; ++i) parts[i] = round_neighbours(v[2 * i], v[2 * i + 1]);
  }
  if constexpr (F == kFP8)  // each second eight
    for (int i = 0; i < 4; i += 2) {
      const auto a = reinterpret_cast<__m512i>(parts[i]), b = reinterpret_cast<__m512i>(parts[i + 1]);
      parts[i] = reinterpret_cast<VecI>(_mm512_shuffle_i64x2(a, b, 0x88));
      parts[i + 1] = reinterpret_cast<VecI>(_mm512_shuffle_i64x2(a, b, 0xdd));
    }
}
template <int64_t F>
INLINE VecI scale_exponents(const uint8_t* scale) {
  if constexpr (F == kFP8) return reinterpret_cast<VecI>(_mm512_set1_epi16(int16_t((*scale - 127 + kSmall<F>) << 7)));
  const VecI one = reinterpret_cast<VecI>(lane_scales(scale, kSmall<F> - 127)) >> 16;
  return (one & 0xffff) | (one << 16);
}
#endif

template <int64_t F>
static void lay_out_paired(Inputs& in, const float* x, int64_t ldx) {
  const int64_t chunks = (in.n + kPairChunk - 1) / kPairChunk;
  in.row_bytes = chunks * 2 * kPairChunk + kRowShift;
  in.fits = true;
  for (int64_t c = 0; c < in.t; ++c, x += ldx) {
    auto* out = reinterpret_cast<int32_t*>(in.space + c * in.row_bytes);
    for (int64_t base = 0; base < in.n; base += kPairChunk) {
      Vec v[8];
      VecI parts[4];
      for (int i = 0; i < 8; ++i) v[i] = base + i * kLanes < in.n ? load_at(x + base, i * kLanes, in.n - base) : zero();
      order_pairs<F>(v, parts);
      for (int i = 0; i < 4; ++i, out += kLanes) store(reinterpret_cast<float*>(out), reinterpret_cast<Vec>(parts[i]));
    }
  }
}

// acc[r][c] += a chunk of R weight rows times C input rows. `ahead`: bytes to prefetch ahead.
template <int64_t F, int R, int C>
INLINE void paired_chunk(const Rows& w, int64_t col, int64_t ahead, const Inputs& in, int64_t c0, Vec (&acc)[R][C]) {
  VecI parts[R][4];
  Vec factor[R];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    const uint8_t* p = w.data + r * w.row_bytes + col * 4 / kParts<F>;
    for (int i = 0; i < kChunkBytes<F>; i += 64) __builtin_prefetch(p + ahead + i, 0, 2);  // into L2: L1 holds the inputs
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

// One row's columns [col, col + count) times their scales, padded with zeros to whole chunks. nan: see any_nan.
template <int64_t F>
INLINE void decode_scaled(const Rows& w, int64_t col, int64_t count, int64_t ahead, int32_t* out, VecI& nan) {
  each_chunk<F, kPairChunk>(w, col, count, ahead, [&](const uint8_t* p, const uint8_t* scale) {
    VecI parts[4];
    decode_pairs<F>(p, parts);
    if constexpr (F == kFP8)
      for (int k = 0; k < kChunkBytes<F>; k += VECTOR_BYTES) nan |= nan_bits(load_words(p + k));
    if constexpr (F != kBF16) {
      const VecI up = scale_exponents<F>(scale);
      for (int k = 0; k < 4; ++k) parts[k] = scaled(parts[k], up);
    }
    for (int k = 0; k < 4; ++k, out += kLanes) store(reinterpret_cast<float*>(out), reinterpret_cast<Vec>(parts[k]));
  });
}
