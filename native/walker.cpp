/**
 * Walks token ids from standard input through a bundle, and writes one JSON line for each line.
 *
 *     walk BUNDLE [options] < rows.jsonl > answers.jsonl
 *
 * README.md beside it says how it is built; walker.hpp is what an app includes.
 */
#include "walker.hpp"

#include <cmath>
#include <cstdint>
#include <exception>
#include <iostream>
#include <string>
#include <vector>

namespace {

using namespace offramp;

/// Read a row from a JSON line; raises BadInput.
Row parse_row(const std::string& line) {
  if (line.find_first_not_of(" \t\r") == std::string::npos) throw BadInput("empty line");
  try {
    const Json value = parse_json(line);
    expect(value.is_object(), "line", "an object with \"input_ids\"", value);
    Row row;
    for (const auto& entry : value.items()) {
      if (entry.key() != "input_ids" && entry.key() != "token_type_ids")
        throw BadInput("key " + show(entry.key()) +
                       ": a row has input_ids and, if the tokenizer gives it, token_type_ids");
      expect(entry.value().is_array(), entry.key(), "a list of whole numbers", entry.value());
      auto& numbers = entry.key() == "input_ids" ? row.ids : row.types;
      for (const auto& number : entry.value()) numbers.push_back(whole_of(entry.key(), number, 0, 1 << 24));
    }
    return row;
  } catch (const BadField& problem) {
    throw BadInput(problem.what());
  }
}

const char* const USAGE =
    "usage: walk BUNDLE [options] < rows.jsonl > answers.jsonl\n"
    "A row is {\"input_ids\": [...]}, with \"token_type_ids\" if the tokenizer gives them.\n"
    "  --point NAME        operating point of the bundle\n"
    "  --variant NAME      precision, such as int8; only without --point\n"
    "  --max-depth BLOCKS  most blocks that are run\n"
    "  --threads N         threads of ONNX Runtime; one a core if left out\n"
    "  --steps             add to each answer what every exit gave\n";

int whole_option(const std::string& name, const std::string& text) {
  const bool right =
      !text.empty() && text.size() < 7 && text.find_first_not_of("0123456789") == std::string::npos;
  if (!right || std::stoi(text) < 1) throw Error(name + " " + text + ": expected a whole number from 1");
  return std::stoi(text);
}

Json object_of(const Answer& answer, bool steps) {
  Json object{{"label", answer.label},
              {"score", std::round(answer.score * 1e6) / 1e6},
              {"exit", answer.exit},
              {"depth", answer.depth},
              {"ms", std::round(answer.ms * 1e3) / 1e3}};
  for (const auto& step : answer.steps) {
    if (!steps) break;
    Json gate;
    if (!std::isnan(step.gate)) gate = step.gate;
    object["steps"].push_back({{"logits", step.logits}, {"gate", gate}});
  }
  return object;
}

int command(const std::vector<std::string>& arguments) {
  Options options;
  std::string folder;
  bool steps = false;
  for (std::size_t place = 0; place < arguments.size(); place++) {
    const auto& name = arguments[place];
    if (name == "--help") {
      std::cout << USAGE;
      return 0;
    }
    if (name == "--steps") {
      steps = true;
    } else if (name == "--point" || name == "--variant" || name == "--max-depth" || name == "--threads") {
      if (++place == arguments.size()) throw Error(name + ": expected a value");
      const auto& value = arguments[place];
      if (name == "--point") options.point = value;
      if (name == "--variant") options.variant = value;
      if (name == "--max-depth") options.max_depth = whole_option(name, value);
      if (name == "--threads") options.threads = whole_option(name, value);
    } else if (name.rfind("--", 0) == 0 || !folder.empty()) {
      throw Error(name + ": not an option; see walk --help");
    } else {
      folder = name;
    }
  }
  if (folder.empty()) throw Error("name a bundle; see walk --help");
  const Bundle bundle(folder, options);
  bool failed = false;
  std::string line;
  for (int number = 1; std::getline(std::cin, line); number++) {
    Json object;
    try {
      object = object_of(bundle.walk(parse_row(line)), steps);
    } catch (const BadInput& problem) {
      object = {{"error", problem.what()}, {"line", number}};
      failed = true;
    }
    std::cout << dump(object) << '\n' << std::flush;
    if (!std::cout) {
      std::cerr << "walk: standard output: the answers cannot be written\n";
      return 1;
    }
  }
  return failed ? 1 : 0;
}

}  // namespace

/// Ends with 0: every line was answered, 1: some lines have errors, 2: bundle or options cannot be used.
int main(int count, char** arguments) {
  try {
    return command({arguments + 1, arguments + count});
  } catch (const std::exception& problem) {
    std::cerr << "walk: " << problem.what() << '\n';
    return 2;
  }
}
