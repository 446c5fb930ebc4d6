// The parts of a layer that don't depend on how its work is cut among threads.

struct RowsOfPool {  // where entry e of a sequence lies in a pool of blocks
  const int64_t* table;
  int64_t per_block;
  int shift;  // per_block = 1 << shift, or shift < 0

  RowsOfPool(const int64_t* table, int64_t per_block)
      : table(table), per_block(per_block), shift(per_block & (per_block - 1) ? -1 : __builtin_ctzll(uint64_t(per_block))) {}
  int64_t operator()(int64_t e) const {
    if (shift >= 0) return (table[e >> shift] << shift) + (e & (per_block - 1));
    return table[e / per_block] * per_block + e % per_block;
  }
};

struct LayerPass {
  Worker& w;
  const Call& call;
  const Model& m;
  Buffers& b;
  int64_t T;              // tokens that are computed
  bool narrowed = false;  // of each sequence, they are its last one

  float* stream(int64_t t) { return call.streams + t * m.streams * m.hidden; }
  const Sequence& sequence(int64_t t) { return call.sequences[b.sequence_of[t]]; }
  // A sequence's tokens among those that are computed: their first one's number and position, and how many.
  struct Queries {
    int64_t row, start, length;
  };
  Queries queries(const Sequence& s) {
    if (narrowed) return {&s - call.sequences, s.start + s.length - 1, 1};
    return {s.row, s.start, s.length};
  }
  int64_t token(int64_t t) { return narrowed ? sequence(t).row + sequence(t).length - 1 : t; }  // among all of the call
  int64_t position(int64_t t) {
    const Queries q = queries(sequence(t));
    return q.start + t - q.row;
  }
  int64_t visible(const Layer& l, int64_t t) { return l.ratio ? (position(t) + 1) / l.ratio : 0; }
  const float* turn(const Layer& l, int64_t t) { return b.turn[l.ratio != 0] + t * 2 * m.rope; }

  void start() {
    if (w.id == 0)
      for (int64_t s = 0; s < call.sequence_count; ++s)
        for (int64_t i = 0; i < call.sequences[s].length; ++i) b.sequence_of[call.sequences[s].row + i] = int32_t(s);
    w.barrier();
    bool used[2] = {false, false};
    for (int64_t i = 0; i < call.layer_count; ++i) used[call.layers[i].ratio != 0] = true;
    w.units(T, [&](int64_t t) {
      for (int kind = 0; kind < 2; ++kind)
        if (used[kind]) angles(position(t), kind ? m.compress_freqs : m.freqs, b.turn[kind] + t * 2 * m.rope);
      for (int64_t i = 0; call.embed != nullptr && i < m.streams; ++i)
        __builtin_memcpy(stream(t) + i * m.hidden, call.embed + call.ids[t] * call.embed_stride, sizeof(float) * size_t(m.hidden));
    });
    w.barrier();
  }
  void angles(int64_t position, const float* freqs, float* turn) {
    for (int64_t i = 0; i < m.rope / 2; ++i) {
      const float angle = float(position) * freqs[i];
      turn[2 * i] = turn[2 * i + 1] = std::cos(angle);
      turn[m.rope + 2 * i + 1] = std::sin(angle);
      turn[m.rope + 2 * i] = -turn[m.rope + 2 * i + 1];
    }
  }

  // In the last layer, whose keys are there: of each sequence only the last token goes on, in the row of its number.
  void narrow() {
    if (w.id == 0)
      for (int64_t s = 0; s < call.sequence_count; ++s) {
        const int64_t t = call.sequences[s].row + call.sequences[s].length - 1;  // t >= s
        auto move = [&](float* rows, int64_t n) { __builtin_memmove(rows + s * n, rows + t * n, sizeof(float) * size_t(n)); };
        move(call.streams, m.streams * m.hidden);
        for (float* turns : b.turn) move(turns, 2 * m.rope);
        b.sequence_of[s] = int32_t(s);
      }
    w.barrier();
    T = call.sequence_count, narrowed = true;
  }
  bool narrows(int64_t layer) { return call.only_last && layer == call.layer_count - 1 && T > call.sequence_count; }

  // What is projected of a layer's input: what is asked with, and what is found.
  enum Sides { kQueries = 1, kKeys = 2, kBoth = 3 };

