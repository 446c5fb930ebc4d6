// A result as CSV (RFC 4180), with the mark by which Excel knows UTF-8.

export function toCsv(columns, rows) {
  const line = (cells) => cells.map(cell).join(",");
  return `\ufeff${[columns, ...rows].map(line).join("\r\n")}\r\n`;
}

function cell(value) {
  if (value === null || value === undefined) return "";
  const text = String(value);
  return /[",\r\n]|^\s|\s$/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
}
