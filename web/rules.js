import { BadSetting, NotSupported } from "./errors.js";

/** Probabilities from logits, divided by a temperature first; arrays of the same length. */
export function softmax(logits, temperature = 1) {
  const scaled = Array.from(logits, (logit) => Math.fround(logit / temperature));
  const top = Math.max(...scaled);
  const powers = scaled.map((logit) => Math.exp(logit - top));
  const sum = powers.reduce((total, power) => total + power, 0);
  return powers.map((power) => Math.fround(power / sum));
}

/** Entropy of probabilities as a share (0..1) of its maximum, log(classes). */
export function normalisedEntropy(probabilities) {
  const nats = probabilities.reduce((sum, p) => sum - p * Math.log(Math.max(p, 1e-30)), 0);
  return Math.fround(nats / Math.log(probabilities.length));
}

/** Place of the largest number; the first of equal ones. */
export function argmax(values) {
  let best = 0;
  for (let place = 1; place < values.length; place++) if (values[place] > values[best]) best = place;
  return best;
}

/**
 * The rules that this walker has, each a function from its parameters to a new walk's test.
 *
 * needs: its parameters; those in `whole` are whole numbers from 1. reads: the signal that it reads. certain:
 * it reads probabilities, at the temperatures of its spec. test(parameters) gives a function that is called
 * after every segment but the last one with {logits, gate, probabilities, number}, number being that of the
 * exit (1-based), and returns {exits, what, value, sign, limit}: what the rule read, for people.
 */
const RULES = {
  max_probability: {
    needs: ["threshold"],
    certain: true,
    test:
      ({ threshold }) =>
      ({ probabilities }) =>
        reading("top probability", Math.max(...probabilities), "≥", threshold),
  },
  margin: {
    needs: ["threshold"],
    certain: true,
    test:
      ({ threshold }) =>
      ({ probabilities }) => {
        const [first, second] = [...probabilities].sort((a, b) => b - a);
        return reading("margin", Math.fround(first - second), "≥", threshold);
      },
  },
  entropy: {
    needs: ["threshold"],
    certain: true,
    test:
      ({ threshold }) =>
      ({ probabilities }) =>
        reading("entropy", normalisedEntropy(probabilities), "≤", threshold),
  },
  gate: {
    needs: ["threshold"],
    reads: "gate",
    test:
      ({ threshold }) =>
      ({ gate }) =>
        reading("gate", gate, ">", threshold),
  },
  patience: {
    needs: ["patience"],
    whole: ["patience"],
    test: ({ patience }) => {
      let before = -1; // the first exit agrees with no other
      let streak = 0;
      return ({ logits }) => {
        const label = argmax(logits);
        streak = label === before ? streak + 1 : 0;
        before = label;
        return reading("agreements in a row", streak, "≥", patience);
      };
    },
  },
  patience_confident: {
    needs: ["threshold", "patience"],
    whole: ["patience"],
    certain: true,
    test: ({ threshold, patience }) => {
      let streak = 0;
      return ({ probabilities }) => {
        streak = normalisedEntropy(probabilities) < threshold ? streak + 1 : 0;
        return reading("confident exits in a row", streak, "≥", patience);
      };
    },
  },
  fixed: {
    needs: ["exit"],
    whole: ["exit"],
    test:
      ({ exit }) =>
      ({ number }) =>
        reading("exit", number, "≥", exit),
  },
  never: { needs: [], test: () => () => ({ exits: false }) },
};

/** Names of the rules that this walker has. */
export const RULE_NAMES = Object.keys(RULES);

/**
 * Make a rule from its spec: a function that begins a walk and returns the test for it (see RULES).
 *
 * The test is called with {logits, gate} and the number of the exit, 1-based. Raises NotSupported for a rule
 * that this walker does not have, BadSetting for wrong parameters and for signals that the bundle lacks.
 */
export function makeRule(spec, manifest) {
  if (!Object.hasOwn(RULES, spec.name)) {
    throw new NotSupported(
      `rule ${JSON.stringify(spec.name)}: this walker does not have it; it has ${RULE_NAMES.join(", ")}`,
    );
  }
  const rule = RULES[spec.name];
  const parameters = checkedParameters(spec, rule, manifest);
  if (rule.reads === "gate") {
    const lacking = manifest.segments.slice(0, -1).find((segment) => !hasGate(segment));
    if (lacking) throw new BadSetting(`rule gate: ${lacking.name} has no policy; choose another rule`);
  }
  const temperatures = rule.certain ? spec.temperatures : undefined;
  return () => {
    const test = rule.test(parameters);
    return ({ logits, gate }, number) => {
      const probabilities = rule.certain ? softmax(logits, temperatures?.[number - 1]) : [];
      return test({ logits, gate, probabilities, number });
    };
  };
}

function checkedParameters(spec, rule, manifest) {
  for (const name of Object.keys(spec.parameters)) {
    if (!rule.needs.includes(name)) {
      throw new NotSupported(
        `rule ${spec.name}: this walker does not know its parameter ${JSON.stringify(name)}`,
      );
    }
  }
  const parameters = {};
  for (const name of rule.needs) {
    const value = spec.parameters[name];
    if (!Number.isFinite(value)) {
      throw new BadSetting(`rule ${spec.name}: it needs ${name}, a number; choose an operating point`);
    }
    if (rule.whole?.includes(name) && !(Number.isInteger(value) && value >= 1)) {
      throw new BadSetting(`rule ${spec.name}: ${name} ${value} must be a whole number from 1`);
    }
    parameters[name] = Math.fround(value); // signals are float32, too
  }
  if (spec.name === "fixed" && parameters.exit > manifest.segments.length) {
    throw new BadSetting(
      `rule fixed: exit ${parameters.exit} does not exist; there are ${manifest.segments.length}`,
    );
  }
  return parameters;
}

function hasGate(segment) {
  return Object.values(segment.variants)[0].outputs.some((tensor) => tensor.name === "gate");
}

function reading(what, value, sign, limit) {
  const exits = sign === "≥" ? value >= limit : sign === "≤" ? value <= limit : value > limit;
  return { exits, what, value, sign, limit };
}
