// A sparkline: the last minute of a rate, a second each.

import { svg } from "./dom.js";

const WIDTH = 120;
const HEIGHT = 28;

export function sparkline() {
  const line = svg("polyline", { class: "spark-line", fill: "none", points: "" });
  const area = svg("polygon", { class: "spark-area", points: "" });
  const picture = svg("svg", { class: "spark", viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", "aria-hidden": "true", focusable: "false" }, area, line);
  return {
    element: picture,
    draw(history) {
      const top = Math.max(1, ...history);
      const points = history.map((n, i) => {
        const x = (i * WIDTH) / Math.max(1, history.length - 1);
        return `${x.toFixed(1)},${(HEIGHT - 2 - (n / top) * (HEIGHT - 5)).toFixed(1)}`;
      });
      line.setAttribute("points", points.join(" "));
      area.setAttribute("points", `0,${HEIGHT} ${points.join(" ")} ${WIDTH},${HEIGHT}`);
    },
  };
}
