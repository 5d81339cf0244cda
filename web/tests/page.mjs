/**
 * Use the page in headless Chromium, by keyboard as a person would, and report what it shows.
 *
 *     node tests/page.mjs CHROMIUM ADDRESS TEXT [FOLDER]
 *
 * Prints one JSON object. FOLDER: gets screenshots in light and dark, of a desktop and of a phone.
 */
import { join } from "node:path";

import { chromium } from "playwright-core";

const [executablePath, address, text, folder] = process.argv.slice(2);
const SIZES = { desktop: { width: 1100, height: 900 }, phone: { width: 360, height: 740 } };
const browser = await chromium.launch({ executablePath, args: ["--no-sandbox", "--disable-gpu"] });
const report = { errors: [], requests: [] };
try {
  for (const [size, viewport] of Object.entries(SIZES)) {
    for (const colorScheme of ["light", "dark"]) {
      const page = await browser.newPage({ viewport, colorScheme });
      page.on("pageerror", (problem) => report.errors.push(String(problem)));
      page.on("console", (message) => message.type() === "error" && report.errors.push(message.text()));
      page.on("request", (request) => report.requests.push(new URL(request.url()).host));
      await page.goto(address);
      if (size === "desktop" && colorScheme === "light") Object.assign(report, await use(page));
      else {
        await page.locator("#text").fill(text);
        await fullDepth(page);
      }
      report.overflow ??= {};
      report.overflow[size] = await page.evaluate(() => document.documentElement.scrollWidth > innerWidth);
      if (folder) await page.screenshot({ path: join(folder, `${size}-${colorScheme}.png`), fullPage: true });
      await page.close();
    }
  }
} finally {
  await browser.close();
}
report.requests = [...new Set(report.requests)].sort();
console.log(JSON.stringify(report));

/** Type a text, then move the slider by the keys alone; what the page shows after each. */
async function use(page) {
  await page.locator("#text:focus").waitFor({ timeout: 60_000 });
  await page.keyboard.type(text, { delay: 5 });
  const typed = await fullDepth(page);
  if (folder) await page.screenshot({ path: join(folder, "typed.png"), fullPage: true });
  await page.keyboard.press("Tab");
  const focused = await page.evaluate(() => document.activeElement.id);
  await page.keyboard.press("End");
  const deepest = await fullDepth(page, typed.point);
  await page.keyboard.press("Home");
  const shallowest = await fullDepth(page, deepest.point);
  return { typed, focused, deepest, shallowest };
}

/** Wait for the full depth of the text in the box at a point other than `before`, and read the page. */
async function fullDepth(page, before = null) {
  await page.waitForFunction(
    (name) =>
      document.getElementById("point-name").textContent !== name &&
      document.getElementById("saved").textContent !== "" &&
      !document.getElementById("answers").ariaBusy,
    before,
    { timeout: 60_000 },
  );
  return page.evaluate(() => {
    const read = (selector) => document.querySelector(selector).textContent.trim();
    return {
      point: read("#point-name"),
      promise: read("#promise"),
      label: read("#early .label"),
      detail: read("#early .detail"),
      full: read("#full .label"),
      saved: read("#saved"),
      segments: [...document.querySelectorAll(".segment")].map((item) => ({
        lit: item.classList.contains("ran"),
        exit: item.classList.contains("exit"),
        label: item.querySelector(".label").textContent,
        score: item.querySelector(".score").textContent,
        reading: item.querySelector(".reading").textContent,
      })),
    };
  });
}
