// Training's output head with cross-entropy, FP32: the logits of a block of tokens are made, become their own gradients
// and go into both products before the next block's are made, so they never leave the cache. After training_products.h
// and training_attention.h in each instruction set's namespace.

constexpr int64_t kLossColumns = 256;  // a unit of logits: kLinearRows tokens by so many columns
constexpr int64_t kLossRows = 32;      // a unit of the softmax: tokens

// A token's logits become their gradient, for a loss that counts `share`; returns the loss. Beyond `vocab` the row is
// scratch, up to a whole vector.
static float train_cross_entropy(float* logits, int64_t vocab, int64_t target, float share) {
  const int64_t end = whole_vectors(vocab);
  for (int64_t k = vocab; k < end; ++k) logits[k] = -__builtin_inff();
  Vec most = load(logits), total = zero();
  for (int64_t k = kLanes; k < end; k += kLanes) most = larger(load(logits + k), most);
  const float top = max_lanes(most), of_target = logits[target];
  map(logits, logits, end, [&](Vec v, int64_t) {
    const Vec e = exp_below(v - top);
    total += e;
    return e;
  });
  const float sum = sum_lanes(total), factor = share / sum;
  map(logits, logits, vocab, [&](Vec v, int64_t) { return v * factor; });
  logits[target] -= share;
  return std::log(sum) + top - of_target;
}

static void train_loss(Worker& worker, void* argument) {
  const auto& a = *static_cast<const LossTraining*>(argument);
  float* workspace = training_workspace(kGemmFloats);
  const int64_t row = odd_lines(a.vocab);
  for (int64_t t = 0; t < a.tokens; t += a.block) {
    const int64_t count = a.tokens - t < a.block ? a.tokens - t : a.block, chunks = parts_of(count, kLinearRows);
    const float* x = a.x + t * a.dim;
    worker.units(chunks * parts_of(a.vocab, kLossColumns), [&](int64_t unit) {
      int64_t rows, columns;
      const int64_t i = part_from(unit % chunks, kLinearRows, count, &rows);
      const int64_t j = part_from(unit / chunks, kLossColumns, a.vocab, &columns);
      gemm({x + i * a.dim, a.dim, 1, a.weight + j * a.dim, 1, a.dim, a.logits + i * row + j, row, rows, columns, a.dim,
            false}, workspace);
    });
    worker.barrier();
    worker.units(parts_of(count, kLossRows), [&](int64_t unit) {
      int64_t rows;
      const int64_t i = part_from(unit, kLossRows, count, &rows);
      for (int64_t n = i; n < i + rows; ++n) {
        float* logits = a.logits + n * row;
        const int64_t target = a.targets[t + n];
        if (target >= 0) a.losses[t + n] = train_cross_entropy(logits, a.vocab, target, a.share);
        else std::memset(logits, 0, sizeof(float) * a.vocab), a.losses[t + n] = 0.0f;
      }
    });
    worker.barrier();
    const WeightGrad grad{a.logits, row, x, a.dim, a.grad_weight, a.vocab, a.dim, count, t > 0};
    worker.units(chunks + grad.units(), [&](int64_t unit) {
      if (unit >= chunks) return grad.run(unit - chunks, workspace);
      int64_t rows;
      const int64_t i = part_from(unit, kLinearRows, count, &rows);
      gemm({a.logits + i * row, row, 1, a.weight, a.dim, 1, a.grad_x + (t + i) * a.dim, a.dim, rows, a.dim, a.vocab,
            false}, workspace);
    });
    worker.barrier();
  }
}
