// Eight windows of one browser over HTTP/1.1, which gives them six connections: each shows what comes in as it comes, and
// each can still ask for something; also when the one goes that has the stream for all, and when they show different things.
const [base, adminKey, mqttUrl] = process.argv.slice(1);

const ask = async (method, path, body, key = adminKey) => {
  const answer = await fetch(base + path, { method, headers: { authorization: `Bearer ${key}`, "content-type": "application/json" }, body: body && JSON.stringify(body) });
  const text = await answer.text();
  if (!answer.ok) throw new Error(text);
  return text ? JSON.parse(text) : null;
};

run(async () => {
  const browser = await launch();
  const { key } = await ask("POST", "/v1/datasources", { name: "Tank 7", id: "tank-7" });
  const publish = (value) => ask("POST", "/v1/ingest/tank-7/level", { level: value }, key.secret);
  const { context, page, errors } = await open(browser, base);
  await signIn(page, adminKey);
  await page.getByRole("heading", { name: "Tank 7" }).waitFor();
  // One that hears of what happens before it knows what there is.
  const tick = await page.evaluate(() => new Promise((resolve) => {
    new BroadcastChannel("headgate-live").onmessage = ({ data }) => data.name === "tick" && resolve(data);
  }));
  const early = await context.newPage();
  early.setDefaultTimeout(60000);
  await early.addInitScript((heard) => {
    const channel = new BroadcastChannel("headgate-live");
    setInterval(() => channel.postMessage(heard), 5);
  }, tick);
  await early.goto(base);
  await early.getByRole("heading", { name: "Tank 7" }).waitFor();
  await early.close();

  const windows = [page];
  while (windows.length < 8) {
    const next = await context.newPage();
    opened.push({ page: next, errors });
    next.setDefaultTimeout(60000);
    next.on("pageerror", (error) => errors.push(String(error.stack ?? error)));
    await next.goto(base);
    windows.push(next);
  }
  for (const one of windows) await one.getByRole("heading", { name: "Tank 7" }).waitFor();
  // What comes while one window takes the stream over from another is shown with the next message.
  const allShow = async (value) => {
    for (const one of windows) {
      const shown = one.locator(".card").getByText(String(value), { exact: true });
      await until(`${value} in a window`, async () => {
        await publish(value);
        return shown.first().waitFor({ timeout: 1000 }).then(() => true, () => false);
      });
    }
  };
  await allShow(4711);

  // Whichever has the stream goes, one after the other.
  while (windows.length > 4) await windows.shift().close();
  await allShow(4712);

  // What one of them asks for is answered, and it comes back to what the others show.
  for (const one of windows) {
    await one.getByRole("link", { name: "Tank 7" }).click();
    await one.getByRole("navigation", { name: "Of this datasource" }).getByRole("link", { name: "Keys" }).click();
    await one.getByRole("heading", { name: "Keys" }).waitFor();
    await one.getByText(key.id).waitFor();
  }
  for (const one of windows) {
    await one.getByRole("link", { name: "All datasources" }).click();
    await one.getByRole("heading", { name: "Tank 7" }).waitFor();
  }
  await allShow(4713);
  check(errors.length === 0, errors.join("\n"));
  await browser.close();
});
