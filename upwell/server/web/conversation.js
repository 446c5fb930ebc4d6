// A conversation as it is kept, as it is sent, and as a reply's chunks build it up. Knows no page.
//
// A kept assistant's message: {role, content, reasoning_content, tool_calls, results: {call id: text}, finish, stopped,
// error, seconds, tokens}. `results` are what the person answered for the tools.

export function newConversation() {
  return { id: crypto.randomUUID?.() ?? String(Date.now() + Math.random()), title: "", messages: [] };
}

export function addUser(conversation, text) {
  conversation.messages.push({ role: "user", content: text });
  conversation.title ||= text.replace(/\s+/g, " ").slice(0, 60);
}

export function addAssistant(conversation) {
  const message = { role: "assistant", content: "", reasoning_content: "", tool_calls: [], results: {} };
  conversation.messages.push(message);
  return message;
}

/** The request's body for the next reply. `settings` as store.js has them; empty ones are left out. */
export function requestBody(conversation, settings, model) {
  const body = { model, messages: wire(conversation.messages, settings.system), stream_options: { include_usage: true } };
  if (settings.temperature !== "") body.temperature = Number(settings.temperature);
  if (settings.maxTokens !== "") body.max_tokens = Number(settings.maxTokens);
  if (settings.thinking !== "none") body.reasoning_effort = settings.thinking;
  if (settings.tools.trim()) body.tools = JSON.parse(settings.tools);
  return body;
}

function wire(messages, system) {
  const sent = system.trim() ? [{ role: "system", content: system }] : [];
  for (const message of messages) {
    if (message.role !== "assistant") {
      sent.push({ role: message.role, content: message.content });
      continue;
    }
    const calls = message.tool_calls ?? [];
    if (!message.content && !calls.length) continue; // failed, stopped at once, or still to come
    const reply = { role: "assistant", content: message.content };
    if (message.reasoning_content) reply.reasoning_content = message.reasoning_content;
    if (calls.length) reply.tool_calls = calls;
    sent.push(reply);
    for (const call of calls) {
      sent.push({ role: "tool", tool_call_id: call.id, content: message.results?.[call.id] ?? "(no result)" });
    }
  }
  return sent;
}

/** Take a streamed chunk into the message. */
export function accept(message, chunk) {
  if (chunk.usage) message.tokens = chunk.usage.completion_tokens;
  const choice = chunk.choices?.find((c) => (c.index ?? 0) === 0);
  if (!choice) return;
  const delta = choice.delta ?? {};
  message.content += delta.content ?? "";
  message.reasoning_content += delta.reasoning_content ?? delta.reasoning ?? "";
  for (const part of delta.tool_calls ?? []) {
    const call = (message.tool_calls[part.index ?? 0] ??= { id: "", type: "function", function: { name: "", arguments: "" } });
    if (part.id) call.id = part.id;
    if (part.function?.name) call.function.name = part.function.name;
    call.function.arguments += part.function?.arguments ?? "";
  }
  if (choice.finish_reason) message.finish = choice.finish_reason;
}
