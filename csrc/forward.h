// One call of the model's layers on any number of sequences, each with its own number of new tokens: decode, prefill
// and mixtures are the same code. Threads take units of a phase; a barrier ends each phase.

struct Buffers {  // all from the workspace
  float *z, *post, *comb, *x, *qa, *ckv, *cgate, *ikv, *igate, *iweights, *kv, *q, *iq, *attended, *latent, *y;
  float *scores, *route_weights, *gathered, *hidden, *up, *expert_out, *shared_out;
  float *cos[2], *sin[2];
  int32_t *picks, *route, *order, *group_start, *sequence_of;
  float *tile, *rows_buffer, *qt, *probs, *row, *index_scores, *index_q;  // of one thread from here on
  int64_t* keys;
  const float** pointers;
  Inputs inputs;
};

struct Bump {
  char* base;
  int64_t used = 0;
  template <class T>
  void take(T*& p, int64_t n) {
    p = reinterpret_cast<T*>(base + used);
    used += (n * int64_t(sizeof(T)) + 127) / 64 * 64;
  }
};

static int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }

// Lays out the workspace; returns bytes shared by all threads, and in `own` the bytes each thread adds.
static int64_t lay_out(const Model& m, int64_t tokens, int64_t entries, char* base, int thread, Buffers& b, int64_t& own) {
  Bump shared{base};
  const int64_t h = m.streams, d = m.dim, k = m.experts_per_token;
  const int64_t pairs = tokens * k, inter = max64(m.inter, m.shared_inter);
  shared.take(b.z, tokens * (2 + h) * h);
  shared.take(b.post, tokens * h);
  shared.take(b.comb, tokens * h * h);
  shared.take(b.x, tokens * m.hidden);
  shared.take(b.qa, tokens * m.q_rank);
  shared.take(b.ckv, tokens * 2 * d);
  shared.take(b.cgate, tokens * 2 * d);
  shared.take(b.ikv, tokens * 2 * m.index_dim);
  shared.take(b.igate, tokens * 2 * m.index_dim);
  shared.take(b.iweights, tokens * m.index_heads);
  shared.take(b.kv, tokens * d);
  shared.take(b.q, tokens * m.heads * d);
  shared.take(b.iq, tokens * m.index_heads * m.index_dim);
  shared.take(b.attended, tokens * m.heads * d);
  shared.take(b.latent, tokens * m.groups * m.o_rank);
  shared.take(b.y, tokens * m.hidden);
  shared.take(b.scores, tokens * m.experts);
  shared.take(b.route_weights, pairs);
  shared.take(b.gathered, pairs * m.hidden);
  shared.take(b.hidden, (pairs + tokens) * inter);
  shared.take(b.up, (pairs + tokens) * inter);
  shared.take(b.expert_out, pairs * m.hidden);
  shared.take(b.shared_out, tokens * m.hidden);
  for (int i = 0; i < 2; ++i) {
    shared.take(b.cos[i], tokens * m.rope / 2);
    shared.take(b.sin[i], tokens * m.rope / 2);
  }
  shared.take(b.picks, tokens * (m.index_topk + 1));
  shared.take(b.route, pairs);
  shared.take(b.order, pairs);
  shared.take(b.group_start, m.experts + 1);
  shared.take(b.sequence_of, tokens);
  const int64_t widest = max64(max64(max64(h * m.hidden, m.heads * d / m.groups), m.groups * m.o_rank),
                               max64(inter, max64(m.q_rank, m.index_dim)));
  const int64_t keys = m.window + max64(entries, 1);
  Bump local{base};
  local.take(b.tile, widest * kTile);
  local.take(b.rows_buffer, widest * 4);
  local.take(b.inputs.space, kPackedRows * packed_row_bytes(widest));
  local.take(b.qt, d * kLanes);
  local.take(b.probs, keys * kLanes);
  local.take(b.row, d);
  local.take(b.index_scores, 8 * (entries + kTile));
  local.take(b.index_q, 8 * m.index_heads * m.index_dim);
  local.take(b.keys, 2 * m.index_topk + 64);
  local.take(b.pointers, keys + 8);
  own = local.used;
  if (base != nullptr) {  // second pass with this thread's place
    Bump mine{base + shared.used + own * thread};
    mine.take(b.tile, widest * kTile);
    mine.take(b.rows_buffer, widest * 4);
    mine.take(b.inputs.space, kPackedRows * packed_row_bytes(widest));
    mine.take(b.qt, d * kLanes);
    mine.take(b.probs, keys * kLanes);
    mine.take(b.row, d);
    mine.take(b.index_scores, 8 * (entries + kTile));
    mine.take(b.index_q, 8 * m.index_heads * m.index_dim);
    mine.take(b.keys, 2 * m.index_topk + 64);
    mine.take(b.pointers, keys + 8);
  }
  return shared.used;
}

