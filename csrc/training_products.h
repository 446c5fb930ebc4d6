// Training's linear maps and mixture of experts, FP32, whole calls by one team. Every sum is made by one thread in a
// fixed order, so results do not depend on who was first. The longest units come first, that threads end together.
// After training_gemm.h and training_rows.h in each instruction set's namespace.

constexpr int64_t kLinearRows = 512;    // tokens of a unit of work
constexpr int64_t kLinearGradRows = 256;  // and of one in the backward pass, where a unit has several products
constexpr int64_t kGradRows = kTurnedRows;  // a weight gradient's unit: outputs
constexpr int64_t kGradColumns = 128;   // and inputs, or twice as many where there are many outputs
constexpr int64_t kTrainingExpertRows = 256;    // rows that go through an expert together

INLINE int64_t parts_of(int64_t n, int64_t part) { return (n + part - 1) / part; }
INLINE int64_t part_from(int64_t index, int64_t part, int64_t n, int64_t* size) {
  const int64_t begin = index * part;
  *size = n - begin < part ? n - begin : part;
  return begin;
}

// One part of grad_w [out, in] (+)= grad_y^T x over all tokens.
struct WeightGrad {
  const float* grad_y;
  int64_t grad_row;
  const float* x;
  int64_t x_row;
  float* grad_w;
  int64_t out, in, tokens;
  bool add = false;

  int64_t width() const { return out > 4 * kGradRows ? 2 * kGradColumns : kGradColumns; }
  int64_t units() const { return parts_of(out, kGradRows) * parts_of(in, width()); }
  void run(int64_t unit, float* workspace) const {
    const int64_t across = parts_of(in, width());
    int64_t rows, columns;
    const int64_t i = part_from(unit / across, kGradRows, out, &rows);
    const int64_t j = part_from(unit % across, width(), in, &columns);
    gemm({grad_y + i, 1, grad_row, x + j, x_row, 1, grad_w + i * in + j, in, rows, columns, tokens, add}, workspace);
  }
};

static void train_linear_forward(Worker& worker, void* argument) {
  const auto& call = *static_cast<const LinearTraining*>(argument);
  float* workspace = training_workspace(kGemmFloats);
  const int64_t chunks = parts_of(call.tokens, kLinearRows);
  int64_t units = 0;
  for (int64_t n = 0; n < call.count; ++n) units += chunks * parts_of(call.maps[n].out, kColumns);
  worker.units(units, [&](int64_t unit) {
    const LinearMap* m = call.maps;
    for (; unit >= chunks * parts_of(m->out, kColumns); ++m) unit -= chunks * parts_of(m->out, kColumns);
    int64_t rows, columns;
    const int64_t t = part_from(unit % chunks, kLinearRows, call.tokens, &rows);
    const int64_t j = part_from(unit / chunks, kColumns, m->out, &columns);
    gemm({m->x + t * m->x_row, m->x_row, 1, m->weight + j * m->in, 1, m->in, m->y + t * m->y_row + j, m->y_row, rows,
          columns, m->in, false}, workspace);
  });
}

static void train_linear_backward(Worker& worker, void* argument) {
  const auto& call = *static_cast<const LinearTraining*>(argument);
  float* workspace = training_workspace(kGemmFloats);
  const int64_t chunks = parts_of(call.tokens, kLinearGradRows);
  auto weight_grad = [&](const LinearMap& m) {
    return WeightGrad{m.y, m.y_row, m.x, m.x_row, m.grad_weight, m.out, m.in, call.tokens};
  };
  int64_t units = 0;
  for (int64_t n = 0; n < call.count; ++n) {
    const LinearMap& m = call.maps[n];
    if (m.grad_x != nullptr && m.adds != 1) units += chunks;
    if (m.grad_weight != nullptr) units += weight_grad(m).units();
  }
  worker.units(units, [&](int64_t unit) {
    for (int64_t n = 0; n < call.count; ++n) {
      if (call.maps[n].grad_weight == nullptr) continue;
      const WeightGrad grad = weight_grad(call.maps[n]);
      if (unit < grad.units()) return grad.run(unit, workspace);
      unit -= grad.units();
    }
    for (int64_t n = 0; n < call.count; ++n) {
      const LinearMap& m = call.maps[n];
      if (m.grad_x == nullptr || m.adds == 1) continue;
      if (unit >= chunks) {
        unit -= chunks;
        continue;
      }
      int64_t rows;
      const int64_t t = part_from(unit, kLinearGradRows, call.tokens, &rows);
      for (int64_t i = n; i < call.count && (i == n || call.maps[i].adds == 1); ++i) {
        const LinearMap& each = call.maps[i];
        gemm({each.y + t * each.y_row, each.y_row, 1, each.weight, each.in, 1,
              each.grad_x + t * each.grad_x_row, each.grad_x_row, rows, each.in, each.out, each.adds != 0},
             workspace);
      }
      return;
    }
  });
}

