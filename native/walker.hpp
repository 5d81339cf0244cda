/**
 * Walks rows of token ids through the segments of a bundle, by its manifest alone.
 *
 *     #include "walker.hpp"
 *     const offramp::Bundle bundle("bundle/");
 *     const offramp::Answer answer = bundle.walk({{101, 2307, 102}, {}});
 *
 * Runs bundles of task text-classification on ONNX Runtime's C API; docs/bundle-format.md describes them.
 */
#pragma once

#include <onnxruntime_c_api.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "fields.hpp"
#include "files.hpp"
#include "manifest.hpp"
#include "rules.hpp"

namespace offramp {

/// One row: token ids as the bundle's tokenizer gives them, and their types (empty: 0 for all).
struct Row {
  std::vector<std::int64_t> ids, types;
};
/// The answer to a row. exit: number of the segment that ran last, from 1. depth: blocks run. ms: from the
/// stem to the exit.
struct Answer {
  std::string label;
  double score;
  int exit;
  int depth;
  double ms;
  std::vector<Step> steps;
};
/// What a caller chooses. variant: only without a point. max_depth: most blocks that are run, 0: all.
/// threads: of ONNX Runtime, 0: one a core; the first bundle that a process opens decides it.
struct Options {
  std::string point, variant;
  int max_depth = 0;
  int threads = 0;
};

/// The version of the C API that is asked for, that of ONNX Runtime 1.14; later libraries have it, too.
constexpr std::uint32_t API = 14;
static_assert(ORT_API_VERSION >= API, "the headers of ONNX Runtime 1.14 or newer are needed");

template <typename T>
using Handle = std::unique_ptr<T, void (*)(T*)>;
using Value = Handle<OrtValue>;

inline const OrtApi& ort() {
  static const OrtApi* const api = OrtGetApiBase()->GetApi(API);
  if (api == nullptr)
    throw Error(std::string("ONNX Runtime ") + OrtGetApiBase()->GetVersionString() +
                ": 1.14 or newer is needed");
  return *api;
}

inline void check(OrtStatus* status, const std::string& where) {
  if (status == nullptr) return;
  const std::string message = ort().GetErrorMessage(status);
  ort().ReleaseStatus(status);
  throw Error(where + ": ONNX Runtime: " + message);
}

template <typename T, typename Create, typename... Arguments>
Handle<T> make(void (*release)(T*), const std::string& where, Create create, Arguments... arguments) {
  T* object = nullptr;
  check(create(arguments..., &object), where);
  return Handle<T>(object, release);
}

/// One environment, thread pool and arena for all graphs: a segment uses the memory that the one before
/// freed.
class Runtime {
 public:
  explicit Runtime(int threads) {
#ifndef _WIN32
    // ONNX Runtime from 1.29 on reads it when the environment is made, and starts a thread without it.
    setenv("ORT_DISABLE_TELEMETRY", "1", 0);
#endif
    const auto pool = make(ort().ReleaseThreadingOptions, "threads", ort().CreateThreadingOptions);
    check(ort().SetGlobalIntraOpNumThreads(pool.get(), threads), "threads");
    check(ort().SetGlobalInterOpNumThreads(pool.get(), 1), "threads");
    env = make(ort().ReleaseEnv, "environment", ort().CreateEnvWithGlobalThreadPools, ORT_LOGGING_LEVEL_FATAL,
               "offramp", pool.get());  // errors come as results, not as lines
    check(ort().DisableTelemetryEvents(env.get()), "environment");
    memory = make(ort().ReleaseMemoryInfo, "memory", ort().CreateCpuMemoryInfo, OrtArenaAllocator,
                  OrtMemTypeDefault);
    // It refuses if the process has an arena already, which is then used.
    if (auto* status = ort().CreateAndRegisterAllocator(env.get(), memory.get(), nullptr))
      ort().ReleaseStatus(status);
    options = make(ort().ReleaseSessionOptions, "options", ort().CreateSessionOptions);
    check(ort().DisablePerSessionThreads(options.get()), "options");
    check(ort().DisableMemPattern(options.get()), "options");  // it keeps memory for every length of a row
    check(ort().AddSessionConfigEntry(options.get(), "session.use_env_allocators", "1"), "options");
  }

