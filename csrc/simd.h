// Vectors in the compiler's generic notation: the same source makes SSE2, AVX2, AVX-512 and NEON code.
// Included inside a namespace of each instruction set, after VECTOR_BYTES is set; no include guard.

#ifndef UPWELL_BF16_DOTS
#define UPWELL_BF16_DOTS 0
#endif
#ifndef UPWELL_BYTE_DOTS
#define UPWELL_BYTE_DOTS 0
#endif
#if defined(UPWELL_VNNI) || (UPWELL_BYTE_DOTS && defined(__aarch64__))
#define UPWELL_INTEGER_DOTS 1  // of bytes, exact in 32 bits (integers.h)
#else
#define UPWELL_INTEGER_DOTS 0
#endif

constexpr int kLanes = VECTOR_BYTES / 4;
typedef float Vec __attribute__((vector_size(VECTOR_BYTES)));
typedef int32_t VecI __attribute__((vector_size(VECTOR_BYTES)));
typedef uint32_t VecQ __attribute__((vector_size(VECTOR_BYTES)));  // four bytes a lane
typedef float VecU __attribute__((vector_size(VECTOR_BYTES), aligned(4), may_alias));
typedef uint16_t Half16 __attribute__((vector_size(VECTOR_BYTES / 2), aligned(2), may_alias));
typedef uint8_t Bytes __attribute__((vector_size(VECTOR_BYTES / 4), aligned(1), may_alias));
#define INLINE static inline __attribute__((always_inline))

