// The indexer over keys in INT8 (attention_bytes.h), its queries rounded to INT8 by head. Unlike index_shorts.h this
// changes the choice: that of the keys as the cache has them.

// H heads, rows of `row` words each, with a tile of keys [fours, kTile] that have kAdded added.
template <int H>
INLINE void byte_heads(const uint32_t* q, int64_t row, const float* factor, int64_t fours, const uint32_t* keys, Vec& s0, Vec& s1) {
  VecI a0[H], a1[H];
  for (int h = 0; h < H; ++h) a0[h] = a1[h] = VecI{} - int32_t(kAdded) * head_of(q + h * row).sum;
  for (int64_t k = 0; k < fours; ++k) {
    const VecQ b0 = load(keys + k * kTile), b1 = load(keys + k * kTile + kLanes);
    for (int h = 0; h < H; ++h) {
      const VecQ v = VecQ{} + q[h * row + k];
      a0[h] = dot_bytes(a0[h], v, b0);
      a1[h] = dot_bytes(a1[h], v, b1);
    }
  }
  for (int h = 0; h < H; ++h) {
    s0 += whole(a0[h] > 0 ? a0[h] : VecI{}) * factor[h];
    s1 += whole(a1[h] > 0 ? a1[h] : VecI{}) * factor[h];
  }
}

// s[e] = sum_h w[h] relu(q_h . k_e) for one tile of keys. factor [heads]: w times a head's step; step [kTile]: the keys'.
static void byte_tile(const uint32_t* q, int64_t row, const float* factor, int64_t heads, int64_t fours, const uint32_t* keys,
                      const float* step, float* out) {
  Vec s0{}, s1{};
  int64_t h = 0;
  for (; h + 4 <= heads; h += 4) byte_heads<4>(q + h * row, row, factor + h, fours, keys, s0, s1);
  for (; h < heads; ++h) byte_heads<1>(q + h * row, row, factor + h, fours, keys, s0, s1);
  store(out, s0 * load(step));
  store(out + kLanes, s1 * load(step + kLanes));
}
