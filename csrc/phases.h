// A layer cut by weights: every phase's products are tiles of weight rows, which threads take. Serves few tokens
// (decode), and weights that are packed or larger than the cache.

// The most input rows that a thread lays out at once for a weight; INT64_MAX where they are read as they lie.
INLINE int64_t rows_laid_out(const Matrix& m, bool rounds) {
  return is_packed(m) ? rows_at_once(m, rounds) : is_integer(m) ? integer_rows(m.cols) : m.format == kPairs ? kPairRows : INT64_MAX;
}

// All jobs of a phase, cut into tiles of weight rows and, where tokens are many, of tokens.
static void run_jobs(Worker& w, Buffers& b, const Job* jobs, int count) {
  int64_t tiles = 0;
  for (int i = 0; i < count; ++i) tiles += (jobs[i].m.rows + kTile - 1) / kTile;
  int64_t t = 1;
  for (int i = 0; i < count; ++i) t = max64(t, jobs[i].t);
  int64_t step = t;
  // Rows that a thread has laid out serve all tiles, then come the next.
  for (int i = 0; i < count; ++i) step = min64(step, rows_laid_out(jobs[i].m, b.inputs.rounds));
  const bool laid_out = rows_laid_out(jobs[0].m, b.inputs.rounds) < INT64_MAX;
  while (step > 96 && tiles * ((t + step - 1) / step) < 6 * w.team.size) step = (step / 2 + 11) / 12 * 12;
  const int64_t cuts = (t + step - 1) / step;
  // Few tokens: neighbouring tiles stay with a thread, which then fetches its own weights ahead across tiles.
  const int64_t run = t <= kPackedRows ? max64(1, min64(4, tiles / (32 * w.team.size))) : 1;
  const int64_t runs = (tiles + run - 1) / run;
  auto job_of = [&](int64_t& tile) {  // tile: of all, then of the job
    const Job* job = jobs;
    for (; tile >= (job->m.rows + kTile - 1) / kTile; ++job) tile -= (job->m.rows + kTile - 1) / kTile;
    return job;
  };
  w.units(runs * cuts, [&](int64_t u) {
    const int64_t begin = (laid_out ? u % runs : u / cuts) * run, t0 = (laid_out ? u / runs : u % cuts) * step;
    for (int64_t i = begin; i < min64(tiles, begin + run); ++i) {
      int64_t tile = i, then = i + 1 < begin + run ? i + 1 : i + 1 + run * (w.team.size - 1);
      const Job* job = job_of(tile);
      const int64_t t1 = t0 + step < job->t ? t0 + step : job->t;
      if (t0 >= t1) continue;
      const int64_t first = tile * kTile;
      const int width = int(job->m.rows - first < kTile ? job->m.rows - first : kTile);
      const void* next = nullptr;
      if (then < tiles) {
        const Job* after = job_of(then);
        next = panel_of(after->m, then * kTile);
      }
      run_job(*job, first, width, t0, t1, b.tile, b.rows_buffer, &b.inputs, w.phase, next);
    }
  });
}