INLINE Vec load(const float* p) { return *reinterpret_cast<const VecU*>(p); }
INLINE VecI load(const int32_t* p) { return reinterpret_cast<VecI>(load(reinterpret_cast<const float*>(p))); }
INLINE VecQ load(const uint32_t* p) { return reinterpret_cast<VecQ>(load(reinterpret_cast<const float*>(p))); }
INLINE void store(float* p, Vec v) { *reinterpret_cast<VecU*>(p) = v; }
INLINE void store(uint32_t* p, VecQ v) { store(reinterpret_cast<float*>(p), reinterpret_cast<Vec>(v)); }
INLINE Vec whole(VecI v) { return __builtin_convertvector(v, Vec); }
template <class T>
using Lanes = decltype(load(static_cast<const T*>(nullptr)));
// v, from here on in a register: the compiler would rather read it again from memory for each use.
INLINE Vec held(Vec v) {
#if VECTOR_BYTES == 64
  asm("" : "+v"(v));
#elif defined(__x86_64__)
  asm("" : "+x"(v));
#elif defined(__aarch64__)
  asm("" : "+w"(v));
#endif
  return v;
}
INLINE VecI held(VecI v) { return reinterpret_cast<VecI>(held(reinterpret_cast<Vec>(v))); }
INLINE Vec multiply_add(Vec acc, Vec x, Vec w) { return acc + x * w; }
// Of lanes that hold a pair of BF16 each: both products, summed in FP32.
INLINE Vec multiply_add(Vec acc, VecI x, VecI w) {
#if UPWELL_BF16_DOTS && defined(__aarch64__)
  return Vec(vbfdotq_f32(float32x4_t(acc), vreinterpretq_bf16_s32(int32x4_t(x)), vreinterpretq_bf16_s32(int32x4_t(w))));
#elif UPWELL_BF16_DOTS
  __m512bh a, b;
  __builtin_memcpy(&a, &x, 64);
  __builtin_memcpy(&b, &w, 64);
  return reinterpret_cast<Vec>(_mm512_dpbf16_ps(reinterpret_cast<__m512>(acc), a, b));
#else
  acc += reinterpret_cast<Vec>(x << 16) * reinterpret_cast<Vec>(w << 16);
  return acc + reinterpret_cast<Vec>(x & int32_t(0xffff0000)) * reinterpret_cast<Vec>(w & int32_t(0xffff0000));
#endif
}
#if defined(__x86_64__)
INLINE VecI dot_pairs(VecI sum, VecI a, VecI b) {  // sum + a.low b.low + a.high b.high, 16-bit halves of each lane
#if defined(UPWELL_VNNI)
  return reinterpret_cast<VecI>(_mm512_dpwssd_epi32(reinterpret_cast<__m512i>(sum), reinterpret_cast<__m512i>(a),
                                                    reinterpret_cast<__m512i>(b)));
#elif VECTOR_BYTES == 64
  return sum + reinterpret_cast<VecI>(_mm512_madd_epi16(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
#elif VECTOR_BYTES == 32
  return sum + reinterpret_cast<VecI>(_mm256_madd_epi16(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
#else
  return sum + reinterpret_cast<VecI>(_mm_madd_epi16(reinterpret_cast<__m128i>(a), reinterpret_cast<__m128i>(b)));
#endif
}
#else
INLINE VecI dot_pairs(VecI sum, VecI, VecI) { return sum; }  // not used (index_shorts.h)
#endif
#if defined(UPWELL_VNNI)
constexpr uint32_t kAdded = 128;  // to one side's bytes: VNNI multiplies unsigned ones by signed ones
#else
constexpr uint32_t kAdded = 0;
#endif
// Of lanes that hold four bytes each: their products, summed in lanes of 32-bit integers. w's have kAdded added.
INLINE VecI dot_bytes(VecI sums, VecQ x, VecQ w) {
#if defined(UPWELL_VNNI)
  return reinterpret_cast<VecI>(
      _mm512_dpbusd_epi32(reinterpret_cast<__m512i>(sums), reinterpret_cast<__m512i>(w), reinterpret_cast<__m512i>(x)));
#elif UPWELL_INTEGER_DOTS
  return VecI(vdotq_s32(int32x4_t(sums), vreinterpretq_s8_u32(uint32x4_t(x)), vreinterpretq_s8_u32(uint32x4_t(w))));
#elif defined(__aarch64__)
  const int8x16_t a = vreinterpretq_s8_u32(uint32x4_t(x)), b = vreinterpretq_s8_u32(uint32x4_t(w));
  const int16x8_t low = vmull_s8(vget_low_s8(a), vget_low_s8(b)), high = vmull_s8(vget_high_s8(a), vget_high_s8(b));
  return sums + VecI(vpaddq_s32(vpaddlq_s16(low), vpaddlq_s16(high)));
#else
  typedef int16_t Shorts __attribute__((vector_size(VECTOR_BYTES)));
  const Shorts a = reinterpret_cast<Shorts>(x), b = reinterpret_cast<Shorts>(w);
  auto lanes = [](Shorts v) { return reinterpret_cast<VecI>(v); };
  return dot_pairs(dot_pairs(sums, lanes(a << 8 >> 8), lanes(b << 8 >> 8)), lanes(a >> 8), lanes(b >> 8));
#endif
}
INLINE VecI multiply_add(VecI sums, VecQ x, VecQ w) { return dot_bytes(sums, x, w); }
template <class T>  // float, or int32_t: pairs
constexpr bool kOfPairs = false;
template <>
constexpr bool kOfPairs<int32_t> = true;
template <class T>  // uint32_t: four integers, a byte each
constexpr bool kOfIntegers = false;
template <>
constexpr bool kOfIntegers<uint32_t> = true;
template <class T>  // of products of such
using Sums = std::conditional_t<kOfIntegers<T>, VecI, Vec>;
INLINE Vec splat(float x) { return x - Vec{}; }
INLINE Vec zero() { return Vec{}; }
INLINE Vec select(VecI mask, Vec a, Vec b) { return mask ? a : b; }

INLINE Vec load_part(const float* p, int n) {
#if VECTOR_BYTES == 64
  return reinterpret_cast<Vec>(_mm512_maskz_loadu_ps(__mmask16((1u << n) - 1), p));
#else
  Vec v{};
  __builtin_memcpy(&v, p, sizeof(float) * n);
  return v;
#endif
}
INLINE void store_part(float* p, Vec v, int n) {
#if VECTOR_BYTES == 64
  _mm512_mask_storeu_ps(p, __mmask16((1u << n) - 1), reinterpret_cast<__m512>(v));
#else
  __builtin_memcpy(p, &v, sizeof(float) * n);
#endif
}

// To an aligned place that isn't read soon: past the cache where the instruction set can. finish_past_cache() comes
// before other threads are told.
INLINE void store_past_cache(float* p, Vec v) {
#if VECTOR_BYTES == 64
  _mm512_stream_ps(p, reinterpret_cast<__m512>(v));
#elif VECTOR_BYTES == 32
  _mm256_stream_ps(p, reinterpret_cast<__m256>(v));
#else
  store(p, v);
#endif
}
INLINE void finish_past_cache() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

// f of all lanes of a Vec or VecI, by halves.
template <class V, class F>
INLINE auto fold_lanes(V v, F f) {
#if VECTOR_BYTES == 64
  const auto a = f(__builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7), __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15));
  const auto b = f(__builtin_shufflevector(a, a, 0, 1, 2, 3), __builtin_shufflevector(a, a, 4, 5, 6, 7));
#elif VECTOR_BYTES == 32
  const auto b = f(__builtin_shufflevector(v, v, 0, 1, 2, 3), __builtin_shufflevector(v, v, 4, 5, 6, 7));
#else
  const V b = v;
#endif
  return f(f(b[0], b[1]), f(b[2], b[3]));
}
template <class V>
INLINE auto sum_lanes(V v) {
  return fold_lanes(v, [](auto a, auto b) { return a + b; });
}
template <class V>
INLINE auto largest_lane(V v) {
  return fold_lanes(v, [](auto a, auto b) { return a > b ? a : b; });
}

// The lane sums of a, b, c, d, into out[0..3]: a transposition that adds, cheaper than four sum_lanes.
template <class V, class T>  // Vec and float, or VecI and int32_t
INLINE void sum_four(V a, V b, V c, V d, T* out) {
#if VECTOR_BYTES == 64
#define UPWELL_LOW32 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29
#define UPWELL_HIGH32 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31
#define UPWELL_LOW64 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29
#define UPWELL_HIGH64 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31
#elif VECTOR_BYTES == 32
#define UPWELL_LOW32 0, 8, 1, 9, 4, 12, 5, 13
#define UPWELL_HIGH32 2, 10, 3, 11, 6, 14, 7, 15
#define UPWELL_LOW64 0, 1, 8, 9, 4, 5, 12, 13
#define UPWELL_HIGH64 2, 3, 10, 11, 6, 7, 14, 15
#else
#define UPWELL_LOW32 0, 4, 1, 5
#define UPWELL_HIGH32 2, 6, 3, 7
#define UPWELL_LOW64 0, 1, 4, 5
#define UPWELL_HIGH64 2, 3, 6, 7
#endif
  const V ab = __builtin_shufflevector(a, b, UPWELL_LOW32) + __builtin_shufflevector(a, b, UPWELL_HIGH32);
  const V cd = __builtin_shufflevector(c, d, UPWELL_LOW32) + __builtin_shufflevector(c, d, UPWELL_HIGH32);
  const V s = __builtin_shufflevector(ab, cd, UPWELL_LOW64) + __builtin_shufflevector(ab, cd, UPWELL_HIGH64);
#undef UPWELL_LOW32
#undef UPWELL_HIGH32
#undef UPWELL_LOW64
#undef UPWELL_HIGH64
  typedef T V4 __attribute__((vector_size(16)));
  typedef T V4U __attribute__((vector_size(16), aligned(4), may_alias));
#if VECTOR_BYTES == 64
  typedef T V8 __attribute__((vector_size(32)));
  const V8 half = __builtin_shufflevector(s, s, 0, 1, 2, 3, 4, 5, 6, 7) +
                  __builtin_shufflevector(s, s, 8, 9, 10, 11, 12, 13, 14, 15);
  const V4 sums = __builtin_shufflevector(half, half, 0, 1, 2, 3) + __builtin_shufflevector(half, half, 4, 5, 6, 7);
#elif VECTOR_BYTES == 32
  const V4 sums = __builtin_shufflevector(s, s, 0, 1, 2, 3) + __builtin_shufflevector(s, s, 4, 5, 6, 7);
#else
  const V4 sums = s;
#endif
  *reinterpret_cast<V4U*>(out) = sums;
}

constexpr float kRounding = 12582912.0f;  // 1.5 * 2^23: adding and subtracting it rounds to the nearest even integer

INLINE Vec larger(Vec a, Vec b) {  // b where either is NaN
#if VECTOR_BYTES == 64
  return reinterpret_cast<Vec>(_mm512_max_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b)));
#elif VECTOR_BYTES == 32
  return reinterpret_cast<Vec>(_mm256_max_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b)));
