// A layer cut by tokens: a thread takes a block of tokens through all dense products up to the next point where tokens
// meet (the window, the entries, the experts), so activations stay in its cache and weights stream from the shared one.
// Serves several tokens where a layer's dense weights fit that cache: small models.

constexpr int64_t kBlock = 48;        // tokens of a block, at most
constexpr int64_t kExpertRows = 96;   // an expert's tokens at a time
constexpr int64_t kSkew = 16;         // floats that keep rows of 4 KiB from meeting in one set of the L1 cache

struct OwnBuffers {  // of one thread, for a block
  float *z, *x, *q, *iq, *attended, *latent, *y, *scores, *gathered, *hidden, *up, *factor;
  int32_t *pairs, *key_pairs;
  int inputs = 0;  // what products' inputs are told apart by
};

// Each thread reads all of a layer's dense weights. Two threads read them together out of the shared cache, and fewer
// barriers are worth that from one token each; what more threads do isn't measured, so there it has to be many tokens.
static bool by_tokens(const Model& m, int64_t tokens, int threads) {
  return m.by_tokens && tokens >= (threads <= 2 ? 1 : 12) * threads && tokens > 1;
}

static int64_t lay_out_blocks(const Model& m, int64_t tokens, int64_t entries, char* base, int thread, int threads,
                              Buffers& b, OwnBuffers& o) {
  Bump at{base};
  take_shared(at, b, m, tokens, entries, threads);
  const int64_t shared = at.used, h = m.streams, inter = max64(m.inter, m.shared_inter);
  const int64_t attended = max64(m.heads * m.dim / m.groups, m.groups * m.o_rank);
  const int64_t widest = max64(max64(h * m.hidden, m.q_rank), max64(inter, attended));
  Bump own{base + shared};
  for (int i = 0; i <= thread; ++i) {
    take_own(own, b, m, entries);
    own.take(b.tile, max64(m.index_dim, widest) * kTile);
    own.take(b.rows_buffer, 4 * widest);
    own.take(b.inputs.space, kPackedRows * packed_row_bytes(widest));
    own.take(o.z, kBlock * (2 + h) * h);
    own.take(o.x, kBlock * m.hidden);
    own.take(o.q, kBlock * (m.heads * m.dim + kSkew));
    own.take(o.iq, kBlock * m.index_heads * m.index_dim);
    own.take(o.attended, kBlock * (m.heads * m.dim + kSkew));
    own.take(o.latent, kBlock * m.groups * m.o_rank);
    own.take(o.y, kBlock * m.hidden);
    own.take(o.scores, kBlock * m.experts);
    own.take(o.pairs, kIndexRows * m.index_heads * ((m.index_dim + 1) / 2));
    own.take(o.factor, kIndexRows * m.index_heads);
    own.take(o.key_pairs, (m.index_dim + 1) / 2 * kTile);
    own.take(o.gathered, kExpertRows * m.hidden);
    own.take(o.hidden, kExpertRows * inter);
    own.take(o.up, kExpertRows * inter);
  }
  return shared + own.used / (thread + 1) * threads;
}

struct ByTokens : LayerPass {
  OwnBuffers& o;

  // f(first token, count) for even blocks, as many for each thread.
  template <class F>
  void blocks(F f) {
    const int64_t n = w.team.size, count = ((T + kBlock - 1) / kBlock + n - 1) / n * n;
    w.units(count, [&](int64_t u) {
      const int64_t t0 = T * u / count, t1 = T * (u + 1) / count;
      if (t0 < t1) f(t0, t1 - t0);
    });
  }

  // Jobs of the same input.
  void multiply(const Job* jobs, int count) {
    ++o.inputs;
    for (const Job* job = jobs; job < jobs + count; ++job)
      for (int64_t first = 0; first < job->m.rows; first += kTile)
        run_job(*job, first, int(min64(job->m.rows - first, kTile)), 0, job->t, b.tile, b.rows_buffer, &b.inputs, o.inputs);
  }
  void multiply(const Job& job) { multiply(&job, 1); }

  // x [n, hidden]: the sublayer's normed input of tokens [t0, t0 + n); their weights to leave by, where they will.
  void enter(const Mix& mix, const float* norm, int64_t t0, int64_t n, float* x, bool leaves = true) {
    const int64_t h = m.streams, zs = leaves ? (2 + h) * h : h;
    multiply({rows_of(mix.fn, 0, zs), stream(t0), h * m.hidden, n, o.z, zs});
    for (int64_t i = 0; i < n; i += kLanes)
      mix_any(m, mix, stream(t0 + i), o.z + i * zs, int(min64(n - i, kLanes)), !leaves, norm, b.post + (t0 + i) * h,
              b.comb + (t0 + i) * h * h, x + i * m.hidden);
  }

  void before_attention(const Layer& l, Sides sides, int64_t t0, int64_t n) {
    enter(l.mix_attn, l.attn_norm, t0, n, o.x, sides & kQueries);
    Job jobs[7];
    multiply(jobs, inputs(l, sides, o.x, t0, n, jobs));
    for (int64_t t = t0; t < t0 + n; ++t) norm_inputs(l, sides, t);
  }

