/**
 * The page: texts walk through a bundle while they are typed, and the full depth of the network follows.
 *
 * Address: ?bundle=FOLDER chooses the bundle (default bundle/), ?point=NAME the operating point, ?text=TEXT
 * what is in the box at first. ?server lets the server of the page walk (ee-serve), ?model=NAME names its bundle.
 */
import { WalkerError } from "./errors.js";

const TYPING = 120; // milliseconds without a key before a text is walked
const RESTING = 400; // and before its full depth is computed

const query = new URLSearchParams(location.search);
const isRemote = query.has("server");
const $ = (id) => document.getElementById(id);

let bundle; // the opened bundle
let settings = []; // those of the slider, from little depth to much
let shown = null; // {text, setting, answer, full}: what is on the page
let running = new AbortController(); // ends the walk that is no longer wanted

start().catch(showProblem);

/** A bundle whose graphs run in this page. */
async function openHere() {
  const { openBundle, urlSource } = await import("./walker.js");
  return openBundle(urlSource(query.get("bundle") ?? "bundle/"));
}

/** A bundle that the server walks; the libraries of vendor/ are not needed. */
async function openOnServer() {
  const { openRemote } = await import("./remote.js");
  return openRemote(query.get("model"), askForKey);
}

/** Show the field for an API key, and give what is typed; wasRefused: whether the server refused one before. */
function askForKey(wasRefused) {
  $("loading").hidden = true;
  $("sign-in").hidden = false;
  $("key-refused").hidden = !wasRefused;
  $("api-key").value = "";
  $("api-key").focus();
  return new Promise((resolve) => {
    const take = (event) => {
      event.preventDefault();
      $("sign-in").hidden = true;
      $("loading").hidden = false;
      resolve($("api-key").value.trim());
    };
    $("sign-in").addEventListener("submit", take, { once: true });
  });
}

async function start() {
  bundle = await (isRemote ? openOnServer() : openHere());
  if (isRemote) document.querySelector("h1").textContent = "Early exit, as you type";
  const { manifest } = bundle;
  const name = manifest.provenance?.backbone;
  document.title = `Early exit: ${manifest.labels.length} labels, ${manifest.blocks} blocks`;
  $("about").textContent =
    `A network of ${manifest.blocks} blocks${typeof name === "string" ? ` (${name})` : ""} in ` +
    `${manifest.segments.length} segments, each with an exit; it answers with one of ` +
    `${manifest.labels.length} labels. Each text runs only as many segments as it needs. ` +
    (isRemote ? "The server walks them." : "Nothing leaves this page.");
  const point = manifest.points.find((entry) => entry.name === (query.get("point") ?? "default"));
  makeVariants(point?.variant ?? bundle.setting().variant);
  makeSegments();
  await chooseVariant(chosenVariant(), point);
  $("text").value = query.get("text") ?? "";
  $("temperatures").hidden = !manifest.points.some(
    ({ rule }) => rule.temperatures || rule.score_temperatures,
  );
  for (const id of ["controls", "segments", "key"]) $(id).hidden = false;
  $("controls").addEventListener("submit", (event) => event.preventDefault());
  $("text").addEventListener("input", () => later(TYPING));
  $("point").addEventListener("input", () => {
    showSetting();
    later(0);
  });
  $("variants").addEventListener("change", () => {
    const before = settings[$("point").value]?.depth;
    chooseVariant(chosenVariant(), null, before)
      .then(() => later(0))
      .catch(showProblem);
  });
  $("text").focus();
  later(0);
}

/** One radio button for each variant; none is shown if there is no choice. */
function makeVariants(chosen) {
  for (const name of bundle.variants) {
    const label = document.createElement("label");
    const input = document.createElement("input");
    Object.assign(input, { type: "radio", name: "variant", value: name, checked: name === chosen });
    label.append(input, name);
    $("variants").append(label);
  }
  $("variants").hidden = bundle.variants.length < 2;
}

function chosenVariant() {
  return $("variants").querySelector("input:checked").value;
}