#else
  return select(a > b, a, b);
#endif
}

#if VECTOR_BYTES == 64
INLINE Vec smaller(Vec a, Vec b) { return reinterpret_cast<Vec>(_mm512_min_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b))); }
INLINE Vec nearest(Vec x) { return reinterpret_cast<Vec>(_mm512_roundscale_ps(reinterpret_cast<__m512>(x), 0)); }
INLINE Vec times_power(Vec x, Vec exponent) {  // x 2^exponent
  return reinterpret_cast<Vec>(_mm512_scalef_ps(reinterpret_cast<__m512>(x), reinterpret_cast<__m512>(exponent)));
}
#endif

// exp to about 1 ulp; exact at -inf (0), +inf and NaN.
INLINE Vec exp_vec(Vec x) {
#if VECTOR_BYTES == 64
  const Vec clamped = smaller(splat(89.0f), larger(splat(-104.0f), x));  // to inf and 0: inf itself leaves no rest
  const Vec n = nearest(clamped * 1.44269504f);
#else
  const Vec magic = splat(kRounding);
  Vec clamped = select(x > 88.0f, splat(88.0f), select(x < -87.0f, splat(-87.0f), x));
  Vec shifted = clamped * 1.44269504f + magic;
  Vec n = shifted - magic;
#endif
  Vec r = clamped - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  Vec p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
#if VECTOR_BYTES == 64
  return times_power(p, n);
#else
  VecI power = (reinterpret_cast<VecI>(shifted) - reinterpret_cast<VecI>(magic) + 127) << 23;
  Vec result = p * reinterpret_cast<Vec>(power);
  result = select(x < -87.0f, zero(), result);
  result = select(x > 88.0f, splat(__builtin_inff()), result);
  return select(x != x, x, result);
#endif
}
INLINE Vec sigmoid(Vec x) { return 1.0f / (1.0f + exp_vec(-x)); }