  // The projections of a layer's input, all at once.
  int inputs(const Layer& l, Sides sides, const float* x, int64_t t0, int64_t t, Job* jobs) {
    const Compressor &main = l.compressor, &index = l.index_compressor;
    int n = 0;
    auto add = [&](const Matrix& a, float* out, int64_t width) {
      jobs[n++] = {a, x, m.hidden, t, out + t0 * width, width};
    };
    if (sides & kQueries) {
      add(l.wq_a, b.qa, m.q_rank);
      if (l.has_index) add(l.index_weights, b.iweights, m.index_heads);
    }
    if (!(sides & kKeys)) return n;
    add(l.wkv, b.kv, m.dim);
    if (l.ratio) add(main.wkv, b.ckv, main.width), add(main.wgate, b.cgate, main.width);
    if (l.has_index) {
      add(index.wkv, b.ikv, index.width);
      add(index.wgate, b.igate, index.width);
    }
    return n;
  }

  // f(token), each thread its own share of the tokens: what it wrote in one phase is in its cache in the next.
  template <class F>
  void tokens(F f) {
    for (int64_t t = T * w.id / w.team.size; t < T * (w.id + 1) / w.team.size; ++t) f(t);
  }

  // What follows the projections of one token: norms, the latent's rotation, the gates' position bias.
  void norm_inputs(const Layer& l, Sides sides, int64_t t) {
    if (sides & kQueries) norm_queries(l, t);
    if (!(sides & kKeys)) return;
    float* kv = b.kv + t * m.dim;
    rms_norm(kv, kv, l.kv_norm, m.dim, float(m.norm_eps));
    rotate(kv + m.dim - m.rope, turn(l, t), m.rope, 1.0f);
    if (m.bytes) round_to_row(kv, m.dim, b.kv_bytes + t * byte_row(m.dim));
    if (l.ratio) compress_gate(l.compressor, b.cgate, t);
    if (l.has_index) compress_gate(l.index_compressor, b.igate, t);
  }
  void norm_queries(const Layer& l, int64_t t) {
    float* qa = b.qa + t * m.q_rank;
    rms_norm(qa, qa, l.q_norm, m.q_rank, float(m.norm_eps));
    if (!l.has_index) return;
    const float scale = 1.0f / std::sqrt(float(m.index_dim) * float(m.index_heads));
    float* weights = b.iweights + t * m.index_heads;
    map(weights, weights, m.index_heads, [&](Vec v, int64_t) { return v * scale; });
  }

  void compress_gate(const Compressor& c, float* gate, int64_t t) {
    const float* ape = c.ape + position(t) % c.ratio * c.width;
    map(gate + t * c.width, gate + t * c.width, c.width, [&](Vec v, int64_t i) { return v + load_at(ape, i, c.width); });
  }

  // One entry of a sequence, from this call's tokens and the tail's, written to its row of the pool.
  void pool_entry(const Compressor& c, const Sequence& s, int64_t entry, const float* kv, const float* gate,
                  const float* tail_kv, const float* tail_gate, int64_t ring, float* pool) {
    const int64_t row_of_pool = RowsOfPool(s.table, call.block_tokens / c.ratio)(entry);
    float* out = m.bytes ? b.entry : pool + row_of_pool * c.dim;
    const bool overlap = c.width == 2 * c.dim;
    const int64_t first = overlap && entry > 0 ? (entry - 1) * c.ratio : entry * c.ratio, end = (entry + 1) * c.ratio;
    auto row = [&](const float* fresh, const float* tail, int64_t j) {
      const int64_t half = overlap && j >= entry * c.ratio ? c.dim : 0;
      return (j >= s.start ? fresh + (s.row + j - s.start) * c.width : tail + (s.slot * ring + j % ring) * c.width) + half;
    };
    for (int64_t i = 0; i < c.dim; i += kLanes) {
      Vec best = splat(-__builtin_inff()), total{}, sum{};
      for (int64_t j = first; j < end; ++j) {
        const Vec g = load_at(row(gate, tail_gate, j), i, c.dim);
        best = select(g > best, g, best);
      }
      for (int64_t j = first; j < end; ++j) {
        const Vec p = exp_vec(load_at(row(gate, tail_gate, j), i, c.dim) - best);
        total += p;
        sum += p * load_at(row(kv, tail_kv, j), i, c.dim);
      }
      const Vec v = sum / total;
      if (i + kLanes <= c.dim) store(out + i, v);
      else store_part(out + i, v, int(c.dim - i));
    }
    rms_norm(out, out, c.norm, c.dim, float(m.norm_eps));
    float at[1024];
    angles(entry * c.ratio, m.compress_freqs, at);
    rotate(out + c.dim - m.rope, at, m.rope, 1.0f);
    if (m.bytes) round_to_row(out, c.dim, reinterpret_cast<char*>(pool) + row_of_pool * byte_row(c.dim));
  }

