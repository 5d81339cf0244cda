/** Files of a bundle, and their SHA-256. */
#pragma once

#include <array>
#include <cmath>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <string>

#include "fields.hpp"

namespace offramp {

namespace fs = std::filesystem;

/// SHA-256 (FIPS 180-4) as 64 hex digits.
inline std::string sha256(const std::string& data) {
  static const std::array<std::uint32_t, 64> constants = [] {
    std::array<std::uint32_t, 64> result{};  // of cube roots of the first 64 primes: 32 bits of the fraction
    for (std::uint32_t number = 2, count = 0; count < 64; number++) {
      bool prime = true;
      for (std::uint32_t divisor = 2; divisor * divisor <= number; divisor++)
        prime = prime && number % divisor;
      if (!prime) continue;
      const long double root = std::cbrt(static_cast<long double>(number));
      result[count++] = static_cast<std::uint32_t>((root - std::floor(root)) * 4294967296.0L);
    }
    return result;
  }();
  std::array<std::uint32_t, 8> state{0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                                     0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
  const auto turn = [](std::uint32_t word, int bits) { return word >> bits | word << (32 - bits); };
  const auto add = [&](const unsigned char* block) {
    std::array<std::uint32_t, 64> w;
    for (int i = 0; i < 16; i++)
      w[i] = std::uint32_t(block[4 * i]) << 24 | block[4 * i + 1] << 16 | block[4 * i + 2] << 8 |
             block[4 * i + 3];
    for (int i = 16; i < 64; i++)
      w[i] = w[i - 16] + (turn(w[i - 15], 7) ^ turn(w[i - 15], 18) ^ w[i - 15] >> 3) + w[i - 7] +
             (turn(w[i - 2], 17) ^ turn(w[i - 2], 19) ^ w[i - 2] >> 10);
    auto [a, b, c, d, e, f, g, h] = state;
    for (int i = 0; i < 64; i++) {
      const auto t1 =
          h + (turn(e, 6) ^ turn(e, 11) ^ turn(e, 25)) + ((e & f) ^ (~e & g)) + constants[i] + w[i];
      const auto t2 = (turn(a, 2) ^ turn(a, 13) ^ turn(a, 22)) + ((a & b) ^ (a & c) ^ (b & c));
      h = g, g = f, f = e, e = d + t1, d = c, c = b, b = a, a = t1 + t2;
    }
    const std::array<std::uint32_t, 8> added{a, b, c, d, e, f, g, h};
    for (int i = 0; i < 8; i++) state[i] += added[i];
  };
  const std::size_t whole = data.size() / 64 * 64;
  for (std::size_t at = 0; at < whole; at += 64) add(reinterpret_cast<const unsigned char*>(&data[at]));
  std::string tail = data.substr(whole) + '\x80';
  while (tail.size() % 64 != 56) tail += '\0';
  for (int shift = 56; shift >= 0; shift -= 8)
    tail += static_cast<char>(std::uint64_t(data.size()) * 8 >> shift);
  for (std::size_t at = 0; at < tail.size(); at += 64) add(reinterpret_cast<const unsigned char*>(&tail[at]));
  std::string hex;
  for (const auto word : state)
    for (int shift = 28; shift >= 0; shift -= 4) hex += "0123456789abcdef"[word >> shift & 15];
  return hex;
}

/// Read a regular file that is in the folder itself, of at most (exact: of exactly) so many bytes.
inline std::string read_file(const fs::path& folder, const std::string& name, std::uint64_t most,
                             bool exact) {
  const fs::path path = folder / name;
  std::error_code problem;
  const fs::path real = fs::canonical(path, problem);
  if (problem)
    throw Error(path.string() + ": cannot be found (" + problem.message() + "); copy the bundle again");
  if (real.parent_path() != fs::canonical(folder))
    throw Error(path.string() + ": a link out of the bundle; copy the file itself into the folder");
  if (!fs::is_regular_file(real)) throw Error(path.string() + ": not a regular file; write the bundle again");
  const auto size = fs::file_size(real);
  const auto found = path.string() + ": " + std::to_string(size) + " bytes, ";
  if (exact && size != most)
    throw Error(found + "the manifest has " + std::to_string(most) + "; copy or write the bundle again");
  if (size > most)
    throw Error(found + "and at most " + std::to_string(most) + " are read; write the bundle again");
  std::string data(size, '\0');
  std::ifstream stream(real, std::ios::binary);
  if (!stream.read(data.data(), static_cast<std::streamsize>(size)) || stream.peek() != EOF)
    throw Error(path.string() + ": cannot be read, or changed while it was read");
  return data;
}

}  // namespace offramp
