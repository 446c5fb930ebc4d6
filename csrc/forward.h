// One call of the model's layers on any number of sequences, each with its own number of new tokens: decode, prefill
// and mixtures are the same code. Threads take units of a phase; a barrier ends each phase.

static void forward_body(Worker& w, void* argument) {
  const Call& call = *static_cast<const Call*>(argument);
  const Model& m = *call.model;
  Buffers b;
  b.inputs.rounds = m.rounds;
  const int64_t entries = most_entries(call.layers, call.layer_count, call.sequences, call.sequence_count);
  auto* base = reinterpret_cast<char*>(call.workspace);
  if (!call.parts && by_tokens(m, call.tokens, w.team.size)) {
    OwnBuffers own;
    lay_out_blocks(m, call.tokens, entries, base, w.id, w.team.size, b, own);
    ByTokens{{w, call, m, b, call.tokens}, own}.run();
  } else {
    lay_out(m, call.tokens, entries, base, w.id, w.team.size, b);
    if (call.parts) b.x = call.x, b.y = call.y, b.post = call.post, b.comb = call.comb;
    ByWeights{{w, call, m, b, call.tokens}}.run();
  }
}

// The pool may give fewer threads than asked for, which may change the way: room for both.
static int64_t workspace_bytes(const Model& m, const Layer* layers, int64_t layer_count, const Sequence* s, int64_t n,
                               int64_t tokens, int threads) {
  Buffers b;
  OwnBuffers own;
  const int64_t entries = most_entries(layers, layer_count, s, n);
  const int64_t bytes = by_tokens(m, tokens, threads) ? 0 : lay_out(m, tokens, entries, nullptr, 0, threads, b);
  return by_tokens(m, tokens, 1) ? max64(bytes, lay_out_blocks(m, tokens, entries, nullptr, 0, threads, b, own)) : bytes;
}

static void head_body(Worker& w, void* argument) {
  const HeadCall& call = *static_cast<const HeadCall*>(argument);
  const Model& m = *call.model;
  const int64_t T = call.tokens, h = m.streams;
  const int64_t widest = max64(h * m.hidden, m.hidden);
  Buffers b;
  float *z = call.workspace, *x = z + T * h;
  const int64_t packed = kPackedRows * packed_row_bytes(widest) / 4 + 16;
  b.tile = x + T * m.hidden + w.id * (widest * (kTile + 4) + packed);
  b.rows_buffer = b.tile + widest * kTile;
  const auto space = reinterpret_cast<uintptr_t>(b.rows_buffer + widest * 4);
  b.inputs.space = reinterpret_cast<char*>((space + 63) / 64 * 64);
  b.inputs.rounds = m.rounds;
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
  return 4 * (tokens * (m.streams + m.hidden) + threads * (widest * (kTile + 4) + 16)) +
         threads * kPackedRows * packed_row_bytes(widest);
}

extern const Kernels kernels;
const Kernels kernels{forward_body,    head_body,            product_body,            experts_body,
                      workspace_bytes, head_workspace_bytes, product_workspace_bytes, experts_workspace_bytes,
                      UPWELL_BYTE_DOTS, UPWELL_BF16_DOTS,    UPWELL_INTEGER_DOTS};
