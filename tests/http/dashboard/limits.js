// The limits of a datasource and of a key, on the dashboard: shown, set, changed and taken away; they hold at once.
const [base, adminKey] = process.argv.slice(1);

const ask = (method, path, body, key = adminKey) =>
  fetch(base + path, { method, headers: { authorization: `Bearer ${key}`, "content-type": "application/json" }, body: body && JSON.stringify(body) });

run(async () => {
  const browser = await launch();
  const made = await (await ask("POST", "/v1/datasources", { name: "Tank 7", id: "tank-7" })).json();
  const limits = async () => (await (await ask("GET", "/v1/datasources/tank-7")).json()).limits;
  const send = async (bytes) => (await ask("POST", "/v1/ingest/tank-7", { x: "y".repeat(bytes) }, made.key.secret)).status;
  const { page, errors } = await open(browser, base);
  await signIn(page, adminKey);
  await page.getByRole("link", { name: "Tank 7" }).click();
  await page.getByRole("link", { name: "Settings" }).click();
  await page.getByText("None but the gateway's own.").waitFor();

  await page.getByRole("button", { name: "Limits" }).click();
  const dialog = page.getByRole("dialog");
  const submit = dialog.getByRole("button", { name: "Set limits" });
  await dialog.getByLabel("Bytes of one payload").fill("many");
  check(await submit.isDisabled(), "a limit is a number");
  await dialog.getByLabel("Bytes of one payload").fill("50");
  await dialog.getByLabel("Messages a second", { exact: true }).fill("100");
  await dialog.getByLabel("What is over it").first().selectOption("reject");
  await inspect(page, "limits");
  await submit.click();
  await page.getByText("payload_bytes = 50").waitFor();
  const set = await limits();
  check(set.payload_bytes.max === 50 && set.messages_per_s.max === 100 && set.messages_per_s.policy === "reject", JSON.stringify(set));
  check((await send(10)) === 200 && (await send(100)) === 413, "they hold at once");

  // What is not touched stays as it is.
  await page.getByRole("button", { name: "Limits" }).click();
  check((await dialog.getByLabel("Bytes of one payload").inputValue()) === "50", "what is set is shown");
  await dialog.getByLabel("Bytes of one payload").fill("");
  await submit.click();
  await page.getByText("payload_bytes = 50").waitFor({ state: "detached" });
  const left = await limits();
  check(left.payload_bytes === undefined && left.messages_per_s.policy === "reject", JSON.stringify(left));
  check((await send(100)) === 200, "it is gone");

  // Of a key.
  await page.getByRole("navigation", { name: "Of this datasource" }).getByRole("link", { name: "Keys" }).click();
  await page.getByRole("button", { name: /^Limits of / }).click();
  check((await dialog.getByLabel("Bytes that are stored").count()) === 0, "only datasources have that");
  await dialog.getByLabel("Connections at once").fill("2");
  await submit.click();
  await page.getByText("connections = 2").waitFor();
  const { keys } = await (await ask("GET", "/v1/datasources/tank-7/keys")).json();
  check(keys[0].limits.connections.max === 2, JSON.stringify(keys[0].limits));
  check(errors.length === 0, errors.join("\n"));
  await browser.close();
});
