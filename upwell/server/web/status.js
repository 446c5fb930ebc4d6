// The server's state, from /health and /metrics (names as vLLM's), every two seconds while it is looked at.

import { request } from "./api.js";
import { h } from "./dom.js";
import { errorText } from "./errors.js";
import { number, t } from "./i18n.js";
import { growth, parseMetrics, quantileBetween, total } from "./prometheus.js";
import { sparkline } from "./sparkline.js";

const EVERY = 2000; // ms
const KEPT = 90; // scrapes: three minutes

const rate = (...names) => (before, after, seconds) => {
  const grown = growth(before, after, ...names);
  return grown === null ? null : grown / seconds;
};
const gauge = (scale, ...names) => (before, after) => {
  const value = total(after, ...names);
  return value === null ? null : scale * value;
};
const share = (part, ...whole) => (before, after) => {
  const [some, all] = [growth(before, after, ...part), growth(before, after, ...whole)];
  return some === null || !all ? null : (100 * some) / all;
};
const milliseconds = (q, ...names) => (before, after) => {
  for (const name of names) {
    const value = quantileBetween(before, after, name, q);
    if (value !== null) return 1000 * value;
  }
  return null;
};
const has = (...names) => (samples) => names.some((name) => samples.some((sample) => sample.name === name || sample.name === `${name}_bucket`));

const GENERATED = ["vllm:generation_tokens_total"];
const PROMPT = ["vllm:prompt_tokens_total"];
const CACHE = ["vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc"];
const HITS = ["vllm:prefix_cache_hits_total", "vllm:gpu_prefix_cache_hits_total"];
const QUERIES = ["vllm:prefix_cache_queries_total", "vllm:gpu_prefix_cache_queries_total"];
const PER_TOKEN = ["vllm:inter_token_latency_seconds", "vllm:time_per_output_token_seconds", "vllm:request_time_per_output_token_seconds"];
const FIRST = ["vllm:time_to_first_token_seconds"];
const WHOLE = ["vllm:e2e_request_latency_seconds"];

// What is plotted: a key of the page's words, a unit, from which metrics, whether the server reports them at all.
const PLOTS = [
  ["generated", "tokens/s", rate(...GENERATED), has(...GENERATED)],
  ["prompts", "tokens/s", rate(...PROMPT), has(...PROMPT)],
  ["runningRequests", "", gauge(1, "vllm:num_requests_running"), has("vllm:num_requests_running")],
  ["queue", "", gauge(1, "vllm:num_requests_waiting"), has("vllm:num_requests_waiting")],
  ["cacheUse", "%", gauge(100, ...CACHE), has(...CACHE)],
  ["prefixHits", "%", share(HITS, ...QUERIES), has(...HITS)],
  ["firstToken", "ms", milliseconds(0.5, ...FIRST), has(...FIRST)],
  ["firstTokenSlow", "ms", milliseconds(0.95, ...FIRST), has(...FIRST)],
  ["perToken", "ms", milliseconds(0.5, ...PER_TOKEN), has(...PER_TOKEN)],
  ["wholeRequest", "ms", milliseconds(0.5, ...WHOLE), has(...WHOLE)],
  ["drafts", "%", share(["vllm:spec_decode_num_accepted_tokens_total"], "vllm:spec_decode_num_draft_tokens_total"), has("vllm:spec_decode_num_draft_tokens_total")],
];

let root;
let timer = null;
let last = null; // {at, samples}
let reported = []; // which plots the server has metrics for
let series = PLOTS.map(() => []);
let health = null;
let problem = "";

export function mount(element) {
  root = element;
  draw();
}

export function show() {
  poll();
  timer = setInterval(poll, EVERY);
}

export const hide = () => clearInterval(timer);

async function poll() {
  if (document.hidden) return;
  await Promise.all([readHealth(), readMetrics()]);
  draw();
}

async function readHealth() {
  try {
    await request("/health");
    health = "healthy";
  } catch (error) {
    health = error.status === 0 ? "gone" : "unhealthy";
  }
}

async function readMetrics() {
  try {
    const samples = parseMetrics(await (await request("/metrics")).text());
    const at = performance.now();
    reported = PLOTS.map(([, , , isThere]) => isThere(samples));
    if (last) PLOTS.forEach(([, , value], k) => {
      series[k] = [...series[k], value(last.samples, samples, (at - last.at) / 1000)].slice(-KEPT);
    });
    last = { at, samples };
    problem = "";
  } catch (error) {
    last = null; // a gap: rates start anew
    reported = [];
    problem = error.status === 404 ? t("noMetrics") : errorText(error);
  }
}

function draw() {
  root?.replaceChildren(
    h("p", { role: "status" }, h("span", { class: `badge ${health ?? ""}` }, t(`health_${health ?? "unknown"}`))),
    problem ? h("p", { class: "note" }, problem) : "",
    last || series.some((values) => values.length) ? h("div", { class: "plots" }, PLOTS.map(tile)) : "",
  );
}

function tile([key, unit], k) {
  const newest = series[k].at(-1) ?? null;
  const known = series[k].some((value) => value !== null);
  let text = newest === null ? "–" : `${number(newest)} ${unit === "tokens/s" ? t("unitTokens") : unit}`.trim();
  if (last && !reported[k]) text = t("notReported");
  return h("figure", { class: "card plot", "data-plot": key },
    h("figcaption", {}, t(key)), h("div", { class: "value" }, text),
    known && sparkline(series[k], KEPT, `${t(key)}: ${text}`));
}
