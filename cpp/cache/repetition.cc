#include "cache/repetition.h"

#include <algorithm>

namespace engine::cache {
namespace {

constexpr std::int64_t kBlock = 64;

// Whether one of the tokens of a block is `last` and comes behind `previous`. Without branches, for vectors.
bool may_end_here(const std::int32_t* tokens, std::int32_t previous, std::int32_t last) {
  std::uint32_t found = 0;
  for (std::int64_t i = 0; i < kBlock; ++i) {
    found |=
        static_cast<std::uint32_t>(tokens[i] == last) & static_cast<std::uint32_t>(tokens[i - 1] == previous);
  }
  return found != 0;
}

}  // namespace

Repetition find_repetition(std::span<const std::int32_t> tokens, std::int64_t num_wanted, std::int64_t most) {
  const auto num_tokens = static_cast<std::int64_t>(tokens.size());
  const std::int32_t* text = tokens.data();
  for (std::int64_t end = num_tokens - 1; end >= num_wanted;) {
    if (end > kBlock && !may_end_here(text + end - kBlock, text[num_tokens - 2], text[num_tokens - 1])) {
      end -= kBlock;
      continue;
    }
    for (const std::int64_t stop = std::max(end - kBlock, num_wanted - 1); end > stop; --end) {
      std::int64_t num_agreed = 0;
      while (num_agreed < std::min(end, most) &&
             text[end - 1 - num_agreed] == text[num_tokens - 1 - num_agreed]) {
        ++num_agreed;
      }
      if (num_agreed >= num_wanted) return {end, num_agreed};
    }
  }
  return {0, 0};
}

}  // namespace engine::cache
