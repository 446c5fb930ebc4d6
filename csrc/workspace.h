// What a call needs besides weights and caches: shared buffers, then one set of scratch a thread.

struct Buffers {
  float *z, *post, *comb, *x, *qa, *ckv, *cgate, *ikv, *igate, *iweights, *kv, *q, *iq, *attended, *latent, *y;
  float *scores, *route_weights, *gathered, *hidden, *up, *expert_out, *shared_out, *index_scores, *parts;
  float* turn[2];  // of window and compressed layers: a token's cosines and sines, see rotate
  int64_t score_row;  // floats of one query's index scores
  int64_t* load = nullptr;  // of the layer, null: not counted
  int32_t *picks, *route, *order, *pair_of, *group_start, *active, *sequence_of, *finished;
  char* kv_bytes;  // kv as rows of bytes
  float *tile, *rows_buffer, *qt, *probs, *index_q;  // of one thread from here on
  const float** pointers;
  KeptRows kept;
  KeptColumns kept_columns;
  float *entry, *index_factor;
  char* index_bytes;  // queries of the indexer
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

constexpr int64_t kIndexRows = 16;  // queries that score a tile of index keys together
constexpr int64_t kMostParts = 8;   // threads that share one query's rows in decode

// What both ways through a layer use. entries: the most that a sequence has.
static void take_shared(Bump& at, Buffers& b, const Model& m, int64_t tokens, int64_t entries, int threads) {
  const int64_t h = m.streams, d = m.dim, pairs = tokens * m.experts_per_token;
  at.take(b.post, tokens * h);
  at.take(b.comb, tokens * h * h);
  at.take(b.x, tokens * m.hidden);
  at.take(b.qa, tokens * m.q_rank);
  at.take(b.kv, tokens * d);
  at.take(b.kv_bytes, m.bytes ? tokens * byte_row(d) : 0);
  at.take(b.ckv, tokens * 2 * d);
  at.take(b.cgate, tokens * 2 * d);
  at.take(b.ikv, tokens * 2 * m.index_dim);
  at.take(b.igate, tokens * 2 * m.index_dim);
  at.take(b.iweights, tokens * m.index_heads);
  at.take(b.route_weights, pairs);
  at.take(b.expert_out, pairs * m.hidden);
  at.take(b.shared_out, tokens * m.hidden);
  for (int i = 0; i < 2; ++i) at.take(b.turn[i], tokens * m.rope * 2);
  at.take(b.picks, tokens * (m.index_topk + 1));
  at.take(b.route, pairs);
  at.take(b.order, pairs);
  at.take(b.pair_of, pairs);
  at.take(b.group_start, m.experts + 1);
  at.take(b.active, m.experts + 2);
  at.take(b.sequence_of, tokens);
  b.score_row = (entries + kTile - 1) / kTile * kTile + 64;
  at.take(b.index_scores, threads * kIndexRows * b.score_row);
}

// What a thread's products need of its own, for inputs of up to `widest` columns.
static void take_product(Bump& own, Buffers& b, int64_t widest) {
  own.take(b.tile, widest * kTile);
  own.take(b.rows_buffer, widest * 4);
  own.take(b.inputs.space, kPackedRows * packed_row_bytes(widest));
}

static void take_own(Bump& at, Buffers& b, const Model& m, int64_t entries) {
  const int64_t keys = m.window + max64(entries, 1);
  at.take(b.qt, (m.dim + kLanes) * kLanes);
  at.take(b.probs, (keys + 8) * kLanes);
  at.take(b.pointers, keys + 8);
  if (m.bytes) {
    at.take(b.kept_columns.columns, (keys + 16) / 4 * byte_columns(m.dim));
    at.take(b.kept_columns.row_at, keys + 16);
    at.take(b.kept_columns.columns_at, keys / 4 + 8);
    at.take(b.entry, max64(m.dim, m.index_dim));
    at.take(b.index_factor, kIndexRows * m.index_heads);
    at.take(b.index_bytes, kIndexRows * m.index_heads * byte_row(m.index_dim));
  } else if (m.rounds && UPWELL_BF16_DOTS) {
    const int64_t pairs = row_pairs(m.dim);
    at.take(b.kept.rows, (keys + 8) * pairs);
    at.take(b.kept.columns, (keys + 8) * pairs);
    at.take(b.kept.row_at, keys + 8);
    at.take(b.kept.columns_at, keys / 2 + 4);
  }
  at.take(b.index_q, kIndexRows * m.index_heads * m.index_dim);
}

// Lays out the workspace of a call by weights (phases.h); returns its bytes.
static int64_t lay_out(const Model& m, int64_t tokens, int64_t entries, char* base, int thread, int threads, Buffers& b) {
  Bump at{base};
  take_shared(at, b, m, tokens, entries, threads);
  const int64_t h = m.streams, d = m.dim, pairs = tokens * m.experts_per_token, inter = max64(m.inter, m.shared_inter);
  at.take(b.z, tokens * (2 + h) * h);
  at.take(b.q, tokens * m.heads * d);
  at.take(b.iq, tokens * m.index_heads * m.index_dim);
  at.take(b.attended, tokens * m.heads * d);
  at.take(b.latent, tokens * m.groups * m.o_rank);
  at.take(b.y, tokens * m.hidden);
  at.take(b.scores, tokens * m.experts);
  at.take(b.gathered, pairs * m.hidden);
  at.take(b.hidden, (pairs + tokens) * inter);
  at.take(b.up, (pairs + tokens) * inter);
  const int64_t splits = min64(tokens * ((m.heads + kLanes - 1) / kLanes), threads);
  at.take(b.parts, splits * kMostParts * (d + 2) * kLanes);
  at.take(b.finished, max64(splits, threads));
  const int64_t widest = max64(max64(max64(max64(h * m.hidden, m.index_dim), m.heads * d / m.groups), m.groups * m.o_rank),
                               max64(inter, m.q_rank));
  const int64_t shared = at.used;
  Bump own{base + shared};
  for (int i = 0; i <= thread; ++i) {
    take_product(own, b, widest);
    take_own(own, b, m, entries);
  }
  return shared + own.used / (thread + 1) * threads;
}

static int64_t most_entries(const Layer* layers, int64_t layer_count, const Sequence* s, int64_t n) {
  int64_t most = 0;
  for (int64_t l = 0; l < layer_count; ++l)
    for (int64_t i = 0; i < n && layers[l].ratio; ++i) most = max64(most, (s[i].start + s[i].length) / layers[l].ratio);
  return most;
}
