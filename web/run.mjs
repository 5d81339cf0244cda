/**
 * Walk texts through a bundle in Node, to compare answers with those of offramp.runtime.
 *
 *     node run.mjs BUNDLE < items.jsonl
 *
 * Each line of the input is an object: text, and if wanted text_b, point, variant, rule; each line of the
 * output is the answer to one, or {"error": kind, "message": ...}. See Bundle.walk.
 */
import { createInterface } from "node:readline";

import { WalkerError, folderSource, openBundle } from "./walker.js";

const [folder] = process.argv.slice(2);
if (folder === undefined) {
  console.error("usage: node run.mjs BUNDLE < items.jsonl");
  process.exit(2);
}

async function answer(bundle, line) {
  const { text, text_b: textB = null, ...choice } = JSON.parse(line);
  return bundle.walk(text, { textB, ...choice });
}

async function orError(work) {
  try {
    return await work();
  } catch (problem) {
    if (!(problem instanceof WalkerError)) throw problem;
    return { error: problem.name, message: problem.message };
  }
}

const bundle = await orError(() => openBundle(folderSource(folder)));
if (bundle.error) {
  console.error(`${bundle.error}: ${bundle.message}`);
  process.exit(2);
}
for await (const line of createInterface({ input: process.stdin })) {
  if (line.trim()) console.log(JSON.stringify(await orError(() => answer(bundle, line))));
}
await bundle.close();
