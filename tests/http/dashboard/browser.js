// What the tests of the dashboard share: a headless Chromium, a real MQTT client, and what no page may do: write an error
// to the console, be wider than its window, or have a finding of axe.
const fs = require("fs");
const { chromium } = require("playwright-core");

const AXE = fs.readFileSync(require.resolve("axe-core/axe.min.js"), "utf8");
const PROGRAMS = ["/usr/bin/chromium", "/usr/bin/chromium-browser", "/usr/bin/google-chrome"];
const PICTURES = process.env.HEADGATE_TEST_PICTURES;

async function launch() {
  const executablePath = PROGRAMS.find((path) => fs.existsSync(path));
  if (!executablePath) throw new Error("there is no Chromium (tests/run installs it)");
  return chromium.launch({ executablePath, args: ["--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"] });
}

// What is told of all of them if a test fails.
const opened = [];

// A page, and the errors that its console has had. `expected`: patterns of those that a step brings about.
async function open(browser, base, options = {}) {
  const context = await browser.newContext({ viewport: { width: 1280, height: 900 }, locale: "en-GB", timezoneId: "UTC", ...options });
  const page = await context.newPage();
  page.setDefaultTimeout(60000);
  const errors = [];
  page.on("console", (message) => {
    if (message.type() === "error") errors.push(`${message.text()} ${message.location().url}`);
  });
  page.on("pageerror", (error) => errors.push(String(error.stack ?? error)));
  page.on("dialog", (dialog) => {
    errors.push(`a dialog of the browser: ${dialog.message()}`);
    dialog.dismiss();
  });
  opened.push({ page, errors });
  await page.goto(base);
  return { context, page, errors };
}

async function signIn(page, key) {
  await page.getByLabel("API key").fill(key);
  await page.getByRole("button", { name: "Sign in" }).click();
}

// Looks at a page: wide and narrow, light and dark.
async function inspect(page, name) {
  const size = page.viewportSize();
  for (const [width, height] of [[1280, 900], [375, 800]]) {
    await page.setViewportSize({ width, height });
    for (const colorScheme of ["light", "dark"]) {
      await page.emulateMedia({ colorScheme, reducedMotion: "reduce" });
      const wide = await page.evaluate(() => [document.documentElement.scrollWidth, innerWidth]);
      if (wide[0] > wide[1]) {
        const who = await page.evaluate(() => [...document.querySelectorAll("body *")]
          .filter((of) => of.getBoundingClientRect().right > innerWidth + 1).slice(0, 5).map((of) => `${of.tagName}.${of.className}`));
        throw new Error(`${name} is ${wide[0]} wide in a window of ${wide[1]}: ${who}`);
      }
      if (PICTURES) await page.screenshot({ path: `${PICTURES}/${name}-${width}-${colorScheme}.png`, fullPage: true });
      // Each width in one of the two, each of the two in one width.
      if ((width === 375) !== (colorScheme === "dark")) continue;
      await page.evaluate(AXE);
      const { violations } = await page.evaluate(() => axe.run());
      if (violations.length) {
        const told = violations.map((of) => `${of.id}: ${of.help}\n${of.nodes.slice(0, 3).map((node) => `  ${node.html}\n  ${node.failureSummary}`).join("\n")}`);
        throw new Error(`axe, ${name} ${width} ${colorScheme}:\n${told.join("\n")}`);
      }
    }
  }
  await page.setViewportSize(size);
  await page.emulateMedia({ colorScheme: "light", reducedMotion: "no-preference" });
}

function check(is, words) {
  if (!is) throw new Error(words);
}

async function until(what, ready) {
  const deadline = Date.now() + 60000;
  for (;;) {
    const found = await ready();
    if (found) return found;
    if (Date.now() > deadline) throw new Error(`waited for: ${what}`);
    await new Promise((resolve) => setTimeout(resolve, 50));
  }
}

function run(test) {
  test().then(() => process.exit(0), async (error) => {
    console.error(error.stack ?? error);
    for (const { page, errors } of opened) {
      const shown = await page.evaluate(() => document.body.innerText).catch((gone) => String(gone));
      console.error(`a page had these errors:\n${errors.join("\n")}\nand shows:\n${shown}`);
    }
    process.exit(1);
  });
}