  Handle<OrtEnv> env{nullptr, ort().ReleaseEnv};
  Handle<OrtMemoryInfo> memory{nullptr, ort().ReleaseMemoryInfo};
  Handle<OrtSessionOptions> options{nullptr, ort().ReleaseSessionOptions};
};

/// The numbers of a float32 tensor, which must be `count`.
inline std::vector<float> floats_of(const OrtValue* value, std::size_t count, const std::string& where) {
  const auto form = make(ort().ReleaseTensorTypeAndShapeInfo, where, ort().GetTensorTypeAndShape, value);
  std::size_t size = 0;
  ONNXTensorElementDataType kind = ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
  check(ort().GetTensorShapeElementCount(form.get(), &size), where);
  check(ort().GetTensorElementType(form.get(), &kind), where);
  if (kind != ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT || size != count)
    throw Error(where + ": expected " + std::to_string(count) +
                " numbers of float32; write the bundle again");
  void* data = nullptr;
  check(ort().GetTensorMutableData(const_cast<OrtValue*>(value), &data), where);
  return {static_cast<float*>(data), static_cast<float*>(data) + size};
}

/// An opened bundle. walk() may be called from several threads.
class Bundle {
 public:
  /// Open a bundle, and all graphs that its walks may run; raises Error.
  explicit Bundle(const fs::path& folder, const Options& options = {})
      : folder_(folder), runtime_(options.threads) {
    if (!fs::is_directory(folder_)) throw Error(folder_.string() + ": no such folder; name a bundle");
    read_manifest();
    choose(options);
    const Json& segments = manifest_["segments"];
    const Json& stems = manifest_["stem"]["variants"];
    stem_ = open(stems[stems.contains(variant_) ? variant_ : keys_of(segments[0]["variants"])[0]]);
    int depth = 0;
    for (const auto& segment : segments) {
      depth += static_cast<int>(segment["blocks"].size());
      if (options.max_depth > 0 && depth > options.max_depth) break;
      depths_.push_back(depth);
      auto& graphs = segments_.emplace_back();
      for (const Json* graph : graphs_of(segment["variants"][variant_])) graphs.push_back(open(*graph));
    }
    if (segments_.empty())
      throw Error("max depth " + std::to_string(options.max_depth) +
                  ": the first exit of this bundle is after " + std::to_string(depth) + " blocks");
  }

  /// Walk one row to its exit; raises BadInput for a row that cannot be answered.
  Answer walk(const Row& row) const {
    const auto started = std::chrono::steady_clock::now();
    auto tensors = begin(row);
    Answer answer{"", 0, 0, 0, 0, {}};
    Memory memory;
    for (std::size_t place = 0; place < segments_.size(); place++) {
      std::map<std::string, Value> signals;
      for (const auto& graph : segments_[place]) run(graph, tensors, tensors, signals);
      const auto& file = segments_[place].back().file;
      Step step{floats_of(signals.at("logits").get(), labels_.size(), file + ": logits"), NAN};
      if (const auto gate = signals.find("gate"); gate != signals.end())
        step.gate = floats_of(gate->second.get(), 1, file + ": gate")[0];
      answer.steps.push_back(std::move(step));
      if (place + 1 < segments_.size() &&
          rule_.exits(answer.steps.back(), static_cast<int>(place) + 1, memory))
        break;
    }
    answer.exit = static_cast<int>(answer.steps.size());
    answer.depth = depths_[answer.exit - 1];
    const auto& logits = answer.steps.back().logits;
    answer.label = labels_[argmax(logits)];
    const auto& scales = rule_.score_temperatures;
    answer.score = softmax(logits, scales.empty() ? 1 : scales[answer.exit - 1])[argmax(logits)];
    if (std::isnan(answer.score))
      throw BadInput("the network's output at exit " + std::to_string(answer.exit) +
                     " is not finite: it is no answer");
    answer.ms = std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - started).count();
    return answer;
  }

