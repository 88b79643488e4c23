// A page of another origin that reads a stream with an access token, by the browser's own EventSource, which sends no
// header: what the token is for and no more, until it ends.
const http = require("http");
const [base, adminKey] = process.argv.slice(1);

const ask = async (method, path, body) => {
  const answer = await fetch(base + path, { method, headers: { authorization: `Bearer ${adminKey}`, "content-type": "application/json" }, body: body && JSON.stringify(body) });
  const text = await answer.text();
  if (!answer.ok) throw new Error(text);
  return JSON.parse(text);
};

run(async () => {
  const { key } = await ask("POST", "/v1/datasources", { name: "Tank 7", id: "tank-7", scopes: ["ingest", "subscribe"] });
  const send = (topic, payload) => ask("POST", `/v1/ingest/tank-7/${topic}`, payload);
  const token = async (wanted) => (await ask("POST", `/v1/datasources/tank-7/keys/${key.id}/tokens`, wanted)).token;
  await send("level/a", 1);
  await send("secret", 2);

  const site = http.createServer((_, answer) => {
    answer.setHeader("content-type", "text/html");
    answer.end("<!doctype html><title>A page</title><link rel=icon href=data:,>");
  });
  await new Promise((ready) => site.listen(0, "127.0.0.1", ready));
  const browser = await launch();
  const { page, errors } = await open(browser, `http://127.0.0.1:${site.address().port}/`);

  // Opens a stream in the page, which notes what comes.
  const follow = (name, query) => page.evaluate(([name, url]) => {
    const seen = { payloads: [], end: null, states: [] };
    const source = new EventSource(url);
    source.onmessage = (event) => seen.payloads.push(JSON.parse(event.data).payload);
    source.addEventListener("end", (event) => { seen.end = JSON.parse(event.data).reason; });
    source.onerror = () => seen.states.push(source.readyState);
    (window.streams ??= {})[name] = seen;
  }, [name, `${base}/v1/datasources/tank-7/stream?${query}`]);
  const seen = (name) => page.evaluate((name) => window.streams[name], name);

  const short = await token({ ttl_s: 4, topics: ["level/#"], scopes: ["subscribe"] });
  await follow("short", `from_offset=0&access_token=${short}`);
  await until("the first reading", async () => (await seen("short")).payloads.length === 1);
  await send("secret", 3);
  await send("level/b", 4);
  await until("the next reading", async () => (await seen("short")).payloads.length === 2);
  check((await seen("short")).payloads.join() === "1,4", "it sees what it is for");

  // What it is not for, what it does not open, and what a key is refused: the browser gives up.
  await follow("beyond", `topic=%23&access_token=${short}`);
  await follow("key", `access_token=${key.secret}`);
  for (const name of ["beyond", "key"]) {
    await until(`${name} to be refused`, async () => (await seen(name)).states.at(-1) === 2);
    check((await seen(name)).payloads.length === 0, `${name} saw something`);
  }

  // It is told why it ends; it asks once more by itself, and gives up.
  await until("the end of the token", async () => (await seen("short")).end === "token_over");
  await until("the browser to give up", async () => (await seen("short")).states.at(-1) === 2);
  const next = await token({ ttl_s: 60, topics: ["level/#"] });
  await follow("next", `tail=2&access_token=${next}`);
  await until("the same readings again", async () => (await seen("next")).payloads.length === 2);
  // A key in a URL is refused before anybody looks from where the page is.
  const isExpected = (error) => /status of 40[13]/.test(error) || (error.includes(key.secret) && /CORS|ERR_FAILED/.test(error));
  check(errors.every(isExpected), errors.join("\n"));
  await browser.close();
  site.close();
});
