// Prometheus' text format, and the few sums that the page makes of it.

const SAMPLE = /^([a-zA-Z_:][\w:]*)(?:\{(.*)\})?\s+(\S+)(?:\s+-?\d+)?$/;
const LABEL = /([a-zA-Z_]\w*)="((?:[^"\\]|\\.)*)"/g;

/** [{name, labels, value}] of a scrape; lines that are none are passed over. */
export function parseMetrics(text) {
  const samples = [];
  for (const line of text.split("\n")) {
    const match = line.startsWith("#") ? null : SAMPLE.exec(line.trim());
    if (!match) continue;
    const labels = Object.fromEntries([...(match[2] ?? "").matchAll(LABEL)].map(([, key, value]) => [key, value]));
    const value = { "+Inf": Infinity, "-Inf": -Infinity }[match[3]] ?? Number(match[3]);
    samples.push({ name: match[1], labels, value });
  }
  return samples;
}

/** The sum over all labels of the first of `names` that is there; null when none is. */
export function total(samples, ...names) {
  for (const name of names) {
    const values = samples.filter((sample) => sample.name === name).map((sample) => sample.value);
    if (values.length) return values.reduce((a, b) => a + b, 0);
  }
  return null;
}

/** A histogram's cumulative buckets [[upper bound, count]], over all labels; [] when it isn't there. */
function buckets(samples, name) {
  const counts = new Map();
  for (const sample of samples) {
    if (sample.name !== `${name}_bucket`) continue;
    const bound = sample.labels.le === "+Inf" ? Infinity : Number(sample.labels.le);
    counts.set(bound, (counts.get(bound) ?? 0) + sample.value);
  }
  return [...counts].sort((a, b) => a[0] - b[0]);
}

/** The q-quantile of what a histogram took in between two scrapes, linear within a bucket; null for nothing. */
export function quantileBetween(before, after, name, q) {
  const earlier = new Map(buckets(before, name));
  const grown = buckets(after, name).map(([bound, count]) => [bound, count - (earlier.get(bound) ?? 0)]);
  const all = grown.at(-1)?.[1] ?? 0;
  if (all <= 0) return null;
  let [low, below] = [0, 0];
  for (const [bound, count] of grown) {
    if (count >= q * all) {
      if (bound === Infinity) return low;
      return low + ((bound - low) * (q * all - below)) / (count - below || 1);
    }
    [low, below] = [bound, count];
  }
  return low;
}

/** How much a counter grew between two scrapes; null where it is absent, its whole value after a restart. */
export function growth(before, after, ...names) {
  const [was, is] = [total(before, ...names), total(after, ...names)];
  if (is === null) return null;
  return was === null || is < was ? is : is - was;
}
