import { BadBundle, NotSupported } from "./errors.js";

/** Name of the file that describes a bundle. */
export const MANIFEST = "manifest.json";
/** Most bytes of a manifest. */
export const LONGEST_MANIFEST = 16 * 2 ** 20;
/** An output with this prefix is the new value of a tensor that segments read. */
export const NEXT = "next_";
const FORMAT = 1;
const TASK = "text-classification";
const TEXT_INPUTS = ["input_ids", "attention_mask", "token_type_ids"];
const TYPES = ["float32", "float16", "int64", "int32", "int8", "uint8", "bool"];

// The keys of each object: those that must be there, and those that may be.
const KEYS = {
  manifest: [
    "format task labels input hidden_size vocab_size blocks stem segments rule points files provenance",
    "costs decoder thresholds",
  ],
  input: ["tokenizer prefix pad_id longest", ""],
  segment: ["name blocks macs variants", ""],
  macs: ["", "token pair row"],
  variant: ["file inputs outputs", "before"],
  tensor: ["name dtype shape", ""],
  rule: ["name parameters", "temperatures score_temperatures"],
  point: ["name rule variant data split measured", "calibration guarantee exit_rows"],
  file: ["sha256 bytes", ""],
};

/**
 * Read a manifest from JSON text and check all that a walk of a text classifier reads.
 *
 * place: what messages call the bundle. Raises BadBundle, which names the field, and NotSupported for
 * another format or task.
 */
export function readManifest(text, place) {
  const where = `${place}/${MANIFEST}`.replace(/\/\/manifest/, "/manifest");
  let manifest;
  try {
    manifest = JSON.parse(text);
  } catch (problem) {
    throw new BadBundle(`${where}: not valid JSON: ${problem.message}; write the bundle again`);
  }
  try {
    check(manifest);
  } catch (problem) {
    if (problem instanceof Problem)
      throw new BadBundle(`${where}: ${problem.message}; write the bundle again`);
    if (problem instanceof NotSupported) throw new NotSupported(`${where}: ${problem.message}`);
    throw problem;
  }
  return manifest;
}

/** The graphs of a variant in the order in which they run; the last one gives the signals. */
export function graphsOf(variant) {
  return [...(variant.before ?? []), variant];
}

/** The stem's graph for walks in a variant: its own, or that of the default variant. */
export function stemOf(manifest, variant) {
  const { variants } = manifest.stem;
  return own(variants, variant) ?? variants[variantsOf(manifest)[0]];
}

/** Names of the variants that every segment has, the default first. */
export function variantsOf(manifest) {
  return Object.keys(manifest.segments[0].variants);
}

/** The value of an object's own key, undefined if there is none: names come from files. */
export function own(object, key) {
  return Object.hasOwn(object, key) ? object[key] : undefined;
}

class Problem extends Error {}

function check(manifest) {
  expect(isObject(manifest), "manifest", "an object", manifest);
  // First, as other errors about an unknown format or task would mislead.
  if (manifest.format !== FORMAT) {
    throw new NotSupported(`format: ${show(manifest.format)}; this walker reads format ${FORMAT}`);
  }
  if (manifest.task !== TASK) {
    throw new NotSupported(`task: ${show(manifest.task)}; this walker runs ${TASK}`);
  }
  checkKeys("manifest", manifest, KEYS.manifest);
  checkList("labels", manifest.labels, isText);
  expect(manifest.labels.length >= 2, "labels", "two or more", manifest.labels);
  unique("labels", manifest.labels);
  checkInput(manifest);
  expect(
    Number.isInteger(manifest.blocks) && manifest.blocks > 0,
    "blocks",
    "a whole number from 1",
    manifest.blocks,
  );
  expect(isObject(manifest.files), "files", "an object", manifest.files);
  for (const [name, fact] of Object.entries(manifest.files)) checkFile(`files[${show(name)}]`, name, fact);
  listed("input.tokenizer", manifest.input.tokenizer, manifest);
  checkGraphs(manifest);
  checkRule("rule", manifest.rule, manifest);
  expect(Array.isArray(manifest.points), "points", "a list", manifest.points);
  manifest.points.forEach((point, number) => checkPoint(`points[${number}]`, point, manifest));
  unique(
    "points",
    manifest.points.map((point) => point.name),
  );
}

function checkInput(manifest) {
  checkKeys("input", manifest.input, KEYS.input);
  const { prefix, pad_id: padding, longest } = manifest.input;
  expect(isText(prefix), "input.prefix", "a string", prefix);
  expect(Number.isInteger(longest) && longest > 0, "input.longest", "a whole number from 1", longest);
  expect(Number.isInteger(padding) && padding >= 0, "input.pad_id", "a whole number from 0", padding);
}

