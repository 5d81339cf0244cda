/** What a manifest says of settings, whoever walks: the base of the bundles of walker.js and remote.js. */
import { BadSetting } from "./errors.js";
import { variantsOf } from "./manifest.js";
import { RULE_NAMES, argmax, makeRule, softmax } from "./rules.js";

/** The settings of a bundle. */
export class Settings {
  constructor(manifest) {
    this.manifest = manifest;
  }

  /** Names of the variants, the default first. */
  get variants() {
    return variantsOf(this.manifest);
  }

  /** Operating points that this walker can run, in the order of the manifest. */
  get points() {
    return this.manifest.points.filter((point) => RULE_NAMES.includes(point.rule.name));
  }

  /**
   * Find the rule and the variant that options select: {spec, variant}.
   *
   * point: name of an operating point. rule: {name, parameters, ...}, instead of a point. Without both, the
   * bundle's own rule. variant: only without a point. Raises BadSetting.
   */
  setting({ point, rule, variant } = {}) {
    if (point !== undefined) {
      const found = this.manifest.points.find((entry) => entry.name === point);
      if (!found) {
        const names = this.manifest.points.map((entry) => entry.name).join(", ") || "none";
        throw new BadSetting(
          `operating point ${JSON.stringify(point)} is not in this bundle; it has: ${names}`,
        );
      }
      if (rule !== undefined || (variant !== undefined && variant !== found.variant)) {
        throw new BadSetting(`point ${point} sets rule and variant (${found.variant}); give no others`);
      }
      return { spec: found.rule, variant: found.variant };
    }
    const spec = rule ?? this.manifest.rule;
    if (variant !== undefined) this.checkVariant(variant);
    return { spec: { parameters: {}, ...spec }, variant: variant ?? this.#usualVariant(spec) };
  }

  /** Check that a setting can be walked here; raises NotSupported or BadSetting. */
  check(options) {
    makeRule(this.setting(options).spec, this.manifest);
  }

  /** The setting that runs every segment in a variant, with the temperatures that its point has. */
  fullDepth(variant = this.variants[0]) {
    this.checkVariant(variant);
    const point = this.manifest.points.find(
      (entry) => entry.rule.name === "never" && entry.variant === variant,
    );
    return { rule: point?.rule ?? { name: "never", parameters: {} }, variant };
  }

  /**
   * What an exit gave, as onStep of a walk gets it; signals: {logits, gate}, test: that of makeRule() or null
   * after the last segment.
   */
  stepOf(place, variant, signals, ms, spec, test) {
    const segment = this.manifest.segments[place];
    const { logits, gate } = signals;
    const isLast = place === this.manifest.segments.length - 1;
    const reading = isLast ? { exits: true } : test({ logits, gate }, place + 1);
    const probabilities = softmax(logits, spec.score_temperatures?.[place]);
    const best = argmax(probabilities);
    return {
      segment: place + 1,
      name: segment.name,
      blocks: segment.blocks,
      variant,
      logits,
      gate,
      probabilities,
      label: this.manifest.labels[best],
      score: logits.some(Number.isNaN) ? NaN : probabilities[best],
      ms,
      exits: reading.exits,
      reading: reading.what === undefined ? null : reading,
    };
  }

  /** Raise BadSetting for a variant that the bundle does not have. */
  checkVariant(variant) {
    if (!this.variants.includes(variant)) {
      throw new BadSetting(
        `variant ${JSON.stringify(variant)} is not in this bundle; it has: ${this.variants.join(", ")}`,
      );
    }
  }

  #usualVariant(spec) {
    const point = this.manifest.points.find(
      (entry) => entry.name === "default" && entry.rule.name === spec.name,
    );
    return point?.variant ?? this.variants[0];
  }
}