/** Open the graphs of a variant, and give the slider its points: the one named, or the nearest in depth. */
async function chooseVariant(variant, point = null, depth = null) {
  running.abort();
  const bytes = bundle.bytesOf(variant);
  let read = 0;
  $("loading").hidden = bytes === 0;
  $("progress").value = 0;
  const megabytes = (count) => (count / 1e6).toFixed(1);
  await bundle.prepare(variant, {
    onBytes(count) {
      read += count;
      $("progress").value = read / bytes;
      $("status").textContent =
        `Opening the graphs in ${variant}: ${megabytes(read)} of ${megabytes(bytes)} MB`;
    },
  });
  $("status").textContent = "The first walk …";
  // A graph's first run takes longer than all later ones.
  for (const text of ["a", "one more text of some words to begin with"]) {
    await bundle.walk(text, bundle.fullDepth(variant));
  }
  $("loading").hidden = true;
  if (chosenVariant() !== variant) return;
  settings = settingsOf(variant);
  const slider = $("point");
  slider.max = settings.length - 1;
  slider.disabled = settings.length < 2;
  let place = settings.findIndex((setting) => point && setting.names.includes(point.name));
  if (place < 0 && depth !== null) {
    const distances = settings.map((setting) => Math.abs(setting.depth - depth));
    place = distances.indexOf(Math.min(...distances));
  }
  if (place < 0)
    place = settings.findIndex((setting) => setting.names.some((name) => name.endsWith("default")));
  slider.value = Math.max(0, place);
  showSetting();
}

/** The points of a variant in order of their mean depth; points with the same rule and promise are one. */
function settingsOf(variant) {
  const found = new Map();
  for (const point of bundle.points.filter((entry) => entry.variant === variant)) {
    const key = JSON.stringify([point.rule, point.guarantee ?? null]);
    if (found.has(key)) found.get(key).names.push(point.name);
    else found.set(key, { names: [point.name], point, choice: { point: point.name }, depth: depthOf(point) });
  }
  const sorted = [...found.values()].sort((a, b) => a.depth - b.depth);
  if (!sorted.length) {
    const { choice, name } = ownRule(variant);
    sorted.push({ names: [name], point: null, choice, depth: bundle.manifest.blocks });
  }
  return sorted;
}

/** The bundle's own rule for a variant without points; all segments if this walker does not have the rule. */
function ownRule(variant) {
  const { rule } = bundle.manifest;
  try {
    bundle.check({ rule, variant });
    return { choice: { rule, variant }, name: `the bundle's rule, ${rule.name}` };
  } catch (problem) {
    if (!(problem instanceof WalkerError)) throw problem;
    return { choice: bundle.fullDepth(variant), name: "every segment" };
  }
}

/** Blocks that a row runs on average at a point, as it was measured. */
function depthOf(point) {
  if (point.measured.mean_exit !== undefined) return point.measured.mean_exit;
  return point.rule.name === "never" ? bundle.manifest.blocks : bundle.manifest.blocks / 2;
}

/** Show the name of the chosen point, and what it promises. */
function showSetting() {
  const { names, point } = settings[$("point").value];
  $("point-name").textContent = names.join(", ");
  $("point").setAttribute("aria-valuetext", names.join(", "));
  $("promise").textContent = point
    ? promiseOf(point)
    : "This bundle has no operating points in this precision.";
}

