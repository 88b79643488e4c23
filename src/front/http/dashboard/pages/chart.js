// A chart of one number over time: what is stored of it, and what comes in while it is shown.

import uPlot from "./uplot.js";
import { get, of, query } from "./api.js";
import { fill, h, notify, select, setText } from "./dom.js";
import { plural, samples, time, tod, value } from "./format.js";

const RANGES = [["900", "15 minutes"], ["3600", "1 hour"], ["21600", "6 hours"], ["86400", "24 hours"], ["604800", "7 days"], ["2592000", "30 days"]];
const AGGREGATES = [["avg", "average"], ["min", "minimum"], ["max", "maximum"], ["last", "last"], ["sum", "sum"], ["count", "count"]];
const POINTS = 600;
const HEIGHT = 230;

export function chartPanel(place, datasource) {
  let chosen = null; // { topic, key }
  let choices = [];
  let range = "900";
  let aggregate = "avg";
  let chart = null;
  let data = [[], []];
  let stepS = 0;
  let step = null; // what the newest step has so far
  let loadedAt = ""; // the newest record that the answer can have
  let serial = 0;
  const what = select([], null, (name) => choose(...JSON.parse(name)));
  what.setAttribute("aria-label", "Value");
  const over = select(RANGES, range, (to) => {
    range = to;
    load();
  });
  over.setAttribute("aria-label", "Time range");
  const by = select(AGGREGATES, aggregate, (to) => {
    aggregate = to;
    load();
  });
  by.setAttribute("aria-label", "Aggregate");
  const words = h("p", { class: "muted" }, "");
  const canvas = h("div", { class: "chart", role: "img", "aria-label": "Chart" });
  const tools = h("div", { class: "tools" }, what, over, by);
  fill(place, h("div", { class: "panel-head" }, h("h2", {}, "Over time"), tools), canvas, words);
  place.hidden = true;

  const resize = new ResizeObserver(() => chart?.setSize({ width: canvas.clientWidth, height: HEIGHT }));
  resize.observe(canvas);
  const scheme = matchMedia("(prefers-color-scheme: dark)");
  const redraw = () => draw(true);
  scheme.addEventListener("change", redraw);

  function offer(numbers) {
    const names = numbers.map(({ topic, key }) => JSON.stringify([topic, key]));
    if (names.join() === choices.join()) return;
    choices = names;
    fill(what, numbers.map(({ topic, key }) => h("option", { value: JSON.stringify([topic, key]) }, key ? `${topic} · ${key}` : topic)));
    if (chosen) what.value = JSON.stringify([chosen.topic, chosen.key]);
    place.hidden = !numbers.length;
    if (!chosen && numbers.length) choose(numbers[0].topic, numbers[0].key);
  }

  function choose(topic, key) {
    chosen = { topic, key };
    what.value = JSON.stringify([topic, key]);
    place.hidden = false;
    load();
  }

  async function load() {
    if (!chosen) return;
    serial += 1;
    const asked = serial;
    const from = new Date(Date.now() - Number(range) * 1000).toISOString();
    try {
      const series = await get(of(datasource, "series") + query({ topic: chosen.topic, key: chosen.key, from, agg: aggregate, points: POINTS }));
      if (asked !== serial) return;
      stepS = series.step_s;
      loadedAt = series.to ?? "";
      data = [[], []];
      for (const { at, value: of_ } of series.points) {
        data[0].push(Date.parse(at) / 1000);
        data[1].push(of_);
      }
      const newest = series.points.at(-1);
      step = newest?.value === null || !newest ? null : stepOf(Date.parse(newest.at) / 1000, newest.value, newest.count);
      draw(true);
    } catch (error) {
      if (error.status !== 401 && asked === serial) notify(error.message, true);
    }
  }

  // A step of so many samples, of which the answer says one number.
  function stepOf(at, number, count) {
    const sum = aggregate === "avg" ? number * count : number;
    return { at, sum, count: aggregate === "count" ? number : count, min: number, max: number, last: number, first: number };
  }

  function colors() {
    const style = getComputedStyle(document.documentElement);
    const of_ = (name) => style.getPropertyValue(name).trim();
    return { accent: of_("--accent"), area: of_("--accent-soft"), text: of_("--muted"), line: of_("--line") };
  }

  function draw(isNew) {
    const known = data[1].filter((n) => n !== null);
    const name = chosen ? `${chosen.topic}${chosen.key ? ` ${chosen.key}` : ""}` : "";
    const summary = known.length
      ? `${name}: lowest ${value(min(known))}, highest ${value(max(known))}, last ${value(known.at(-1))}. ${plural(known.length, "point")}${stepS ? `, ${stepS < 1 ? `${stepS * 1000} ms` : `${stepS} s`} each` : ""}.`
      : `${name}: nothing in this time.`;
    setText(words, summary);
    canvas.setAttribute("aria-label", `Chart of ${summary}`);
    if (!isNew && chart) {
      chart.setData(data);
      return;
    }
    chart?.destroy();
    const { accent, area, text, line } = colors();
    const axis = { stroke: text, grid: { stroke: line, width: 1 }, ticks: { stroke: line, width: 1 }, font: "12px system-ui, sans-serif" };
    chart = new uPlot({
      width: canvas.clientWidth || 300,
      height: HEIGHT,
      legend: { show: true, live: true },
      cursor: { y: false },
      scales: { x: { time: true } },
      axes: [{ ...axis, values: timeLabels }, { ...axis, size: 64 }],
      series: [{ label: "Time", value: (_, at) => (at ? time(at * 1000) : "–") }, { label: name, stroke: accent, fill: area, width: 1.75, spanGaps: false, points: { show: known.length < 60 }, value: (_, of_) => (of_ === null || of_ === undefined ? "–" : value(of_)) }],
    }, data, canvas);
  }

  return {
    offer,
    choose,
    load,
    // Adds what has come in to the step that is not over, or begins the next ones.
    take(records) {
      if (!chosen || !stepS) return;
      let isChanged = false;
      for (const record of records) {
        if (record.topic !== chosen.topic || record.payload_encoding) continue;
        const number = samples(record.payload).get(chosen.key);
        if (number === undefined) continue;
        // What the answer had already is older than it.
        if (record.received_at <= loadedAt) continue;
        const at = Math.floor(Date.parse(record.event_at ?? record.received_at) / 1000 / stepS) * stepS;
        if (data[0].length && at < data[0].at(-1)) continue;
        if (step?.at === at) step = { at, sum: step.sum + number, count: step.count + 1, min: Math.min(step.min, number), max: Math.max(step.max, number), last: number, first: step.first };
        else step = { at, sum: number, count: 1, min: number, max: number, last: number, first: number };
        if (data[0].at(-1) !== at) {
          data[0].push(at);
          data[1].push(null);
        }
        data[1][data[1].length - 1] = aggregate === "avg" ? step.sum / step.count : step[aggregate];
        isChanged = true;
      }
      const oldest = Date.now() / 1000 - Number(range);
      while (data[0].length && data[0][0] < oldest) {
        data[0].shift();
        data[1].shift();
        isChanged = true;
      }
      if (isChanged) draw(false);
    },
    close() {
      resize.disconnect();
      scheme.removeEventListener("change", redraw);
      chart?.destroy();
    },
  };
}

const day = new Intl.DateTimeFormat(undefined, { day: "numeric", month: "short" });

// Labels of the axis of time, as long as its steps need.
function timeLabels(_, splits, axis, space, step) {
  return splits.map((at) => {
    const date = new Date(at * 1000);
    if (step >= 86400 || (date.getHours() === 0 && date.getMinutes() === 0)) return day.format(date);
    return step < 60 ? tod(date) : tod(date).slice(0, 5);
  });
}

const min = (all) => all.reduce((a, b) => Math.min(a, b));
const max = (all) => all.reduce((a, b) => Math.max(a, b));