INLINE Vec square_root(Vec v) {
#if VECTOR_BYTES == 64
  return reinterpret_cast<Vec>(_mm512_sqrt_ps(reinterpret_cast<__m512>(v)));
#elif VECTOR_BYTES == 32
  return reinterpret_cast<Vec>(_mm256_sqrt_ps(reinterpret_cast<__m256>(v)));
#else
  for (int i = 0; i < kLanes; ++i) v[i] = std::sqrt(v[i]);
  return v;
#endif
}

// To the nearest whole number, |x| < 2^22: the low bits of a sum with kRounding hold it.
INLINE VecI round_to_int(Vec x) {
  const Vec magic = splat(kRounding);
  return reinterpret_cast<VecI>(x + magic) - reinterpret_cast<VecI>(magic);
}

// 2^x of x <= 0 (or NaN): what a softmax needs. 0 below -126, or with AVX-512 below what subnormals hold.
INLINE Vec exp2_below(Vec x) {
#if VECTOR_BYTES == 64
  x = larger(splat(-200.0f), x);  // -inf less itself would be NaN
  const Vec n = nearest(x), r = x - n;
#else
  const Vec magic = splat(kRounding), shifted = x + magic, r = x - (shifted - magic);
#endif
  Vec p = splat(1.33952310e-3f);
  p = p * r + 9.61837694e-3f;
  p = p * r + 5.55033238e-2f;
  p = p * r + 2.40226463e-1f;
  p = p * r + 6.93147182e-1f;
  p = p * r + 1.0f;
#if VECTOR_BYTES == 64
  return times_power(p, n);
#else
  return select(x < -126.0f, zero(), reinterpret_cast<Vec>(reinterpret_cast<VecI>(p) + (reinterpret_cast<VecI>(shifted) << 23)));
#endif
}

constexpr float kLog2e = 1.44269504f;
INLINE Vec exp_below(Vec x) { return exp2_below(x * kLog2e); }

// log(1 + e^x), by log1p(u) = 2 atanh(u / (2 + u)).
INLINE Vec softplus(Vec x) {
  const Vec u = exp_vec(select(x > 0.0f, -x, x)), w = u / (2.0f + u), w2 = w * w;
  Vec p = splat(1.0f / 17);
  for (int odd = 15; odd > 0; odd -= 2) p = p * w2 + 1.0f / float(odd);
  return select(x > 0.0f, x, zero()) + 2.0f * w * p;
}

