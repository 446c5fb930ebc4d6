// The page's words. English and Chinese, a JSON file each; what a model or the server says isn't translated.

import { prefer, preference } from "./store.js";

const LANGUAGES = ["en", "zh"];
let words = {};
let current = "en";

export const language = () => current;

function wanted() {
  const chosen = preference("language", null);
  if (LANGUAGES.includes(chosen)) return chosen;
  const spoken = navigator.languages ?? [navigator.language];
  return spoken.map((tag) => tag.slice(0, 2).toLowerCase()).find((tag) => LANGUAGES.includes(tag)) ?? "en";
}

export async function loadWords(chosen = wanted()) {
  const answer = await fetch(`/assets/i18n/${chosen}.json`);
  if (!answer.ok) throw new Error(`i18n/${chosen}.json: ${answer.status}`);
  words = await answer.json();
  current = chosen;
  document.documentElement.lang = chosen === "zh" ? "zh-CN" : chosen;
  for (const element of document.querySelectorAll("[data-i18n]")) element.textContent = t(element.dataset.i18n);
  for (const element of document.querySelectorAll("[data-i18n-label]")) {
    element.setAttribute("aria-label", t(element.dataset.i18nLabel));
    element.title = t(element.dataset.i18nLabel);
  }
}

export async function chooseLanguage(chosen) {
  prefer("language", chosen);
  await loadWords(chosen);
}

/** The text of a key, with {name} replaced by values.name. */
export function t(key, values = {}) {
  const text = words[key] ?? key;
  return text.replace(/\{(\w+)\}/g, (whole, name) => (name in values ? String(values[name]) : whole));
}

export const number = (value, digits = 1) => value.toLocaleString(current, { maximumFractionDigits: digits });
