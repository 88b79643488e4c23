// The audit: who changed what, when and from where.

import { get, query } from "./api.js";
import { fill, h, notify, select, table } from "./dom.js";
import { time } from "./format.js";

const PERIODS = [["86400", "last 24 hours"], ["604800", "last 7 days"], ["2592000", "last 30 days"], ["", "all"]];
const PAGE = 1000;
const SHOWN_MAX = 500;
// The oldest come first, so that the newest are behind so many pages at most.
const PAGES_MAX = 50;

export function auditPanel(place) {
  let period = "604800";
  let entries = [];
  const list = h("div", {});
  const since = select(PERIODS, period, (to) => {
    period = to;
    reload();
  });
  since.setAttribute("aria-label", "Time");
  const words = h("input", { type: "search", placeholder: "Find", "aria-label": "Find", oninput: () => draw() });
  fill(place, h("div", { class: "panel-head" }, h("h2", {}, "Audit"), h("div", { class: "tools" }, words, since)), list);

  async function load() {
    const from = period ? new Date(Date.now() - Number(period) * 1000).toISOString() : undefined;
    let after;
    let kept = [];
    for (let pages = 0; pages < PAGES_MAX; pages += 1) {
      const page = await get(`/v1/audit${query({ from, after, limit: PAGE })}`);
      kept = [...kept, ...page.entries].slice(-SHOWN_MAX);
      if (page.next === null) break;
      after = page.next;
    }
    entries = kept.reverse();
    draw();
  }

  function draw() {
    const wanted = words.value.trim().toLowerCase();
    const shown = entries.filter((of) => !wanted || JSON.stringify(of).toLowerCase().includes(wanted));
    fill(list, table("Audit", [
      { name: "When", class: "time" }, { name: "What" }, { name: "Of" }, { name: "Who" }, { name: "Details", class: "value" },
    ], shown.map((of) => ({
      cells: [
        time(of.at),
        h("code", {}, of.action),
        h("div", {}, of.datasource ?? "", of.key_id ? h("div", {}, h("code", {}, of.key_id)) : null),
        h("div", {}, h("span", { class: "wrap" }, of.who), of.address ? h("div", {}, h("small", {}, of.address)) : null),
        of.what && Object.keys(of.what).length ? h("code", { class: "wrap" }, JSON.stringify(of.what)) : "",
      ],
    })), "Nothing was changed in this time."),
    entries.length === SHOWN_MAX ? h("p", { class: "muted" }, `The newest ${SHOWN_MAX} are shown.`) : null);
  }

  const reload = () => load().catch((error) => {
    if (error.status !== 401) notify(error.message, true);
  });
  reload();
  return { reload };
}