// in: P vectors in a row -> out[p]: each P-th lane of them, from lane p on.
template <int P>
INLINE void every_pth(const Vec* in, Vec* out) {
#if VECTOR_BYTES == 64
#define UPWELL_EVEN 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30
#define UPWELL_ODD 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31
#elif VECTOR_BYTES == 32
#define UPWELL_EVEN 0, 2, 4, 6, 8, 10, 12, 14
#define UPWELL_ODD 1, 3, 5, 7, 9, 11, 13, 15
#else
#define UPWELL_EVEN 0, 2, 4, 6
#define UPWELL_ODD 1, 3, 5, 7
#endif
  if constexpr (P == 1) {
    out[0] = in[0];
  } else {
    Vec even[P / 2], odd[P / 2], evens[P / 2], odds[P / 2];
    for (int i = 0; i < P / 2; ++i) {
      even[i] = __builtin_shufflevector(in[2 * i], in[2 * i + 1], UPWELL_EVEN);
      odd[i] = __builtin_shufflevector(in[2 * i], in[2 * i + 1], UPWELL_ODD);
    }
    every_pth<P / 2>(even, evens);
    every_pth<P / 2>(odd, odds);
    for (int i = 0; i < P / 2; ++i) out[2 * i] = evens[i], out[2 * i + 1] = odds[i];
  }
#undef UPWELL_EVEN
#undef UPWELL_ODD
}

// Pairs of a lane of `even` and the same one of `odd`.
INLINE VecI round_pairs(Vec even, Vec odd) {
#if UPWELL_BF16_DOTS && defined(__aarch64__)
  const bfloat16x8_t a = vcvtq_low_bf16_f32(float32x4_t(even)), b = vcvtq_low_bf16_f32(float32x4_t(odd));
  return VecI(vreinterpretq_s32_s16(vzip1q_s16(vreinterpretq_s16_bf16(a), vreinterpretq_s16_bf16(b))));
#elif UPWELL_BF16_DOTS
  const __m512bh both = _mm512_cvtne2ps_pbh(reinterpret_cast<__m512>(odd), reinterpret_cast<__m512>(even));
  typedef int16_t Shorts __attribute__((vector_size(64)));
  Shorts apart;
  __builtin_memcpy(&apart, &both, 64);
  return reinterpret_cast<VecI>(__builtin_shufflevector(apart, apart, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23, 8,
                                                        24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31));
#else
  auto rounded = [](Vec v) {
    const VecI bits = reinterpret_cast<VecI>(v);
    return select(v != v, reinterpret_cast<Vec>(bits | 0x400000), reinterpret_cast<Vec>(bits + 0x7fff + (bits >> 16 & 1)));
  };
  const VecI low = reinterpret_cast<VecI>(rounded(even)), high = reinterpret_cast<VecI>(rounded(odd));
  return (low >> 16 & 0xffff) | (high & int32_t(0xffff0000));
#endif
}
// Pairs of neighbouring lanes, those of a first.
INLINE VecI round_neighbours(Vec a, Vec b) {
#if UPWELL_BF16_DOTS && defined(__aarch64__)
  return VecI(vreinterpretq_s32_bf16(vcvtq_high_bf16_f32(vcvtq_low_bf16_f32(float32x4_t(a)), float32x4_t(b))));
#elif UPWELL_BF16_DOTS
  const __m512bh both = _mm512_cvtne2ps_pbh(reinterpret_cast<__m512>(b), reinterpret_cast<__m512>(a));
  VecI pairs;
  __builtin_memcpy(&pairs, &both, 64);
  return pairs;
#else
  const Vec in[2] = {a, b};
  Vec apart[2];
  every_pth<2>(in, apart);
  return round_pairs(apart[0], apart[1]);
#endif
}

// The lower halves of both, or the upper ones, lane by lane in turn.
#if VECTOR_BYTES == 64
#define UPWELL_LOW 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define UPWELL_HIGH 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#elif VECTOR_BYTES == 32
#define UPWELL_LOW 0, 8, 1, 9, 2, 10, 3, 11
#define UPWELL_HIGH 4, 12, 5, 13, 6, 14, 7, 15
#else
#define UPWELL_LOW 0, 4, 1, 5
#define UPWELL_HIGH 2, 6, 3, 7
#endif
INLINE Vec low_turns(Vec a, Vec b) { return __builtin_shufflevector(a, b, UPWELL_LOW); }
INLINE Vec high_turns(Vec a, Vec b) { return __builtin_shufflevector(a, b, UPWELL_HIGH); }
#undef UPWELL_LOW
#undef UPWELL_HIGH

