// Shows every datasource with its newest values, again every two seconds. The key stays in this tab.
"use strict";

const REFRESH_MS = 2000;
const byId = (id) => document.getElementById(id);

async function get(path) {
  const key = sessionStorage.getItem("key");
  const response = await fetch(path, { headers: { "X-API-Key": key } });
  if (!response.ok) {
    const problem = await response.json().catch(() => ({}));
    throw Object.assign(new Error(problem.detail || problem.title || response.statusText), { status: response.status });
  }
  return response.json();
}

function element(name, className, text) {
  const made = document.createElement(name);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

function row(cells) {
  const made = element("tr");
  for (const [className, text] of cells) made.append(element("td", className, text));
  return made;
}

function section(datasource, latest) {
  const made = element("section");
  const title = element("h2", "", datasource.name + " ");
  title.append(element("small", "id", datasource.id));
  made.append(title);
  if (latest.topics.length === 0) {
    made.append(element("p", "id", "nothing stored yet"));
    return made;
  }
  const table = element("table");
  const head = element("tr");
  for (const name of ["topic", "value", "received", "offset"]) head.append(element("th", "", name));
  table.append(head);
  for (const topic of latest.topics) {
    const payload = typeof topic.payload === "string" ? topic.payload : JSON.stringify(topic.payload);
    table.append(row([
      ["", topic.topic],
      ["value", payload.slice(0, 300)],
      ["", new Date(topic.received_at).toLocaleString()],
      ["offset", String(topic.offset)],
    ]));
  }
  made.append(table);
  return made;
}

async function refresh() {
  if (!sessionStorage.getItem("key")) return;
  try {
    const { datasources } = await get("/v1/datasources");
    const sections = await Promise.all(datasources.map(async (datasource) =>
      section(datasource, await get(`/v1/datasources/${datasource.id}/latest`))));
    byId("datasources").replaceChildren(...sections);
    byId("state").textContent = `${datasources.length} datasources, ${new Date().toLocaleTimeString()}`;
    byId("ask").hidden = true;
    byId("trouble").textContent = "";
  } catch (error) {
    byId("trouble").textContent = error.message;
    byId("ask").hidden = false;
    if (error.status === 401 || error.status === 403) sessionStorage.removeItem("key");
  }
}

byId("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem("key", byId("key").value.trim());
  byId("key").value = "";
  refresh();
});
refresh();
setInterval(refresh, REFRESH_MS);