function checkFile(where, name, fact) {
  // A plain name, so that nothing in a manifest can point out of the folder.
  expect(
    isText(name) && name !== "." && name !== ".." && /^[^/\\:\p{C}]+$/u.test(name),
    where,
    "a plain file name",
    name,
  );
  expect(!name.endsWith(".onnx.data"), where, "graphs with their weights inside, as this walker reads them", name);
  checkKeys(where, fact, KEYS.file);
  expect(
    Number.isSafeInteger(fact.bytes) && fact.bytes >= 0,
    `${where}.bytes`,
    "a whole number from 0",
    fact.bytes,
  );
  expect(/^[0-9a-f]{64}$/.test(fact.sha256), `${where}.sha256`, "64 lower-case hex digits", fact.sha256);
}

function checkGraphs(manifest) {
  checkSegment("stem", manifest.stem, manifest);
  checkList("segments", manifest.segments, isObject);
  expect(manifest.segments.length > 0, "segments", "at least one", manifest.segments);
  manifest.segments.forEach((segment, number) => checkSegment(`segments[${number}]`, segment, manifest));
  const variants = variantsOf(manifest);
  expect(
    own(manifest.stem.variants, variants[0]),
    "stem.variants",
    `variant ${variants[0]}`,
    Object.keys(manifest.stem.variants),
  );
  const blocks = manifest.segments.flatMap((segment) => segment.blocks);
  const expected = Array.from({ length: manifest.blocks }, (_, block) => block + 1);
  expect(
    String(blocks) === String(expected),
    "segments: their blocks",
    `1 to ${manifest.blocks} in order`,
    blocks,
  );
  const stem = manifest.stem.variants[variants[0]];
  for (const graph of Object.values(manifest.stem.variants)) {
    for (const tensor of graph.inputs) {
      if (!TEXT_INPUTS.includes(tensor.name)) {
        throw new NotSupported(`stem: its input ${show(tensor.name)} cannot be made from text`);
      }
      if (!["int64", "int32"].includes(tensor.dtype)) {
        throw new NotSupported(`stem: its input ${tensor.name} is ${tensor.dtype}, not int64 or int32`);
      }
    }
  }
  const known = new Map(stem.outputs.map((tensor) => [tensor.name, shapeOf(tensor)]));
  expect(known.has("hidden"), "stem", "an output 'hidden'", [...known.keys()]);
  manifest.segments.forEach((segment, number) => {
    const where = `segments[${number}]`;
    const names = Object.keys(segment.variants);
    expect(String(names) === String(variants), `${where}.variants`, `${variants}, in this order`, names);
    for (const [name, variant] of Object.entries(segment.variants)) {
      checkFlow(`${where}.variants[${show(name)}]`, variant, known, manifest.labels.length);
      const updates = graphsOf(variant).flatMap((graph) => graph.outputs.map((tensor) => tensor.name));
      if (number < manifest.segments.length - 1) {
        expect(updates.includes(`${NEXT}hidden`), where, `an output '${NEXT}hidden'`, updates);
      }
    }
  });
}

function checkSegment(where, segment, manifest) {
  checkKeys(where, segment, KEYS.segment);
  expect(isText(segment.name), `${where}.name`, "a string", segment.name);
  checkList(`${where}.blocks`, segment.blocks, Number.isInteger);
  checkKeys(`${where}.macs`, segment.macs, KEYS.macs);
  expect(
    isObject(segment.variants) && Object.keys(segment.variants).length > 0,
    `${where}.variants`,
    "an object with variants",
    segment.variants,
  );
  for (const [name, variant] of Object.entries(segment.variants)) {
    checkVariant(`${where}.variants[${show(name)}]`, variant, manifest);
  }
}

function checkVariant(where, variant, manifest) {
  checkKeys(where, variant, KEYS.variant);
  listed(`${where}.file`, variant.file, manifest);
  for (const side of ["inputs", "outputs"]) {
    checkList(`${where}.${side}`, variant[side], isObject);
    for (const tensor of variant[side]) {
      checkKeys(`${where}.${side}`, tensor, KEYS.tensor);
      expect(isText(tensor.name), `${where}.${side}: name`, "a string", tensor.name);
      expect(
        TYPES.includes(tensor.dtype),
        `${where}.${side}: dtype of ${tensor.name}`,
        `one of ${TYPES.join(", ")}`,
        tensor.dtype,
      );
      checkList(
        `${where}.${side}: shape of ${tensor.name}`,
        tensor.shape,
        (size) => ["batch", "seq"].includes(size) || (Number.isInteger(size) && size > 0),
      );
    }
    unique(
      `${where}.${side}`,
      variant[side].map((tensor) => tensor.name),
    );
  }
  (variant.before ?? []).forEach((graph, number) =>
    checkVariant(`${where}.before[${number}]`, graph, manifest),
  );
}

