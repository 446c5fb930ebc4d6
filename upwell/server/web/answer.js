// One question and its answer: how it was read, the query, the result, a chart. The query can be changed and run again.

import * as chart from "./chart.js";
import { toCsv } from "./csv.js";
import { download, h } from "./dom.js";
import { errorText } from "./errors.js";
import { number, t } from "./i18n.js";
import { resultTable } from "./result.js";

/** `answer` as /api/ask gives it, with `edited` and `error` added here; runQuery(sql) resolves to a result. */
export function answerElement(answer, runQuery) {
  const result = h("div", { class: "answer-result" });
  const parts = [h("h3", {}, answer.question), badge(answer)];
  if (answer.reading) parts.push(h("p", { class: "reading" }, h("span", { class: "muted" }, `${t("readAs")} `), answer.reading));
  if (answer.message) parts.push(h("p", { class: "note" }, answer.message));
  if (answer.sql !== null) parts.push(query(answer, runQuery, result));
  parts.push(result);
  drawResult(answer, result);
  return h("article", { class: `card answer ${answer.status}`, "aria-label": answer.question }, parts);
}

function badge(answer) {
  const sure = t("confidence", { n: number(100 * answer.confidence, 0) });
  return h("p", { class: "badges" }, h("span", { class: `badge ${answer.status}` }, t(`status_${answer.status}`)), " ", h("span", { class: "muted" }, sure));
}

function query(answer, runQuery, result) {
  const box = h("textarea", { class: "mono", "aria-label": t("sql"), spellcheck: "false", rows: Math.min(12, answer.sql.split("\n").length) });
  box.value = answer.sql;
  const button = h("button", { type: "submit" }, t("run"));
  const form = h("form", { onsubmit: run }, box, h("div", { class: "row" }, button, h("small", { class: "muted" }, t("sqlNote"))));
  box.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) run(event);
  });

  async function run(event) {
    event.preventDefault();
    button.disabled = true;
    try {
      const { columns, rows, truncated } = await runQuery(box.value);
      Object.assign(answer, { sql: box.value, columns, rows, truncated, edited: true, error: null, kind: null });
    } catch (error) {
      Object.assign(answer, { sql: box.value, columns: [], rows: [], error: errorText(error) });
    }
    button.disabled = false;
    drawResult(answer, result);
  }

  return h("details", { class: "query", open: true }, h("summary", {}, t("sql")), form);
}

function drawResult(answer, place) {
  const { columns, rows } = answer;
  if (answer.error) {
    place.replaceChildren(h("p", { class: "error", role: "alert" }, answer.error));
    return;
  }
  if (!columns.length) {
    place.replaceChildren();
    return;
  }
  const drawing = h("div", { class: "chart", role: "img" });
  place.replaceChildren(
    answer.edited ? h("p", { class: "muted" }, t("edited")) : "",
    resultTable(columns, rows),
    h("div", { class: "row" },
      h("span", { class: "muted" }, t(answer.truncated ? "firstRows" : "rows", { n: number(rows.length, 0) })),
      h("button", { type: "button", onclick: () => download("result.csv", toCsv(columns, rows)) }, t("downloadCsv")),
      ...chartControls(answer, drawing)),
    drawing,
  );
}

/** A choice of kinds and a picture to download; the chart itself goes into `place`. */
function chartControls(answer, place) {
  const suggested = chart.suggest(answer.columns, answer.rows);
  if (!suggested) return [];
  let view = null;
  const picture = h("button", { type: "button", onclick: savePicture }, t("downloadPng"));
  const choose = h("select", { "aria-label": t("chart"), onchange: redraw },
    ["none", ...chart.KINDS].map((kind) => h("option", { value: kind, selected: kind === (answer.kind ?? suggested.kind) }, t(`chart_${kind}`))));

  async function redraw() {
    answer.kind = choose.value;
    view?.finalize();
    view = null;
    place.replaceChildren();
    picture.disabled = true;
    if (choose.value === "none") return;
    place.setAttribute("aria-label", t("chartOf", { y: answer.columns[suggested.y], x: answer.columns[suggested.x] }));
    try {
      view = await chart.draw(place, answer.columns, answer.rows, { ...suggested, kind: choose.value });
      picture.disabled = false;
    } catch (error) {
      place.replaceChildren(h("p", { class: "error" }, `${t("noChart")} ${error.message}`));
    }
  }

  async function savePicture() {
    const canvas = await view.toCanvas(2);
    canvas.toBlob((blob) => download("chart.png", blob));
  }

  queueMicrotask(redraw); // once `place` is on the page and has a width
  const again = () => (place.isConnected ? redraw() : document.removeEventListener("themechange", again));
  document.addEventListener("themechange", again);
  return [choose, picture];
}
