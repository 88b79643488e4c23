// What is behind signing in: which view is shown, and the bar above it.

import { auditPanel } from "./audit.js";
import { datasourceView } from "./datasource.js";
import { datasourcesView } from "./datasources.js";
import { button, fill, h, notify } from "./dom.js";
import { healthView } from "./health.js";
import { keysPanel } from "./keys.js";
import { ask, gateway, onEnded, stop, watch } from "./live.js";
import { refusalsPanel } from "./refusals.js";
import { current, end, isGatewayAdmin, resume } from "./session.js";

const bar = document.getElementById("bar");
const main = document.getElementById("main");
const state = h("span", { class: "state", role: "status" });
let view = null;
let leave = () => {};

const PAGES = [["#/", "Datasources", false], ["#/keys", "Keys", true], ["#/refusals", "Refusals", true], ["#/audit", "Audit", true], ["#/health", "Health", false]];

function drawBar(hash) {
  const { key } = current();
  const shown = PAGES.filter(([, , needsAdmin]) => !needsAdmin || isGatewayAdmin());
  fill(bar,
    button("Skip to the content", () => main.focus(), { class: "skip" }),
    h("a", { href: "#/", class: "brand" }, "Headgate"),
    h("nav", { "aria-label": "Pages" }, shown.map(([path, label]) => {
      const isHere = path === "#/" ? hash === "#/" || hash.startsWith("#/datasources/") : hash === path;
      return h("a", { href: path, "aria-current": isHere ? "page" : null }, label);
    })),
    state,
    h("span", { class: "who" }, h("span", { class: "muted", title: `key ${key.id}` }, key.label || key.id), button("Sign out", async () => {
      try {
        await end();
      } finally {
        leave();
      }
    }, { class: "quiet" })));
}

function drawState() {
  const status = gateway.health?.readiness;
  const [words, kind] = !gateway.isConnected
    ? ["connecting", "warn"]
    : !status ? ["live", "good"]
      : status.status !== "ready" ? ["not ready", "bad"]
        : status.warnings.length ? ["warnings", "warn"] : ["live", "good"];
  state.className = `state ${kind}`;
  if (state.textContent !== words) state.textContent = words;
}

// A view of one panel, on a page of its own.
function panelView(title, make) {
  const place = h("section", { class: "panel" });
  fill(main, h("div", { class: "title" }, h("h1", {}, title)), place);
  return make(place);
}

function show() {
  if (!current()) return;
  const hash = location.hash || "#/";
  const [, page, id, tab] = hash.split("/").map(decode);
  view?.close?.();
  document.querySelectorAll("dialog:not([data-kept])").forEach((open) => open.close());
  drawBar(hash);
  document.title = "Headgate";
  let parameters = {};
  const rewatch = (topic) => watch({ datasource: id, topic }, take);
  if (page === "datasources" && id) {
    parameters = { datasource: id };
    view = datasourceView(main, id, tab ?? "", rewatch);
  } else if (page === "keys" && isGatewayAdmin()) {
    view = panelView("Keys", (place) => keysPanel(place, "*"));
  } else if (page === "refusals" && isGatewayAdmin()) {
    const { reload } = panelView("Refusals", (place) => refusalsPanel(place, undefined, "What was refused lately"));
    view = throttled(reload, ["refusals"]);
  } else if (page === "audit" && isGatewayAdmin()) {
    view = panelView("Audit", auditPanel);
  } else if (page === "health") {
    view = healthView(main);
  } else {
    view = datasourcesView(main);
  }
  watch(parameters, take);
}

// A view that is loaded again when one of these events comes, once a second at most.
function throttled(reload, names) {
  let timer = null;
  return {
    on(name) {
      if (names.includes(name) && timer === null) {
        timer = setTimeout(() => {
          timer = null;
          reload();
        }, 1000);
      }
    },
    close: () => clearTimeout(timer),
  };
}

function decode(text) {
  try {
    return decodeURIComponent(text);
  } catch {
    return text;
  }
}

function take(name, data) {
  if (name === "hello" || name === "health" || name === "connection") drawState();
  view?.on?.(name, data);
}

// Shows the view that the address names, for whoever has signed in. `whenOver(words)` is called when the session is over.
export function begin(whenOver) {
  leave = whenOver;
  show();
}

// Nothing of what was shown stays.
export function close() {
  stop();
  view?.close?.();
  view = null;
  document.querySelectorAll("dialog:not([data-kept])").forEach((open) => open.close());
  fill(bar);
  document.title = "Headgate";
}

onEnded(async (reason, again) => {
  if (reason === "datasource_deleted") {
    if (location.hash.startsWith("#/datasources/")) {
      notify("This datasource was deleted.");
      location.hash = "#/";
    }
    return;
  }
  if (reason === "key_dead") {
    leave("You are signed out: your key was revoked or has expired.");
    return;
  }
  try {
    if (!(await resume())) leave("You are signed out: the session is over, or its key has ended.");
    else await ask().then(again);
  } catch (error) {
    if (error.status === 404 && location.hash.startsWith("#/datasources/")) {
      notify("There is no such datasource, or it is not this key's to read.", true);
      location.hash = "#/";
      return;
    }
    if (error.status === 429) notify("Too many pages watch the gateway with this key: close one.", true);
    again();
  }
});

addEventListener("hashchange", () => {
  show();
  main.focus({ preventScroll: true });
  scrollTo(0, 0);
});