/** Check that a segment's graphs read outputs of the stem, and give signals and new values of them. */
function checkFlow(where, variant, known, labels) {
  const signals = new Map([
    ["logits", `float32 batch,${labels}`],
    ["gate", "float32 batch"],
  ]);
  for (const graph of graphsOf(variant)) {
    for (const tensor of graph.inputs) {
      expect(known.get(tensor.name) === shapeOf(tensor), where, "inputs that the stem gives", tensor);
    }
    for (const tensor of graph.outputs) {
      if (tensor.name.startsWith(NEXT)) {
        expect(
          known.get(tensor.name.slice(NEXT.length)) === shapeOf(tensor),
          where,
          "new values of tensors of the stem",
          tensor,
        );
      } else if (tensor.name === "forecast" && graph === variant) {
        continue; // read by rule quee alone, which this walker refuses
      } else {
        expect(
          graph === variant && signals.has(tensor.name),
          where,
          "outputs logits, gate, or new values",
          tensor,
        );
        const form = shapeOf(tensor);
        if (form !== signals.get(tensor.name)) {
          throw new NotSupported(
            `${where}: ${tensor.name} is ${form}; this walker reads ${signals.get(tensor.name)}`,
          );
        }
      }
    }
  }
  expect(
    variant.outputs.some((tensor) => tensor.name === "logits"),
    where,
    "an output 'logits'",
    variant.outputs,
  );
}

function checkRule(where, rule, manifest) {
  checkKeys(where, rule, KEYS.rule);
  expect(isText(rule.name), `${where}.name`, "a string", rule.name);
  expect(isObject(rule.parameters), `${where}.parameters`, "an object", rule.parameters);
  for (const [name, value] of Object.entries(rule.parameters)) {
    expect(Number.isFinite(value), `${where}.parameters[${show(name)}]`, "a number", value);
  }
  for (const field of ["temperatures", "score_temperatures"]) {
    if (rule[field] === undefined) continue;
    checkList(`${where}.${field}`, rule[field], (value) => Number.isFinite(value) && value > 0);
    const count = manifest.segments.length;
    expect(rule[field].length === count, `${where}.${field}`, `${count} numbers, one a segment`, rule[field]);
  }
}

function checkPoint(where, point, manifest) {
  checkKeys(where, point, KEYS.point);
  expect(isText(point.name), `${where}.name`, "a string", point.name);
  checkRule(`${where}.rule`, point.rule, manifest);
  expect(
    own(manifest.segments[0].variants, point.variant),
    `${where}.variant`,
    `one of ${variantsOf(manifest)}`,
    point.variant,
  );
  expect(isObject(point.measured), `${where}.measured`, "an object", point.measured);
  for (const [name, value] of Object.entries(point.measured)) {
    expect(Number.isFinite(value), `${where}.measured[${show(name)}]`, "a number", value);
  }
  if (point.guarantee !== undefined) {
    expect(isObject(point.guarantee), `${where}.guarantee`, "an object", point.guarantee);
    for (const field of ["limit", "confidence", "rows"]) {
      expect(
        Number.isFinite(point.guarantee[field]),
        `${where}.guarantee.${field}`,
        "a number",
        point.guarantee[field],
      );
    }
  }
}

/** Check the keys of an object: an unknown one could change the meaning of the others. */
function checkKeys(where, value, [needed, allowed]) {
  expect(isObject(value), where, "an object", value);
  const required = needed.split(" ").filter(Boolean);
  for (const key of required) {
    if (!Object.hasOwn(value, key)) throw new Problem(`${where}.${key}: missing`);
  }
  const known = [...required, ...allowed.split(" ")];
  for (const key of Object.keys(value)) {
    if (!known.includes(key)) throw new Problem(`${where}: ${show(key)} is not a key of format ${FORMAT}`);
  }
}

function checkList(where, value, test) {
  expect(Array.isArray(value) && value.every(test), where, "a list of valid values", value);
}

function listed(where, name, manifest) {
  expect(isText(name) && own(manifest.files, name) !== undefined, where, "a name listed in files", name);
}

function unique(where, names) {
  for (const [place, name] of names.entries()) {
    if (names.indexOf(name) !== place || name === "")
      throw new Problem(`${where}: ${show(name)} is there twice or empty`);
  }
}

function expect(right, where, expected, value) {
  if (!right) throw new Problem(`${where}: expected ${expected}, found ${show(value)}`);
}

function shapeOf(tensor) {
  return `${tensor.dtype} ${tensor.shape}`;
}

function isText(value) {
  return typeof value === "string";
}

function isObject(value) {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}

function show(value) {
  return (JSON.stringify(value) ?? "nothing").slice(0, 100);
}