function promiseOf({ rule, measured, guarantee, data }) {
  const parts = [];
  if (guarantee) {
    const share = percent(guarantee.limit);
    const full = `full depth in ${bundle.variants[0]}`;
    const risks = {
      disagreement: `at most ${share} of texts get another answer than from ${full}`,
      error_increase: `at most ${share} of accuracy is lost against ${full}`,
    };
    const where = { class: " within each class", exit: " at each exit" }[guarantee.groups] ?? "";
    const what =
      risks[guarantee.risk] ?? `${String(guarantee.risk).replaceAll("_", " ")} is at most ${share}`;
    parts.push(
      `Guaranteed for texts drawn like its ${guarantee.rows} calibration rows: ${what}${where}, with ` +
        `confidence ${percent(guarantee.confidence)}.`,
    );
  }
  const { accuracy, agreement, mean_exit: depth, macs_saved: saved } = measured;
  const figures = [];
  if (accuracy !== undefined) figures.push(`accuracy ${accuracy.toFixed(1)} %`);
  if (agreement !== undefined) figures.push(`${agreement.toFixed(1)} % agree with full depth`);
  if (depth !== undefined) figures.push(`${depth.toFixed(1)} of ${bundle.manifest.blocks} blocks on average`);
  if (saved !== undefined) figures.push(`${saved.toFixed(0)} % of operations saved`);
  if (figures.length)
    parts.push(
      `Measured on ${data}: ${figures.join(", ")}.${guarantee ? "" : " No guarantee for other texts."}`,
    );
  const settings = Object.entries(rule.parameters).map(
    ([name, value]) => `${name} ${Number(value.toPrecision(3))}`,
  );
  parts.push(`Rule ${[rule.name, ...settings].join(", ")}.`);
  return parts.join(" ");
}

let timer;

/** Walk the text of the box after some milliseconds, unless something else is asked for before. */
function later(milliseconds) {
  clearTimeout(timer);
  running.abort();
  $("answers").setAttribute("aria-busy", "true");
  timer = setTimeout(() => answer().catch(showProblem), milliseconds);
}

async function answer() {
  const text = $("text").value;
  const { choice } = settings[$("point").value];
  running = new AbortController();
  const { signal } = running;
  $("problem").hidden = true;
  if (!text.trim()) {
    shown = null;
    showAnswers();
    clearSegments();
    $("answers").removeAttribute("aria-busy");
    return;
  }
  try {
    await walkBoth(text, choice, signal);
  } catch (problem) {
    if (!signal.aborted) throw problem;
  }
}

async function walkBoth(text, choice, signal) {
  let isFirst = true;
  const early = await bundle.walk(text, {
    ...choice,
    signal,
    async onStep(step) {
      if (isFirst) clearSegments();
      isFirst = false;
      showStep(step, true);
      await painted();
    },
  });
  shown = { answer: early, full: null };
  showAnswers();
  await pause(RESTING);
  signal.throwIfAborted();
  shown.full = await bundle.walk(text, {
    ...bundle.fullDepth(early.variant),
    signal,
    async onStep(step) {
      if (step.segment > early.exit) showStep(step, false);
      await painted(); // keys are read meanwhile
    },
  });
  showAnswers();
  $("answers").removeAttribute("aria-busy");
}

/** The rows of the column of segments, without values. */
function makeSegments() {
  const list = $("segments");
  for (const [place, segment] of bundle.manifest.segments.entries()) {
    const item = document.createElement("li");
    item.className = "segment";
    const blocks = segment.blocks;
    const span = blocks.length > 1 ? `blocks ${blocks[0]} to ${blocks.at(-1)}` : `block ${blocks[0]}`;
    item.append(part("span", "lamp"), part("span", "what"), part("div", "value"), part("span", "ms"));
    item.querySelector(".lamp").setAttribute("aria-hidden", "true");
    item.querySelector(".what").append(part("b", "", `Segment ${place + 1} `), span);
    const top = part("div", "top");
    top.append(part("span", "label"), part("span", "score"));
    const bar = part("div", "bar");
    bar.append(part("div", ""));
    item.querySelector(".value").append(top, bar, part("div", "reading"));
    list.append(item);
  }
  clearSegments();
}

function clearSegments() {
  for (const item of $("segments").children) {
    item.className = "segment";
    item.querySelector(".bar div").style.width = "0";
    for (const name of ["label", "score", "reading", "ms"]) item.querySelector(`.${name}`).textContent = "";
  }
}

