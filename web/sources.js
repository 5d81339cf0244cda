import { BadBundle } from "./errors.js";

/**
 * A file source reads the files of a bundle by name:
 *
 *   read(name, {limit, onBytes, fresh}) -> Promise<Uint8Array>
 *
 * limit: most bytes of the file. onBytes(count): called while bytes arrive. fresh: caches must not answer.
 * place: what messages call the bundle. Raises BadBundle for files that are missing or longer.
 */

/** The source of a bundle that a web server has; address: of its folder. */
export function urlSource(address, base = globalThis.document?.baseURI) {
  let folder;
  try {
    folder = new URL(address.endsWith("/") ? address : `${address}/`, base);
  } catch {
    throw new BadBundle(`${address}: not an address; give that of a bundle's folder, such as bundle/`);
  }
  return {
    place: folder.href,
    async read(name, { limit, onBytes, fresh = false }) {
      const url = new URL(encodeURIComponent(name), folder);
      let response;
      try {
        response = await fetch(url, { cache: fresh ? "reload" : "default" });
      } catch (problem) {
        throw new BadBundle(
          `${url}: cannot be read (${problem.message}); check the address, and for another server that it ` +
            "allows this page to read it (Access-Control-Allow-Origin)",
        );
      }
      if (!response.ok) {
        throw new BadBundle(
          `${url}: the server answers ${response.status}; copy the whole bundle there, or give its address`,
        );
      }
      const parts = [];
      let count = 0;
      const reader = response.body.getReader();
      try {
        for (let part = await reader.read(); !part.done; part = await reader.read()) {
          count += part.value.length;
          if (count > limit) throw tooLong(url, limit);
          parts.push(part.value);
          onBytes?.(part.value.length);
        }
      } catch (problem) {
        await reader.cancel().catch(() => {});
        if (problem instanceof BadBundle) throw problem;
        throw new BadBundle(`${url}: the connection ended (${problem.message}); open the page again`);
      }
      const bytes = new Uint8Array(count);
      let start = 0;
      for (const part of parts) {
        bytes.set(part, start);
        start += part.length;
      }
      return bytes;
    },
  };
}

/** The source of a bundle's folder on disk, in Node. */
export function folderSource(folder) {
  return {
    place: folder,
    async read(name, { limit, onBytes }) {
      const { readFile, stat } = await import("node:fs/promises");
      const { join } = await import("node:path");
      const path = join(folder, name);
      try {
        const { size } = await stat(path);
        if (size > limit) throw tooLong(path, limit);
        const bytes = new Uint8Array(await readFile(path));
        onBytes?.(bytes.length);
        return bytes;
      } catch (problem) {
        if (problem instanceof BadBundle) throw problem;
        throw new BadBundle(`${path}: cannot be read (${problem.message}); copy the whole bundle there`);
      }
    },
  };
}

function tooLong(where, limit) {
  return new BadBundle(`${where}: more than ${limit} bytes; copy or write the bundle again`);
}
