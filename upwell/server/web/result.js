// Rows and columns as a table.

import { h } from "./dom.js";
import { number, t } from "./i18n.js";

const ROWS_AT_FIRST = 100;

/** Figures to the right; long results open by a button. */
export function resultTable(columns, rows) {
  const figures = columns.map((_, k) => rows.length > 0 && rows.every((row) => row[k] === null || typeof row[k] === "number"));
  const cell = (value, k) => h("td", { class: figures[k] ? "figure" : null }, value === null ? h("span", { class: "muted" }, "–") : shown(value, columns[k]));
  const body = h("tbody");
  const add = (some) => body.append(...some.map((row) => h("tr", {}, row.map(cell))));
  add(rows.slice(0, ROWS_AT_FIRST));
  const head = h("thead", {}, h("tr", {}, columns.map((name, k) => h("th", { scope: "col", class: figures[k] ? "figure" : null }, name))));
  const more = rows.length > ROWS_AT_FIRST && h("button", { type: "button", onclick: () => { add(rows.slice(ROWS_AT_FIRST)); more.remove(); } }, t("showAll"));
  return h("div", {}, h("div", { class: "scroll", tabindex: "0", "aria-label": t("result"), role: "region" }, h("table", {}, head, body)), more);
}

/** Figures as the reader's language writes them; a year isn't grouped. */
function shown(value, name) {
  if (typeof value !== "number") return String(value);
  return Number.isInteger(value) && /year|年|\bid\b/i.test(name) ? String(value) : number(value, 6);
}
