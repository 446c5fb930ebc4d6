// The indexer in 16-bit integers, twice as fast as in FP32, with a bound on the error: what lies within the bound of the
// cut is scored again in FP32, so the choice is that of FP32.
//
// Keys and queries are scaled to length 32767, so a product of two fits 32 bits and each component is off by half a
// step. By Cauchy-Schwarz a dot product is off by at most |q| |k| 1.01 sqrt(c) / 32767, and FP32's own sums by
// |q| |k| (c + heads) 2^-23; relu doesn't increase either.

#if defined(__x86_64__)
constexpr bool kShorts = true;
#else
constexpr bool kShorts = false;  // NEON multiplies as many FP32 as 16-bit numbers at a time
#endif

constexpr float kShortLength = 32767.0f;
constexpr int64_t kMostClose = 8 * kTile;  // entries near the cut that are worth scoring one by one

// Lengths that the scaling serves: others are left to FP32.
INLINE bool plain_length(float square) { return square == 0.0f || (square > 1e-30f && square < 1e30f); }

struct ShortKeys {  // of one tile: pairs [c/2, kTile] of neighbouring components
  int32_t* pairs;
  float step[kTile];  // the value of one unit
  float longest;      // of all keys so far
  bool plain;
};

// tile [c, kTile] of FP32 keys into `keys`.
static void shorten_keys(const float* tile, int64_t c, ShortKeys& keys) {
  for (int half = 0; half < kTile; half += kLanes) {
    Vec square{};
    for (int64_t k = 0; k < c; ++k) square += load(tile + k * kTile + half) * load(tile + k * kTile + half);
    float scale[kLanes];
    for (int i = 0; i < kLanes; ++i) {
      const float length = std::sqrt(square[i]);
      keys.plain &= plain_length(square[i]);
      keys.longest = length > keys.longest ? length : keys.longest;
      scale[i] = length > 0.0f ? kShortLength / length : 0.0f;
      keys.step[half + i] = length / kShortLength;
    }
    const Vec factor = load(scale);
    for (int64_t k = 0; k < c; k += 2) {
      VecI pair = round_to_int(load(tile + k * kTile + half) * factor) & 0xffff;
      if (k + 1 < c) pair |= round_to_int(load(tile + (k + 1) * kTile + half) * factor) << 16;
      store(reinterpret_cast<float*>(keys.pairs + k / 2 * kTile + half), reinterpret_cast<Vec>(pair));
    }
  }
}

// One query's heads q [heads, c] as pairs [heads, (c+1)/2], and factor[h] = w[h] times the value of a unit.
// Returns sum_h |w[h]| |q_h|, or NaN where FP32 has to serve.
static float shorten_query(const float* q, const float* w, int64_t heads, int64_t c, int32_t* pairs, float* factor) {
  float total = 0.0f;
  for (int64_t h = 0; h < heads; ++h, q += c, pairs += (c + 1) / 2) {
    const float square = dot(q, q, c), length = std::sqrt(square);
    if (!plain_length(square)) return __builtin_nanf("");
    const float scale = length > 0.0f ? kShortLength / length : 0.0f;
    auto* out = reinterpret_cast<int16_t*>(pairs);
    out[(c + 1) / 2 * 2 - 1] = 0;
    for (int64_t k = 0; k < c; k += kLanes) {
      const VecI v = round_to_int(load_at(q + k, 0, c - k) * scale);
      typedef int16_t Shorts __attribute__((vector_size(VECTOR_BYTES / 2)));
      const Shorts s = __builtin_convertvector(v, Shorts);
      __builtin_memcpy(out + k, &s, 2 * size_t(min_lanes(c - k)));
    }
    factor[h] = w[h] * length / kShortLength;
    total += std::fabs(w[h]) * length;
  }
  return total;
}

// Of scores [n] that are off by at most `error`: picks what is surely among the k best, and lists in `close` what may
// be. Returns how many were picked; `count` of close ones, or -1 where they are more than kMostClose.
static int64_t select_sure(float* scores, int64_t n, int64_t k, float error, int32_t* picks, int32_t* close, int64_t& count) {
  const Cut cut = cut_best(scores, n, k);
  const auto* keys = reinterpret_cast<int32_t*>(scores);
  const float at = unordered(int32_t(cut.bound));
  const VecI low = VecI{} + ordered(at - 2.0f * error), high = VecI{} + ordered(at + 2.0f * error);
  int64_t sure = 0;
  count = 0;
  for (int64_t i = 0; i < n; i += kLanes) {
    const VecI key = load(keys + i);
    unsigned bits = lane_bits(key >= low);
    if (bits == 0) continue;
    const unsigned over = lane_bits(key > high);
    for (; bits != 0; bits &= bits - 1) {
      const int lane = __builtin_ctz(bits);
      if (over >> lane & 1) {
        picks[sure++] = int32_t(i + lane);
      } else if (i + lane < n) {
        if (count == kMostClose) {
          count = -1;
          return 0;
        }
        close[count++] = int32_t(i + lane);
      }
    }
  }
  return sure;
}