static int64_t most_entries(const Layer* layers, int64_t layer_count, const Sequence* s, int64_t n) {
  int64_t most = 0;
  for (int64_t l = 0; l < layer_count; ++l)
    for (int64_t i = 0; i < n && layers[l].ratio; ++i) most = max64(most, (s[i].start + s[i].length) / layers[l].ratio);
  return most;
}

// All jobs of a phase, cut into tiles of weight rows and, where tokens are many, of tokens.
static void run_jobs(Worker& w, Buffers& b, const Job* jobs, int count) {
  int64_t tiles = 0;
  for (int i = 0; i < count; ++i) tiles += (jobs[i].m.rows + kTile - 1) / kTile;
  int64_t t = 1;
  for (int i = 0; i < count; ++i) t = max64(t, jobs[i].t);
  int64_t step = t;
  while (step > 96 && tiles * ((t + step - 1) / step) < 6 * w.team.size) step = (step / 2 + 11) / 12 * 12;
  const int64_t cuts = (t + step - 1) / step;
  w.units(tiles * cuts, [&](int64_t u) {
    int64_t tile = u / cuts;
    const int64_t t0 = u % cuts * step;
    const Job* job = jobs;
    for (; tile >= (job->m.rows + kTile - 1) / kTile; ++job) tile -= (job->m.rows + kTile - 1) / kTile;
    const int64_t t1 = t0 + step < job->t ? t0 + step : job->t;
    if (t0 >= t1) return;
    const int64_t first = tile * kTile;
    const int width = int(job->m.rows - first < kTile ? job->m.rows - first : kTile);
    run_job(*job, first, width, t0, t1, b.tile, b.rows_buffer, b.inputs, w.phase);
  });
}

struct Forward {
  Worker& w;
  const Call& call;
  const Model& m;
  Buffers& b;
  int64_t T;

  float* stream(int64_t t) { return call.streams + t * m.streams * m.hidden; }
  const Sequence& sequence(int64_t t) { return call.sequences[b.sequence_of[t]]; }
  int64_t position(int64_t t) { return sequence(t).start + t - sequence(t).row; }

  void start() {
    if (w.id == 0)
      for (int64_t s = 0; s < call.sequence_count; ++s)
        for (int64_t i = 0; i < call.sequences[s].length; ++i) b.sequence_of[call.sequences[s].row + i] = int32_t(s);
    w.barrier();
    w.units(T, [&](int64_t t) {
      for (int kind = 0; kind < 2; ++kind) angles(position(t), kind, b.cos[kind] + t * m.rope / 2, b.sin[kind] + t * m.rope / 2);
    });
  }
  void angles(int64_t position, int compressed, float* cos, float* sin) {
    const float* freqs = compressed ? m.compress_freqs : m.freqs;
    for (int64_t i = 0; i < m.rope / 2; ++i) {
      const float angle = float(position) * freqs[i];
      cos[i] = std::cos(angle);
      sin[i] = std::sin(angle);
    }
  }

  void enter(const Mix& mix, const float* norm) {
    const int64_t zs = (2 + m.streams) * m.streams;
    Job job{mix.fn, call.streams, m.streams * m.hidden, T, b.z, zs};
    run_jobs(w, b, &job, 1);
    w.barrier();
    const int64_t step = T >= kLanes * w.team.size ? kLanes : max64(1, (T + w.team.size - 1) / w.team.size);
    w.units((T + step - 1) / step, [&](int64_t u) {
      const int64_t t = u * step;
      const int count = int(T - t < step ? T - t : step);
      mix_any(m, mix, stream(t), b.z + t * zs, count, false, norm, b.post + t * m.streams,
              b.comb + t * m.streams * m.streams, b.x + t * m.hidden);
    });
    w.barrier();
  }

