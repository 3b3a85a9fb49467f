#include "binding/module.h"
#include "engine/error.h"

namespace engine::binding {
namespace {

namespace py = pybind11;

const char* slug_of(ErrorCode code) {
  switch (code) {
    case ErrorCode::kInvalidArgument: return "invalid_argument";
    case ErrorCode::kUnsupported: return "unsupported";
    case ErrorCode::kStaleHandle: return "stale_handle";
    case ErrorCode::kInternal: return "internal_error";
  }
  return "native_error";
}

}  // namespace

void bind_errors(py::module_&) {
  py::register_local_exception_translator([](std::exception_ptr pointer) {
    try {
      if (pointer) std::rethrow_exception(pointer);
    } catch (const Error& error) {
      const py::object type = py::module_::import("engine.errors").attr("NativeError");
      const py::object instance = type(error.what(), py::arg("slug") = slug_of(error.code()));
      PyErr_SetObject(type.ptr(), instance.ptr());
    }
  });
}

}  // namespace engine::binding