struct ByWeights : LayerPass {
  // before(t): what makes token t's streams. Of many tokens a thread takes some through all of it: they lie in its cache.
  template <class F>
  void enter(const Mix& mix, const float* norm, F before) {
    const int64_t h = m.streams, zs = (2 + h) * h;
    const Job job{mix.fn, call.streams, h * m.hidden, T, b.z, zs};
    auto product = [&](int64_t first, int64_t rows, int64_t t0, int64_t t1) {
      run_job(job, first, int(rows), t0, t1, b.tile, b.rows_buffer, &b.inputs, w.phase);
    };
    auto mixed = [&](int64_t t, int64_t end) {
      mix_any(m, mix, stream(t), b.z + t * zs, int(min64(end - t, kLanes)), false, norm, b.post + t * h, b.comb + t * h * h,
              b.x + t * m.hidden);
    };
    if (T >= kLanes * w.team.size) {  // some for each thread
      w.units((T + kLanes - 1) / kLanes, [&](int64_t u) {
        const int64_t t0 = u * kLanes, t1 = min64(t0 + kLanes, T);
        for (int64_t t = t0; t < t1; ++t) before(t);
        for (int64_t first = 0; first < zs; first += kTile) product(first, min64(kTile, zs - first), t0, t1);
        mixed(t0, t1);
      });
      w.barrier();
      return;
    }
    tokens(before);
    w.barrier();
    const int64_t rows = 4, cut = 48, groups = (zs + rows - 1) / rows;  // few rows, many columns: small units
    w.units(groups * ((T + cut - 1) / cut), [&](int64_t u) {
      const int64_t first = u % groups * rows, t0 = u / groups * cut;
      product(first, min64(rows, zs - first), t0, min64(t0 + cut, T));
    });
    w.barrier();
    const int64_t end = T * (w.id + 1) / w.team.size;
    for (int64_t t = T * w.id / w.team.size; t < end; t += kLanes) mixed(t, end);
    w.barrier();
  }
  void enter(const Mix& mix, const float* norm) {
    enter(mix, norm, [](int64_t) {});
  }

  // picks[t]: the entries that each token reads; only for tokens that see more than the top-k. Where groups of queries
  // are fewer than threads, a group's entries are cut among them, and the last to finish selects.
  void choose(const Layer& l, const LayerCache& c) {
    int64_t groups = 0, most = 0;
    for (int64_t s = 0; s < call.sequence_count; ++s) {
      const Queries q = queries(call.sequences[s]);
      groups += (q.length + kIndexRows - 1) / kIndexRows;
      most = max64(most, (q.start + q.length) / l.ratio);
    }
    if (most <= m.index_topk) return;
    int64_t parts = groups < w.team.size ? (w.team.size + groups - 1) / groups : 1;
    const int64_t step = max64(256, (most + parts * kTile - 1) / (parts * kTile) * kTile);
    parts = (most + step - 1) / step;
    const int64_t n = m.index_heads * m.index_dim;
    w.units(groups * parts, [&](int64_t u) {
      int64_t group = u / parts;
      const int64_t part = u % parts;
      float* scores = b.index_scores + (parts > 1 ? group : w.id) * kIndexRows * b.score_row;
      const Sequence* s = call.sequences;
      auto groups_of = [&](const Queries& q) { return (q.length + kIndexRows - 1) / kIndexRows; };
      Queries q = queries(*s);
      for (; group >= groups_of(q); q = queries(*++s)) group -= groups_of(q);
      const int64_t t0 = q.row + group * kIndexRows, count = min64(q.row + q.length - t0, kIndexRows);
      const int64_t entries = visible(l, t0 + count - 1);
      if (entries <= m.index_topk) return;
      if (part * step < entries) {
        __builtin_memcpy(b.index_q, b.iq + t0 * n, sizeof(float) * size_t(count * n));
        turn_index_queries(t0, count, b.index_q);
        score_entries(l, c, t0, count, b.index_q, part * step, min64(entries, part * step + step), scores);
      }
      if (parts > 1 && !last_part(u / parts, parts)) return;
      select_entries(l, t0, count, scores);
    });
    w.barrier();
  }

  // Whether this is the last of a group's parts to finish. The counters are zero again afterwards.
  bool last_part(int64_t group, int64_t parts) {
    if (__atomic_add_fetch(b.finished + group, 1, __ATOMIC_ACQ_REL) != parts) return false;
    __atomic_store_n(b.finished + group, 0, __ATOMIC_RELAXED);
    return true;
  }

