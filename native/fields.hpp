/** JSON as nlohmann's library reads it, with the checks of fields that the bundle format asks for. */
#pragma once

#include <algorithm>
#include <cstdint>
#include <nlohmann/json.hpp>
#include <set>
#include <stdexcept>
#include <string>
#include <vector>

namespace offramp {

using Json = nlohmann::ordered_json;  // in the order of the file: the first variant is the default
using Names = std::vector<std::string>;

/// The bundle, or a setting, cannot be used; the message names the file, field or option, and the cure.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};
/// A field of a manifest is wrong, or its JSON is.
struct BadField : Error {
  using Error::Error;
};
/// A row cannot be answered.
struct BadInput : Error {
  using Error::Error;
};

inline std::string dump(const Json& value) {
  return value.dump(-1, ' ', false, Json::error_handler_t::replace);
}

inline std::string show(const Json& value) { return dump(value).substr(0, 100); }

inline std::string join(const Names& names) {
  std::string text;
  for (const auto& name : names) text += (text.empty() ? "" : ", ") + name;
  return text.empty() ? "none" : text;
}

inline bool has(const Names& names, const std::string& name) {
  return std::find(names.begin(), names.end(), name) != names.end();
}

inline void expect(bool right, const std::string& where, const std::string& expected, const Json& value) {
  if (!right) throw BadField(where + ": expected " + expected + ", found " + show(value));
}

/// Parse JSON; raises BadField also for keys that are there twice and for values in values in values.
inline Json parse_json(const std::string& text) {
  std::vector<std::set<std::string>> keys;  // of the objects that are open
  try {
    return Json::parse(text, [&keys](int depth, Json::parse_event_t event, Json& value) {
      if (depth > 100) throw BadField("nested too deeply");
      if (event == Json::parse_event_t::object_start) keys.emplace_back();
      if (event == Json::parse_event_t::object_end) keys.pop_back();
      if (event == Json::parse_event_t::key) {
        if (!keys.back().insert(value.get<std::string>()).second)
          throw BadField("the key " + show(value) + " is there twice");
        if (keys.back().size() > 10'000) throw BadField("an object of more than 10000 keys");
      }
      return true;
    });
  } catch (const Json::parse_error& problem) {
    throw BadField("not JSON: error at byte " + std::to_string(problem.byte));
  } catch (const Json::exception& problem) {  // a number that is too large for any
    throw BadField(std::string("not JSON: ") + problem.what());
  }
}

/// Check the keys of an object: an unknown one could change the meaning of the others.
inline void check_keys(const std::string& where, const Json& value, const Names& needed,
                       const Names& allowed) {
  expect(value.is_object(), where, "an object", value);
  for (const auto& name : needed)
    if (!value.contains(name)) throw BadField(where + "." + name + ": missing");
  for (const auto& entry : value.items())
    if (!has(needed, entry.key()) && !has(allowed, entry.key()))
      throw BadField(where + ": " + show(entry.key()) + " is not a key of format 1");
}

inline std::string text_of(const std::string& where, const Json& value) {
  expect(value.is_string() && !value.get_ref<const std::string&>().empty(), where, "a text", value);
  return value.get<std::string>();
}

inline std::int64_t whole_of(const std::string& where, const Json& value, std::int64_t least,
                             std::int64_t most) {
  const bool right = value.is_number_unsigned() && value.get<std::uint64_t>() <= std::uint64_t(most);
  const auto range = std::to_string(least) + " to " + std::to_string(most);
  expect(right && value.get<std::int64_t>() >= least, where, "a whole number, " + range, value);
  return value.get<std::int64_t>();
}

inline void check_list(const std::string& where, const Json& value) {
  expect(value.is_array() && !value.empty(), where, "a list", value);
}

}  // namespace offramp
