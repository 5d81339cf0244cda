/**
 * Opens a bundle of offramp and walks texts through its segments, by the manifest alone.
 *
 *   import { openBundle, urlSource } from "./walker.js";
 *   const bundle = await openBundle(urlSource("bundle/"));
 *   const answer = await bundle.walk("a stirring, funny film", { point: "default" });
 *   console.log(answer.label, answer.score, answer.exit);
 *
 * Runs in browsers and in Node 20. Bundles of task text-classification; docs/bundle-format.md describes them.
 */
import * as ort from "onnxruntime-web";

import { BadBundle, BadInput, NotSupported } from "./errors.js";
import { LONGEST_MANIFEST, MANIFEST, NEXT, graphsOf, readManifest, stemOf } from "./manifest.js";
import { RULE_NAMES, makeRule, softmax } from "./rules.js";
import { Settings } from "./settings.js";
import { sha256 } from "./sha256.js";
import { TextReader } from "./text.js";

export { BadBundle, BadInput, BadSetting, NotSupported, WalkerError } from "./errors.js";
export { folderSource, urlSource } from "./sources.js";
export { RULE_NAMES, softmax };

/**
 * Open a bundle: read its manifest and tokenizer, no graph yet.
 *
 * source: see sources.js. threads: of each graph; more than one needs a page that is isolated from others
 * (headers Cross-Origin-Opener-Policy and -Embedder-Policy). Raises BadBundle and NotSupported.
 */
export async function openBundle(source, { threads = 1 } = {}) {
  ort.env.wasm.numThreads = threads;
  const bytes = await source.read(MANIFEST, { limit: LONGEST_MANIFEST, fresh: true });
  let text;
  try {
    text = new TextDecoder("utf-8", { fatal: true }).decode(bytes);
  } catch {
    throw new BadBundle(`${source.place}: ${MANIFEST} is not UTF-8; write the bundle again`);
  }
  const bundle = new Bundle(source, readManifest(text, source.place));
  await bundle.openTokenizer();
  return bundle;
}

/** An opened bundle; openBundle() makes it. */
export class Bundle extends Settings {
  #source;
  #reader;
  #sessions = new Map(); // file -> promise of an opened graph
  #last = Promise.resolve(); // the walk before: one runs at a time

  constructor(source, manifest) {
    super(manifest);
    this.#source = source;
  }

