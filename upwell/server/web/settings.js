// The settings' dialog. An empty field leaves the choice to the server.

import { modelNames } from "./api.js";
import { $, h } from "./dom.js";
import { errorText } from "./errors.js";
import { t } from "./i18n.js";
import { apiKey, saveApiKey, saveSettings, settings } from "./store.js";

export async function openSettings() {
  const dialog = $("#settings");
  const form = h("form", { onsubmit: (event) => save(event, dialog, form) });
  form.append(
    h("h2", { id: "settings-title" }, t("settings")),
    field("model", h("select", { name: "model" }, h("option", { value: "" }, t("firstModel")))),
    field("thinking", h("select", { name: "thinking" }, ["none", "high", "max"].map((k) => h("option", { value: k }, t(`thinking_${k}`))))),
    field("temperature", h("input", { name: "temperature", type: "number", min: 0, max: 2, step: "any", placeholder: t("serversChoice") })),
    field("maxTokens", h("input", { name: "maxTokens", type: "number", min: 1, step: 1, placeholder: t("serversChoice") })),
    field("system", h("textarea", { name: "system", rows: 3 })),
    field("tools", h("textarea", { name: "tools", rows: 3, class: "mono", spellcheck: "false", placeholder: '[{"type": "function", "function": {"name": …}}]' })),
    field("apiKey", h("input", { name: "apiKey", type: "password", autocomplete: "off" }), t("apiKeyNote")),
    h("p", { class: "error", role: "alert", hidden: true }),
    h("div", { class: "row end" },
      h("button", { type: "button", onclick: () => dialog.close() }, t("cancel")),
      h("button", { type: "submit", class: "primary" }, t("save"))),
  );
  for (const [name, value] of Object.entries({ ...settings, apiKey: apiKey() })) {
    if (form.elements[name]) form.elements[name].value = value;
  }
  dialog.replaceChildren(form);
  dialog.showModal();
  await offerModels(form);
}

function field(key, control, note) {
  control.id = `setting-${control.name}`;
  return h("div", { class: "field" }, h("label", { for: control.id }, t(key)), control, note && h("small", {}, note));
}

async function offerModels(form) {
  try {
    const select = form.elements.model;
    for (const name of await modelNames()) select.append(h("option", { value: name }, name));
    select.value = settings.model;
    if (select.selectedIndex < 0) select.value = "";
  } catch (error) {
    complain(form, errorText(error));
  }
}

function save(event, dialog, form) {
  event.preventDefault();
  const problem = toolsProblem(form.elements.tools.value);
  if (problem) {
    complain(form, problem);
    form.elements.tools.focus();
    return;
  }
  for (const name of Object.keys(settings)) {
    if (form.elements[name]) settings[name] = form.elements[name].value.trim();
  }
  saveSettings();
  saveApiKey(form.elements.apiKey.value.trim());
  dialog.close();
}

function toolsProblem(text) {
  if (!text.trim()) return null;
  try {
    return Array.isArray(JSON.parse(text)) ? null : t("toolsNotList");
  } catch (error) {
    return `${t("toolsNotJson")} ${error.message}`;
  }
}

function complain(form, text) {
  const place = $(".error", form);
  place.textContent = text;
  place.hidden = false;
}
