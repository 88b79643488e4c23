// How far each consumer of the log is: the sinks that store records, and what goes to NATS.

import { h, table } from "./dom.js";
import { age, count, plural, rate } from "./format.js";

export function consumersTable(gateway) {
  const rows = gateway.sinks.map((sink) => ({
    cells: [
      h("div", {}, sink.sink, sink.is_read ? h("small", {}, " reads are answered from it") : null),
      state(sink.trouble, sink.lag),
      count(sink.lag),
      `${rate(sink.records_per_s)}/s`,
      sink.last_error ? h("div", { class: "wrap" }, sink.last_error.error, h("div", {}, h("small", {}, age(sink.last_error.at)))) : "",
    ],
  }));
  if (gateway.egress) {
    const { lag, trouble, sent } = gateway.egress;
    rows.push({ cells: ["NATS", state(trouble, lag), count(lag), `${count(sent)} sent`, trouble ?? ""] });
  }
  return h("div", {}, table("Consumers of the log", [
    { name: "Consumer" }, { name: "State" }, { name: "Behind", class: "value" }, { name: "Pace", class: "value" }, { name: "Last error" },
  ], rows, "Nothing is stored: storage is off."),
  h("p", { class: "muted" }, `${plural(gateway.streams[0], "open stream")} over HTTP${gateway.streams[1] ? `, of which ${count(gateway.streams[1])} take nothing` : ""}.`));
}

function state(trouble, lag) {
  if (trouble) return h("div", {}, h("span", { class: "badge bad" }, "failing"), h("div", { class: "wrap" }, h("small", {}, trouble)));
  return lag > 10_000 ? h("span", { class: "badge warn" }, "behind") : h("span", { class: "badge good" }, "up to date");
}
