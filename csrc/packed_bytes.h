// FP4 by integer products of bytes. A code's double is a whole number of -12 .. 12, found by one table look-up of 16
// bytes a nibble. An input row becomes, in each group of 32, 23-bit integers times a power of two, cut into three signed
// bytes; sums of 8 products are exact in 32 bits. That is as fine as FP32's own rounding of the group's largest value.

#if defined(__aarch64__)
constexpr int kBias = 0;  // what the table adds to a weight's double, to make it unsigned
typedef int8x16_t ByteVec;
INLINE ByteVec load_bytes(const void* p) { return vld1q_s8(static_cast<const int8_t*>(p)); }
INLINE ByteVec look_up(ByteVec table, ByteVec nibbles) { return vqtbl1q_s8(table, vreinterpretq_u8_s8(nibbles)); }
INLINE ByteVec low_nibbles(ByteVec v) { return vandq_s8(v, vdupq_n_s8(15)); }
INLINE ByteVec high_nibbles(ByteVec v) { return vreinterpretq_s8_u8(vshrq_n_u8(vreinterpretq_u8_s8(v), 4)); }
// acc + the products of bytes of (a, x) and (b, y), four neighbours a lane.
INLINE VecI dot_bytes(VecI acc, ByteVec a, ByteVec x, ByteVec b, ByteVec y) {
  return VecI(vdotq_s32(vdotq_s32(int32x4_t(acc), a, x), b, y));
}
#elif VECTOR_BYTES == 64
constexpr int kBias = 12;
typedef __m512i ByteVec;
INLINE ByteVec load_bytes(const void* p) { return _mm512_loadu_si512(p); }
INLINE ByteVec look_up(ByteVec table, ByteVec nibbles) { return _mm512_shuffle_epi8(table, nibbles); }
INLINE ByteVec low_nibbles(ByteVec v) { return _mm512_and_si512(v, _mm512_set1_epi8(15)); }
INLINE ByteVec high_nibbles(ByteVec v) { return low_nibbles(_mm512_srli_epi16(v, 4)); }
INLINE VecI dot_bytes(VecI acc, ByteVec a, ByteVec x, ByteVec b, ByteVec y) {
#if defined(UPWELL_VNNI)
  return VecI(_mm512_dpbusd_epi32(_mm512_dpbusd_epi32(__m512i(acc), a, x), b, y));
#else
  const __m512i pairs = _mm512_add_epi16(_mm512_maddubs_epi16(a, x), _mm512_maddubs_epi16(b, y));
  return acc + VecI(_mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
#endif
}
#else
constexpr int kBias = 12;
typedef __m256i ByteVec;
INLINE ByteVec load_bytes(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
INLINE ByteVec look_up(ByteVec table, ByteVec nibbles) { return _mm256_shuffle_epi8(table, nibbles); }
INLINE ByteVec low_nibbles(ByteVec v) { return _mm256_and_si256(v, _mm256_set1_epi8(15)); }
INLINE ByteVec high_nibbles(ByteVec v) { return low_nibbles(_mm256_srli_epi16(v, 4)); }
INLINE VecI dot_bytes(VecI acc, ByteVec a, ByteVec x, ByteVec b, ByteVec y) {
  const __m256i pairs = _mm256_add_epi16(_mm256_maddubs_epi16(a, x), _mm256_maddubs_epi16(b, y));
  return acc + VecI(_mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
#endif

// What a chunk (VECTOR_BYTES packed bytes, twice as many weights) needs of an input row.
struct alignas(VECTOR_BYTES) ByteChunk {
  int8_t part[3][2][VECTOR_BYTES];  // from the highest byte down; even columns, odd columns
  int32_t start[kLanes];            // -kBias times the sum of a lane's eight integers
  float scale[kLanes];
};

typedef int8_t SignedBytes __attribute__((vector_size(kLanes)));
typedef uint16_t BytePairs __attribute__((vector_size(32)));
typedef uint8_t EachSecond __attribute__((vector_size(16)));

static void lay_out_bytes(Inputs& in, const float* x, int64_t ldx) {
  constexpr int64_t chunk = 2 * VECTOR_BYTES;
  const int64_t chunks = (in.n + chunk - 1) / chunk;
  in.row_bytes = chunks * int64_t(sizeof(ByteChunk)) + kRowShift;
  in.fits = true;
  for (int64_t c = 0; c < in.t; ++c, x += ldx) {
    const int e = exponent_of(x, in.n);
    if (e == INT_MAX) {
      in.fits = false;
      return;
    }
    const int shift = e == INT_MIN ? 0 : -e;  // the row's largest value becomes 1 .. 2
    const float up[2] = {power_of_two(shift / 2), power_of_two(shift - shift / 2)};
    in.back[c][0] = power_of_two(-shift / 2), in.back[c][1] = power_of_two(-shift - -shift / 2);
    auto* out = reinterpret_cast<ByteChunk*>(in.space + c * in.row_bytes);
    for (int64_t group = 0; group < chunks * chunk / 32; ++group) {
      ByteChunk& to = out[group * 32 / chunk];
      const int lane = int(group * 32 % chunk / 8);  // its first of four
      float values[32];
      for (int i = 0; i < 32; i += kLanes)  // n is a multiple of 32
        store(values + i, group * 32 < in.n ? load(x + group * 32 + i) * up[0] * up[1] : zero());
      int own = exponent_of(values, 32);
      if (own < -100) own = -100;  // next to the row's largest value that is nothing
      const float fine = power_of_two(21 - own), scale = power_of_two(own - 22);  // 22: a table holds doubles
      alignas(64) int32_t wholes[32];
      alignas(32) int8_t bytes[3][32];
      for (int i = 0; i < 32; i += kLanes) {
        const VecI whole = round_to_int(load(values + i) * fine);
        const VecI low = (whole << 24) >> 24, rest = (whole - low) >> 8, middle = (rest << 24) >> 24;
        __builtin_memcpy(wholes + i, &whole, VECTOR_BYTES);
        const SignedBytes cut[3] = {__builtin_convertvector((rest - middle) >> 8, SignedBytes),
                                    __builtin_convertvector(middle, SignedBytes), __builtin_convertvector(low, SignedBytes)};
        for (int p = 0; p < 3; ++p) __builtin_memcpy(bytes[p] + i, &cut[p], kLanes);
      }
      for (int p = 0; p < 3; ++p) {
        BytePairs pairs;
        __builtin_memcpy(&pairs, bytes[p], 32);
        const EachSecond even = __builtin_convertvector(pairs, EachSecond), odd = __builtin_convertvector(pairs >> 8, EachSecond);
        __builtin_memcpy(to.part[p][0] + lane * 4, &even, 16);
        __builtin_memcpy(to.part[p][1] + lane * 4, &odd, 16);
      }
      for (int i = 0; i < 4; ++i) {
        int32_t sum = 0;
        for (int k = 0; k < 8; ++k) sum += wholes[8 * i + k];
        to.start[lane + i] = -kBias * sum, to.scale[lane + i] = scale;
      }
    }
  }
}

#if VECTOR_BYTES == 64
// One scale byte for each four lanes, moved to the exponent's place.
INLINE Vec byte_scales(const uint8_t* scale) {
  uint32_t bytes;
  __builtin_memcpy(&bytes, scale, 4);
  const __m512i to_top = _mm512_set_epi32(
      0x03808080, 0x03808080, 0x03808080, 0x03808080, 0x02808080, 0x02808080, 0x02808080, 0x02808080,
      0x01808080, 0x01808080, 0x01808080, 0x01808080, 0x00808080, 0x00808080, 0x00808080, 0x00808080);
  return Vec(_mm512_srli_epi32(_mm512_shuffle_epi8(_mm512_set1_epi32(int32_t(bytes)), to_top), 1));
}
#else
INLINE Vec byte_scales(const uint8_t* scale) { return lane_scales(scale, 0); }
#endif

struct alignas(64) DoublesOfCodes {
  int8_t values[VECTOR_BYTES] = {};
  constexpr DoublesOfCodes() {
    constexpr int8_t of_code[8] = {0, 1, 2, 3, 4, 6, 8, 12};
    for (int i = 0; i < VECTOR_BYTES; ++i) values[i] = int8_t(kBias + (i & 8 ? -of_code[i & 7] : of_code[i & 7]));
  }
};
constexpr DoublesOfCodes doubles_of_codes;

// acc[r][c] += a chunk of R weight rows, at column `at` of their rows and `col` of the inputs, times C input rows.
template <int R, int C>
INLINE void byte_chunk(const uint8_t* data, const uint8_t* scale, int64_t row_bytes, int64_t row_scales, int64_t at,
                       int64_t ahead, const Inputs& in, int64_t c0, int64_t col, ByteVec table, Vec (&acc)[R][C]) {
  ByteVec even[R], odd[R];
  Vec factor[R];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    const uint8_t* p = data + r * row_bytes + at / 2;
    __builtin_prefetch(p + ahead, 0, 2);  // into L2: L1 holds the inputs
    const ByteVec packed = load_bytes(p);
    even[r] = look_up(table, low_nibbles(packed)), odd[r] = look_up(table, high_nibbles(packed));
    factor[r] = byte_scales(scale + r * row_scales + at / 32);
  }
#pragma GCC unroll 4
  for (int c = 0; c < C; ++c) {
    const ByteChunk& x = in.row<ByteChunk>(c0 + c)[col / (2 * VECTOR_BYTES)];
    ByteVec part[3][2];  // once for all rows
    for (int i = 0; i < 6; ++i) part[i / 2][i % 2] = load_bytes(x.part[i / 2][i % 2]);
    const VecI start = *reinterpret_cast<const VecI*>(x.start);
    const Vec scales = load(x.scale);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      VecI sum = dot_bytes(VecI{}, even[r], part[0][0], odd[r], part[0][1]);
      sum = dot_bytes(sum << 8, even[r], part[1][0], odd[r], part[1][1]);
      sum = dot_bytes(sum << 8, even[r], part[2][0], odd[r], part[2][1]);
      acc[r][c] += __builtin_convertvector(sum + start, Vec) * (scales * factor[r]);
    }
  }
}