  /** Read the tokenizer; openBundle() does it. */
  async openTokenizer() {
    const { tokenizer } = this.manifest.input;
    this.#reader = new TextReader(
      await this.#read(tokenizer),
      this.manifest.input,
      `${this.#source.place}: ${tokenizer}`,
    );
  }

  /** Bytes of the graphs of a variant that are not open yet. */
  bytesOf(variant) {
    return this.#files(variant)
      .filter((file) => !this.#sessions.has(file))
      .reduce((sum, file) => sum + this.manifest.files[file].bytes, 0);
  }

  /**
   * Open stem and segments of a variant, so that no walk has to.
   *
   * onBytes(count): called while files arrive. Raises BadBundle if a file differs from the manifest,
   * NotSupported if ONNX Runtime cannot open a graph.
   */
  async prepare(variant = this.variants[0], { onBytes } = {}) {
    this.checkVariant(variant);
    for (const file of this.#files(variant)) await this.#open(file, onBytes);
  }

  /**
   * Walk one text, or a pair, and return its answer.
   *
   * options: those of setting(), and textB; onStep(step): called, and awaited, after every segment; signal:
   * an AbortSignal that ends the walk between two segments. The answer has label, score (0..1), exit
   * (1-based), depth (blocks run), variant, tokens, truncated, stemMs, ms (stem and segments, without
   * tokenizing and onStep), and steps, one for each segment that was run: {segment (1-based), name, blocks,
   * variant, logits, gate, probabilities, label, score, ms, exits, reading}. Raises BadInput, BadSetting,
   * NotSupported.
   */
  walk(text, options = {}) {
    const result = this.#last.then(() => this.#walk(text, options));
    this.#last = result.catch(() => {});
    return result;
  }

  /** Free all graphs. */
  async close() {
    await this.#last;
    const opened = await Promise.allSettled(this.#sessions.values());
    this.#sessions.clear();
    for (const { value } of opened) await value?.release();
  }

  async #walk(text, { textB = null, onStep, signal, ...choice }) {
    signal?.throwIfAborted();
    const { spec, variant } = this.setting(choice);
    const test = makeRule(spec, this.manifest)();
    const row = this.#reader.read(text, textB);
    const stem = stemOf(this.manifest, variant);
    const tensors = new Map(); // the newest value of each tensor by name
    const inputs = new Map(stem.inputs.map((tensor) => [tensor.name, idsTensor(tensor, row)]));
    const stemMs = await this.#run(stem, inputs, tensors);
    const steps = [];
    let ms = stemMs;
    for (const [place, segment] of this.manifest.segments.entries()) {
      const step = await this.#step(place, segment, variant, tensors, spec, test);
      steps.push(step);
      ms += step.ms;
      await onStep?.(step);
      signal?.throwIfAborted();
      if (step.exits) break;
    }
    const last = steps.at(-1);
    if (Number.isNaN(last.score)) {
      throw new BadInput(`the network's output at exit ${last.segment} is not finite: it is no answer`);
    }
    return {
      label: last.label,
      score: last.score,
      exit: last.segment,
      depth: steps.reduce((sum, step) => sum + step.blocks.length, 0),
      variant,
      tokens: row.ids.length,
      truncated: row.truncated,
      stemMs,
      ms,
      steps,
    };
  }

  async #step(place, segment, variant, tensors, spec, test) {
    const signals = new Map();
    let ms = 0;
    for (const graph of graphsOf(segment.variants[variant])) {
      ms += await this.#run(graph, tensors, tensors, signals);
    }
    const logits = Array.from(signals.get("logits").data);
    const gate = signals.get("gate")?.data[0] ?? null;
    return this.stepOf(place, variant, { logits, gate }, ms, spec, test);
  }

  /** Run one graph: read its inputs, store new values and signals; returns milliseconds. */
  async #run(graph, inputs, values, signals = values) {
    const session = await this.#open(graph.file);
    const feeds = {};
    for (const { name } of graph.inputs) feeds[name] = inputs.get(name);
    const started = performance.now();
    let outputs;
    try {
      outputs = await session.run(feeds);
    } catch (problem) {
      throw new NotSupported(
        `${this.#source.place}: ${graph.file}: ONNX Runtime cannot run it here: ${problem.message}`,
      );
    }
    const ms = performance.now() - started;
    for (const { name } of graph.outputs) {
      if (name.startsWith(NEXT)) values.set(name.slice(NEXT.length), outputs[name]);
      else signals.set(name, outputs[name]);
    }
    return ms;
  }

  #files(variant) {
    const graphs = this.manifest.segments.flatMap((segment) => graphsOf(segment.variants[variant]));
    return [...new Set([stemOf(this.manifest, variant), ...graphs].map((graph) => graph.file))];
  }

  /** The session of a graph's file, which is opened once; after an error it may be tried again. */
  #open(file, onBytes) {
    if (!this.#sessions.has(file)) {
      const opening = this.#openNow(file, onBytes);
      this.#sessions.set(file, opening);
      opening.catch(() => this.#sessions.delete(file));
    }
    return this.#sessions.get(file);
  }

  async #openNow(file, onBytes) {
    const bytes = await this.#read(file, onBytes);
    const where = `${this.#source.place}: ${file}`;
    let session;
    try {
      session = await ort.InferenceSession.create(bytes, { executionProviders: ["wasm"] });
    } catch (problem) {
      throw new NotSupported(`${where}: ONNX Runtime cannot open it here: ${problem.message}`);
    }
    const graph = this.#graphs().find((entry) => entry.file === file);
    for (const [side, names] of [
      ["inputs", session.inputNames],
      ["outputs", session.outputNames],
    ]) {
      const expected = graph[side].map((tensor) => tensor.name);
      if (String([...names].sort()) !== String(expected.sort())) {
        throw new BadBundle(
          `${where}: its ${side} are ${names}, the manifest has ${expected}; write the bundle again`,
        );
      }
    }
    return session;
  }

  #graphs() {
    const segments = [this.manifest.stem, ...this.manifest.segments];
    return segments.flatMap((segment) => Object.values(segment.variants).flatMap(graphsOf));
  }

  /** Read a file and compare it with the manifest; a cache may hold that of an older bundle. */
  async #read(name, onBytes) {
    const fact = this.manifest.files[name];
    for (const fresh of [false, true]) {
      const bytes = await this.#source.read(name, {
        limit: fact.bytes,
        onBytes: fresh ? undefined : onBytes,
        fresh,
      });
      if (bytes.length === fact.bytes && (await sha256(bytes)) === fact.sha256) return bytes;
    }
    throw new BadBundle(
      `${this.#source.place}: ${name} is not the file that the manifest lists (size or sha256 differ); ` +
        "copy or write the bundle again",
    );
  }

}

/** An input of the stem for one row that is not padded, [1, tokens]. */
function idsTensor({ name, dtype }, row) {
  const numbers =
    name === "input_ids" ? row.ids : name === "token_type_ids" ? row.types : row.ids.map(() => 1);
  const data = dtype === "int64" ? BigInt64Array.from(numbers, BigInt) : Int32Array.from(numbers);
  return new ort.Tensor(dtype, data, [1, numbers.length]);
}
