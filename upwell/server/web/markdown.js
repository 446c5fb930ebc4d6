// Markdown to elements. No markup passes: HTML shows as the text it is, images as links, and a link goes to the web.

import { copyButton, h } from "./dom.js";
import { t } from "./i18n.js";

const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([^\s`]*)[^`]*$/;
const HEADING = /^ {0,3}(#{1,6})\s+(.*?)\s*#*\s*$/;
const RULE = /^ {0,3}([-*_])( *\1){2,} *$/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)])(?: +(.*)|)$/;
const QUOTE = /^ {0,3}> ?(.*)$/;
const DIVIDER = /^ {0,3}\|? *:?-+:? *(\| *:?-+:? *)*\|? *$/;
const MAX_DEPTH = 12; // of lists and quotes in each other

/** The elements of a text. */
export function markdown(text) {
  const root = document.createDocumentFragment();
  root.append(...blocks(text.replace(/\r\n?/g, "\n").replace(/\t/g, "    ").split("\n"), 0));
  return root;
}

function blocks(lines, depth) {
  const made = [];
  let paragraph = [];
  const close = () => {
    if (paragraph.length) made.push(h("p", {}, inline(paragraph.join("\n").trimEnd())));
    paragraph = [];
  };
  for (let k = 0; k < lines.length;) {
    const line = lines[k];
    let match;
    if (!line.trim()) {
      close();
      k += 1;
    } else if ((match = FENCE.exec(line))) {
      close();
      const [code, next] = fenced(lines, k, match[1]);
      made.push(codeBlock(code, match[2]));
      k = next;
    } else if ((match = HEADING.exec(line))) {
      close();
      made.push(h(`h${Math.min(6, match[1].length + 2)}`, {}, inline(match[2])));
      k += 1;
    } else if (RULE.test(line)) {
      close();
      made.push(h("hr"));
      k += 1;
    } else if (QUOTE.test(line) && depth < MAX_DEPTH) {
      close();
      const inside = [];
      while (k < lines.length && (match = QUOTE.exec(lines[k]))) {
        inside.push(match[1]);
        k += 1;
      }
      made.push(h("blockquote", {}, blocks(inside, depth + 1)));
    } else if (ITEM.test(line) && depth < MAX_DEPTH) {
      close();
      const [element, next] = list(lines, k, depth);
      made.push(element);
      k = next;
    } else if (line.includes("|") && k + 1 < lines.length && DIVIDER.test(lines[k + 1]) && lines[k + 1].includes("-")) {
      close();
      const [element, next] = table(lines, k);
      made.push(element);
      k = next;
    } else {
      paragraph.push(line.trimStart());
      k += 1;
    }
  }
  close();
  return made;
}

/** A fence that isn't closed yet, as while it streams, runs to the end. */
function fenced(lines, start, fence) {
  let end = start + 1;
  const closes = (line) => line.trim().startsWith(fence) && !line.trim().replaceAll(fence[0], "");
  while (end < lines.length && !closes(lines[end])) end += 1;
  return [lines.slice(start + 1, end).join("\n"), end + 1];
}

function codeBlock(code, name) {
  const head = h("div", { class: "code-head" }, h("span", {}, name), copyButton(t("copy"), t("copied"), () => code));
  return h("div", { class: "code" }, head, h("pre", { tabindex: "0" }, h("code", {}, code)));
}

