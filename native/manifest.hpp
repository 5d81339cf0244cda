/** The manifest of a bundle: all that a walk of a text classifier reads is checked here. */
#pragma once

#include <cmath>
#include <cstdint>
#include <map>
#include <set>
#include <string>
#include <vector>

#include "fields.hpp"

namespace offramp {

inline const Names TYPES{"float32", "float16", "int64", "int32", "int8", "uint8", "bool"};
inline const Names STEM_INPUTS{"input_ids", "attention_mask", "token_type_ids"};
inline const std::string NEXT = "next_";
constexpr std::uint64_t MOST_BYTES = (1ULL << 31) - 1;  // of a graph
using Forms = std::map<std::string, std::string>;       // dtype and shape of tensors by name

inline bool is_next(const std::string& name) { return name.rfind(NEXT, 0) == 0; }

inline Forms forms_of(const Json& tensors) {
  Forms forms;
  for (const auto& tensor : tensors) forms[tensor["name"]] = dump(tensor["dtype"]) + dump(tensor["shape"]);
  return forms;
}

/// The graphs of a variant in the order in which they run; the last one gives the signals.
inline std::vector<const Json*> graphs_of(const Json& variant) {
  std::vector<const Json*> graphs;
  if (variant.contains("before"))
    for (const auto& graph : variant["before"]) graphs.push_back(&graph);
  graphs.push_back(&variant);
  return graphs;
}

inline Names keys_of(const Json& object) {
  Names names;
  for (const auto& entry : object.items()) names.push_back(entry.key());
  return names;
}

/// Checks a manifest, all that a walk of a text classifier reads; raises Error, which names the field.
class ManifestCheck {
 public:
  explicit ManifestCheck(const Json& manifest) : all(manifest) {
    expect(all.is_object(), "manifest", "an object", all);
    // First, as other errors about an unknown format or task would mislead.
    if (all.value("format", Json()) != 1)
      throw Error("format: " + show(all.value("format", Json())) + "; this walker reads format 1");
    if (all.value("task", Json()) != "text-classification")
      throw Error("task: " + show(all.value("task", Json())) + "; this walker runs text-classification");
    check_keys("manifest", all,
               {"format", "task", "labels", "input", "hidden_size", "vocab_size", "blocks", "stem",
                "segments", "rule", "points", "files", "provenance"},
               {"costs", "decoder", "thresholds"});
    check_list("labels", all["labels"]);
    std::set<std::string> labels;
    for (const auto& label : all["labels"])
      expect(labels.insert(text_of("labels", label)).second, "labels", "each once", label);
    expect(labels.size() >= 2, "labels", "two or more", all["labels"]);
    check_keys("input", all["input"], {"tokenizer", "prefix", "pad_id", "longest"}, {});
    whole_of("input.longest", all["input"]["longest"], 1, 1 << 20);
    whole_of("vocab_size", all["vocab_size"], 1, 1 << 24);
    expect(all["files"].is_object(), "files", "an object", all["files"]);
    for (const auto& file : all["files"].items())
      check_file("files[" + show(file.key()) + "]", file.key(), file.value());
    check_listed("input.tokenizer", all["input"]["tokenizer"]);
    check_graphs();
    check_rule("rule", all["rule"]);
    expect(all["points"].is_array(), "points", "a list", all["points"]);
    std::set<std::string> points;
    for (const auto& point : all["points"]) {
      const auto where = "points[" + std::to_string(points.size()) + "]";
      check_keys(where, point, {"name", "rule", "variant", "data", "split", "measured"},
                 {"calibration", "guarantee", "exit_rows"});
      expect(points.insert(text_of(where + ".name", point["name"])).second, where, "a name of its own",
             point["name"]);
      check_rule(where + ".rule", point["rule"]);
      expect(has(variants, text_of(where + ".variant", point["variant"])), where + ".variant",
             "one of " + join(variants), point["variant"]);
    }
  }

 private:
  const Json& all;
  Names variants;
  Forms tensors;  // outputs of the stem

