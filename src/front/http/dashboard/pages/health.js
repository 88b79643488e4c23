// How the gateway is: whether it takes messages, what an operator should look at, and how far its consumers are.

import { fill, h } from "./dom.js";
import { bytes, count } from "./format.js";
import { gateway } from "./live.js";
import { consumersTable } from "./sinks.js";

export function healthView(main) {
  const status = h("section", { class: "panel" });
  const numbers = h("section", { class: "panel" });
  const consumers = h("section", { class: "panel" });
  fill(main, h("div", { class: "title" }, h("h1", {}, "Health")), status, numbers, consumers);
  const made = {
    on(name) {
      if (name === "health" || name === "connection") draw();
    },
  };
  function draw() {
    const { health } = gateway;
    if (!health) return;
    const { status: word, reasons, warnings } = health.readiness;
    const isReady = word === "ready";
    fill(status, h("h2", {}, isReady ? "Messages are taken" : "No message can be taken"),
      h("p", {}, h("span", { class: `badge ${isReady ? "good" : "bad"}` }, word), warnings.length ? h("span", { class: "badge warn" }, `${warnings.length} to look at`) : null),
      [...reasons, ...warnings].map((line) => h("p", { class: "wrap" }, line)),
      isReady && !warnings.length ? h("p", { class: "muted" }, "Nothing needs attention.") : null);
    const of = health.gateway;
    numbers.hidden = consumers.hidden = !of;
    if (!of) return;
    const facts = [
      ["Records in the log", count(of.log_end - of.log_first)],
      ["Next offset", count(of.log_end)],
      ["Size of the log", bytes(of.log_bytes)],
      ["Keys", count(of.keys)],
      ["Version", gateway.version ?? "–"],
    ];
    fill(numbers, h("h2", {}, "Log"), h("dl", { class: "facts big" }, facts.map(([name, text]) => h("div", {}, h("dt", {}, name), h("dd", { class: "number" }, text)))));
    fill(consumers, h("h2", {}, "Consumers"), consumersTable(of));
  }
  draw();
  return made;
}
