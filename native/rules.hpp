/** The rules that only exit, as docs/bundle-format.md has them; they compute in float32. */
#pragma once

#include <algorithm>
#include <cmath>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "fields.hpp"

namespace offramp {

/// What the exit of one segment gave; gate: P(exit), NaN without a policy.
struct Step {
  std::vector<float> logits;
  float gate;
};

inline std::vector<float> softmax(const std::vector<float>& logits, double temperature) {
  std::vector<float> powers;
  float sum = 0;
  const float top = *std::max_element(logits.begin(), logits.end()) / static_cast<float>(temperature);
  for (const float logit : logits)
    sum += powers.emplace_back(std::exp(logit / static_cast<float>(temperature) - top));
  for (float& power : powers) power /= sum;
  return powers;
}

/// Entropy of probabilities as a share (0..1) of its maximum.
inline float entropy_of(const std::vector<float>& probabilities) {
  float nats = 0;
  for (const float p : probabilities) nats -= p * std::log(std::max(p, 1e-30F));
  return nats / static_cast<float>(std::log(static_cast<double>(probabilities.size())));
}

inline int argmax(const std::vector<float>& values) {
  return static_cast<int>(std::max_element(values.begin(), values.end()) - values.begin());
}

/// What a rule remembers of a row: the label of the exit before (-1: none), and exits in a row that agreed.
struct Memory {
  int label = -1;
  int streak = 0;
};

/// A rule that only exits; docs/bundle-format.md has the formulas.
struct Rule {
  std::string name;
  float threshold = 0;
  int count = 0;  // patience, or the number of the exit
  std::vector<double> temperatures, score_temperatures;

  /// Whether a row exits after segment `number` (from 1), which is not the last one.
  bool exits(const Step& step, int number, Memory& memory) const {
    if (name == "gate") return step.gate > threshold;
    if (name == "fixed") return number >= count;
    if (name == "never") return false;
    if (name == "patience") {
      const int label = argmax(step.logits);
      memory.streak = label == memory.label ? memory.streak + 1 : 0;
      memory.label = label;
      return memory.streak >= count;
    }
    auto p = softmax(step.logits, temperatures.empty() ? 1 : temperatures[number - 1]);
    if (name == "max_probability") return *std::max_element(p.begin(), p.end()) >= threshold;
    if (name == "entropy") return entropy_of(p) <= threshold;
    if (name == "patience_confident") {
      memory.streak = entropy_of(p) < threshold ? memory.streak + 1 : 0;
      return memory.streak >= count;
    }
    std::partial_sort(p.begin(), p.begin() + 2, p.end(), std::greater<>());  // margin
    return p[0] - p[1] >= threshold;
  }
};

/// Names of the rules, and the parameters of each.
inline const std::map<std::string, Names>& rules() {
  static const std::map<std::string, Names> all{
      {"max_probability", {"threshold"}},
      {"margin", {"threshold"}},
      {"entropy", {"threshold"}},
      {"gate", {"threshold"}},
      {"patience", {"patience"}},
      {"patience_confident", {"threshold", "patience"}},
      {"fixed", {"exit"}},
      {"never", {}},
  };
  return all;
}

/// Make a rule from its spec; raises Error for one that this walker does not have.
inline Rule make_rule(const Json& spec, std::size_t segments) {
  Rule rule{spec["name"], 0, 0, spec.value("temperatures", std::vector<double>()),
            spec.value("score_temperatures", std::vector<double>())};
  const auto known = rules().find(rule.name);
  if (known == rules().end()) {
    Names names;
    for (const auto& entry : rules()) names.push_back(entry.first);
    throw Error("rule " + show(spec["name"]) + ": this walker does not have it; it has " + join(names));
  }
  const Json& parameters = spec["parameters"];
  for (const auto& entry : parameters.items())
    if (!has(known->second, entry.key()))
      throw Error("rule " + rule.name + ": this walker does not know its parameter " + show(entry.key()));
  for (const auto& name : known->second) {
    if (!parameters.contains(name))
      throw Error("rule " + rule.name + ": it needs " + name + "; choose an operating point");
    const double value = parameters[name];
    if (name == "threshold") {
      rule.threshold = static_cast<float>(value);
    } else if (value >= 1 && value <= 1e6 && value == std::floor(value)) {
      rule.count = static_cast<int>(value);
    } else {
      throw Error("rule " + rule.name + ": " + name + " " + show(value) + " must be a whole number from 1");
    }
  }
  if (rule.name == "fixed" && std::size_t(rule.count) > segments)
    throw Error("rule fixed: exit " + std::to_string(rule.count) + " does not exist; there are " +
                std::to_string(segments));
  return rule;
}

}  // namespace offramp
