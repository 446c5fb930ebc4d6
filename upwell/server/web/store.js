// What the browser keeps: settings and conversations in localStorage, the API key only as long as the tab is open.

const PREFIX = "upwell.";

function read(storage, name, otherwise) {
  try {
    const text = storage.getItem(PREFIX + name);
    return text === null ? otherwise : JSON.parse(text);
  } catch {
    return otherwise; // storage is off, or holds what isn't ours
  }
}

/** Whether it could be kept. */
function write(storage, name, value) {
  try {
    storage.setItem(PREFIX + name, JSON.stringify(value));
    return true;
  } catch {
    return false;
  }
}

export const DEFAULTS = { model: "", system: "", temperature: "", maxTokens: "", thinking: "none", tools: "" };

export const settings = { ...DEFAULTS, ...read(localStorage, "settings", {}) };
export const saveSettings = () => write(localStorage, "settings", settings);

export const apiKey = () => read(sessionStorage, "key", "");
export const saveApiKey = (key) => write(sessionStorage, "key", key);

export const preference = (name, otherwise) => read(localStorage, name, otherwise);
export const prefer = (name, value) => write(localStorage, name, value);

/** Conversations, the newest first: {id, title, messages}. */
export function conversations() {
  const kept = read(localStorage, "conversations", []);
  return Array.isArray(kept) ? kept.filter((c) => c && Array.isArray(c.messages)) : [];
}

/** Keeps them; gives up the oldest while the browser has no room. */
export function saveConversations(list) {
  const kept = list.filter((c) => c.messages.length);
  while (!write(localStorage, "conversations", kept) && kept.length > 1) kept.pop();
}
