// What was refused lately, why, and what to do about it.

import { get, query } from "./api.js";
import { fill, h, notify, select } from "./dom.js";
import { age, count, plural, time } from "./format.js";

export function refusalsPanel(place, datasource, title = "Refusals") {
  let cause = "";
  let shown = [];
  const list = h("div", { class: "refusals" });
  const causes = select([["", "every cause"]], "", (to) => {
    cause = to;
    draw();
  });
  causes.setAttribute("aria-label", "Cause");
  const words = h("input", { type: "search", placeholder: "Client or address", "aria-label": "Find", oninput: () => draw() });
  fill(place, h("div", { class: "panel-head" }, h("h2", {}, title), h("div", { class: "tools" }, words, causes)), list);

  async function load() {
    const { refusals, unlisted } = await get(`/v1/refusals${query({ datasource, limit: 300 })}`);
    shown = refusals;
    const names = [...new Set(refusals.map((of) => of.cause))].sort();
    fill(causes, h("option", { value: "" }, "every cause"), names.map((name) => h("option", { value: name }, readable(name))));
    causes.value = names.includes(cause) ? cause : "";
    cause = causes.value;
    draw(unlisted);
  }

  function draw(unlisted = 0) {
    const wanted = words.value.trim().toLowerCase();
    const of = shown.filter((one) => (!cause || one.cause === cause)
      && (!wanted || [one.client, one.address, one.key_id, one.datasource].some((text) => text?.toLowerCase().includes(wanted))));
    fill(list, of.length ? of.map(entry) : h("p", { class: "empty" }, shown.length ? "None of them." : "Nothing was refused since the gateway started."),
      unlisted ? h("p", { class: "muted" }, `${count(unlisted)} more were counted and are not listed.`) : null);
  }

  const reload = () => load().catch((error) => {
    if (error.status !== 401) notify(error.message, true);
  });
  reload();
  return { reload };
}

const readable = (name) => name.replaceAll("_", " ");

function entry(of) {
  const facts = [
    ["From", [of.client, of.address].filter(Boolean).join(" · ") || "unknown"],
    ["Over", of.transport],
    of.datasource ? ["Datasource", of.datasource] : null,
    of.key_id ? ["Key", of.key_id] : null,
    of.limit ? ["Limit", `${of.limit.name} = ${of.limit.max} of ${of.limit.of}`] : null,
    ["First", time(of.first_at)],
  ].filter(Boolean);
  return h("article", { class: "refusal" },
    h("div", { class: "refusal-head" }, h("h3", { class: "cause" }, readable(of.cause)), h("span", { class: "muted" }, `${of.count === 1 ? "once" : plural(of.count, "time")}, last ${age(of.last_at)}`)),
    h("p", { class: "wrap" }, of.detail),
    h("p", { class: "advice wrap" }, of.advice),
    h("dl", { class: "facts" }, facts.map(([name, text]) => h("div", {}, h("dt", {}, name), h("dd", {}, text)))));
}
