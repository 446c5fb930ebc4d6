// One product by itself: a weight in any format times up to any number of input rows.

static int64_t product_floats(int64_t cols) {  // of one thread
  return cols * (kTile + 4) + kPackedRows * packed_row_bytes(cols) / 4 + 32;
}

static void product_body(Worker& w, void* argument) {
  const ProductCall& call = *static_cast<const ProductCall*>(argument);
  const int64_t n = call.m.cols;
  Buffers b;
  b.tile = call.workspace + w.id * product_floats(n);
  b.rows_buffer = b.tile + n * kTile;
  const auto space = reinterpret_cast<uintptr_t>(b.rows_buffer + n * 4);
  b.inputs.space = reinterpret_cast<char*>((space + 63) / 64 * 64);
  b.inputs.rounds = call.rounds;
  const Job job{call.m, call.x, n, call.tokens, call.out, call.m.rows};
  run_jobs(w, b, &job, 1);
}

static int64_t product_workspace_bytes(int64_t cols, int threads) { return 4 * product_floats(cols) * threads; }