  void attend(const Layer& l, const LayerCache& c) {
    const int64_t blocks = (m.heads + kLanes - 1) / kLanes, splits = T * blocks, d = m.dim;
    if (T >= 2 * w.team.size) {  // whoever takes a token finds its rows once
      w.units(T, [&](int64_t t) {
        attend_token(l, c, t, min64(t + w.team.size, T - 1), b.q + t * m.heads * d, b.attended + t * m.heads * d);
      });
      w.barrier();
      return;
    }
    // One query's rows are cut among threads where there are too few queries.
    const int64_t parts = splits < w.team.size ? min64((w.team.size + splits - 1) / splits, kMostParts) : 1;
    w.units(splits * parts, [&](int64_t u) {
      const int64_t split = u / parts, t = split / blocks, head = split % blocks * kLanes;
      const int heads = int(min64(m.heads - head, kLanes));
      const float* q = b.q + (t * m.heads + head) * d;
      float* out = b.attended + (t * m.heads + head) * d;
      with_rows(l, c, t, t, [&](const auto& read) {
        if (parts == 1) {
          attend_heads(l, t, q, head, read, out);
          return;
        }
        const int64_t part = u % parts, fours = (read.n + 3) / 4;  // of rows, which mustn't be cut apart
        const int64_t first = fours * part / parts * 4, end = min64(read.n, fours * (part + 1) / parts * 4);
        float* mine = b.parts + split * kMostParts * (d + 2) * kLanes;
        float* own = mine + part * (d + 2) * kLanes;
        query_lanes(q, heads, d, float(m.norm_eps), turn(l, t), m.rope, b.qt);
        const Vec none = splat(-__builtin_inff());
        const Partial sum = attend_rows(b.qt, heads, d, read.part(first, end - first), none, b.probs, own + 2 * kLanes);
        store(own, sum.best);
        store(own + kLanes, sum.total);
        if (last_part(split, parts))
          join_parts(mine, parts, heads, load_part(l.sink + head, heads), turn(l, t), out);
      });
    });
    w.barrier();
  }

  void join_parts(const float* parts, int64_t count, int heads, Vec sinks, const float* turn, float* out) {
    const int64_t d = m.dim, size = (d + 2) * kLanes;
    Vec best = sinks, factors[kMostParts];
    for (int64_t p = 0; p < count; ++p) best = select(load(parts + p * size) > best, load(parts + p * size), best);
    Vec total = exp_below(sinks - best);
    for (int64_t p = 0; p < count; ++p) {
      factors[p] = exp_below(load(parts + p * size) - best);
      total += factors[p] * load(parts + p * size + kLanes);
    }
    for (int h = 0; h < heads; ++h)
      map(out + h * d, parts + 2 * kLanes + h * d, d, [&](Vec v, int64_t i) {
        Vec sum = v * factors[0][h];
        for (int64_t p = 1; p < count; ++p) sum += load_at(parts + p * size + 2 * kLanes + h * d, i, d) * factors[p][h];
        return sum;
      });
    finish_heads(out, heads, d, 1.0f / total, turn, m.rope);
  }

  void project(const Layer& l, Sides sides) {
    Job in[7];
    run_jobs(w, b, in, inputs(l, sides, b.x, 0, T, in));
    w.barrier();
    tokens([&](int64_t t) { norm_inputs(l, sides, t); });
    w.barrier();
  }

  void attention(const Layer& l, const LayerCache& c, bool narrows) {
    project(l, narrows ? kKeys : kBoth);
    if (narrows) {
      narrow();
      enter(l.mix_attn, l.attn_norm);
      project(l, kQueries);
    }
    Job up[2] = {{l.wq_b, b.qa, m.q_rank, T, b.q, m.heads * m.dim},
                 {l.index_wq_b, b.qa, m.q_rank, T, b.iq, m.index_heads * m.index_dim}};
    run_jobs(w, b, up, l.has_index ? 2 : 1);
    pool(l, c);
    w.barrier();
    if (l.has_index) choose(l, c);
    attend(l, c);
    Job grouped[64];
    const int64_t width = m.heads * m.dim / m.groups;
    for (int64_t g = 0; g < m.groups; ++g)
      grouped[g] = {rows_of(l.wo_a, g * m.o_rank, m.o_rank), b.attended + g * width, m.heads * m.dim, T,
                    b.latent + g * m.o_rank, m.groups * m.o_rank};
    run_jobs(w, b, grouped, int(m.groups));
    keep(l, c);
    w.barrier();
    Job out{l.wo_b, b.latent, m.groups * m.o_rank, T, b.y, m.hidden};
    run_jobs(w, b, &out, 1);
    w.barrier();
  }

