// The live tail: the records of a datasource as they come, with pause and filters.

import { button, fill, h, setText } from "./dom.js";
import { count, payload, tod } from "./format.js";

const ROWS_MAX = 200;

// `whenTopic(filter)` is called when another topic filter is to be watched.
export function tailPanel(place, whenTopic) {
  let isPaused = false;
  let held = [];
  let missed = 0;
  const list = h("ol", { class: "tail", tabindex: "0", "aria-label": "Newest records" });
  const state = h("span", { class: "muted", role: "status" }, "Waiting for records");
  const topic = h("input", { type: "text", placeholder: "Topic filter: spindle/#", "aria-label": "Topic filter", spellcheck: "false", autocapitalize: "off" });
  const words = h("input", { type: "search", placeholder: "Contains", "aria-label": "Only records that contain", oninput: () => sift() });
  const pause = button("Pause", () => {
    isPaused = !isPaused;
    pause.setAttribute("aria-pressed", String(isPaused));
    fill(pause, isPaused ? "Go on" : "Pause");
    if (!isPaused) {
      const kept = held;
      held = [];
      show(kept);
    }
    say();
  }, { "aria-pressed": "false" });
  const form = h("form", { class: "tools" }, topic, words, pause, button("Clear", () => {
    fill(list);
    held = [];
    missed = 0;
    say();
  }));
  form.addEventListener("submit", (event) => event.preventDefault());
  topic.addEventListener("change", () => {
    fill(list);
    held = [];
    missed = 0;
    whenTopic(topic.value.trim());
    say();
  });
  fill(place, h("div", { class: "panel-head" }, h("h2", {}, "Records as they come"), form), state, list);

  function say() {
    if (isPaused) setText(state, `Paused${held.length ? ` · ${count(held.length)} new` : ""}`);
    else if (missed) setText(state, `Too fast to show each: ${count(missed)} more came`);
    else setText(state, list.children.length ? "" : "Waiting for records");
  }

  function matches(text) {
    const wanted = words.value.trim().toLowerCase();
    return !wanted || text.toLowerCase().includes(wanted);
  }

  function sift() {
    for (const row of list.children) row.hidden = !matches(row.textContent);
  }

  function show(records) {
    const isAtTop = list.scrollTop < 8;
    const rows = records.slice(-ROWS_MAX).reverse().map((record) => {
      const row = h("li", {},
        h("time", { datetime: record.received_at }, tod(record.received_at)),
        h("span", { class: "topic" }, record.topic),
        h("span", { class: "payload" }, payload(record)),
        h("span", { class: "by" }, `${record.transport} ${record.key_id}`));
      row.hidden = !matches(row.textContent);
      return row;
    });
    list.prepend(...rows);
    while (list.children.length > ROWS_MAX) list.lastChild.remove();
    if (isAtTop) list.scrollTop = 0;
  }

  return {
    take(records, more) {
      missed += more;
      if (isPaused) held = [...held, ...records].slice(-ROWS_MAX);
      else if (records.length) show(records);
      say();
    },
  };
}