// a[i][j] -> a[j][i].
INLINE void transpose(Vec (&a)[kLanes]) {
  for (int round = 1; round < kLanes; round *= 2) {
    Vec next[kLanes];
    for (int i = 0; i < kLanes / 2; ++i) {
      next[2 * i] = low_turns(a[i], a[i + kLanes / 2]);
      next[2 * i + 1] = high_turns(a[i], a[i + kLanes / 2]);
    }
    for (int i = 0; i < kLanes; ++i) a[i] = next[i];
  }
}

// Neighbouring lanes change places.
INLINE Vec swap_pairs(Vec v) {
#if VECTOR_BYTES == 64
  return __builtin_shufflevector(v, v, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
#elif VECTOR_BYTES == 32
  return __builtin_shufflevector(v, v, 1, 0, 3, 2, 5, 4, 7, 6);
#else
  return __builtin_shufflevector(v, v, 1, 0, 3, 2);
#endif
}

// Even lanes of a, odd ones of b.
INLINE Vec take_turns(Vec a, Vec b) {
  VecI odd{};
  for (int i = 1; i < kLanes; i += 2) odd[i] = -1;
  return select(odd, b, a);
}
INLINE VecI swap_pairs(VecI v) { return reinterpret_cast<VecI>(swap_pairs(reinterpret_cast<Vec>(v))); }
INLINE VecI take_turns(VecI a, VecI b) {
  return reinterpret_cast<VecI>(take_turns(reinterpret_cast<Vec>(a), reinterpret_cast<Vec>(b)));
}
// Every second lane from the first on, in both halves.
INLINE Vec every_second(Vec v) {
  const Vec in[2] = {v, v};
  Vec apart[2];
  every_pth<2>(in, apart);
  return apart[0];
}
INLINE VecI every_second(VecI v) { return reinterpret_cast<VecI>(every_second(reinterpret_cast<Vec>(v))); }

// One bit a lane: whether the mask is set there.
INLINE unsigned lane_bits(VecI mask) {
#if VECTOR_BYTES == 64
  return unsigned(_mm512_movepi32_mask(reinterpret_cast<__m512i>(mask)));
#elif VECTOR_BYTES == 32
  return unsigned(_mm256_movemask_ps(reinterpret_cast<__m256>(mask)));
#else
  unsigned bits = 0;
  for (int i = 0; i < kLanes; ++i) bits |= unsigned(mask[i] & 1) << i;
  return bits;
#endif
}

// ---- elementwise loops over n floats ----
INLINE float dot(const float* a, const float* b, int64_t n) {
  Vec s0{}, s1{}, s2{}, s3{};
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
    s0 += load(a + i) * load(b + i);
    s1 += load(a + i + kLanes) * load(b + i + kLanes);
    s2 += load(a + i + 2 * kLanes) * load(b + i + 2 * kLanes);
    s3 += load(a + i + 3 * kLanes) * load(b + i + 3 * kLanes);
  }
  for (; i + kLanes <= n; i += kLanes) s0 += load(a + i) * load(b + i);
  if (i < n) s1 += load_part(a + i, int(n - i)) * load_part(b + i, int(n - i));
  return sum_lanes((s0 + s1) + (s2 + s3));
}
// f(Vec of a) over n floats, in place or not.
template <class F>
INLINE void map(float* out, const float* in, int64_t n, F f) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(out + i, f(load(in + i), i));
  if (i < n) store_part(out + i, f(load_part(in + i, int(n - i)), i), int(n - i));
}
INLINE Vec load_at(const float* p, int64_t i, int64_t n) {
  return i + kLanes <= n ? load(p + i) : load_part(p + i, int(n - i));
}
INLINE int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }
INLINE int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int min_lanes(int64_t n) { return n < kLanes ? int(n) : kLanes; }
INLINE void rms_norm(float* out, const float* x, const float* weight, int64_t n, float eps) {
  const float scale = 1.0f / std::sqrt(dot(x, x, n) / float(n) + eps);
  if (weight == nullptr) map(out, x, n, [&](Vec v, int64_t) { return v * scale; });
  else map(out, x, n, [&](Vec v, int64_t i) { return v * scale * load_at(weight, i, n); });
}
