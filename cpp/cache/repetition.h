// Where the end of a text has stood before.
#pragma once

#include <cstdint>
#include <span>

namespace engine::cache {

struct Repetition {
  std::int64_t end;         // of the place; 0: there is none
  std::int64_t num_agreed;  // tokens before it that are the same as the text's last ones
};

// The last place before the end of the text, overlapping it perhaps, with the same `num_wanted` (2 or more)
// tokens as its end; at most `most` tokens are compared. Cost: one pass over the tokens from the end to that
// place.
Repetition find_repetition(std::span<const std::int32_t> tokens, std::int64_t num_wanted, std::int64_t most);

}  // namespace engine::cache
