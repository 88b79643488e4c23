// A key that may only read, and one that manages a single datasource: what each is shown, and that it is out at once
// when its key ends. Told beside it: a gateway that goes away.
const [base, adminKey] = process.argv.slice(1);

const ask = async (method, path, body) => {
  const answer = await fetch(base + path, { method, headers: { authorization: `Bearer ${adminKey}`, "content-type": "application/json" }, body: body && JSON.stringify(body) });
  const text = await answer.text();
  if (!answer.ok) throw new Error(text);
  return text ? JSON.parse(text) : null;
};

run(async () => {
  const browser = await launch();
  const made = await ask("POST", "/v1/datasources", { name: "Tank 7", id: "tank-7" });
  await ask("POST", "/v1/datasources", { name: "Secret", id: "secret" });
  const { key } = await ask("POST", "/v1/datasources/tank-7/keys", { scopes: ["subscribe"], label: "wall display" });
  await fetch(`${base}/v1/ingest/tank-7/level`, { method: "POST", headers: { authorization: made.key.secret }, body: '{"state": {"level": 3.5, "unit": "m"}}' });

  // A key that only publishes is told which one is needed.
  const { page, errors } = await open(browser, base);
  await signIn(page, made.key.secret);
  await page.getByText("This key may only publish").waitFor();
  check(errors.splice(0).every((error) => error.includes("403")), "only the refusal");

  await signIn(page, key.secret);
  await page.getByRole("heading", { name: "Tank 7" }).waitFor();
  await page.locator(".card").getByText("3.5").waitFor();
  check((await page.getByText("Secret").count()) === 0, "another datasource is shown");
  for (const name of ["New datasource", "Audit", "Refusals", "Keys"]) {
    check((await page.getByText(name, { exact: true }).count()) === 0, `${name} is shown`);
  }
  await page.getByRole("link", { name: "Tank 7" }).click();
  await page.getByText("state.level", { exact: true }).waitFor();
  await page.getByRole("link", { name: "Schema" }).click();
  await page.getByText("None: every payload is let in.").waitFor();
  check((await page.getByLabel("Schemas").count()) === 0, "it may not set them");
  await page.getByRole("link", { name: "Quarantine" }).click();
  await page.getByText("Nothing is in quarantine").waitFor();
  await inspect(page, "reader");
  // What it is not shown it is not given either.
  await page.goto(`${base}/#/datasources/tank-7/keys`);
  await page.getByText("state.level", { exact: true }).waitFor();
  check(errors.length === 0, errors.join("\n"));

  // A reload keeps the session; a second tab has it as well.
  await page.reload();
  await page.getByText("state.level", { exact: true }).waitFor();
  await ask("DELETE", `/v1/datasources/tank-7/keys/${key.id}`);
  await page.getByText(/You are signed out: (your key was revoked or has expired|the session is over, or its key has ended)\./).waitFor();
  check(!(await page.content()).includes("state.level"), "what was shown is still there");
  check(errors.length === 0, errors.join("\n"));

  // An admin of one datasource manages that one.
  const { key: own } = await ask("POST", "/v1/datasources/tank-7/keys", { scopes: ["admin"] });
  await signIn(page, own.secret);
  await page.getByRole("button", { name: "New key" }).click();
  await page.getByLabel("Label").fill("backend");
  await page.getByText("Publish (ingest)").click();
  await page.getByText("Read (subscribe)").click();
  await page.locator("dialog").getByRole("button", { name: "Create" }).click();
  await page.locator("#secret").waitFor();
  await page.getByText("I have stored the key").click();
  await page.getByRole("button", { name: "Done" }).click();
  await page.getByText("backend", { exact: true }).waitFor();
  await page.getByRole("link", { name: "Refusals" }).click();
  await page.getByText(/Nothing was refused|missing scope/i).first().waitFor();
  check(errors.length === 0, errors.join("\n"));
  await browser.close();
});
