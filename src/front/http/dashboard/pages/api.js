// The gateway's API, as the session's cookie opens it.

// What proves to the gateway that a change comes from this page.
let proof = "";
let whenSignedOut = () => {};

export function useProof(given) {
  proof = given;
}

export function onSignedOut(act) {
  whenSignedOut = act;
}

export class Refusal extends Error {
  constructor(status, problem) {
    super(problem.detail ? `${problem.title}: ${problem.detail}` : problem.title ?? `The gateway answered ${status}.`);
    this.status = status;
    this.problem = problem;
  }
}

export async function request(method, path, body, headers = {}) {
  const options = { method, headers: { ...headers }, credentials: "same-origin", cache: "no-store" };
  if (body !== undefined) {
    options.headers["Content-Type"] = "application/json";
    options.body = JSON.stringify(body);
  }
  if (method !== "GET") options.headers["x-headgate-csrf"] = proof;
  let answer;
  try {
    answer = await fetch(path, options);
  } catch {
    throw new Refusal(0, { title: "The gateway cannot be reached", detail: "It may be restarting, or the network is away." });
  }
  const text = await answer.text();
  let parsed = null;
  try {
    parsed = text ? JSON.parse(text) : null;
  } catch {
    parsed = { title: text.slice(0, 200) };
  }
  if (answer.ok) return { status: answer.status, body: parsed };
  if (answer.status === 401 && path !== "/v1/session") whenSignedOut();
  throw new Refusal(answer.status, parsed ?? {});
}

export const get = async (path) => (await request("GET", path)).body;
export const post = (path, body) => request("POST", path, body ?? {});
export const put = (path, body) => request("PUT", path, body);
export const remove = (path) => request("DELETE", path);

// The path of a datasource, or of something in it. `*` is all datasources.
export function of(datasource, ...parts) {
  const all = ["/v1/datasources", datasource === "*" ? "*" : encodeURIComponent(datasource)];
  return [...all, ...parts.map(encodeURIComponent)].join("/");
}

// A query string of what is given.
export function query(parameters) {
  const given = Object.entries(parameters).filter(([, value]) => value !== undefined && value !== null && value !== "");
  return given.length ? `?${new URLSearchParams(given)}` : "";
}