  void leave_all() {
    tokens([&](int64_t t) { leave(t, b.y + t * m.hidden); });
    w.barrier();
  }

  void route(const Layer& l) {
    Job gate{l.gate, b.x, m.hidden, T, b.scores, m.experts, true};
    run_jobs(w, b, &gate, 1);
    w.barrier();
    tokens([&](int64_t t) { route_token(l, t, b.scores + t * m.experts); });
    w.barrier();
  }

  // The router's choice on the streams as they are before the layer's attention.
  void guess(const Layer& l, int64_t layer) {
    enter(l.mix_ffn, l.ffn_norm);
    route(l);
    if (w.id == 0) call.expect(layer, b.route, T * m.experts_per_token);
  }

  // False: an expert can't be had.
  bool experts(const Layer& l, int64_t layer) {
    route(l);
    return mixture(l.experts, layer, call.take, true);
  }

  // b.x through the experts of b.route into b.expert_out and, with_shared, through the shared one into b.shared_out.
  // False: an expert can't be had.
  bool mixture(const Matrix* matrices, int64_t layer, Take take, bool with_shared) {
    const int64_t k = m.experts_per_token, E = m.experts;
    int32_t* until = b.active + E + 1;  // where this wave of experts ends
    auto next_wave = [&](int64_t from) {
      if (w.id == 0) *until = int32_t(take == nullptr ? b.active[E] : take(layer, from, b.active, b.active[E]));
    };
    if (w.id == 0) group_pairs();
    next_wave(0);
    w.barrier();
    w.units(T * k, [&](int64_t p) {  // order[p]: where the pair lies among the sorted
      __builtin_memcpy(b.gathered + b.order[p] * m.hidden, b.x + p / k * m.hidden, sizeof(float) * size_t(m.hidden));
    });
    w.barrier();
    for (int64_t from = 0;;) {
      const int64_t to = *until;
      if (to <= from) return false;
      wave(matrices, b.active + from, to - from, with_shared && from == 0);
      if (to >= b.active[E]) return true;
      next_wave(to);
      w.barrier();
      from = to;
    }
  }