  void check_file(const std::string& where, const std::string& name, const Json& fact) {
    // A plain name, so that nothing in a manifest can point out of the folder.
    const auto bad = [](unsigned char c) { return c < 32 || c == 127 || c == '/' || c == '\\' || c == ':'; };
    const bool plain =
        !name.empty() && name != "." && name != ".." && std::none_of(name.begin(), name.end(), bad);
    expect(plain, where, "a plain file name", name);
    const std::string outside = ".onnx.data";
    const bool inside = name.size() < outside.size() || name.substr(name.size() - outside.size()) != outside;
    expect(inside, where, "graphs with their weights inside, as this walker reads them", name);
    check_keys(where, fact, {"sha256", "bytes"}, {});
    whole_of(where + ".bytes", fact["bytes"], 0, MOST_BYTES);
    const auto hex = text_of(where + ".sha256", fact["sha256"]);
    const bool right = hex.size() == 64 && hex.find_first_not_of("0123456789abcdef") == std::string::npos;
    expect(right, where + ".sha256", "64 lower-case hex digits", hex);
  }

  void check_listed(const std::string& where, const Json& name) {
    expect(all["files"].contains(text_of(where, name)), where, "a name listed in files", name);
  }

  void check_graphs() {
    check_segment("stem", all["stem"]);
    check_list("segments", all["segments"]);
    const auto blocks = whole_of("blocks", all["blocks"], 1, 10'000);
    std::int64_t block = 0;
    for (std::size_t number = 0; number < all["segments"].size(); number++) {
      const auto where = "segments[" + std::to_string(number) + "]";
      const Json& segment = all["segments"][number];
      check_segment(where, segment);
      check_list(where + ".blocks", segment["blocks"]);
      for (const auto& found : segment["blocks"])
        expect(found == ++block, "segments: their blocks", "1 to " + std::to_string(blocks) + " in order",
               found);
    }
    expect(block == blocks, "segments: their blocks", "1 to " + std::to_string(blocks) + " in order", block);
    variants = keys_of(all["segments"][0]["variants"]);
    expect(all["stem"]["variants"].contains(variants[0]), "stem.variants", "variant " + variants[0],
           keys_of(all["stem"]["variants"]));
    tensors = forms_of(all["stem"]["variants"][variants[0]]["outputs"]);
    for (const auto& tensor : tensors)
      expect(!is_next(tensor.first), "stem", "outputs that no segment replaces under that name",
             tensor.first);
    expect(tensors.count("hidden") == 1, "stem", "an output 'hidden'", tensors);
    for (const auto& graph : all["stem"]["variants"]) {
      expect(!graph.contains("before"), "stem", "no graphs before its own", graph);
      expect(forms_of(graph["outputs"]) == tensors, "stem", "the same outputs in all variants",
             graph["outputs"]);
      for (const auto& tensor : graph["inputs"])
        if (!has(STEM_INPUTS, tensor["name"]) || tensor["dtype"] != "int64")
          throw Error("stem: its input " + show(tensor["name"]) + ", " + show(tensor["dtype"]) +
                      ", cannot be made from token ids");
    }
    for (std::size_t number = 0; number < all["segments"].size(); number++) {
      const auto where = "segments[" + std::to_string(number) + "].variants";
      const Json& own = all["segments"][number]["variants"];
      expect(keys_of(own) == variants, where, join(variants) + ", in this order", keys_of(own));
      for (const auto& variant : own.items())
        check_flow(where + "[" + show(variant.key()) + "]", variant.value(),
                   number + 1 == all["segments"].size());
    }
  }

  void check_segment(const std::string& where, const Json& segment) {
    check_keys(where, segment, {"name", "blocks", "macs", "variants"}, {});
    text_of(where + ".name", segment["name"]);
    check_keys(where + ".macs", segment["macs"], {}, {"token", "pair", "row"});
    const Json& own = segment["variants"];
    expect(own.is_object() && !own.empty(), where + ".variants", "an object with variants", own);
    for (const auto& variant : own.items())
      check_variant(where + ".variants[" + show(variant.key()) + "]", variant.value(), true);
  }

  void check_variant(const std::string& where, const Json& variant, bool outer) {
    check_keys(where, variant, {"file", "inputs", "outputs"}, outer ? Names{"before"} : Names{});
    check_listed(where + ".file", variant["file"]);
    for (const std::string side : {"inputs", "outputs"}) {
      check_list(where + "." + side, variant[side]);
      for (const auto& tensor : variant[side]) {
        check_keys(where + "." + side, tensor, {"name", "dtype", "shape"}, {});
        const auto name = where + "." + side + ": " + text_of(where + "." + side + ": name", tensor["name"]);
        expect(has(TYPES, text_of(name + ": dtype", tensor["dtype"])), name + ": dtype",
               "one of " + join(TYPES), tensor["dtype"]);
        check_list(name + ": shape", tensor["shape"]);
        for (const auto& size : tensor["shape"])
          if (size != "batch" && size != "seq") whole_of(name + ": shape", size, 1, 1 << 24);
      }
      expect(forms_of(variant[side]).size() == variant[side].size(), where + "." + side, "each name once",
             variant[side]);
    }
    if (!variant.contains("before")) return;
    check_list(where + ".before", variant["before"]);
    for (const auto& graph : variant["before"]) check_variant(where + ".before", graph, false);
  }

  /// Check that a segment's graphs read outputs of the stem, and give signals and new values of them.
  void check_flow(const std::string& where, const Json& variant, bool last) {
    const Forms signals{{"logits", "\"float32\"[\"batch\"," + std::to_string(all["labels"].size()) + "]"},
                        {"gate", "\"float32\"[\"batch\"]"}};
    bool hidden = last, logits = false;
    const auto same = [](const Forms& known, const std::string& name, const std::string& form) {
      const auto found = known.find(name);
      return found != known.end() && found->second == form;
    };
    for (const Json* graph : graphs_of(variant)) {
      for (const auto& [name, form] : forms_of((*graph)["inputs"]))
        expect(same(tensors, name, form), where + ": input " + name, "an output of the stem", form);
      for (const auto& [name, form] : forms_of((*graph)["outputs"])) {
        if (is_next(name)) {
          expect(same(tensors, name.substr(NEXT.size()), form), where + ": output " + name,
                 "a tensor of the stem", form);
          hidden = hidden || name == NEXT + "hidden";
        } else if (graph != &variant || name != "forecast") {  // rule quee alone reads forecasts
          const bool right = graph == &variant && same(signals, name, form);
          expect(right, where + ": output " + name, "logits [batch, labels], gate [batch], or new values",
                 form);
          logits = logits || name == "logits";
        }
      }
    }
    expect(logits && hidden, where, "outputs logits and, but at the end, next_hidden",
           keys_of(forms_of(variant["outputs"])));
  }

  void check_rule(const std::string& where, const Json& rule) {
    check_keys(where, rule, {"name", "parameters"}, {"temperatures", "score_temperatures"});
    text_of(where + ".name", rule["name"]);
    expect(rule["parameters"].is_object(), where + ".parameters", "an object", rule["parameters"]);
    for (const auto& entry : rule["parameters"].items())
      expect(entry.value().is_number() && std::abs(entry.value().get<double>()) <= 3e38,
             where + ".parameters[" + show(entry.key()) + "]", "a number", entry.value());
    for (const std::string field : {"temperatures", "score_temperatures"}) {
      if (!rule.contains(field)) continue;
      const auto count = all["segments"].size();
      expect(rule[field].is_array() && rule[field].size() == count, where + "." + field,
             std::to_string(count) + " numbers, one a segment", rule[field]);
      for (const auto& value : rule[field])
        expect(value.is_number() && value.get<double>() > 0, where + "." + field, "numbers above 0", value);
    }
  }
};

}  // namespace offramp
