// A result as a chart: what suits its columns, drawn by Vega-Lite. Vega is loaded when the first chart is.

const MAX_BARS = 50;
const MAX_COLOURS = 10;
const DAY = /^\d{4}-\d{2}-\d{2}(T\d{2}:\d{2}(:\d{2}(\.\d+)?)?)?$/;

export const KINDS = ["bar", "line", "point"];

/** quantitative, temporal, year or nominal, by the column's cells. */
function columnType(rows, k, name) {
  const cells = rows.map((row) => row[k]).filter((value) => value !== null);
  if (!cells.length) return "nominal";
  if (cells.every((value) => typeof value === "number")) {
    const years = cells.every((value) => Number.isInteger(value) && value >= 1000 && value <= 2999);
    return years && /year|年/i.test(name) ? "year" : "quantitative";
  }
  return cells.every((value) => typeof value === "string" && DAY.test(value)) ? "temporal" : "nominal";
}

/** {kind, x, y, colour} as numbers of columns (colour may be null), or null where a chart says nothing. */
export function suggest(columns, rows) {
  if (rows.length < 2 || columns.length < 2) return null;
  const types = columns.map((name, k) => columnType(rows, k, name));
  const of = (...wanted) => types.flatMap((type, k) => (wanted.includes(type) ? [k] : []));
  const numbers = of("quantitative");
  const times = of("temporal", "year");
  const names = of("nominal");
  if (!numbers.length) return null;
  const [y] = numbers.slice(-1); // the figure asked for comes last
  const colour = names.find((k) => new Set(rows.map((row) => row[k])).size <= MAX_COLOURS) ?? null;
  // Lines of more names than there are colours would run into each other.
  if (times.length) return { kind: names.length && colour === null ? "point" : "line", x: times[0], y, colour };
  if (names.length) return { kind: "bar", x: names[0], y, colour: names.length > 1 ? names.slice(1).find((k) => k === colour) ?? null : null };
  return numbers.length > 1 ? { kind: "point", x: numbers[0], y, colour: null } : null;
}

/** The Vega-Lite specification. Fields are c0, c1, ...: a column's name is only ever a title. */
export function specification(columns, rows, { kind, x, y, colour }, look) {
  const types = columns.map((name, k) => columnType(rows, k, name));
  const shown = kind === "bar" && types[x] === "nominal" ? rows.slice(0, MAX_BARS) : rows;
  const values = shown.map((row) => Object.fromEntries(row.map((value, k) => [`c${k}`, value])));
  const channel = (k) => ({ field: `c${k}`, type: types[k] === "year" ? "ordinal" : types[k], title: columns[k] });
  const names = { ...channel(x), sort: null };
  const figure = channel(y);
  const sideways = kind === "bar" && types[x] === "nominal";
  const encoding = sideways ? { y: names, x: figure } : { x: kind === "line" && types[x] === "nominal" ? names : channel(x), y: figure };
  if (colour !== null) encoding.color = { ...channel(colour), type: "nominal" };
  if (colour !== null && sideways) encoding.yOffset = { field: `c${colour}` };
  encoding.tooltip = columns.map((_, k) => ({ ...channel(k), type: types[k] === "temporal" ? "temporal" : "nominal" }));
  return {
    data: { values },
    mark: { type: kind, ...(kind === "line" ? { point: true } : {}) },
    encoding,
    width: look.width,
    ...(sideways ? { height: { step: colour === null ? 22 : 12 } } : { height: 260 }),
    autosize: { type: "fit-x", contains: "padding" },
    background: "transparent",
    config: {
      view: { stroke: null }, mark: { color: look.accent }, bar: { color: look.accent },
      axis: { labelColor: look.text, titleColor: look.text, gridColor: look.line, domainColor: look.line, tickColor: look.line, labelLimit: 160 },
      legend: { labelColor: look.text, titleColor: look.text },
    },
  };
}

let vega = null;

async function load() {
  // In this order: Vega-Lite and the interpreter look for globalThis.vega.
  await import("./vendor/vega.min.js");
  await import("./vendor/vega-lite.min.js");
  const { expressionInterpreter } = await import("./vendor/vega-interpreter.js");
  return { ...globalThis.vega, compile: globalThis.vegaLite.compile, expressionInterpreter };
}

/** Draw into the element; resolves to the view, whose toImageURL makes a picture. */
export async function draw(element, columns, rows, choice) {
  vega ??= load();
  const { compile, parse, View, expressionInterpreter } = await vega;
  const style = getComputedStyle(element);
  const look = {
    width: Math.max(240, Math.min(720, element.clientWidth || 600)),
    accent: style.getPropertyValue("--accent-plain").trim(), text: style.color, line: style.borderTopColor,
  };
  const spec = compile(specification(columns, rows, choice, look)).spec;
  // ast: expressions are interpreted, not compiled by eval.
  const view = new View(parse(spec, null, { ast: true }), { expr: expressionInterpreter, renderer: "svg", container: element, hover: true });
  await view.runAsync();
  return view;
}