  void compress_gate(const Compressor& c, float* gate, int64_t t) {
    const float* ape = c.ape + position(t) % c.ratio * c.width;
    map(gate + t * c.width, gate + t * c.width, c.width, [&](Vec v, int64_t i) { return v + load_at(ape, i, c.width); });
  }

  // Entry `w` of a sequence, from this call's tokens and the tail's, written to its row of the pool.
  void pool_entry(const Compressor& c, const Sequence& s, int64_t entry, const float* kv, const float* gate,
                  const float* tail_kv, const float* tail_gate, int64_t ring, float* pool) {
    const int64_t per_block = call.block_tokens / c.ratio;
    float* out = pool + (s.table[entry / per_block] * per_block + entry % per_block) * c.dim;
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
    float cos[256], sin[256];
    angles(entry * c.ratio, 1, cos, sin);
    rotate(out + c.dim - m.rope, cos, sin, m.rope, 1.0f);
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

  void keep_tail(const Compressor& c, const Sequence& s, const float* kv, const float* gate, float* tail_kv,
                 float* tail_gate, int64_t ring) {
    for (int64_t j = max64(s.start, s.start + s.length - ring); j < s.start + s.length; ++j) {
      const int64_t from = (s.row + j - s.start) * c.width, to = (s.slot * ring + j % ring) * c.width;
      __builtin_memcpy(tail_kv + to, kv + from, sizeof(float) * size_t(c.width));
      __builtin_memcpy(tail_gate + to, gate + from, sizeof(float) * size_t(c.width));
    }
  }

  int64_t visible(const Layer& l, int64_t t) { return l.ratio ? (position(t) + 1) / l.ratio : 0; }

  // picks[t]: the indices in no order; only for tokens that see more entries than the top-k.
  void choose(const Layer& l, const LayerCache& c) {
    int64_t total = 0;
    for (int64_t s = 0; s < call.sequence_count; ++s) total += (call.sequences[s].length + 7) / 8;
    const int64_t n = m.index_heads, dim = m.index_dim, per_block = call.block_tokens / l.ratio;
    const float scale = 1.0f / std::sqrt(float(dim) * float(n));
    w.units(total, [&](int64_t u) {
      const Sequence* s = call.sequences;
      for (; u >= (s->length + 7) / 8; ++s) u -= (s->length + 7) / 8;
      const int64_t t0 = s->row + u * 8, count = s->length - u * 8 < 8 ? s->length - u * 8 : 8;
      const int64_t entries = visible(l, t0 + count - 1);
      if (entries <= m.index_topk) return;
      for (int64_t i = 0; i < count; ++i) {
        const int64_t t = t0 + i;
        float* q = b.index_q + i * n * dim;
        __builtin_memcpy(q, b.iq + t * n * dim, sizeof(float) * size_t(n * dim));
        for (int64_t h = 0; h < n; ++h)
          rotate(q + h * dim + dim - m.rope, b.cos[1] + t * m.rope / 2, b.sin[1] + t * m.rope / 2, m.rope, 1.0f);
        map(b.iweights + t * n, b.iweights + t * n, n, [&](Vec v, int64_t) { return v * scale; });
      }
      const int64_t stride = (entries + kTile - 1) / kTile * kTile;
      for (int64_t e = 0; e < entries; e += kTile) {
        for (int r = 0; r < kTile; ++r) {
          const int64_t at = e + r < entries ? e + r : entries - 1;
          const float* key = c.index_keys + (s->table[at / per_block] * per_block + at % per_block) * dim;
          for (int64_t k = 0; k < dim; ++k) b.tile[k * kTile + r] = key[k];
        }
        for (int64_t i = 0; i < count; ++i)
          index_tile(b.index_q + i * n * dim, b.iweights + (t0 + i) * n, n, dim, b.tile, b.index_scores + i * stride + e);
      }
      for (int64_t i = 0; i < count; ++i) {
        const int64_t seen = visible(l, t0 + i);
        if (seen > m.index_topk)
          select_best(b.index_scores + i * stride, seen, m.index_topk, b.keys, b.picks + (t0 + i) * m.index_topk);
      }
    });
    w.barrier();
  }

  void attend(const Layer& l, const LayerCache& c) {
    const int64_t blocks = (m.heads + kLanes - 1) / kLanes, per_block = l.ratio ? call.block_tokens / l.ratio : 0;
    const float *cos = b.cos[l.ratio != 0], *sin = b.sin[l.ratio != 0];
    const int64_t per_unit = T * blocks >= 64 * w.team.size ? 8 : 1;
    w.units((T * blocks + per_unit - 1) / per_unit, [&](int64_t u0) {
      for (int64_t u = u0 * per_unit; u < (u0 + 1) * per_unit && u < T * blocks; ++u) {
        const int64_t t = u / blocks, head = u % blocks * kLanes;
        const Sequence& s = sequence(t);
        const int64_t p = position(t), seen = visible(l, t);
        int64_t n = 0;
        const float* ring = c.window + s.slot * m.window * m.dim;
        for (int64_t j = max64(0, p - m.window + 1); j <= p; ++j)
          b.pointers[n++] = j < s.start ? ring + j % m.window * m.dim : b.kv + (s.row + j - s.start) * m.dim;
        const bool selected = l.has_index && seen > m.index_topk;
        const int64_t count = selected ? m.index_topk : seen;
        const int32_t* picks = b.picks + t * m.index_topk;
        for (int64_t i = 0; i < count; ++i) {
          const int64_t e = selected ? picks[i] : i;
          b.pointers[n++] = c.entries + (s.table[e / per_block] * per_block + e % per_block) * m.dim;
        }
        const int heads = int(m.heads - head < kLanes ? m.heads - head : kLanes);
        attend_query(b.q + (t * m.heads + head) * m.dim, heads, m.dim, float(m.norm_eps), cos + t * m.rope / 2,
                     sin + t * m.rope / 2, m.rope, l.sink + head, b.pointers, n, b.qt, b.probs, b.row,
                     b.attended + (t * m.heads + head) * m.dim);
      }
    });
    w.barrier();
  }

  void attention(const Layer& l, const LayerCache& c) {
    const Compressor &main = l.compressor, &index = l.index_compressor;
    Job in[7] = {{l.wq_a, b.x, m.hidden, T, b.qa, m.q_rank}, {l.wkv, b.x, m.hidden, T, b.kv, m.dim}};
    int jobs = 2;
    if (l.ratio) {
      in[jobs++] = {main.wkv, b.x, m.hidden, T, b.ckv, main.width};
      in[jobs++] = {main.wgate, b.x, m.hidden, T, b.cgate, main.width};
    }
    if (l.has_index) {
      in[jobs++] = {index.wkv, b.x, m.hidden, T, b.ikv, index.width};
      in[jobs++] = {index.wgate, b.x, m.hidden, T, b.igate, index.width};
      in[jobs++] = {l.index_weights, b.x, m.hidden, T, b.iweights, m.index_heads};
    }
    run_jobs(w, b, in, jobs);
    w.barrier();
    const float *cos = b.cos[l.ratio != 0], *sin = b.sin[l.ratio != 0];
    w.units(T, [&](int64_t t) {
      rms_norm(b.qa + t * m.q_rank, b.qa + t * m.q_rank, l.q_norm, m.q_rank, float(m.norm_eps));
      rms_norm(b.kv + t * m.dim, b.kv + t * m.dim, l.kv_norm, m.dim, float(m.norm_eps));
      rotate(b.kv + t * m.dim + m.dim - m.rope, cos + t * m.rope / 2, sin + t * m.rope / 2, m.rope, 1.0f);
      if (l.ratio) compress_gate(main, b.cgate, t);
      if (l.has_index) compress_gate(index, b.igate, t);
    });
    w.barrier();
    Job up[2] = {{l.wq_b, b.qa, m.q_rank, T, b.q, m.heads * m.dim},
                 {l.index_wq_b, b.qa, m.q_rank, T, b.iq, m.index_heads * m.index_dim}};
    run_jobs(w, b, up, l.has_index ? 2 : 1);
    if (l.ratio) pool_all(main, b.ckv, b.cgate, c.tail_kv, c.tail_gate, c.tail_ring, c.entries);
    if (l.has_index) pool_all(index, b.ikv, b.igate, c.index_tail_kv, c.index_tail_gate, c.index_tail_ring, c.index_keys);
    w.barrier();
    if (l.has_index) choose(l, c);
    attend(l, c);
    Job grouped[64];
    const int64_t width = m.heads * m.dim / m.groups;
    for (int64_t g = 0; g < m.groups; ++g)
      grouped[g] = {rows_of(l.wo_a, g * m.o_rank, m.o_rank), b.attended + g * width, m.heads * m.dim, T,
                    b.latent + g * m.o_rank, m.groups * m.o_rank};
    run_jobs(w, b, grouped, int(m.groups));
    w.units(call.sequence_count, [&](int64_t i) {
      const Sequence& s = call.sequences[i];
      for (int64_t j = max64(s.start, s.start + s.length - m.window); j < s.start + s.length; ++j)
        __builtin_memcpy(c.window + (s.slot * m.window + j % m.window) * m.dim, b.kv + (s.row + j - s.start) * m.dim,
                         sizeof(float) * size_t(m.dim));
      if (l.ratio) keep_tail(main, s, b.ckv, b.cgate, c.tail_kv, c.tail_gate, c.tail_ring);
      if (l.has_index) keep_tail(index, s, b.ikv, b.igate, c.index_tail_kv, c.index_tail_gate, c.index_tail_ring);
    });
    w.barrier();
    Job out{l.wo_b, b.latent, m.groups * m.o_rank, T, b.y, m.hidden};
    run_jobs(w, b, &out, 1);
    w.barrier();
    w.units(T, [&](int64_t t) {
      leave_token(m, stream(t), b.y + t * m.hidden, b.post + t * m.streams, b.comb + t * m.streams * m.streams);
    });
    w.barrier();
  }

  static Matrix rows_of(const Matrix& a, int64_t first, int64_t rows) {
    const int64_t bytes = a.format == kF32 ? 4 * a.cols : a.format == kBF16 ? 2 * a.cols : a.format == kFP8 ? a.cols : a.cols / 2;
    const uint8_t* scale = a.scale;  // FP8 groups begin on a block of 128 rows, or Python decodes the matrix
    if (a.format == kFP8) scale += first / 128 * ((a.cols + 127) / 128);
    if (a.format == kFP4) scale += first * (a.cols / 32);
    return {static_cast<const char*>(a.data) + first * bytes, scale, rows, a.cols, a.format};
  }

  void route_token(const Layer& l, int64_t t) {
    const int64_t k = m.experts_per_token;
    float* s = b.scores + t * m.experts;
    int32_t* chosen = b.route + t * k;
    for (int64_t e = 0; e < m.experts; ++e) s[e] = std::sqrt(s[e] > 20.0f ? s[e] : std::log1p(std::exp(s[e])));
    for (int64_t i = 0; i < k; ++i) {
      if (l.tid2eid != nullptr) {
        chosen[i] = int32_t(l.tid2eid[call.ids[t] * k + i]);
        continue;
      }
      int64_t best = INT64_MIN;
      for (int64_t e = 0; e < m.experts; ++e) {
        bool taken = false;
        for (int64_t j = 0; j < i; ++j) taken |= chosen[j] == e;
        const int64_t key = rank_key(l.gate_bias != nullptr ? s[e] + l.gate_bias[e] : s[e], e);
        if (!taken && key > best) best = key, chosen[i] = int32_t(e);
      }
    }
    float total = 0.0f;
    for (int64_t i = 0; i < k; ++i) total += s[chosen[i]];
    for (int64_t i = 0; i < k; ++i) b.route_weights[t * k + i] = s[chosen[i]] / total * float(m.routed_scaling);
  }

  void group_pairs() {  // counting sort of (token, place) by expert
    const int64_t pairs = T * m.experts_per_token;
    for (int64_t e = 0; e <= m.experts; ++e) b.group_start[e] = 0;
    for (int64_t p = 0; p < pairs; ++p) ++b.group_start[b.route[p] + 1];
    for (int64_t e = 0; e < m.experts; ++e) b.group_start[e + 1] += b.group_start[e];
    for (int64_t p = 0; p < pairs; ++p) b.order[p] = b.group_start[b.route[p]]++;
    for (int64_t e = m.experts; e > 0; --e) b.group_start[e] = b.group_start[e - 1];
    b.group_start[0] = 0;
  }

  void experts(const Layer& l) {
    const int64_t k = m.experts_per_token, E = m.experts;
    Job gate{l.gate, b.x, m.hidden, T, b.scores, E};
    run_jobs(w, b, &gate, 1);
    w.barrier();
    w.units(T, [&](int64_t t) { route_token(l, t); });
    w.barrier();
    if (w.id == 0) group_pairs();
    w.barrier();
    w.units(T * k, [&](int64_t p) {  // order[p]: where the pair lies among the sorted
      __builtin_memcpy(b.gathered + b.order[p] * m.hidden, b.x + p / k * m.hidden, sizeof(float) * size_t(m.hidden));
    });
    w.barrier();
    // Units: each active expert's tiles of hidden rows, then the shared expert's, cut by tokens where many.
    const int64_t tiles = (m.inter + kTile - 1) / kTile, shared_tiles = (m.shared_inter + kTile - 1) / kTile;
    const int64_t cut = T > 192 ? 96 : T, cuts = (T + cut - 1) / cut;
    w.units(E * tiles + shared_tiles * cuts, [&](int64_t u) {
      const bool shared = u < shared_tiles * cuts;  // first, as these are the largest
      const int64_t e = shared ? E : (u - shared_tiles * cuts) / tiles;
      const int64_t tile = shared ? u / cuts : (u - shared_tiles * cuts) % tiles;
      const int64_t inter = shared ? m.shared_inter : m.inter;
      const int64_t r0 = shared ? u % cuts * cut : b.group_start[e];
      const int64_t r1 = shared ? (r0 + cut < T ? r0 + cut : T) : b.group_start[e + 1];
      if (r0 == r1) return;
      const float* x = shared ? b.x : b.gathered;
      float* hidden = b.hidden + (shared ? T * k * m.inter : 0);
      float* up = b.up + (shared ? T * k * m.inter : 0);
      const int64_t first = tile * kTile;
      const int width = int(inter - first < kTile ? inter - first : kTile);
      run_job({l.experts[3 * e], x, m.hidden, r1, hidden, inter}, first, width, r0, r1, b.tile, b.rows_buffer, b.inputs, w.phase);
      run_job({l.experts[3 * e + 1], x, m.hidden, r1, up, inter}, first, width, r0, r1, b.tile, b.rows_buffer, b.inputs, w.phase);
      const float limit = float(m.swiglu_limit);
      for (int64_t r = r0; r < r1; ++r) {
        float* g = hidden + r * inter + first;
        const float* v = up + r * inter + first;
        map(g, g, width, [&](Vec a, int64_t i) {
          a = select(a > limit, splat(limit), a);
          Vec c = load_at(v, i, width);
          c = select(c > limit, splat(limit), select(c < -limit, splat(-limit), c));
          return a * sigmoid(a) * c;
        });
      }
    });
    w.barrier();
    const int64_t out_tiles = (m.hidden + kTile - 1) / kTile;
    w.units((E + cuts) * out_tiles, [&](int64_t u) {
      const bool shared = u < cuts * out_tiles;
      const int64_t e = shared ? E : (u - cuts * out_tiles) / out_tiles;
      const int64_t first = u % out_tiles * kTile;
      const int64_t r0 = shared ? u / out_tiles * cut : b.group_start[e];
      const int64_t r1 = shared ? (r0 + cut < T ? r0 + cut : T) : b.group_start[e + 1];
      if (r0 == r1) return;
      const int width = int(m.hidden - first < kTile ? m.hidden - first : kTile);
      const int64_t inter = shared ? m.shared_inter : m.inter;
      run_job({l.experts[3 * e + 2], b.hidden + (shared ? T * k * m.inter : 0), inter, r1,
               shared ? b.shared_out : b.expert_out, m.hidden},
              first, width, r0, r1, b.tile, b.rows_buffer, b.inputs, w.phase);
    });
    w.barrier();
    w.units(T, [&](int64_t t) {
      float* y = b.y + t * m.hidden;
      map(y, b.shared_out + t * m.hidden, m.hidden, [&](Vec v, int64_t i) {
        Vec routed{};
        for (int64_t j = 0; j < k; ++j)
          routed += load_at(b.expert_out + b.order[t * k + j] * m.hidden, i, m.hidden) * b.route_weights[t * k + j];
        return v + routed;
      });
      leave_token(m, stream(t), y, b.post + t * m.streams, b.comb + t * m.streams * m.streams);
    });
    w.barrier();
  }
};

static void forward_body(Worker& w, void* argument) {
  const Call& call = *static_cast<const Call*>(argument);
  Buffers b;
  int64_t own = 0;
  const int64_t entries = most_entries(call.layers, call.layer_count, call.sequences, call.sequence_count);
  lay_out(*call.model, call.tokens, entries, reinterpret_cast<char*>(call.workspace), w.id, b, own);
  Forward f{w, call, *call.model, b, call.tokens};
  f.start();
  w.barrier();
  for (int64_t i = 0; i < call.layer_count; ++i) {
    const Layer& l = call.layers[i];
    if (call.picks != nullptr) b.picks = call.picks + i * call.tokens * call.model->index_topk;
    f.enter(l.mix_attn, l.attn_norm);
    f.attention(l, call.caches[i]);
    f.enter(l.mix_ffn, l.ffn_norm);
    f.experts(l);
  }
}

static int64_t workspace_bytes(const Model& m, const Layer* layers, int64_t layer_count, const Sequence* s, int64_t n,
                               int64_t tokens, int threads) {
  Buffers b;
  int64_t own = 0;
  const int64_t shared = lay_out(m, tokens, most_entries(layers, layer_count, s, n), nullptr, 0, b, own);
  return shared + own * threads;
}

static void head_body(Worker& w, void* argument) {
  const HeadCall& call = *static_cast<const HeadCall*>(argument);
  const Model& m = *call.model;
  const int64_t T = call.tokens, h = m.streams;
  const int64_t widest = max64(h * m.hidden, m.hidden);
  Buffers b;
  float *z = call.workspace, *x = z + T * h;
  const int64_t packed = kPackedRows * packed_row_bytes(widest) / 4;
  b.tile = x + T * m.hidden + w.id * (widest * (kTile + 4) + packed);
  b.rows_buffer = b.tile + widest * kTile;
  b.inputs.space = reinterpret_cast<char*>(b.rows_buffer + widest * 4);
  Job job{call.fn, call.streams, h * m.hidden, T, z, h};
  run_jobs(w, b, &job, 1);
  w.barrier();
  const Mix mix{call.fn, call.base, call.scale};
  w.units((T + kLanes - 1) / kLanes, [&](int64_t u) {
    const int64_t t = u * kLanes;
    const int count = int(T - t < kLanes ? T - t : kLanes);
    mix_any(m, mix, call.streams + t * h * m.hidden, z + t * h, count, true, call.norm, nullptr, nullptr, x + t * m.hidden);
  });
  w.barrier();
  Job head{call.head, x, m.hidden, T, call.logits, m.vocab};
  run_jobs(w, b, &head, 1);
}

static int64_t head_workspace_bytes(const Model& m, int64_t tokens, int threads) {
  const int64_t widest = m.streams * m.hidden;
  return 4 * (tokens * (m.streams + m.hidden) + threads * widest * (kTile + 4)) +
         threads * kPackedRows * packed_row_bytes(widest);
}

extern const Kernels kernels;
const Kernels kernels{forward_body, head_body, workspace_bytes, head_workspace_bytes};
