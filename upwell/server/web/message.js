// One message of a conversation on the page.

import { copyButton, h } from "./dom.js";
import { number, t } from "./i18n.js";
import { markdown } from "./markdown.js";

/**
 * The element of a message. `actions`: {retry, answer} may be absent; answer(results) sends tools' results on.
 * `live`: it still streams.
 */
export function messageElement(message, actions, live) {
  if (message.role === "user") return h("article", { class: "message user", "aria-label": t("you") }, h("div", { class: "plain" }, message.content));
  const parts = [];
  if (message.reasoning_content) parts.push(reasoning(message, live));
  if (message.content) parts.push(h("div", { class: "markdown" }, markdown(message.content)));
  const calls = (message.tool_calls ?? []).filter(Boolean);
  if (calls.length) parts.push(toolCalls(message, calls, live ? null : actions.answer));
  if (live && !parts.length) parts.push(h("p", { class: "muted waiting" }, t("waiting")));
  if (message.error) parts.push(h("p", { class: "error", role: "alert" }, message.error));
  if (message.stopped) parts.push(h("p", { class: "muted" }, t("stopped")));
  if (message.finish === "length") parts.push(h("p", { class: "muted" }, t("cutOff")));
  if (!live) parts.push(foot(message, actions.retry));
  return h("article", { class: "message assistant", "aria-label": t("model"), "aria-busy": live ? "true" : "false" }, parts);
}

function reasoning(message, live) {
  const words = live && !message.content ? t("reasoningNow") : t("reasoning");
  // Folded; what the person unfolded stays so while the message is drawn anew.
  return h("details", { class: "reasoning", open: message.unfolded, ontoggle: (event) => { message.unfolded = event.target.open; } },
    h("summary", {}, words), h("div", { class: "markdown" }, markdown(message.reasoning_content)));
}

function toolCalls(message, calls, answer) {
  const open = answer && calls.some((call) => !(call.id in message.results));
  const list = calls.map((call) => {
    const id = `result-${call.id}`;
    return h("div", { class: "call" },
      h("div", { class: "call-name" }, `${t("toolCall")} `, h("code", {}, call.function.name)),
      h("pre", { tabindex: "0" }, h("code", {}, pretty(call.function.arguments))),
      open
        ? [h("label", { for: id }, t("toolResult")), h("textarea", { id, rows: 2, "data-call": call.id }, message.results[call.id] ?? "")]
        : call.id in message.results && h("pre", { class: "result", tabindex: "0" }, message.results[call.id]));
  });
  const form = h("form", { class: "calls", onsubmit: (event) => {
    event.preventDefault();
    const boxes = [...form.querySelectorAll("textarea")];
    answer(Object.fromEntries(boxes.map((box) => [box.dataset.call, box.value])));
  } }, list, open && h("button", { type: "submit" }, t("sendResults")));
  return form;
}

function pretty(text) {
  try {
    return JSON.stringify(JSON.parse(text), null, 2);
  } catch {
    return text; // as the model wrote it, whole or not
  }
}

function foot(message, retry) {
  const facts = [];
  if (message.tokens) facts.push(t("tokens", { n: number(message.tokens, 0) }));
  if (message.seconds !== undefined) facts.push(t("seconds", { n: number(message.seconds) }));
  if (message.tokens && message.seconds) facts.push(t("tokensPerSecond", { n: number(message.tokens / message.seconds) }));
  return h("div", { class: "foot" },
    h("span", { class: "muted" }, facts.join(" · ")),
    message.content && copyButton(t("copy"), t("copied"), () => message.content),
    retry && h("button", { type: "button", class: "quiet", onclick: retry }, t("retry")));
}