 private:
  struct Graph {
    std::string file;
    Names inputs, outputs;
    OrtSession* session;
  };

  fs::path folder_;
  Runtime runtime_;
  std::map<std::string, Handle<OrtSession>> sessions_;  // by file: several segments may run one
  Json manifest_;
  Names labels_;
  std::size_t longest_ = 0;
  std::int64_t vocabulary_ = 0;
  Rule rule_;
  std::string variant_;
  Graph stem_;
  std::vector<std::vector<Graph>> segments_;  // graphs of each, in the order in which they run
  std::vector<int> depths_;                   // blocks up to the end of each segment

  void read_manifest() {
    const auto where = (folder_ / "manifest.json").string();
    const auto text = read_file(folder_, "manifest.json", 16 << 20, false);
    try {
      manifest_ = parse_json(text);
      ManifestCheck check(manifest_);
    } catch (const BadField& problem) {
      throw Error(where + ": " + problem.what() + "; write the bundle again");
    } catch (const Error& problem) {
      throw Error(where + ": " + problem.what());
    }
    labels_ = manifest_["labels"].get<Names>();
    longest_ = manifest_["input"]["longest"];
    vocabulary_ = manifest_["vocab_size"];
  }

  /// Find the rule and the variant that the options select.
  void choose(const Options& options) {
    const Json* spec = &manifest_["rule"];
    const auto variants = keys_of(manifest_["segments"][0]["variants"]);
    const Json* point = nullptr;
    Names names;
    for (const auto& found : manifest_["points"]) {
      names.push_back(found["name"]);
      if (found["name"] == (options.point.empty() ? "default" : options.point)) point = &found;
    }
    if (!options.point.empty()) {
      if (point == nullptr)
        throw Error("operating point " + show(options.point) +
                    " is not in this bundle; it has: " + join(names));
      if (!options.variant.empty() && options.variant != (*point)["variant"])
        throw Error("point " + options.point + " sets the variant, " +
                    (*point)["variant"].get<std::string>() + "; give no other");
      spec = &(*point)["rule"];
    }
    if (!options.variant.empty() && !has(variants, options.variant))
      throw Error("variant " + show(options.variant) + " is not in this bundle; it has: " + join(variants));
    const bool follows = point != nullptr && (*point)["rule"]["name"] == (*spec)["name"];
    variant_ = !options.variant.empty() ? options.variant
               : follows                ? (*point)["variant"].get<std::string>()
                                        : variants[0];
    rule_ = make_rule(*spec, manifest_["segments"].size());
    for (std::size_t place = 0; rule_.name == "gate" && place + 1 < manifest_["segments"].size(); place++)
      if (const Json& own = manifest_["segments"][place]["variants"];
          forms_of(own.front()["outputs"]).count("gate") == 0)
        throw Error("rule gate: segment " + std::to_string(place + 1) +
                    " has no policy; choose another rule");
  }

  Graph open(const Json& graph) {
    Graph opened{graph["file"], {}, {}, nullptr};
    for (const auto& tensor : graph["inputs"]) opened.inputs.push_back(tensor["name"]);
    for (const auto& tensor : graph["outputs"]) opened.outputs.push_back(tensor["name"]);
    const auto where = (folder_ / opened.file).string();
    auto known = sessions_.find(opened.file);
    if (known == sessions_.end()) {
      const Json& fact = manifest_["files"][opened.file];
      const auto data = read_file(folder_, opened.file, fact["bytes"], true);
      if (const auto hash = sha256(data); hash != fact["sha256"])
        throw Error(where + ": sha256 " + hash + ", the manifest has " + fact["sha256"].get<std::string>() +
                    "; copy or write the bundle again");
      auto session = make(ort().ReleaseSession, where, ort().CreateSessionFromArray, runtime_.env.get(),
                          data.data(), data.size(), runtime_.options.get());
      known = sessions_.emplace(opened.file, std::move(session)).first;
    }
    opened.session = known->second.get();
    compare(where + ": its inputs", opened.session, ort().SessionGetInputCount, ort().SessionGetInputName,
            opened.inputs);
    compare(where + ": its outputs", opened.session, ort().SessionGetOutputCount, ort().SessionGetOutputName,
            opened.outputs);
    return opened;
  }

