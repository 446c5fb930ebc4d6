// A small plot of the last values.

import { svg } from "./dom.js";

const WIDTH = 240;
const HEIGHT = 56;

/** `values`: numbers or null (a gap), the newest last; `length`: how many fill the width. */
export function sparkline(values, length, label) {
  const known = values.filter((value) => value !== null);
  const high = Math.max(...known, 1e-9);
  const x = (k) => (WIDTH * (length - values.length + k)) / (length - 1);
  const y = (value) => HEIGHT - 4 - ((HEIGHT - 8) * value) / high;
  let path = "";
  let drawing = false;
  values.forEach((value, k) => {
    if (value !== null) path += `${drawing ? "L" : "M"}${x(k).toFixed(1)} ${y(value).toFixed(1)}${drawing ? "" : "h0.1"}`; // a dot, if alone
    drawing = value !== null;
  });
  const plot = svg("svg", { class: "sparkline", viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", role: "img", "aria-label": label });
  plot.append(svg("line", { x1: 0, x2: WIDTH, y1: HEIGHT - 4, y2: HEIGHT - 4, class: "base" }), svg("path", { d: path }));
  return plot;
}
