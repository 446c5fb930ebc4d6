// The chat: conversations at the side, messages, and a box to write in.

import { chatChunks, modelNames } from "./api.js";
import { accept, addAssistant, addUser, newConversation, requestBody } from "./conversation.js";
import { $, h } from "./dom.js";
import { errorText } from "./errors.js";
import { t } from "./i18n.js";
import { messageElement } from "./message.js";
import { conversations, forgetConversation, keepConversation, settings } from "./store.js";

const DRAW_EVERY = 50; // ms, while a reply streams

const kept = conversations();
let current = kept[0] ?? newConversation();
let running = null; // {conversation, message, controller}
let drawing = null; // the timer by which what came is drawn
let box, log, sendButton, side;

export function mount(root) {
  const draft = box?.value ?? "";
  box = h("textarea", { id: "composer", rows: 2, placeholder: t("writeHere"), "aria-label": t("writeHere"), onkeydown: keys });
  box.value = draft;
  sendButton = h("button", { type: "submit", class: "primary" });
  log = h("div", { class: "log", role: "log", "aria-label": t("conversation"), tabindex: "0" });
  side = h("details", { class: "side", open: matchMedia("(min-width: 50rem)").matches });
  root.replaceChildren(
    side,
    h("div", { class: "talk" }, log, h("form", { class: "composer", onsubmit: submit }, box, sendButton)),
  );
  drawSide();
  drawLog();
}

export const show = () => box.focus();
export const focus = () => box.focus();
export const stop = () => running?.controller.abort();

export function startNew() {
  current = newConversation();
  drawSide();
  drawLog();
  box.focus();
}

function keys(event) {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return; // Enter also ends Chinese input
  event.preventDefault();
  submit(event);
}

function submit(event) {
  event.preventDefault();
  if (running) {
    if (event.type === "submit") stop();
    return;
  }
  const text = box.value.trim();
  if (!text) return;
  box.value = "";
  addUser(current, text);
  reply(current);
}

async function reply(conversation) {
  if (!kept.includes(conversation)) kept.unshift(conversation);
  keepConversation(conversation); // with the question, should the page be left before the answer is whole
  const message = addAssistant(conversation);
  const controller = new AbortController();
  running = { conversation, message, controller };
  drawSide();
  drawLog(true);
  const started = performance.now();
  try {
    const model = settings.model || (await modelNames())[0];
    for await (const chunk of chatChunks(requestBody(conversation, settings, model), controller.signal)) {
      accept(message, chunk);
      drawing ??= setTimeout(drawLast, DRAW_EVERY);
    }
  } catch (error) {
    if (controller.signal.aborted) message.stopped = true;
    else message.error = errorText(error);
  }
  message.tool_calls = message.tool_calls.filter(Boolean);
  message.seconds = (performance.now() - started) / 1000;
  running = null;
  clearTimeout(drawing);
  drawing = null;
  if (kept.includes(conversation)) keepConversation(conversation); // else deleted meanwhile
  drawLog();
}

function retry(conversation) {
  conversation.messages.pop();
  reply(conversation);
}

function answerTools(conversation, message, results) {
  Object.assign(message.results, results);
  reply(conversation);
}

function element(message, k) {
  const last = k === current.messages.length - 1;
  const live = running?.message === message;
  const idle = running === null;
  return messageElement(message, {
    retry: last && idle ? () => retry(current) : null,
    answer: last && idle ? (results) => answerTools(current, message, results) : null,
  }, live);
}

function drawLog(toEnd = false) {
  const follow = toEnd || atEnd();
  const messages = current.messages.map(element);
  log.replaceChildren(...(messages.length ? messages : [h("p", { class: "muted empty" }, t("emptyChat"))]));
  if (follow) log.scrollTop = log.scrollHeight;
  const stoppable = running !== null;
  sendButton.textContent = stoppable ? t("stop") : t("send");
  sendButton.classList.toggle("stop", stoppable);
}

/** The message that streams, drawn anew; the others stay. */
function drawLast() {
  drawing = null;
  if (running?.conversation !== current) return;
  const follow = atEnd();
  log.lastElementChild.replaceWith(element(running.message, current.messages.length - 1));
  if (follow) log.scrollTop = log.scrollHeight;
}

/** A person who scrolled up is left where they read. */
const atEnd = () => log.scrollHeight - log.scrollTop - log.clientHeight < 60;

function drawSide() {
  const items = kept.map((conversation) => h("li", {},
    h("button", { type: "button", class: "pick", "aria-current": conversation === current ? "true" : null, onclick: () => open(conversation) }, conversation.title),
    h("button", { type: "button", class: "quiet", "aria-label": t("deleteNamed", { name: conversation.title }), title: t("delete"), onclick: () => remove(conversation) }, "×")));
  side.replaceChildren(
    h("summary", {}, t("conversations")),
    h("button", { type: "button", id: "new-conversation", onclick: startNew }, t("newConversation")),
    h("ul", {}, items),
  );
}

function open(conversation) {
  current = conversation;
  drawSide();
  drawLog(true);
  $("[aria-current]", side)?.focus();
}

function remove(conversation) {
  if (running?.conversation === conversation) stop();
  kept.splice(kept.indexOf(conversation), 1);
  forgetConversation(conversation);
  if (conversation === current) startNew();
  else drawSide();
}