  void pool_all(const Compressor& c, const float* kv, const float* gate, const float* tail_kv, const float* tail_gate,
                int64_t ring, float* pool) {
    int64_t total = 0;
    for (int64_t s = 0; s < call.sequence_count; ++s) {
      const Sequence& q = call.sequences[s];
      total += (q.start + q.length) / c.ratio - q.start / c.ratio;
    }
    w.units(total, [&](int64_t u) {
      const Sequence* s = call.sequences;
      for (;; ++s) {
        const int64_t own = (s->start + s->length) / c.ratio - s->start / c.ratio;
        if (u < own) break;
        u -= own;
      }
      pool_entry(c, *s, s->start / c.ratio + u, kv, gate, tail_kv, tail_gate, ring, pool);
    });
  }
  void pool(const Layer& l, const LayerCache& c) {
    if (l.ratio) pool_all(l.compressor, b.ckv, b.cgate, c.tail_kv, c.tail_gate, c.tail_ring, c.entries);
    if (l.has_index)
      pool_all(l.index_compressor, b.ikv, b.igate, c.index_tail_kv, c.index_tail_gate, c.index_tail_ring, c.index_keys);
  }

  void keep_tail(const Compressor& c, const Sequence& s, const float* kv, const float* gate, float* tail_kv,
                 float* tail_gate, int64_t ring) {
    for (int64_t j = max64(s.start, s.start + s.length - ring); j < s.start + s.length; ++j) {
      const int64_t from = (s.row + j - s.start) * c.width, to = (s.slot * ring + j % ring) * c.width;
      __builtin_memcpy(tail_kv + to, kv + from, sizeof(float) * size_t(c.width));
      __builtin_memcpy(tail_gate + to, gate + from, sizeof(float) * size_t(c.width));
    }
  }
  int64_t latent_row() { return m.bytes ? byte_row(m.dim) : m.dim * int64_t(sizeof(float)); }
  char* window_of(const LayerCache& c, const Sequence& s) {
    return reinterpret_cast<char*>(c.window) + s.slot * m.window * latent_row();
  }
  // The window's ring and the tails, once no one reads their old rows any more.
  void keep(const Layer& l, const LayerCache& c) {
    w.units(call.sequence_count, [&](int64_t i) {
      const Sequence& s = call.sequences[i];
      const int64_t row = latent_row();
      const char* fresh = m.bytes ? b.kv_bytes : reinterpret_cast<const char*>(b.kv);
      for (int64_t j = max64(s.start, s.start + s.length - m.window); j < s.start + s.length; ++j)
        __builtin_memcpy(window_of(c, s) + j % m.window * row, fresh + (s.row + j - s.start) * row, size_t(row));
      if (l.ratio) keep_tail(l.compressor, s, b.ckv, b.cgate, c.tail_kv, c.tail_gate, c.tail_ring);
      if (l.has_index)
        keep_tail(l.index_compressor, s, b.ikv, b.igate, c.index_tail_kv, c.index_tail_gate, c.index_tail_ring);
    });
  }