function list(lines, start, depth) {
  const [, indent, mark] = ITEM.exec(lines[start]);
  const ordered = /\d/.test(mark);
  const element = h(ordered ? "ol" : "ul", ordered && parseInt(mark, 10) !== 1 ? { start: parseInt(mark, 10) } : {});
  let k = start;
  let inside = [];
  const close = () => {
    if (inside.length) element.append(h("li", {}, tight(blocks(inside, depth + 1))));
    inside = [];
  };
  while (k < lines.length) {
    const match = ITEM.exec(lines[k]);
    const spaces = lines[k].length - lines[k].trimStart().length;
    if (match && match[1].length <= indent.length && !RULE.test(lines[k])) {
      if (/\d/.test(match[2]) !== ordered || match[1].length < indent.length) break;
      close();
      inside.push(match[3] ?? "");
    } else if (!lines[k].trim()) {
      const next = lines.slice(k).find((line) => line.trim());
      const goesOn = next !== undefined && (next.startsWith(`${indent}  `) || ITEM.exec(next)?.[1].length >= indent.length);
      if (!goesOn) break;
      inside.push("");
    } else if (spaces > indent.length) {
      inside.push(lines[k].slice(Math.min(spaces, indent.length + mark.length + 1)));
    } else if (lines[k - 1].trim() && !/^ {0,3}([#>`~|])/.test(lines[k]) && !RULE.test(lines[k])) {
      inside.push(lines[k]); // a paragraph's next line needs no indent
    } else break;
    k += 1;
  }
  close();
  return [element, k];
}

/** An item that is one paragraph needs no <p>. */
function tight(made) {
  return made.flatMap((block, k) => (k === 0 && block.tagName === "P" ? [...block.childNodes] : [block]));
}

function table(lines, start) {
  const cells = (line) => line.trim().replace(/^\||\|$/g, "").split(/(?<!\\)\|/).map((c) => c.replaceAll("\\|", "|").trim());
  const align = cells(lines[start + 1]).map((c) => (c.endsWith(":") ? (c.startsWith(":") ? "center" : "right") : null));
  const row = (tag, line) => h("tr", {}, cells(line).slice(0, 100).map((c, k) => h(tag, { class: align[k] }, inline(c))));
  const body = h("tbody");
  let k = start + 2;
  for (; k < lines.length && lines[k].includes("|") && lines[k].trim(); k += 1) body.append(row("td", lines[k]));
  const element = h("table", {}, h("thead", {}, row("th", lines[start])), body);
  return [h("div", { class: "scroll", tabindex: "0" }, element), k];
}

// Spans have a longest length, so that signs that are never closed cost no time that grows with the text's square.
const INLINE = new RegExp(
  [
    /\\([!-/:-@[-`{-~])/, // 1 an escaped sign
    /(`+)([^`](?:[^]{0,2000}?[^`])?)\2(?!`)/, // 2, 3 code
    /!?\[([^\]\n]{0,1000})\]\(\s*<?([^\s<>()]*(?:\([^\s<>()]*\)[^\s<>()]*)*)>?(?:\s+"[^"\n]{0,300}")?\s*\)/, // 4, 5 link
    /<?(https?:\/\/[^\s<>"'`|\]]*[^\s<>"'`|\].,;:!?)*_])>?/, // 6 address
    /\*\*(?=\S)([^]{0,2000}?\S)\*\*/, // 7 bold
    /~~(?=\S)([^]{0,2000}?\S)~~/, // 8 struck
    /(?<![*\w])\*(?=[^\s*])([^*]{0,2000}?[^\s*])\*(?!\*)/, // 9 italic
    /(?<![_\w])_(?=[^\s_])([^_]{0,2000}?[^\s_])_(?![_\w])/, // 10 italic
    /( {2,}|\\)?\n/, // 11 end of line
  ].map((part) => part.source).join("|"),
  "g",
);

function inline(text, depth = 0) {
  if (text.length > 50_000 || depth > 6) return [text]; // a wall of text: not worth its search
  const made = [];
  let from = 0;
  for (const match of text.matchAll(INLINE)) {
    if (match.index < from) continue;
    const [whole, escaped, , code, label, target, address, bold, struck, starred, lined, hard] = match;
    let node;
    if (escaped !== undefined) node = escaped;
    else if (code !== undefined) node = h("code", {}, code.replace(/^ (.+) $/, "$1"));
    else if (target !== undefined) node = link(target, inline(label || target, depth + 1), whole);
    else if (address !== undefined) node = link(address, [address], whole);
    else if (bold !== undefined) node = h("strong", {}, inline(bold, depth + 1));
    else if (struck !== undefined) node = h("del", {}, inline(struck, depth + 1));
    else if (starred !== undefined || lined !== undefined) node = h("em", {}, inline(starred ?? lined, depth + 1));
    else node = hard ? h("br") : "\n";
    made.push(text.slice(from, match.index), node);
    from = match.index + whole.length;
  }
  made.push(text.slice(from));
  return made.filter((node) => node !== "");
}

/** Only to the web or a mailbox: javascript:, data: and the rest stay the text they were written as. */
function link(target, content, source) {
  let address;
  try {
    address = new URL(target);
  } catch {
    return source;
  }
  if (!["http:", "https:", "mailto:"].includes(address.protocol)) return source;
  return h("a", { href: address.href, target: "_blank", rel: "noopener noreferrer nofollow" }, content);
}
