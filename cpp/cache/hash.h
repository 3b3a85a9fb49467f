// A keyed hash for tables whose keys are chosen by clients.
//
// Each 16 bytes are folded by one 64 by 64 to 128 bit multiplication whose operands are mixed with
// secret words, so that a client cannot prepare keys that collide. It decides only where a table
// looks first: every find compares the keys themselves.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <random>

namespace engine::cache {

struct HashKey {
  std::uint64_t first;
  std::uint64_t second;

  static HashKey random() {
    std::random_device device;
    const auto word = [&] { return (std::uint64_t{device()} << 32) | device(); };
    return {word(), word()};
  }
};

inline std::uint64_t fold(std::uint64_t a, std::uint64_t b) {
  __extension__ using uint128 = unsigned __int128;
  const uint128 product = uint128{a} * b;
  return static_cast<std::uint64_t>(product) ^ static_cast<std::uint64_t>(product >> 64);
}

inline std::uint64_t hash_bytes(const void* data, std::size_t num_bytes, const HashKey& key) {
  const auto* bytes = static_cast<const unsigned char*>(data);
  std::uint64_t state = key.first ^ num_bytes;
  for (; num_bytes >= 16; num_bytes -= 16, bytes += 16) {
    std::uint64_t words[2];
    std::memcpy(words, bytes, 16);
    state = fold(words[0] ^ state, words[1] ^ key.second);
  }
  if (num_bytes > 0) {
    std::uint64_t words[2] = {0, 0};
    std::memcpy(words, bytes, num_bytes);
    state = fold(words[0] ^ state, words[1] ^ key.second);
  }
  return state;
}

}  // namespace engine::cache
