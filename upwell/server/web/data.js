// Ask your data: a file in, questions, answers with their queries.

import { post, request } from "./api.js";
import { answerElement } from "./answer.js";
import { h } from "./dom.js";
import { errorText } from "./errors.js";
import { number, t } from "./i18n.js";
import { resultTable } from "./result.js";

const MAX_BYTES = 32 * 2 ** 20; // what the server takes; said here before the upload
const ACCEPT = ".csv,.tsv,.txt,.gz,.parquet,.pq,.json,.jsonl,.ndjson,.xlsx,.xls,.xlsm,.xlsb,.ods,.db,.sqlite,.sqlite3";

let file = null; // the browser's File: it can be sent again
let table = null; // what /api/tables said of it
let problem = "";
let busy = ""; // the key of what is under way
let draft = "";
const answers = []; // the newest first
let cards = new Map(); // by answer: a card stays as it is when others come
let root;
let input; // stays the same element: it shows the file's name

export function mount(element) {
  root = element;
  cards = new Map(); // in another language
  root.ondragover = (event) => {
    event.preventDefault();
    root.classList.add("over");
  };
  root.ondragleave = () => root.classList.remove("over");
  root.ondrop = (event) => {
    event.preventDefault();
    root.classList.remove("over");
    if (!event.dataTransfer.files.length || busy) return;
    input.files = event.dataTransfer.files;
    take(input.files[0]);
  };
  input = h("input", { type: "file", id: "file", accept: ACCEPT, onchange: () => input.files.length && take(input.files[0]) });
  drawAll();
}

export const show = () => focus();
export const focus = () => (root.querySelector("#question") ?? root.querySelector("#file")).focus();

async function take(chosen, part) {
  if (busy) return;
  if (chosen !== file) answers.length = 0;
  [file, table, problem] = [chosen, null, ""];
  if (file.size > MAX_BYTES) {
    problem = t("tooLarge", { n: MAX_BYTES / 2 ** 20 });
    drawAll();
    return;
  }
  await during("reading", async () => { table = await upload(part); });
  focus();
}

async function upload(part) {
  if (table) request(`/api/tables/${encodeURIComponent(table.id)}`, { method: "DELETE" }).catch(() => {});
  const where = new URLSearchParams({ filename: file.name });
  if (part) where.set("table", part);
  const answer = await request(`/api/tables?${where}`, {
    method: "POST", body: file, headers: { "Content-Type": "application/octet-stream" },
  });
  return answer.json();
}

/** POST about the table; one that the server has forgotten meanwhile is sent again. */
async function about(path, body) {
  try {
    return await (await post(path, { table: table.id, ...body })).json();
  } catch (error) {
    if (error.status !== 404) throw error;
    table = await upload(table.table);
    return (await post(path, { table: table.id, ...body })).json();
  }
}

async function ask(event) {
  event.preventDefault();
  const question = draft.trim();
  if (!question || busy) return;
  await during("thinkingNow", async () => {
    answers.unshift(await about("/api/ask", { question }));
    draft = "";
  });
  focus();
}

/** Do it, with the page saying so; what goes wrong is shown. */
async function during(what, act) {
  [busy, problem] = [what, ""];
  drawAll();
  try {
    await act();
  } catch (error) {
    problem = errorText(error);
  }
  busy = "";
  drawAll();
}

function drawAll() {
  input.disabled = busy !== "";
  root.replaceChildren(
    h("div", { class: "card" },
      h("label", { for: "file" }, h("strong", {}, t("chooseFile"))),
      input,
      h("p", { class: "muted" }, t("fileNote")),
      table && tableElement()),
    table ? questionForm() : "",
    h("p", { class: "muted", role: "status" }, busy && t(busy)),
    problem ? h("p", { class: "error", role: "alert" }, problem) : "",
    ...answers.map(card),
  );
}

function card(answer) {
  if (!cards.has(answer)) cards.set(answer, answerElement(answer, (sql) => about("/api/query", { sql })));
  return cards.get(answer);
}

function tableElement() {
  const columns = table.columns.map(({ name, type }) => h("li", {}, name, " ", h("small", { class: "muted" }, t(`type_${type}`))));
  return h("div", { class: "table" },
    h("p", {}, h("strong", {}, table.name), " · ", t("shape", { rows: number(table.rows, 0), columns: table.columns.length })),
    table.tables.length > 1 && h("p", {}, h("label", { for: "part" }, t("part"), " "),
      h("select", { id: "part", onchange: (event) => { answers.length = 0; take(file, event.target.value); } },
        table.tables.map((name) => h("option", { value: name, selected: name === table.table }, name)))),
    h("ul", { class: "columns", "aria-label": t("columns") }, columns),
    h("details", { class: "sample" }, h("summary", {}, t("sample")), resultTable(table.columns.map(({ name }) => name), table.sample)),
    ...table.notes.map((note) => h("p", { class: "note" }, note)));
}

function questionForm() {
  const box = h("input", { id: "question", type: "text", maxlength: 2000, autocomplete: "off", placeholder: t("questionHere"), "aria-label": t("questionHere"), oninput: (event) => { draft = event.target.value; } });
  box.value = draft;
  return h("form", { class: "row question", onsubmit: ask }, box, h("button", { type: "submit", class: "primary", disabled: busy !== "" }, t("ask")));
}
