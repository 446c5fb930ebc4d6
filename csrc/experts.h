// A layer's routed experts by themselves: for those that stay on the host while the rest of the layer is on a card.

static int64_t lay_out_experts(const Model& m, int64_t tokens, char* base, int thread, int threads, Buffers& b) {
  Bump at{base};
  const int64_t pairs = tokens * m.experts_per_token, widest = max64(m.hidden, m.inter);
  at.take(b.expert_out, pairs * m.hidden);
  at.take(b.order, pairs);
  at.take(b.pair_of, pairs);
  at.take(b.group_start, m.experts + 1);
  at.take(b.active, m.experts + 2);
  at.take(b.gathered, pairs * m.hidden);
  at.take(b.hidden, pairs * m.inter);
  at.take(b.up, pairs * m.inter);
  const int64_t shared = at.used;
  Bump own{base + shared};
  for (int i = 0; i <= thread; ++i) take_product(own, b, widest);
  return shared + own.used / (thread + 1) * threads;
}

static void experts_body(Worker& w, void* argument) {
  const ExpertsCall& call = *static_cast<const ExpertsCall*>(argument);
  const Model& m = *call.model;
  Buffers b{};
  lay_out_experts(m, call.tokens, reinterpret_cast<char*>(call.workspace), w.id, w.team.size, b);
  b.inputs.rounds = m.rounds;
  b.x = const_cast<float*>(call.x);
  b.route = const_cast<int32_t*>(call.route);
  b.route_weights = const_cast<float*>(call.route_weights);
  const Call none{};
  ByWeights pass{{w, none, m, b, call.tokens}};
  if (!pass.mixture(call.experts, call.layer, call.take, false)) return;
  pass.tokens([&](int64_t t) {
    float* y = call.y + t * m.hidden;
    map(y, y, m.hidden, [&](Vec, int64_t i) { return pass.routed(t, i); });
  });
}

static int64_t experts_workspace_bytes(const Model& m, int64_t tokens, int threads) {
  Buffers b;
  return lay_out_experts(m, tokens, nullptr, 0, threads, b);
}
