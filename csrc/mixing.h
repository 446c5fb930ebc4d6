// mHC: weights of a sublayer's connection for kLanes tokens at once (lanes are tokens), collapse, and leave.

template <int H>
static void mix_tokens(const Model& m, const Mix& mix, const float* streams, const float* z, int count, bool head,
                       const float* norm, float* post, float* comb, float* x) {
  const int h = H ? H : int(m.streams);
  const int64_t width = h * m.hidden, zs = head ? h : (2 + h) * h;
  Vec inverse{};
  for (int t = 0; t < count; ++t)
    inverse[t] = 1.0f / std::sqrt(dot(streams + t * width, streams + t * width, width) / float(width) + float(m.norm_eps));
  auto logit = [&](int i, float scale) {
    Vec v{};
    for (int t = 0; t < count; ++t) v[t] = z[t * zs + i];
    return v * inverse * scale + mix.base[i];
  };
  const float eps = float(m.hc_eps);
  Vec pre[H ? H : 8];
  for (int i = 0; i < h; ++i) pre[i] = sigmoid(logit(i, mix.scale[0])) + eps;
  if (!head) {
    Vec c[H ? H * H : 64];
    for (int i = 0; i < h; ++i) {
      const Vec p = 2.0f * sigmoid(logit(h + i, mix.scale[1]));
      for (int t = 0; t < count; ++t) post[t * h + i] = p[t];
      Vec* row = c + i * h;
      Vec best = splat(-__builtin_inff()), total{};
      for (int j = 0; j < h; ++j) {
        row[j] = logit(2 * h + i * h + j, mix.scale[2]);
        best = select(row[j] > best, row[j], best);
      }
      for (int j = 0; j < h; ++j) total += row[j] = exp_vec(row[j] - best);
      for (int j = 0; j < h; ++j) row[j] = row[j] / total + eps;
    }
    auto columns = [&] {
      for (int j = 0; j < h; ++j) {
        Vec total = splat(eps);
        for (int i = 0; i < h; ++i) total += c[i * h + j];
        const Vec factor = 1.0f / total;
        for (int i = 0; i < h; ++i) c[i * h + j] *= factor;
      }
    };
    columns();
    for (int64_t step = 1; step < m.sinkhorn_iters; ++step) {
      for (int i = 0; i < h; ++i) {
        Vec total = splat(eps);
        for (int j = 0; j < h; ++j) total += c[i * h + j];
        const Vec factor = 1.0f / total;
        for (int j = 0; j < h; ++j) c[i * h + j] *= factor;
      }
      columns();
    }
    for (int t = 0; t < count; ++t)
      for (int i = 0; i < h * h; ++i) comb[t * h * h + i] = c[i][t];
  }
  for (int t = 0; t < count; ++t) {
    const float* s = streams + t * width;
    float* out = x + t * m.hidden;
    map(out, s, m.hidden, [&](Vec v, int64_t i) {
      Vec sum = v * pre[0][t];
      for (int k = 1; k < h; ++k) sum += load_at(s + k * m.hidden, i, m.hidden) * pre[k][t];
      return sum;
    });
    rms_norm(out, out, norm, m.hidden, float(m.norm_eps));
  }
}

static void mix_any(const Model& m, const Mix& mix, const float* streams, const float* z, int count, bool head,
                    const float* norm, float* post, float* comb, float* x) {
  if (m.streams == 4) mix_tokens<4>(m, mix, streams, z, count, head, norm, post, comb, x);
  else mix_tokens<0>(m, mix, streams, z, count, head, norm, post, comb, x);
}

// X'_j = post_j y + sum_i comb[i, j] X_i of one token, in place. H: the number of streams, 0 for any.
template <int H>
static void leave_streams(const Model& m, float* streams, const float* y, const float* post, const float* comb) {
  const int h = H ? H : int(m.streams);
  const int64_t n = m.hidden;
  auto columns = [&](int64_t d, auto get, auto put) {
    const Vec out = get(y + d);
    Vec in[H ? H : 8];
    for (int i = 0; i < h; ++i) in[i] = get(streams + i * n + d);
    for (int j = 0; j < h; ++j) {
      Vec sum = out * post[j];
      for (int i = 0; i < h; ++i) sum += in[i] * comb[i * h + j];
      put(streams + j * n + d, sum);
    }
  };
  int64_t d = 0;
  // Lambdas, not load and store themselves: whose address is taken isn't inlined without optimization.
  for (; d + kLanes <= n; d += kLanes)
    columns(d, [](const float* p) { return load(p); }, [](float* p, Vec v) { store(p, v); });
  const int left = int(n - d);
  if (left > 0)
    columns(d, [&](const float* p) { return load_part(p, left); }, [&](float* p, Vec v) { store_part(p, v, left); });
}

static void leave_token(const Model& m, float* streams, const float* y, const float* post, const float* comb) {
  if (m.streams == 4) leave_streams<4>(m, streams, y, post, comb);
  else leave_streams<0>(m, streams, y, post, comb);
}