// sums [T, dim] += the k rows of each token
static void add_rows_of_tokens(const float* rows, const int64_t* back, int64_t k, int64_t dim, float* sums,
                               int64_t from, int64_t to) {
  for (int64_t t = from; t < to; ++t)
    for (int64_t i = 0; i < k; ++i) add_floats(rows + back[t * k + i] * dim, dim, sums + t * dim);
}

static int64_t experts_floats(const ExpertsTraining& a) {
  const int64_t inter = a.inter > a.shared_inter ? a.inter : a.shared_inter;
  return kGemmFloats + kTrainingExpertRows * 4 * inter;
}

static void train_experts_forward(Worker& worker, void* argument) {
  const auto& a = *static_cast<const ExpertsTraining*>(argument);
  float* workspace = training_workspace(experts_floats(a));
  float* hidden = workspace + kGemmFloats;
  const int64_t chunks = parts_of(a.tokens, kTrainingExpertRows);
  worker.units(a.experts + chunks, [&](int64_t unit) {
    if (unit < a.experts) {
      const float *w13 = a.w13 + unit * 2 * a.inter * a.dim, *w2 = a.w2 + unit * a.dim * a.inter;
      for (int64_t r = a.bounds[unit], end = a.bounds[unit + 1]; r < end; r += kTrainingExpertRows) {
        const int64_t rows = end - r < kTrainingExpertRows ? end - r : kTrainingExpertRows, width = 2 * a.inter;
        float* inner = a.inner + r * width;
        gemm({a.x, a.dim, 1, w13, 1, a.dim, inner, width, rows, width, a.dim, false, a.source + r}, workspace);
        train_swiglu_forward(inner, inner + a.inter, width, a.row_weights + r, a.limit, hidden, a.inter, 0, rows);
        gemm({hidden, a.inter, 1, w2, 1, a.inter, a.outs + r * a.dim, a.dim, rows, a.dim, a.inter, false}, workspace);
      }
      return;
    }
    const int64_t half = a.shared_inter, width = 2 * half;
    int64_t rows;
    const int64_t t = part_from(unit - a.experts, kTrainingExpertRows, a.tokens, &rows);
    float* inner = a.shared_inner + t * width;
    const float* in = a.x + t * a.dim;
    gemm({in, a.dim, 1, a.shared_w1, 1, a.dim, inner, width, rows, half, a.dim, false}, workspace);
    gemm({in, a.dim, 1, a.shared_w3, 1, a.dim, inner + half, width, rows, half, a.dim, false}, workspace);
    train_swiglu_forward(inner, inner + half, width, nullptr, a.limit, hidden, half, 0, rows);
    gemm({hidden, half, 1, a.shared_w2, 1, half, a.y + t * a.dim, a.dim, rows, a.dim, half, false}, workspace);
  });
  worker.barrier();
  worker.units(chunks, [&](int64_t unit) {
    int64_t count;
    const int64_t t = part_from(unit, kTrainingExpertRows, a.tokens, &count);
    add_rows_of_tokens(a.outs, a.back, a.k, a.dim, a.y, t, t + count);
  });
}