  template <typename Count, typename NameOf>
  static void compare(const std::string& where, OrtSession* session, Count count, NameOf name_of,
                      const Names& expected) {
    OrtAllocator* allocator = nullptr;
    check(ort().GetAllocatorWithDefaultOptions(&allocator), where);
    std::size_t size = 0;
    check(count(session, &size), where);
    Names names;
    for (std::size_t place = 0; place < size; place++) {
      char* name = nullptr;
      check(name_of(session, place, allocator, &name), where);
      names.emplace_back(name);
      check(ort().AllocatorFree(allocator, name), where);
    }
    if (std::set<std::string>(names.begin(), names.end()) !=
        std::set<std::string>(expected.begin(), expected.end()))
      throw Error(where + " are " + join(names) + ", the manifest has " + join(expected) +
                  "; write the bundle again");
  }

  /// Run the stem for a row that is not padded.
  std::map<std::string, Value> begin(const Row& row) const {
    const auto count = row.ids.size();
    if (count == 0 || count > longest_)
      throw BadInput(std::to_string(count) + " tokens; the bundle reads 1 to " + std::to_string(longest_) +
                     ": let the tokenizer truncate");
    for (const auto id : row.ids)
      if (id < 0 || id >= vocabulary_)
        throw BadInput("token id " + std::to_string(id) + " is not in the vocabulary of " +
                       std::to_string(vocabulary_));
    if (!row.types.empty() && row.types.size() != count)
      throw BadInput(std::to_string(count) + " token ids, but " + std::to_string(row.types.size()) +
                     " types");
    std::array<std::vector<std::int64_t>, 3> data{row.ids, std::vector<std::int64_t>(count, 1), row.types};
    data[2].resize(count);  // zeros, if there are no types
    const std::array<std::int64_t, 2> shape{1, static_cast<std::int64_t>(count)};
    std::map<std::string, Value> inputs, tensors, none;
    for (std::size_t number = 0; number < data.size(); number++)  // in the order of STEM_INPUTS
      inputs.emplace(STEM_INPUTS[number],
                     make(ort().ReleaseValue, "stem", ort().CreateTensorWithDataAsOrtValue,
                          runtime_.memory.get(), data[number].data(), count * sizeof(std::int64_t),
                          shape.data(), shape.size(), ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64));
    try {
      run(stem_, inputs, none, tensors);
    } catch (const Error& problem) {  // a type of token that the network does not have
      throw BadInput(std::string("the stem cannot read the row: ") + problem.what());
    }
    return tensors;
  }

  /// Run a graph: new values of tensors go to `values`, all other outputs to `signals`.
  static void run(const Graph& graph, const std::map<std::string, Value>& inputs,
                  std::map<std::string, Value>& values, std::map<std::string, Value>& signals) {
    std::vector<const OrtValue*> read;
    std::vector<OrtValue*> written(graph.outputs.size(), nullptr);  // allocated by ONNX Runtime
    std::vector<const char*> input_names, output_names;
    for (const auto& name : graph.inputs)
      read.push_back(inputs.at(name).get()), input_names.push_back(name.c_str());
    for (const auto& name : graph.outputs) output_names.push_back(name.c_str());
    check(ort().Run(graph.session, nullptr, input_names.data(), read.data(), read.size(), output_names.data(),
                    written.size(), written.data()),
          graph.file);
    for (std::size_t place = 0; place < written.size(); place++) {
      const auto& name = graph.outputs[place];
      auto& target = is_next(name) ? values : signals;
      target.insert_or_assign(is_next(name) ? name.substr(NEXT.size()) : name,
                              Value(written[place], ort().ReleaseValue));
    }
  }
};

}  // namespace offramp
