import { Tokenizer } from "@huggingface/tokenizers";

import { BadBundle, BadInput, NotSupported } from "./errors.js";

// Characters for each token of the longest input that are kept before tokenizing.
const CHARACTERS_PER_TOKEN = 64;
// The part of the tokenizer for which the tokens of a text are numbers, not text. No tokenizer's text has it.
const MARK = "\u0000offramp ";

/** Turns texts, and pairs of texts, into token ids with a bundle's tokenizer. */
export class TextReader {
  /** data: the bytes of tokenizer.json. input: that of the manifest. place: what messages call the file. */
  constructor(data, input, place) {
    this.input = input;
    this.place = place;
    let facts;
    try {
      facts = JSON.parse(new TextDecoder("utf-8", { fatal: true }).decode(data));
      this.kind = facts.post_processor?.type;
      this.lowers = lowers(facts.normalizer);
      this.tokenizer = new Tokenizer(
        { ...facts, model: knownModel(facts.model), pre_tokenizer: unicodeWords(facts.pre_tokenizer) },
        {},
      );
    } catch (problem) {
      if (problem instanceof NotSupported) throw problem;
      throw new NotSupported(`${place}: the tokenizer cannot be used here: ${problem.message}`);
    }
  }

  /**
   * Convert a text, or a pair, to {ids, types, truncated}, cut to the longest input of the network.
   *
   * The prefix of the manifest stands before the first text. Raises BadInput for what is no text and for
   * texts without tokens.
   */
  read(text, textB = null) {
    const parts = textB === null ? [text] : [text, textB];
    for (const part of parts) {
      if (typeof part !== "string") throw new BadInput(`expected a string, found ${typeof part}`);
      if (/\p{Surrogate}/u.test(part)) throw new BadInput("half of a surrogate pair, not Unicode text");
    }
    const longest = CHARACTERS_PER_TOKEN * this.input.longest;
    const cuts = parts.map((part) => firstCharacters(part, longest));
    const encodings = cuts.map((cut, place) => this.#encode((place ? "" : this.input.prefix) + cut));
    const empty = encodings.map(() => 0);
    const space = Math.max(0, this.input.longest - this.#join(encodings, empty).ids.length);
    const lengths = shortened(
      encodings.map((ids) => ids.length),
      space,
    );
    const row = this.#join(encodings, lengths);
    if (!row.ids.length)
      throw new BadInput(`the tokenizer finds no token in ${JSON.stringify(text).slice(0, 60)}`);
    if (row.ids.some((id) => !Number.isInteger(id))) {
      throw new BadBundle(`${this.place}: it gives tokens without an id; write the bundle again`);
    }
    row.truncated =
      lengths.some((length, place) => length < encodings[place].length) ||
      cuts.some((cut, place) => cut !== parts[place]);
    return row;
  }

  /** The ids of a text without special tokens. */
  #encode(text) {
    // JavaScript's lower case of a sigma at the end of a word is another letter than elsewhere; the tokenizer
    // of the bundle lowers every character alone.
    const lowered = this.lowers ? text.replaceAll("\u03a3", "\u03c3") : text;
    return this.tokenizer.encode(lowered, { add_special_tokens: false }).ids;
  }

  /** The ids and types of a row: the first ids of each text, and the special tokens between them. */
  #join(encodings, lengths) {
    const named = lengths.map((length, place) => Array.from({ length }, (_, n) => `${MARK}${place} ${n}`));
    const { tokens, token_type_ids: types } = this.tokenizer.post_processor
      ? this.tokenizer.post_processor(named[0], named[1] ?? null, true)
      : { tokens: named.flat() };
    const ids = tokens.map((token) => {
      if (!token.startsWith(MARK)) return this.tokenizer.token_to_id(token);
      const [place, n] = token.slice(MARK.length).split(" ");
      return encodings[place][n];
    });
    if (types?.length === ids.length && this.kind !== "RobertaProcessing") return { ids, types };
    return { ids, types: this.#zeros(ids.length, encodings.length) };
  }

  /** Types of processors that state none; all of RoBERTa's are 0, also in pairs. */
  #zeros(count, texts) {
    if (texts > 1 && this.kind === "Sequence") {
      throw new NotSupported(`${this.place}: pairs with a sequence of post-processors`);
    }
    return new Array(count).fill(0);
  }
}

/**
 * A model that the library reads. It has no WordLevel, in which a word is one token or unknown. WordPiece
 * does the same if no part of a word but its beginning can be a token, and that is so if the prefix of later
 * parts is in no token.
 */
function knownModel(model) {
  if (["WordPiece", "BPE", "Unigram"].includes(model?.type)) return model;
  if (model?.type !== "WordLevel") throw new NotSupported(`tokenizer: model ${JSON.stringify(model?.type)}`);
  return {
    type: "WordPiece",
    vocab: model.vocab,
    unk_token: model.unk_token,
    continuing_subword_prefix: MARK,
    max_input_chars_per_word: 1000,
  };
}

/**
 * A pre-tokenizer with Whitespace written as the regular expression that it stands for: the library's own
 * takes only ASCII letters for parts of words, while those in expressions of the file are all of Unicode's.
 */
function unicodeWords(part) {
  if (part?.type === "Sequence") return { ...part, pretokenizers: part.pretokenizers.map(unicodeWords) };
  if (part?.type !== "Whitespace") return part;
  return { type: "Split", pattern: { Regex: "\\w+|[^\\w\\s]+" }, behavior: "Removed", invert: true };
}

/** Whether a normalizer makes letters lower case. */
function lowers(part) {
  if (part?.type === "Sequence") return part.normalizers.some(lowers);
  return part?.type === "Lowercase" || (part?.type === "BertNormalizer" && part.lowercase !== false);
}

/** How many tokens of each text are kept if together they have at most `space`: the longer is cut first. */
function shortened(lengths, space) {
  if (lengths.length === 1) return [Math.min(lengths[0], space)];
  const total = lengths[0] + lengths[1];
  if (total <= space) return lengths;
  const short = Math.min(...lengths);
  // Both are cut if even the shorter one is more than half; the first gets the smaller half then.
  const kept = Math.min(short, Math.floor(space / 2));
  const other = space - kept;
  return lengths[0] <= lengths[1] ? [kept, other] : [other, kept];
}

/** The first characters of a text, counted in code points. */
function firstCharacters(text, count) {
  if (text.length <= count) return text;
  let end = 0;
  let left = count;
  for (const character of text) {
    if (left === 0) return text.slice(0, end);
    end += character.length;
    left -= 1;
  }
  return text;
}