static void train_experts_backward(Worker& worker, void* argument) {
  const auto& a = *static_cast<const ExpertsTraining*>(argument);
  float* workspace = training_workspace(experts_floats(a));
  float* rest = workspace + kGemmFloats;
  const int64_t chunks = parts_of(a.tokens, kTrainingExpertRows);
  worker.units(a.experts + chunks, [&](int64_t unit) {
    if (unit < a.experts) {
      const int64_t width = 2 * a.inter;
      const float *w13 = a.w13 + unit * width * a.dim, *w2 = a.w2 + unit * a.dim * a.inter;
      float *grad_w13 = a.grad_w13 + unit * width * a.dim, *grad_w2 = a.grad_w2 + unit * a.dim * a.inter;
      float *grad_hidden = rest, *hidden = rest + kTrainingExpertRows * a.inter, *grad_inner = hidden + kTrainingExpertRows * a.inter;
      const int64_t begin = a.bounds[unit], end = a.bounds[unit + 1];
      if (begin == end) {
        std::memset(grad_w13, 0, sizeof(float) * width * a.dim);
        std::memset(grad_w2, 0, sizeof(float) * a.dim * a.inter);
      }
      for (int64_t r = begin; r < end; r += kTrainingExpertRows) {
        const int64_t rows = end - r < kTrainingExpertRows ? end - r : kTrainingExpertRows;
        const float* inner = a.inner + r * width;
        const int64_t* source = a.source + r;
        gemm({a.grad, a.dim, 1, w2, a.inter, 1, grad_hidden, a.inter, rows, a.inter, a.dim, false, source},
             workspace);
        train_swiglu_backward(inner, inner + a.inter, width, a.row_weights + r, a.limit, grad_hidden, grad_inner,
                              grad_inner + a.inter, width, hidden, a.grad_row_weights + r, a.inter, 0, rows);
        gemm({a.grad, 1, a.dim, hidden, a.inter, 1, grad_w2, a.inter, a.dim, a.inter, rows, r > begin, source},
             workspace);
        gemm({grad_inner, 1, width, a.x, a.dim, 1, grad_w13, a.dim, width, a.dim, rows, r > begin, nullptr, source},
             workspace);
        gemm({grad_inner, width, 1, w13, a.dim, 1, a.outs + r * a.dim, a.dim, rows, a.dim, width, false}, workspace);
      }
      return;
    }
    const int64_t half = a.shared_inter, width = 2 * half;
    int64_t rows;
    const int64_t t = part_from(unit - a.experts, kTrainingExpertRows, a.tokens, &rows);
    const float* inner = a.shared_inner + t * width;
    float *hidden = a.shared_hidden + t * half, *grad_inner = a.shared_grad_inner + t * width;
    gemm({a.grad + t * a.dim, a.dim, 1, a.shared_w2, half, 1, rest, half, rows, half, a.dim, false}, workspace);
    train_swiglu_backward(inner, inner + half, width, nullptr, a.limit, rest, grad_inner, grad_inner + half, width,
                          hidden, nullptr, half, 0, rows);
    float* to = a.y + t * a.dim;
    gemm({grad_inner, width, 1, a.shared_w1, a.dim, 1, to, a.dim, rows, a.dim, half, false}, workspace);
    gemm({grad_inner + half, width, 1, a.shared_w3, a.dim, 1, to, a.dim, rows, a.dim, half, true}, workspace);
  });
  worker.barrier();
  const int64_t half = a.shared_inter;
  const WeightGrad grads[] = {
      {a.grad, a.dim, a.shared_hidden, half, a.grad_shared_w2, a.dim, half, a.tokens},
      {a.shared_grad_inner, 2 * half, a.x, a.dim, a.grad_shared_w1, half, a.dim, a.tokens},
      {a.shared_grad_inner + half, 2 * half, a.x, a.dim, a.grad_shared_w3, half, a.dim, a.tokens}};
  const int64_t units = grads[0].units() + grads[1].units() + grads[2].units();
  worker.units(units + chunks, [&](int64_t unit) {
    for (const WeightGrad& grad : grads) {
      if (unit < grad.units()) return grad.run(unit, workspace);
      unit -= grad.units();
    }
    int64_t count;
    const int64_t t = part_from(unit, kTrainingExpertRows, a.tokens, &count);
    add_rows_of_tokens(a.outs, a.back, a.k, a.dim, a.y, t, t + count);
    for (int64_t pair = t * a.k; pair < (t + count) * a.k; ++pair)
      a.grad_weights[pair] = a.grad_row_weights[a.back[pair]];
  });
}
