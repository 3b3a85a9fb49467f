// The one exception type of the native side. Expected outcomes are values, not exceptions.
#pragma once

#include <stdexcept>
#include <string>

namespace engine {

enum class ErrorCode {
  kInvalidArgument,  // the caller passed something wrong: the message names argument, expected, got
  kUnsupported,      // this build or this machine lacks something
  kStaleHandle,      // a handle outlived what it named
  kInternal,         // an invariant is broken: a bug of ours
};

class Error : public std::runtime_error {
 public:
  Error(ErrorCode code, const std::string& message) : std::runtime_error(message), code_(code) {}

  ErrorCode code() const { return code_; }

 private:
  ErrorCode code_;
};

}  // namespace engine
