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

// A conversation has an entry of its own, so that two tabs don't write over each other's.
const ENTRY = `${PREFIX}conversation.`;

/** Conversations as conversation.js makes them, the last changed first. */
export function conversations() {
  let names = [];
  try {
    names = Object.keys(localStorage).filter((name) => name.startsWith(ENTRY));
  } catch {
    // storage is off
  }
  const kept = names.map((name) => read(localStorage, name.slice(PREFIX.length), null));
  return kept.filter((c) => c && Array.isArray(c.messages)).sort((a, b) => b.changed - a.changed);
}

/** Keeps it; gives up the oldest others while the browser has no room. */
export function keepConversation(conversation) {
  conversation.changed = Date.now();
  const others = conversations().filter((c) => c.id !== conversation.id);
  while (!write(localStorage, `conversation.${conversation.id}`, conversation) && others.length) forgetConversation(others.pop());
}

export const forgetConversation = ({ id }) => localStorage.removeItem(ENTRY + id);