  // Scores of the sequence's entries [e0, e1) for its `count` <= kIndexRows queries from token t0 on, iq [count, n, c]
  // turned already. scores: a row of b.score_row a query. e0 is a multiple of kTile.
  void score_entries(const Layer& l, const LayerCache& c, int64_t t0, int64_t count, const float* iq, int64_t e0,
                     int64_t e1, float* scores) {
    const int64_t n = m.index_heads, dim = m.index_dim;
    const RowsOfPool row(sequence(t0).table, call.block_tokens / l.ratio);
    if (m.bytes) {
      score_bytes(c, row, t0, count, iq, e0, e1, scores);
      return;
    }
    for (int64_t e = e0; e < e1; e += kTile) {
      const int keys = int(min64(e1 - e, kTile));
      for (int r = 0; r < keys; ++r) {
        b.pointers[r] = c.index_keys + row(e + r) * dim;
        for (int64_t k = 0; k < dim; k += 16) __builtin_prefetch(b.pointers[r] + k);
      }
      key_tile(b.pointers, keys, dim, b.tile);
      for (int64_t i = 0; i < count; ++i)
        index_tile(iq + i * n * dim, b.iweights + (t0 + i) * n, n, dim, b.tile, scores + i * b.score_row + e);
    }
  }
  // The same over keys in INT8, queries rounded to it by head: unlike choose_by_shorts this changes the choice, to that of
  // the keys as the cache has them.
  void score_bytes(const LayerCache& c, const RowsOfPool& row, int64_t t0, int64_t count, const float* iq, int64_t e0,
                   int64_t e1, float* scores) {
    const int64_t n = m.index_heads, dim = m.index_dim, size = byte_row(dim), fours = (dim + 3) / 4;
    for (int64_t i = 0; i < count * n; ++i) {
      round_to_row(iq + i * dim, dim, b.index_bytes + i * size);
      b.index_factor[i] = b.iweights[t0 * n + i] * head_of(bytes_of(b.index_bytes + i * size)).step;
    }
    auto* tile = reinterpret_cast<uint32_t*>(b.tile);
    for (int64_t e = e0; e < e1; e += kTile) {
      const int keys = int(min64(e1 - e, kTile));
      float step[kTile] = {};
      for (int r = 0; r < keys; ++r) {
        const uint32_t* key = bytes_of(reinterpret_cast<const char*>(c.index_keys) + row(e + r) * size);
        b.pointers[r] = reinterpret_cast<const float*>(key);
        step[r] = head_of(key).step;
      }
      key_tile(b.pointers, keys, fours, b.tile);
      for (int64_t k = 0; kAdded && k < fours * kTile; k += kLanes) store(tile + k, weights_of(load(tile + k)));
      for (int64_t i = 0; i < count; ++i)
        integer_tile_scores(bytes_of(b.index_bytes + i * n * size), size / 4, b.index_factor + i * n, n, fours, tile, step,
                            scores + i * b.score_row + e);
    }
  }
  // The same choice as score_entries and select_entries, by way of 16-bit scores (index_shorts.h): sets b.picks.
  // False where FP32 has to serve. pairs [count, n, (c+1)/2], factor [count, n]: scratch.
  bool choose_by_shorts(const Layer& l, const LayerCache& c, int64_t t0, int64_t count, const float* iq, int64_t entries,
                        float* scores, int32_t* pairs, float* factor, int32_t* key_pairs) {
    const int64_t n = m.index_heads, dim = m.index_dim, half = (dim + 1) / 2;
    const RowsOfPool row(sequence(t0).table, call.block_tokens / l.ratio);
    auto fetch = [&](const int32_t* list, int64_t first, int keys) {
      for (int r = 0; r < keys; ++r) b.pointers[r] = c.index_keys + row(list ? list[r] : first + r) * dim;
      key_tile(b.pointers, keys, dim, b.tile);
    };
    float size[kIndexRows];
    for (int64_t i = 0; i < count; ++i) {
      size[i] = shorten_query(iq + i * n * dim, b.iweights + (t0 + i) * n, n, dim, pairs + i * n * half, factor + i * n);
      if (!(size[i] < 1e30f)) return false;
    }
    ShortKeys keys{key_pairs, {}, 0.0f, true};
    for (int64_t e = 0; e < entries; e += kTile) {
      fetch(nullptr, e, int(min64(entries - e, kTile)));
      shorten_keys(b.tile, dim, keys);
      if (!keys.plain) return false;
      for (int64_t i = 0; i < count; ++i)
        integer_tile_scores(pairs + i * n * half, half, factor + i * n, n, half, keys.pairs, keys.step, scores + i * b.score_row + e);
    }
    const float bound = 1.02f * std::sqrt(float(dim)) / kShortLength + float(dim + n) * 0x1p-23f;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t t = t0 + i, seen = visible(l, t), k = m.index_topk;
      if (seen <= k) continue;
      int32_t *picks = b.picks + t * k, close[kMostClose], best[kMostClose];
      float* again = scores + i * b.score_row;
      int64_t near = 0;
      const int64_t sure = select_sure(again, seen, k, bound * size[i] * keys.longest, picks, close, near);
      if (near >= 0 && sure + near > k)
        for (int64_t e = 0; e < near; e += kTile) {
          fetch(close + e, 0, int(min64(near - e, kTile)));
          index_tile(iq + i * n * dim, b.iweights + t * n, n, dim, b.tile, again + e);
        }
      if (near < 0) {
        score_entries(l, c, t, 1, iq + i * n * dim, 0, seen, again);
        select_best(again, seen, k, picks);
      } else if (sure + near == k) {
        for (int64_t e = 0; e < near; ++e) picks[sure + e] = close[e];
      } else {
        select_best(again, near, k - sure, best);
        for (int64_t e = 0; e < k - sure; ++e) picks[sure + e] = close[best[e]];
      }
    }
    return true;
  }
  void turn_index_queries(int64_t t0, int64_t count, float* iq) {
    for (int64_t i = 0; i < count * m.index_heads; ++i)
      rotate(iq + (i + 1) * m.index_dim - m.rope, b.turn[1] + (t0 + i / m.index_heads) * 2 * m.rope, m.rope, 1.0f);
  }
  void select_entries(const Layer& l, int64_t t0, int64_t count, float* scores) {
    for (int64_t i = 0; i < count; ++i)
      if (visible(l, t0 + i) > m.index_topk)
        select_best(scores + i * b.score_row, visible(l, t0 + i), m.index_topk, b.picks + (t0 + i) * m.index_topk);
  }

  // The entries that token t reads: the first of its sequence, or its picks.
  struct Entries {
    int64_t count;
    const int32_t* picks;  // null: all that are visible
    RowsOfPool row;
    int64_t operator()(int64_t e) const { return row(picks ? picks[e] : e); }
    // From which on they weren't its thread's last query's, at `position`: all that were visible, or the same one's picks.
    int64_t fresh(const Layer& l, int64_t position, int64_t own) const {
      return l.ratio == 0 ? 0 : picks == nullptr ? (position + 1) / l.ratio : position == own ? count : 0;
    }
  };
  Entries entries_of(const Layer& l, int64_t t) {
    const int64_t seen = visible(l, t);
    const bool picked = l.has_index && seen > m.index_topk;
    return {picked ? m.index_topk : seen, picked ? b.picks + t * m.index_topk : nullptr,
            RowsOfPool(sequence(t).table, call.block_tokens / max64(1, l.ratio))};
  }

  // b.pointers: the rows that token t reads; returns how many.
  int64_t rows_of_query(const Layer& l, const LayerCache& c, int64_t t) {
    const Sequence& s = sequence(t);
    const int64_t p = position(t);
    const float** at = b.pointers;
    const float* ring = c.window + s.slot * m.window * m.dim;
    int64_t j = max64(0, p - m.window + 1);
    for (int64_t i = j % m.window; j < min64(s.start, p + 1); ++j, i = i + 1 == m.window ? 0 : i + 1)
      *at++ = ring + i * m.dim;
    for (const float* row = b.kv + (s.row + j - s.start) * m.dim; j <= p; ++j, row += m.dim) *at++ = row;
    const Entries entries = entries_of(l, t);
    for (int64_t e = 0; e < entries.count; ++e) *at++ = c.entries + entries(e) * m.dim;
    return at - b.pointers;
  }

  RowsRead<float> read_rows(const Layer& l, const LayerCache& c, int64_t t) {
    return {b.pointers, b.pointers, rows_of_query(l, c, t)};
  }

  // The same in BF16: those that the thread's last query had are kept.
  RowsRead<int32_t> keep_rows(const Layer& l, const LayerCache& c, int64_t t) {
    KeptRows& k = b.kept;
    const Sequence& s = sequence(t);
    const int64_t p = position(t), ring = ring_slots(m.window), used = min64(ring, (p + 2) / 2 * 2), pairs = row_pairs(m.dim);
    auto slot = [&](int64_t i) { return k.rows + i * pairs; };
    auto round = [&](int64_t i, const float* even, const float* odd) { round_two(even, odd, m.dim, slot(i), k.columns + i * pairs); };
    const bool known = k.layer == &l && k.sequence == &s && k.position <= p;
    const bool ours = known && p - k.position < m.window;  // and some of its window is ours
    const int64_t fresh = ours ? k.position + 1 : max64(0, p - m.window + 1), mask = m.window & (m.window - 1) ? 0 : m.window - 1;
    const float* old = c.window + s.slot * m.window * m.dim;
    auto latent = [&](int64_t j) -> const float* {
      if (j >= s.start) return b.kv + (s.row + j - s.start) * m.dim;
      return old + (mask ? j & mask : j % m.window) * m.dim;
    };
    RowsRead<int32_t> read{k.row_at, k.columns_at, used};
    for (int64_t j = p + 1; j <= p + ring - m.window; ++j)  // what has left the window, or is yet to come
      if (j % ring < used) read.hides[read.hidden++] = j % ring;
    if (ours) {
      auto join = [&](int64_t i) { join_rows(slot(i & ~1), slot(i | 1), pairs, k.columns + i / 2 * 2 * pairs); };
      for (int64_t j = fresh; j <= p; ++j) round_row(latent(j), m.dim, slot(j % ring));
      for (int i = 0; i < read.hidden; ++i) {
        __builtin_memset(slot(read.hides[i]), 0, sizeof(int32_t) * size_t(pairs));
        join(read.hides[i]);
      }
      for (int64_t j = fresh; j <= p; ++j) join(j % ring);
    } else {
      auto of_slot = [&, last = p % ring](int64_t i) -> const float* {  // null: nobody's
        const int64_t j = p - last + i - (i > last ? ring : 0);
        return j < fresh ? nullptr : latent(j);
      };
      for (int64_t i = 0; i < used; i += 2) round(i, of_slot(i), of_slot(i + 1));
    }

    const Entries which = entries_of(l, t);
    const int64_t entries = which.count, begin = known ? which.fresh(l, k.position, p) : 0;
    auto entry = [&](int64_t e) { return e == entries ? nullptr : c.entries + which(e) * m.dim; };
    if (begin < entries)
      for (int64_t e = begin / 2 * 2; e < entries; e += 2) round(ring + e, entry(e), entry(e + 1));
    if (entries % 2) read.hides[read.hidden++] = used + entries;
    read.n += (entries + 1) / 2 * 2;
    for (int64_t i = 0; i < used; ++i) k.row_at[i] = slot(i);
    for (int64_t i = used; i < read.n; ++i) k.row_at[i] = slot(ring + i - used);
    for (int64_t i = 0; i < read.n; i += 2) k.columns_at[i / 2] = k.columns + (i < used ? i : ring + i - used) * pairs;
    k.layer = &l, k.sequence = &s, k.position = p;
    return read;
  }

  // The same of caches in INT8, whose rows are read as they lie; the columns that the thread's last query had are kept.
  RowsRead<uint32_t> byte_rows(const Layer& l, const LayerCache& c, int64_t t) {
    KeptColumns& k = b.kept_columns;
    const Sequence& s = sequence(t);
    const int64_t p = position(t), slots = byte_slots(m.window), used = min64(slots, byte_slots(p + 1));
    const int64_t size = byte_row(m.dim), columns = byte_columns(m.dim), first = max64(0, p - m.window + 1);
    const bool known = k.layer == &l && k.sequence == &s && k.position <= p;
    const bool ours = known && p - k.position < m.window;  // and some of its window is ours
    const int64_t fresh = ours ? k.position + 1 : first;
    RowsRead<uint32_t> read{k.row_at, k.columns_at, used};
    auto join = [&](int64_t slot, const uint32_t* const* rows) { join_four(rows, columns, k.columns + slot / 4 * columns); };
    const char *old = window_of(c, s), *own = b.kv_bytes + s.row * size;
    int64_t slot = fresh % slots, place = fresh % m.window;
    for (int64_t j = fresh; j <= p; ++j) {
      k.row_at[slot] = bytes_of(j < s.start ? old + place * size : own + (j - s.start) * size);
      if (++slot == slots) slot = 0;
      if (++place == m.window) place = 0;
    }
    for (int64_t j = p + 1; j < p + 4; ++j) {  // slots of what has left the window, or is yet to come
      if (slot < used && j - slots < first) k.row_at[read.hides[read.hidden++] = slot] = bytes_of(own + (p - s.start) * size);
      if (++slot == slots) slot = 0;
    }
    slot = fresh % slots;
    for (int64_t j = fresh; j <= p; ++j) {  // the last slot of four is fresh, or the newest token is among them
      if (j == p || slot % 4 == 3) join(slot / 4 * 4, k.row_at + slot / 4 * 4);
      if (++slot == slots) slot = 0;
    }

    const Entries which = entries_of(l, t);
    const int64_t entries = which.count, padded = byte_slots(entries), begin = known ? which.fresh(l, k.position, p) : 0;
    const char* pool = reinterpret_cast<const char*>(c.entries);
    const uint32_t** at = k.row_at + used;
    for (int64_t e = 0; e < entries; ++e) at[e] = bytes_of(pool + which(e) * size);
    for (int64_t e = entries; e < padded; ++e) at[e] = k.row_at[p % slots], read.hides[read.hidden++] = used + e;
    if (begin < entries)
      for (int64_t e = begin / 4 * 4; e < entries; e += 4) join(slots + e, at + e);
    read.n += padded;
    for (int64_t i = 0; i < read.n; i += 4) k.columns_at[i / 4] = k.columns + (i < used ? i : slots + i - used) / 4 * columns;
    k.layer = &l, k.sequence = &s, k.position = p;
    return read;
  }

  // The window of token t, where that isn't the window of the token before.
  Coming coming_window(const LayerCache& c, int64_t t) {
    const Sequence& s = sequence(t);
    if (queries(s).row != t) return {};
    const char* at = window_of(c, s);
    return {at, at + min64(s.start, m.window) * latent_row()};
  }

  // f(the rows that token t reads). next: the token after it, or t.
  template <class F>
  void with_rows(const Layer& l, const LayerCache& c, int64_t t, int64_t next, F f) {
    auto with = [&](auto read) {
      if (next != t) read.coming = coming_window(c, next);
      f(read);
    };
    if (m.bytes) with(byte_rows(l, c, t));
    else if (UPWELL_BF16_DOTS && m.rounds) with(keep_rows(l, c, t));
    else with(read_rows(l, c, t));
  }

  // Token t's heads from `head` on, at most kLanes, over `read`: q [heads, dim] -> out.
  template <class T>
  void attend_heads(const Layer& l, int64_t t, const float* q, int64_t head, const RowsRead<T>& read, float* out) {
    attend_query(q, int(min64(m.heads - head, kLanes)), m.dim, float(m.norm_eps), turn(l, t), m.rope, l.sink + head, read,
                 b.qt, b.probs, out);
  }

  // All of token t's heads: q [heads, dim] -> out. next: the token that this thread takes next, or t.
  void attend_token(const Layer& l, const LayerCache& c, int64_t t, int64_t next, const float* q, float* out) {
    with_rows(l, c, t, next, [&](const auto& read) {
      for (int64_t head = 0; head < m.heads; head += kLanes)
        attend_heads(l, t, q + head * m.dim, head, read, out + head * m.dim);
    });
  }

  static Matrix rows_of(const Matrix& a, int64_t first, int64_t rows) {
    int64_t bytes = a.format == kBF16 ? 2 * a.cols : a.format == kFP8 ? a.cols : a.format == kFP4 ? a.cols / 2 : 4 * a.cols;
    if (a.format == kPairs) bytes = 4 * ((a.cols + 1) / 2);
    if (a.format == kPanels || a.format == kPairs)
      first = first / rows * ((rows + kPanel - 1) / kPanel * kPanel);  // a group starts a panel
    // FP8 groups begin on a block of 128 rows, or Python decodes the matrix, as it does integers in groups.
    const uint8_t* scale = a.scale;
    if (a.format == kFP8) scale += first / 128 * ((a.cols + 127) / 128);
    if (a.format == kFP4) scale += first * (a.cols / 32);
    return {static_cast<const char*>(a.data) + first * bytes, scale, rows, a.cols, a.format};
  }

  // Chooses token t's experts from s, its gate's outputs [experts] (overwritten), and their weights.
  void route_token(const Layer& l, int64_t t, float* s) {
    const int64_t k = m.experts_per_token;
    int32_t* chosen = b.route + t * k;
    map(s, s, m.experts, [&](Vec v, int64_t) { return select(v > 20.0f, v, softplus(v)); });
    for (int64_t e = 0; e < m.experts; ++e) s[e] = std::sqrt(s[e]);
    if (l.tid2eid == nullptr) best_experts(s, l.gate_bias, m.experts, k, chosen);
    else for (int64_t i = 0; i < k; ++i) chosen[i] = int32_t(l.tid2eid[call.ids[token(t)] * k + i]);
    float total = 0.0f;
    for (int64_t i = 0; i < k; ++i) total += s[chosen[i]];
    for (int64_t i = 0; i < k; ++i) b.route_weights[t * k + i] = s[chosen[i]] / total * float(m.routed_scaling);
  }

  // Counting sort of pairs (token, place) by expert: order[pair] is its place among the sorted, pair_of the inverse.
  void group_pairs() {
    const int64_t pairs = T * m.experts_per_token;
    for (int64_t e = 0; e <= m.experts; ++e) b.group_start[e] = 0;
    for (int64_t p = 0; p < pairs; ++p) ++b.group_start[b.route[p] + 1];
    for (int64_t e = 0; e < m.experts; ++e) b.group_start[e + 1] += b.group_start[e];
    for (int64_t p = 0; p < pairs; ++p) b.pair_of[b.order[p] = b.group_start[b.route[p]]++] = int32_t(p);
    for (int64_t e = m.experts; e > 0; --e) b.group_start[e] = b.group_start[e - 1];
    b.group_start[0] = 0;
    for (int64_t e = 0; e < m.experts && b.load != nullptr; ++e) b.load[e] += b.group_start[e + 1] - b.group_start[e];
    int32_t active = 0;  // experts that have tokens; their number stands last
    for (int64_t e = 0; e < m.experts; ++e)
      if (b.group_start[e + 1] > b.group_start[e]) b.active[active++] = int32_t(e);
    b.active[m.experts] = active;
  }

  // hidden = silu(min(hidden, limit)) * clamp(up, limit), n floats.
  void swiglu(float* hidden, const float* up, int64_t n) {
    const float limit = float(m.swiglu_limit);
    map(hidden, hidden, n, [&](Vec a, int64_t i) {
      a = select(a > limit, splat(limit), a);
      Vec c = load_at(up, i, n);
      c = select(c > limit, splat(limit), select(c < -limit, splat(-limit), c));
      return a * sigmoid(a) * c;
    });
  }

  // What a layer begins with, beside its numbers.
  void begin(int64_t i) {
    if (call.picks != nullptr) b.picks = call.picks + i * call.tokens * m.index_topk;
    b.load = call.load != nullptr ? call.load + i * m.experts : nullptr;
  }

  // y [hidden]: the experts' outputs of token t, weighted and summed.
  void sum_experts(int64_t t, float* y) {
    map(y, b.shared_out + t * m.hidden, m.hidden, [&](Vec v, int64_t i) { return v + routed(t, i); });
  }
  void leave_experts(int64_t t, float* y) {
    sum_experts(t, y);
    leave(t, y);
  }
  // What leave_experts reads of token t lies anywhere and was written long ago.
  void fetch_experts(int64_t t) {
    const int64_t k = m.experts_per_token;
    auto fetch = [](const float* p, int64_t n) {
      for (int64_t i = 0; i < n; i += 16) __builtin_prefetch(p + i);
    };
    for (int64_t j = 0; j < k; ++j) fetch(b.expert_out + b.order[t * k + j] * m.hidden, m.hidden);
    fetch(b.shared_out + t * m.hidden, m.hidden);
    fetch(stream(t), m.streams * m.hidden);
  }
  Vec routed(int64_t t, int64_t i) {  // the routed ones' sum, columns from i
    const int64_t k = m.experts_per_token;
    Vec sum{};
    for (int64_t j = 0; j < k; ++j)
      sum += load_at(b.expert_out + b.order[t * k + j] * m.hidden, i, m.hidden) * b.route_weights[t * k + j];
    return sum;
  }
  void leave(int64_t t, const float* y) {
    leave_token(m, stream(t), y, b.post + t * m.streams, b.comb + t * m.streams * m.streams);
  }
};
