/**
 * Copy the files of the libraries that the page loads into one folder, which can be served as it is.
 *
 *     npm ci && npm run vendor           writes vendor/ beside this file
 *     node vendor.mjs FOLDER             writes another folder
 *
 * The folder is written under another name first, so that it is never half there.
 */
import { copyFile, mkdir, rename, rm } from "node:fs/promises";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";

const here = dirname(fileURLToPath(import.meta.url));
const target = process.argv[2] ?? join(here, "vendor");
const FILES = {
  "ort.wasm.min.mjs": "onnxruntime-web/dist/ort.wasm.min.mjs",
  "ort-wasm-simd-threaded.mjs": "onnxruntime-web/dist/ort-wasm-simd-threaded.mjs",
  "ort-wasm-simd-threaded.wasm": "onnxruntime-web/dist/ort-wasm-simd-threaded.wasm",
  "tokenizers.min.mjs": "@huggingface/tokenizers/dist/tokenizers.min.mjs",
  "tokenizers.LICENSE": "@huggingface/tokenizers/LICENSE",
};

const partial = `${target}.writing`;
await rm(partial, { recursive: true, force: true });
await mkdir(partial, { recursive: true });
for (const [name, place] of Object.entries(FILES)) {
  try {
    await copyFile(join(here, "node_modules", place), join(partial, name));
  } catch (problem) {
    console.error(`${place}: cannot be copied (${problem.code}); run npm ci in ${here} first`);
    process.exit(2);
  }
}
await rm(target, { recursive: true, force: true });
await rename(partial, target);