  void choose(const Layer& l, const LayerCache& c, int64_t t0, int64_t n) {
    const int64_t width = m.index_heads * m.index_dim;
    for (int64_t i = 0, count; i < n; i += count) {
      const Sequence& s = sequence(t0 + i);
      const Queries q = queries(s);
      count = min64(min64(n - i, kIndexRows), q.row + q.length - t0 - i);
      const int64_t entries = visible(l, t0 + i + count - 1);
      if (entries <= m.index_topk) continue;
      float* scores = b.index_scores + w.id * kIndexRows * b.score_row;
      turn_index_queries(t0 + i, count, o.iq + i * width);
      if (kShorts && !m.bytes && choose_by_shorts(l, c, t0 + i, count, o.iq + i * width, entries, scores, o.pairs, o.factor, o.key_pairs))
        continue;
      score_entries(l, c, t0 + i, count, o.iq + i * width, 0, entries, scores);
      select_entries(l, t0 + i, count, scores);
    }
  }

  void attend(const Layer& l, const LayerCache& c, int64_t t0, int64_t n) {
    const int64_t row = m.heads * m.dim + kSkew;
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t k = 0; k < m.streams * m.hidden; k += 16) __builtin_prefetch(stream(t0 + i) + k, 1, 2);  // left soon
      attend_token(l, c, t0 + i, t0 + min64(i + 1, n - 1), o.q + i * row, o.attended + i * row);
    }
  }

  void from_attention(const Layer& l, const LayerCache& c, int64_t t0, int64_t n) {
    const int64_t row = m.heads * m.dim + kSkew, latent = m.groups * m.o_rank, width = m.heads * m.dim / m.groups;
    int64_t most = 0;  // a block may hold the end of one sequence and the start of another
    for (int64_t t = t0; t < t0 + n; ++t) most = max64(most, visible(l, t));
    const bool chooses = l.has_index && most > m.index_topk;
    const Job up[2] = {{l.wq_b, b.qa + t0 * m.q_rank, m.q_rank, n, o.q, row},
                       {l.index_wq_b, b.qa + t0 * m.q_rank, m.q_rank, n, o.iq, m.index_heads * m.index_dim}};
    multiply(up, chooses ? 2 : 1);
    if (chooses) choose(l, c, t0, n);
    attend(l, c, t0, n);
    for (int64_t g = 0; g < m.groups; ++g)
      multiply({rows_of(l.wo_a, g * m.o_rank, m.o_rank), o.attended + g * width, row, n, o.latent + g * m.o_rank, latent});
    multiply({l.wo_b, o.latent, latent, n, o.y, m.hidden});
    for (int64_t i = 0; i < n; ++i) leave(t0 + i, o.y + i * m.hidden);
    enter(l.mix_ffn, l.ffn_norm, t0, n, b.x + t0 * m.hidden);
    multiply({l.gate, b.x + t0 * m.hidden, m.hidden, n, o.scores, m.experts});
    for (int64_t i = 0; i < n; ++i) route_token(l, t0 + i, o.scores + i * m.experts);
  }

  // SwiGLU of n rows x through expert e (the shared one follows the routed ones).
  void expert(const Layer& l, int64_t e, const float* x, int64_t n, float* out) {
    const int64_t inter = e == m.experts ? m.shared_inter : m.inter;
    const Job up[2] = {{l.experts[3 * e], x, m.hidden, n, o.hidden, inter}, {l.experts[3 * e + 1], x, m.hidden, n, o.up, inter}};
    multiply(up, 2);
    swiglu(o.hidden, o.up, n * inter);
    multiply({l.experts[3 * e + 2], o.hidden, inter, n, out, m.hidden});
  }

  void experts(const Layer& l) {
    const int64_t k = m.experts_per_token;
    w.units(m.experts, [&](int64_t e) {
      const int32_t end = b.group_start[e + 1];
      for (int32_t r0 = b.group_start[e]; r0 < end; r0 += kExpertRows) {
        const int64_t n = min64(end - r0, kExpertRows);
        for (int64_t i = 0; i < n; ++i)
          __builtin_memcpy(o.gathered + i * m.hidden, b.x + b.pair_of[r0 + i] / k * m.hidden,
                           sizeof(float) * size_t(m.hidden));
        expert(l, e, o.gathered, n, b.expert_out + r0 * m.hidden);
      }
    });
    blocks([&](int64_t t0, int64_t n) {
      expert(l, m.experts, b.x + t0 * m.hidden, n, b.shared_out + t0 * m.hidden);
    });
  }

  void leave_experts_of(int64_t t0, int64_t n) {
    for (int64_t t = t0; t < t0 + n; ++t) {
      if (t + 1 < t0 + n) fetch_experts(t + 1);
      leave_experts(t, o.y);
    }
  }

  void run() {
    start();
    for (int64_t i = 0; i < call.layer_count; ++i) {
      const Layer& l = call.layers[i];
      const LayerCache& c = call.caches[i];
      begin(i);
      blocks([&](int64_t t0, int64_t n) {
        if (i > 0) leave_experts_of(t0, n);
        before_attention(l, narrows(i) ? kKeys : kBoth, t0, n);
      });
      w.barrier();
      if (l.ratio) {
        pool(l, c);
        w.barrier();
      }
      if (narrows(i)) {
        narrow();
        blocks([&](int64_t t0, int64_t n) { before_attention(l, kQueries, t0, n); });
        w.barrier();
      }
      blocks([&](int64_t t0, int64_t n) { from_attention(l, c, t0, n); });
      w.barrier();
      if (w.id == 0) group_pairs();
      w.barrier();
      experts(l);
      keep(l, c);
      w.barrier();
    }
    blocks([&](int64_t t0, int64_t n) { leave_experts_of(t0, n); });
  }
};
