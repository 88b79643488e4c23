// The whole life of a datasource on the dashboard, with a real client on the other side.
const mqtt = require("mqtt");

const [base, adminKey, mqttUrl] = process.argv.slice(1);

function client(key, id) {
  const made = mqtt.connect(mqttUrl, { clientId: id, username: key, protocolVersion: 5, reconnectPeriod: 0 });
  made.on("error", () => {});
  return made;
}

const publish = (from, topic, payload) => new Promise((resolve, reject) => {
  from.publish(topic, payload, { qos: 1 }, (error) => (error ? reject(error) : resolve()));
});

run(async () => {
  const browser = await launch();
  const { page, errors, context } = await open(browser, base);

  // Signing in: a wrong key is said to be one for as long as it takes to read it.
  await page.getByLabel("API key").waitFor();
  await inspect(page, "signin");
  await signIn(page, "hgk_wrong");
  await page.getByText("This key is not valid here").waitFor();
  check(errors.splice(0).every((error) => error.includes("401") && error.includes("/v1/session")), "only the refusal");
  await signIn(page, adminKey);
  await page.getByText("No datasource yet").waitFor();
  await inspect(page, "empty");
  const [cookie] = await context.cookies();
  check(cookie.httpOnly && cookie.sameSite === "Strict" && !cookie.value.includes(adminKey), JSON.stringify(cookie));
  check(await page.evaluate(() => document.cookie === "" && localStorage.length === 0 && sessionStorage.length === 0), "a script has something of the session");

  // Created: the key is shown once.
  await page.getByRole("button", { name: "Create the first one" }).click();
  await page.getByLabel("Name").fill("Press <b>4</b>");
  await page.getByLabel("Id").fill("press-4");
  await inspect(page, "create");
  await page.getByRole("button", { name: "Create", exact: true }).click();
  const secret = await page.locator("#secret").textContent();
  check(/^hgk_[0-9A-Za-z]{49}$/.test(secret), secret);
  await inspect(page, "secret");
  await page.keyboard.press("Escape");
  check(await page.locator("#secret").isVisible(), "Escape loses the key");
  await page.getByText("I have stored the key").click();
  await page.getByRole("button", { name: "Done" }).click();
  await page.getByRole("heading", { name: "Press <b>4</b>" }).waitFor();
  check(!(await page.content()).includes(secret), "the key is still in the page");

  // A real client publishes, and it is there without a reload: also what looks like markup.
  const device = client(secret, "press-<i>4</i>");
  await until("the device to connect", () => device.connected);
  for (let i = 0; i < 20; i += 1) await publish(device, "spindle/temp", JSON.stringify({ value: 20 + i / 10, ok: true }));
  // Nothing that a device names or says makes the page wider than its window.
  await publish(device, `hall-b/${"machine-with-a-long-name/".repeat(6)}temp`, JSON.stringify({ value: 1, state: "x".repeat(300) }));
  const markup = "<img src=x onerror=alert(1)><script>alert(2)</script>";
  await publish(device, "<b>topic</b>", markup);
  await page.locator(".tail").getByText(markup).waitFor();
  await page.locator(".tail").getByText("spindle/temp").first().waitFor();
  await page.locator("table").getByText("21.9", { exact: true }).waitFor();
  check((await page.locator("main img, main script, main b, main i").count()) === 0, "data became markup");
  await page.locator(".u-over").waitFor();
  await inspect(page, "live");

  // Paused, nothing moves.
  await page.getByRole("button", { name: "Pause" }).click();
  await publish(device, "spindle/temp", '{"value": 99.25}');
  await page.getByText("Paused · 1 new").waitFor();
  check((await page.locator(".tail").getByText("99.25").count()) === 0, "shown although paused");
  await page.getByRole("button", { name: "Go on" }).click();
  await page.locator(".tail").getByText("99.25").waitFor();
  // Only what matches the filter.
  await page.getByLabel("Topic filter").fill("other/#");
  const filtered = page.waitForResponse((of) => of.url().includes("topic=other"));
  await page.getByLabel("Topic filter").press("Enter");
  check((await filtered).ok(), "the stream with the filter");
  await publish(device, "spindle/temp", '{"value": 55.5}');
  await publish(device, "other/thing", '{"value": 7}');
  await page.locator(".tail").getByText("other/thing").waitFor();
  check((await page.locator(".tail").getByText("55.5").count()) === 0, "shown although it does not match");
  await page.getByLabel("Topic filter").fill("");
  await page.getByLabel("Topic filter").press("Enter");

  // Over time.
  await page.getByRole("button", { name: "Chart of spindle/temp value" }).click();
  await page.getByText("spindle/temp value: lowest").waitFor();

  // The card.
  await page.getByRole("link", { name: "All datasources" }).click();
  await page.locator(".card").getByText("spindle/temp").first().waitFor();
  await page.getByText(/Last message/).waitFor();
  await inspect(page, "cards");
  await page.getByRole("link", { name: "Press <b>4</b>" }).click();

  // Keys: who uses it; rotated, undone, rotated again.
  await page.getByRole("link", { name: "Keys", exact: true }).last().click();
  await page.getByText("mqtt · press-<i>4</i> · 127.0.0.1").waitFor();
  await inspect(page, "keys");
  await page.getByRole("button", { name: /^Rotate/ }).click();
  await page.locator("dialog").getByRole("button", { name: "Rotate" }).click();
  const second = await page.locator("#secret").textContent();
  check(second !== secret, "a new one");
  await page.getByText("I have stored the key").click();
  await page.getByRole("button", { name: "Done" }).click();
  await page.getByText("retiring").waitFor();
  await inspect(page, "rotating");
  await page.getByRole("button", { name: /^Undo/ }).click();
  await page.locator("dialog").getByRole("button", { name: "Undo rotation" }).click();
  await page.getByText("The rotation is undone.").waitFor();
  await until("one key", async () => (await page.locator("tbody tr").count()) === 1);
  const late = client(second, "late");
  await new Promise((resolve) => late.once("close", resolve));
  check(device.connected, "the first key lives on");

  // A client is disconnected.
  await page.getByRole("link", { name: "Clients" }).click();
  await page.locator("td").getByText("press-<i>4</i>").waitFor();
  await inspect(page, "clients");
  const closed = new Promise((resolve) => device.once("disconnect", (packet) => resolve(packet.reasonCode)));
  await page.getByRole("button", { name: "Disconnect press-<i>4</i>" }).click();
  await page.locator("dialog").getByRole("button", { name: "Disconnect" }).click();
  check((await closed) === 0x98, "an administrative action");

  // A schema sends what fails into quarantine; without it, it is let in.
  await page.getByRole("link", { name: "Schema" }).click();
  await page.getByText("None: every payload is let in.").waitFor();
  await page.getByRole("button", { name: "Use it" }).waitFor();
  await inspect(page, "schema");
  await page.getByLabel("Schemas").fill('[{"filter": "spindle/#", "schema": {"type": "object", "properties": {"value": {"type": "number", "maximum": 100}}}}]');
  await page.getByRole("button", { name: "Set the schemas" }).click();
  await page.getByText("The schemas are set.").waitFor();
  const again = client(secret, "press-4");
  await until("the device to connect", () => again.connected);
  await publish(again, "spindle/temp", '{"value": 1000}').catch(() => {});
  await page.getByRole("link", { name: "Quarantine" }).click();
  await page.locator("pre").getByText('{"value":1000}').waitFor();
  await inspect(page, "quarantined");
  await page.getByRole("link", { name: "Schema" }).click();
  await page.getByText("version 1").waitFor();
  await page.getByLabel("Schemas").fill("[]");
  await page.getByRole("button", { name: "Set the schemas" }).click();
  await page.getByText("No schema is enforced any more.").waitFor();
  await page.getByRole("link", { name: "Quarantine" }).click();
  await page.getByLabel(/Choose the message/).check();
  await page.getByRole("button", { name: "Send chosen again" }).click();
  await page.getByText("1 message let in").waitFor();
  await page.getByText("Sent again: it is the record").waitFor();

  // The quarantine of what a key let in, with a preview; and the way back.
  await page.getByRole("link", { name: "Keys", exact: true }).last().click();
  await page.getByRole("button", { name: /^Quarantine what/ }).click();
  await page.locator(".preview").getByText("26 records").waitFor();
  await page.locator(".preview").getByText("spindle/temp").first().waitFor();
  await inspect(page, "preview");
  await page.locator("dialog").getByRole("button", { name: "Quarantine", exact: true }).click();
  await page.getByText(/are in quarantine/).waitFor();
  await page.getByRole("button", { name: /^Quarantine what/ }).click();
  await page.getByText("Nothing that is stored came in with it").waitFor();
  await page.getByRole("button", { name: "Give back" }).click();
  await page.getByText("Given back to readers").waitFor();

  // Revoked: the client drops, and its next try is among the refusals, with what to do about it.
  const dropped = new Promise((resolve) => again.once("close", resolve));
  await page.getByRole("button", { name: /^Revoke/ }).click();
  await page.locator("dialog").getByRole("button", { name: "Revoke" }).click();
  await dropped;
  await page.getByText("No key: nothing can be published").waitFor();
  const refused = client(secret, "press-<i>4</i>");
  await new Promise((resolve) => refused.once("close", resolve));
  await page.getByRole("link", { name: "Refusals" }).first().click();
  await page.getByRole("heading", { name: "revoked key" }).first().waitFor();
  await page.locator(".advice").first().waitFor();
  await inspect(page, "refusals");
  await page.getByRole("link", { name: "Audit" }).click();
  await page.getByText("key.revoked").first().waitFor();
  await inspect(page, "audit");
  await page.getByRole("link", { name: "Health" }).click();
  await page.getByText("Messages are taken").waitFor();
  await page.getByText("up to date").first().waitFor();
  await inspect(page, "health");
  await page.getByRole("link", { name: "Keys", exact: true }).click();
  await page.getByText("Keys for all datasources").waitFor();
  await inspect(page, "gateway-keys");

  // Deleted, once its id was typed.
  await page.goto(`${base}/#/datasources/press-4/settings`);
  await page.getByRole("button", { name: "Delete the datasource" }).click();
  const sure = page.locator("dialog").getByRole("button", { name: "Delete" });
  check(await sure.isDisabled(), "not before its id was typed");
  await page.getByLabel("Type press-4 to confirm").fill("press-5");
  check(await sure.isDisabled(), "not with another id");
  await page.getByLabel("Type press-4 to confirm").fill("press-4");
  await page.getByText("Also remove everything").click();
  await inspect(page, "delete");
  await sure.click();
  await page.getByText("press-4 is deleted").waitFor();
  await page.getByText("No datasource yet").waitFor();

  // By keyboard alone.
  await page.keyboard.press("Tab");
  check(await page.evaluate(() => document.activeElement !== document.body && getComputedStyle(document.activeElement).outlineStyle !== "none"), "focus is seen");

  // Signed out: nothing is left, and the cookie opens nothing.
  await page.getByRole("button", { name: "Sign out" }).click();
  await page.getByLabel("API key").waitFor();
  check((await context.cookies()).length === 0, "no cookie");
  check(errors.length === 0, errors.join("\n"));
  await browser.close();
});