/** Show what an exit gives; ran: whether the segment ran before the exit, or for full depth alone. */
function showStep(step, ran) {
  const item = $("segments").children[step.segment - 1];
  item.classList.toggle("ran", ran);
  item.classList.toggle("exit", ran && step.exits);
  item.querySelector(".label").textContent = step.label;
  item.querySelector(".score").textContent = percent(step.score, 1);
  item.querySelector(".bar div").style.width = `${100 * step.score}%`;
  item.querySelector(".ms").textContent = `${step.ms.toFixed(1)} ms`;
  item.querySelector(".reading").textContent = ran ? readingOf(step) : "saved";
}

/** What the rule read at an exit, and what it decided. */
function readingOf({ reading, exits, segment }) {
  const end = exits ? "exit" : "go on";
  if (reading) {
    const against = { "≥": "<", "≤": ">", ">": "≤" };
    const sign = reading.exits ? reading.sign : against[reading.sign];
    return `${reading.what} ${short(reading.value)} ${sign} ${short(reading.limit)}: ${end}`;
  }
  return segment === bundle.manifest.segments.length ? "the last exit" : end;
}

function showAnswers() {
  $("answers").hidden = shown === null;
  if (shown === null) return;
  const { answer: early, full } = shown;
  const { blocks } = bundle.manifest;
  const cut = early.truncated ? `, cut to ${early.tokens} tokens` : `, ${count(early.tokens, "token")}`;
  fill(
    $("early"),
    early,
    `exit ${early.exit}, ${early.depth} of ${count(blocks, "block")}, ${early.ms.toFixed(1)} ms${cut}`,
  );
  fill(
    $("full"),
    full,
    full ? `${count(blocks, "block")}, ${full.ms.toFixed(1)} ms, ${full.variant}` : "follows …",
  );
  const saved = $("saved");
  saved.replaceChildren();
  if (!full) return;
  const time = full.ms - early.ms;
  if (early.depth === blocks) {
    saved.append("The walk went to full depth, so nothing is saved. ");
  } else {
    saved.append(
      "The early exit saved ",
      part("strong", "", `${blocks - early.depth} of ${count(blocks, "block")}`),
    );
    if (isRemote) {
      saved.append(". Times of a server contain the wait for other rows, so they are not compared. ");
    } else if (time > 0) {
      saved.append(
        " and ",
        part("strong", "", `${time.toFixed(1)} ms (${percent(time / full.ms, 0)})`),
        ". ",
      );
    } else {
      saved.append(`, but took ${(-time).toFixed(1)} ms longer this time. `);
    }
  }
  saved.append(early.label === full.label ? "Both answers are the same." : "The answers differ.");
}

function fill(card, answer, detail) {
  card.querySelector(".label").textContent = answer ? `${answer.label} ${percent(answer.score, 1)}` : "…";
  card.querySelector(".detail").textContent = detail;
}

function showProblem(problem) {
  $("loading").hidden = true;
  $("answers").removeAttribute("aria-busy");
  $("problem").hidden = false;
  $("problem").textContent = problem instanceof WalkerError ? problem.message : `${problem}`;
  if (!(problem instanceof WalkerError)) console.error(problem);
}

function part(tag, name, text = "") {
  const element = document.createElement(tag);
  if (name) element.className = name;
  element.textContent = text;
  return element;
}

/** A share (0..1) in percent; digits: after the point, null for as few as tell small shares apart. */
function percent(share, digits = null) {
  const value = 100 * share;
  return `${digits === null ? Number(value.toPrecision(value < 3 ? 2 : 3)) : value.toFixed(digits)} %`;
}

function count(number, word) {
  return `${number} ${word}${number === 1 ? "" : "s"}`;
}

function short(value) {
  return Number.isInteger(value) ? String(value) : value.toFixed(3);
}

function pause(milliseconds) {
  return new Promise((resolve) => setTimeout(resolve, milliseconds));
}

/** Wait until the page is painted; a hidden page is not, so that a timer helps out. */
function painted() {
  return new Promise((resolve) => {
    const timeout = setTimeout(resolve, 50);
    requestAnimationFrame(() =>
      setTimeout(() => {
        clearTimeout(timeout);
        resolve();
      }),
    );
  });
}
