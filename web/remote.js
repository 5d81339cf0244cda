/** A bundle that a server of ee-serve walks: the page asks for every step of one text, and no file is read here. */
import { BadInput, NotSupported } from "./errors.js";
import { readManifest } from "./manifest.js";
import { makeRule } from "./rules.js";
import { Settings } from "./settings.js";

const KEY = /^[\x21-\x7e]+$/; // what a header can carry

/**
 * Open the bundle of a server; model: its name there, null for the first.
 *
 * askForKey gives an API key, and is called until the server takes it; its argument is whether one was refused
 * before. The key stays in the memory of this page.
 */
export async function openRemote(model = null, askForKey = null) {
  const place = `manifest.json${model === null ? "" : `?model=${encodeURIComponent(model)}`}`;
  let key = null;
  let reply = await fetch(place);
  while (reply.status === 401 && askForKey !== null) {
    key = await askForKey(key !== null);
    if (KEY.test(key)) reply = await fetch(place, { headers: headersOf(key) });
  }
  if (!reply.ok) throw new NotSupported(await reasonOf(reply));
  return new RemoteBundle(readManifest(await reply.text(), "the server's bundle"), model, key);
}

/** Has the methods of Bundle in walker.js that the page uses. */
export class RemoteBundle extends Settings {
  #model;
  #key;

  /** key: an API key that is sent with every request; null for none. */
  constructor(manifest, model, key = null) {
    super(manifest);
    this.#model = model;
    this.#key = key;
  }

  /** Bytes that have to be read before a walk: none, the server has them. */
  bytesOf() {
    return 0;
  }

  /** See Bundle; there is nothing to prepare. */
  async prepare(variant = this.variants[0]) {
    this.checkVariant(variant);
  }

  /** See Bundle: options point, or rule never with a variant; and onStep and signal. */
  async walk(text, { onStep, signal, ...choice } = {}) {
    const { spec, variant } = this.setting(choice);
    const body = { input: text, model: this.#model };
    if (choice.point !== undefined) body.point = choice.point;
    else if (spec.name === "never") body.full_depth = variant;
    const reply = await fetch("../v1/walk", {
      method: "POST",
      headers: { "Content-Type": "application/json", ...headersOf(this.#key) },
      body: JSON.stringify(body),
      signal,
    });
    if (!reply.ok) throw new BadInput(await reasonOf(reply));
    const walked = await reply.json();
    const test = makeRule(spec, this.manifest)();
    const steps = [];
    for (const { segment, variant: ran, logits, gate, ms } of walked.steps) {
      const step = this.stepOf(segment - 1, ran, { logits, gate }, ms, spec, test);
      steps.push(step);
      await onStep?.(step);
      signal?.throwIfAborted();
    }
    const last = steps.at(-1);
    return {
      label: last.label,
      score: last.score,
      exit: last.segment,
      depth: steps.reduce((sum, step) => sum + step.blocks.length, 0),
      variant,
      tokens: walked.tokens,
      truncated: walked.truncated,
      ms: steps.reduce((sum, step) => sum + step.ms, 0),
      steps,
    };
  }
}

function headersOf(key) {
  return key === null ? {} : { Authorization: `Bearer ${key}` };
}

/** Why a server refused a request. */
async function reasonOf(reply) {
  try {
    return (await reply.json()).error.message;
  } catch {
    return `the server answers ${reply.status}`;
  }
}
