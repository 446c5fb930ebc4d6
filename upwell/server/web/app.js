// The page: three views, language, theme, shortcuts.

import * as chat from "./chat.js";
import * as data from "./data.js";
import { $, h } from "./dom.js";
import { chooseLanguage, language, loadWords, t } from "./i18n.js";
import { openSettings } from "./settings.js";
import * as status from "./status.js";
import { prefer, preference } from "./store.js";

const VIEWS = { chat, data, status };
const THEMES = ["auto", "light", "dark"];
const SHORTCUTS = [
  ["Alt+1 / 2 / 3", "shortcutViews"], ["/", "shortcutWrite"], ["Enter", "shortcutSend"], ["Shift+Enter", "shortcutLine"],
  ["Esc", "shortcutStop"], ["Alt+N", "shortcutNew"], ["Alt+,", "settings"], ["?", "shortcuts"],
];
let shown = null;

function show() {
  const name = Object.hasOwn(VIEWS, location.hash.slice(1)) ? location.hash.slice(1) : "chat";
  if (name === shown) return;
  VIEWS[shown]?.hide?.();
  shown = name;
  for (const view of Object.keys(VIEWS)) $(`#${view}`).hidden = view !== name;
  for (const link of document.querySelectorAll("nav a")) {
    if (link.dataset.view === name) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  nameTab();
  VIEWS[name].show?.();
}

const nameTab = () => { document.title = `Upwell · ${t(shown)}`; };

function mount() {
  for (const [name, view] of Object.entries(VIEWS)) view.mount($(`#${name}`));
  $("#language").value = language();
  applyTheme(preference("theme", "auto"));
}

function applyTheme(theme) {
  document.documentElement.dataset.theme = theme;
  const button = $("#theme-button");
  button.textContent = { auto: "◐", light: "☀", dark: "☾" }[theme];
  button.title = `${t("theme")}: ${t(`theme_${theme}`)}`;
  button.setAttribute("aria-label", button.title);
  document.dispatchEvent(new Event("themechange"));
}

function nextTheme() {
  const theme = THEMES[(THEMES.indexOf(preference("theme", "auto")) + 1) % THEMES.length];
  prefer("theme", theme);
  applyTheme(theme);
}

function openHelp() {
  const dialog = $("#help");
  const rows = SHORTCUTS.map(([keys, key]) => h("tr", {}, h("th", { scope: "row" }, h("kbd", {}, keys)), h("td", {}, t(key))));
  dialog.replaceChildren(
    h("h2", { id: "help-title" }, t("shortcuts")),
    h("table", {}, h("tbody", {}, rows)),
    h("button", { type: "button", onclick: () => dialog.close() }, t("close")),
  );
  dialog.showModal();
}

function keys(event) {
  if ($("dialog[open]")) return; // it has its own
  const writing = event.target.closest("input, textarea, select");
  const view = event.altKey && { Digit1: "chat", Digit2: "data", Digit3: "status" }[event.code];
  if (view) location.hash = view;
  else if (event.altKey && event.code === "KeyN") {
    location.hash = "chat";
    chat.startNew();
  } else if (event.altKey && event.code === "Comma") openSettings();
  else if (event.key === "Escape") VIEWS[shown].stop?.();
  else if (!writing && event.key === "/") VIEWS[shown].focus?.();
  else if (!writing && event.key === "?") openHelp();
  else return;
  event.preventDefault();
}

await loadWords();
mount();
show();
addEventListener("hashchange", show);
addEventListener("keydown", keys);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => document.dispatchEvent(new Event("themechange")));
$("#settings-button").addEventListener("click", openSettings);
$("#theme-button").addEventListener("click", nextTheme);
$("#help-button").addEventListener("click", openHelp);
$("#language").addEventListener("change", async (event) => {
  await chooseLanguage(event.target.value);
  mount();
  nameTab();
});
document.documentElement.dataset.ready = "true";
