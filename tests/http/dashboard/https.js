// Over HTTPS, which a browser speaks as HTTP/2: everything comes on one connection, also what a stranger may ask for.
const [base, adminKey] = process.argv.slice(1);

run(async () => {
  const browser = await launch();
  const { page, errors, context } = await open(browser, base, { ignoreHTTPSErrors: true });
  for (let tries = 0; tries < 3; tries += 1) {
    await signIn(page, `hgk_wrong${tries}`);
    await page.getByText("This key is not valid here").waitFor();
  }
  check(errors.splice(0).every((error) => error.includes("401")), "only the refusals");
  await signIn(page, adminKey);
  await page.getByText("No datasource yet").waitFor();
  const [cookie] = await context.cookies();
  check(cookie.name === "__Host-headgate-session" && cookie.secure && cookie.httpOnly && cookie.sameSite === "Strict", JSON.stringify(cookie));
  const protocols = await page.evaluate(() => performance.getEntriesByType("resource").map((of) => of.nextHopProtocol));
  check(protocols.every((of) => of === "h2" || of === ""), protocols.join());
  for (let times = 0; times < 4; times += 1) {
    await page.reload();
    await page.getByText("No datasource yet").waitFor();
  }
  await page.getByRole("link", { name: "Health" }).click();
  await page.getByText("Messages are taken").waitFor();
  check(errors.length === 0, errors.join("\n"));
  await browser.close();
});