  void wave(const Matrix* matrices, const int32_t* chosen, int64_t active, bool with_shared) {
    const int64_t k = m.experts_per_token, E = m.experts;
    // Units: each active expert's tiles of hidden rows, then the shared expert's, cut by tokens where many.
    const int64_t tiles = (m.inter + kTile - 1) / kTile, shared_tiles = (m.shared_inter + kTile - 1) / kTile;
    // Rows that are laid out serve all tiles, then come the next: of w1 and w3, and of w2.
    auto most_rows = [&](int64_t e) {
      return min64(rows_laid_out(matrices[3 * e], b.inputs.rounds), rows_laid_out(matrices[3 * e + 2], b.inputs.rounds));
    };
    const int64_t laid_out = with_shared ? most_rows(E) : T;
    const int64_t cut = laid_out < INT64_MAX ? min64(T, laid_out) : T > 192 ? 96 : T;
    const int64_t cuts = with_shared ? (T + cut - 1) / cut : 0, own_cut = min64(most_rows(chosen[0]), T * k);
    int64_t largest = 1;
    for (int64_t i = 0; i < active; ++i) largest = max64(largest, b.group_start[chosen[i] + 1] - b.group_start[chosen[i]]);
    const int64_t own_cuts = (largest + own_cut - 1) / own_cut;
    struct Part {  // a tile of an expert's rows (e == E: the shared one's), and the input rows it is multiplied with
      int64_t e, first, r0, r1;
    };
    auto part_of = [&](int64_t u, int64_t own_tiles, int64_t shared_tiles) {
      const int64_t v = u - shared_tiles * cuts, r0 = u / shared_tiles * cut;
      if (v < 0) return Part{E, u % shared_tiles * kTile, r0, min64(r0 + cut, T)};  // first, as these are the largest
      const int64_t e = chosen[v / own_tiles / own_cuts], from = b.group_start[e] + v / own_tiles % own_cuts * own_cut;
      return Part{e, v % own_tiles * kTile, min64(from, b.group_start[e + 1]), min64(from + own_cut, b.group_start[e + 1])};
    };
    auto multiply = [&](const Matrix& a, const float* x, float* out, const Part& p, const void* next) {
      run_job({a, x, a.cols, p.r1, out, a.rows}, p.first, int(min64(a.rows - p.first, kTile)), p.r0, p.r1, b.tile,
              b.rows_buffer, &b.inputs, w.phase, next);
    };
    const int64_t units = active * own_cuts * tiles + shared_tiles * cuts;
    w.units(units, [&](int64_t u) {
      const Part p = part_of(u, tiles, shared_tiles), then = part_of(min64(u + w.team.size, units - 1), tiles, shared_tiles);
      if (p.r0 == p.r1) return;
      const int64_t inter = p.e == E ? m.shared_inter : m.inter;
      const float* x = p.e == E ? b.x : b.gathered;
      float* hidden = b.hidden + (p.e == E ? T * k * m.inter : 0);
      float* up = b.up + (p.e == E ? T * k * m.inter : 0);
      const Matrix *gate = matrices + 3 * p.e, *value = gate + 1;
      multiply(*gate, x, hidden, p, panel_of(*value, p.first));
      multiply(*value, x, up, p, panel_of(matrices[3 * then.e], then.first));
      const int width = int(min64(inter - p.first, kTile));
      for (int64_t r = p.r0; r < p.r1; ++r) swiglu(hidden + r * inter + p.first, up + r * inter + p.first, width);
    });
    w.barrier();
    const int64_t out_tiles = (m.hidden + kTile - 1) / kTile, out_units = (active * own_cuts + cuts) * out_tiles;
    w.units(out_units, [&](int64_t u) {
      const Part p = part_of(u, out_tiles, out_tiles), then = part_of(min64(u + w.team.size, out_units - 1), out_tiles, out_tiles);
      if (p.r0 == p.r1) return;
      multiply(matrices[3 * p.e + 2], b.hidden + (p.e == E ? T * k * m.inter : 0), p.e == E ? b.shared_out : b.expert_out, p,
               panel_of(matrices[3 * then.e + 2], then.first));
    });
    w.barrier();
  }

  void run() {
    const int64_t parts = call.parts ? call.parts : kAllParts;
    if (w.id == 0) __builtin_memset(b.finished, 0, sizeof(int32_t) * size_t(max64(w.team.size, 1)));
    if (parts & kAttention) start();
    bool leaves = false;  // the layer before is left as the next one is entered
    for (int64_t i = 0; i < call.layer_count; ++i) {
      const Layer& l = call.layers[i];
      begin(i);
      if (call.expect != nullptr && l.tid2eid == nullptr) guess(l, i);
      auto y = [&](int64_t t) { return b.y + t * m.hidden; };
      if (parts & kEnterAttention)
        enter(l.mix_attn, l.attn_norm, [&](int64_t t) {
          if (leaves) leave_experts(t, y(t));
        });
      if (parts & kAttention) attention(l, call.caches[i], narrows(i));
      if (parts & kEnterExperts)
        enter(l.mix_ffn, l.ffn_norm, [&](int64_t t) {
          if (parts & kLeaveAttention) leave(t, y(t));
        });
      else if (parts & kLeaveAttention) leave_all();
      if (parts & kExperts && !experts(l, i)) return;
      leaves = parts == kAllParts && i + 1 < call.layer_count && call.expect == nullptr;
      if (parts & kExperts && !leaves) tokens([&](int64_t t) { sum_experts(t, y(t)); });  // whoever sums also leaves
      if (parts & kLeaveExperts && !leaves) leave_all();
    }
  }
};
