// Requests to the server that sent the page.

import { apiKey } from "./store.js";

/** What the server refused, in its own words. `status` 0: it couldn't be reached. */
export class ApiError extends Error {
  constructor(message, status, code = null) {
    super(message);
    this.status = status;
    this.code = code;
  }
}

/** fetch with the key; anything but success is an ApiError. AbortError passes. */
export async function request(path, options = {}) {
  const headers = new Headers(options.headers);
  if (apiKey()) headers.set("Authorization", `Bearer ${apiKey()}`);
  let answer;
  try {
    answer = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("", 0);
  }
  if (!answer.ok) throw await refusal(answer);
  return answer;
}

async function refusal(answer) {
  const text = await answer.text();
  try {
    const { error } = JSON.parse(text);
    return new ApiError(error.message, answer.status, error.code);
  } catch {
    return new ApiError(text.slice(0, 300) || answer.statusText, answer.status);
  }
}

export async function post(path, body, signal) {
  return request(path, {
    method: "POST", signal, headers: { "Content-Type": "application/json" }, body: JSON.stringify(body),
  });
}

/** The data of server-sent events, as the stream's bytes come in. */
export async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let pending = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      pending += done ? "\n\n" : value;
      pending = pending.replace(/\r\n/g, "\n");
      let end;
      while ((end = pending.indexOf("\n\n")) >= 0) {
        const lines = pending.slice(0, end).split("\n").filter((line) => line.startsWith("data:"));
        pending = pending.slice(end + 2);
        if (lines.length) yield lines.map((line) => line.slice(5).replace(/^ /, "")).join("\n");
      }
      if (done) return;
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

/** Chunks of a streamed chat completion. An error on the way is thrown. */
export async function* chatChunks(body, signal) {
  const answer = await post("/v1/chat/completions", { ...body, stream: true }, signal);
  for await (const data of events(answer.body)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ApiError(chunk.error.message, chunk.error.status ?? 500, chunk.error.code);
    yield chunk;
  }
  throw new ApiError("", 0); // the stream broke off
}

export async function modelNames() {
  const answer = await request("/v1/models");
  return (await answer.json()).data.map((model) => model.id);
}
