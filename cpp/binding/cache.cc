#include "binding/module.h"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <span>
#include <string>

#include "cache/block_allocator.h"
#include "cache/radix_tree.h"
#include "cache/repetition.h"
#include "engine/error.h"

// Keeps the interpreter lock: calls take microseconds, and the lock is what makes them safe.
namespace engine::binding {
namespace {

namespace py = pybind11;
using cache::BlockAllocator;
using cache::RadixTree;

// Borrows a numpy array. Strict, so that no call hides a copy or a conversion.
std::span<const std::int32_t> int32_span(const py::object& object, const char* argument) {
  using Array = py::array_t<std::int32_t, py::array::c_style>;
  if (Array::check_(object)) {
    const auto array = py::reinterpret_borrow<Array>(object);
    const auto address = reinterpret_cast<std::uintptr_t>(array.data());
    if (array.ndim() == 1 && address % alignof(std::int32_t) == 0) {
      return {array.data(), static_cast<std::size_t>(array.size())};
    }
  }
  const std::string got = py::isinstance<py::array>(object)
                              ? "dtype " + std::string(py::str(object.attr("dtype"))) + ", shape " +
                                    std::string(py::str(object.attr("shape"))) + ", strides " +
                                    std::string(py::str(object.attr("strides")))
                              : std::string(py::str(py::type::of(object).attr("__name__")));
  throw Error(ErrorCode::kInvalidArgument,
              std::string(argument) + ": expected a contiguous one-dimensional int32 numpy array, got " + got);
}

py::array_t<std::int32_t> to_numpy(const std::vector<std::int32_t>& values) {
  return py::array_t<std::int32_t>(static_cast<py::ssize_t>(values.size()), values.data());
}

void bind_block_allocator(py::module_& module) {
  py::class_<BlockAllocator>(module, "BlockAllocator")
      .def(py::init<std::int64_t>(), py::arg("num_blocks"))
      .def_property_readonly("num_blocks", &BlockAllocator::num_blocks)
      .def_property_readonly("num_free", &BlockAllocator::num_free)
      .def(
          "try_allocate",
          [](BlockAllocator& self, std::int64_t count) -> py::object {
            const auto block_ids = self.try_allocate(count);
            if (!block_ids) return py::none();
            return to_numpy(*block_ids);
          },
          py::arg("count"))
      .def(
          "retain",
          [](BlockAllocator& self, const py::object& block_ids) {
            self.retain(int32_span(block_ids, "block_ids"));
          },
          py::arg("block_ids"))
      .def(
          "release",
          [](BlockAllocator& self, const py::object& block_ids) {
            self.release(int32_span(block_ids, "block_ids"));
          },
          py::arg("block_ids"))
      .def("ref_count", &BlockAllocator::ref_count, py::arg("block_id"))
      .def("check", &BlockAllocator::check);
}

void bind_radix_tree(py::module_& module) {
  py::class_<RadixTree>(module, "RadixTree")
      .def(py::init<BlockAllocator&, std::int64_t, std::uint32_t>(), py::arg("allocator"),
           py::arg("block_size"), py::arg("hash_mask") = ~0u, py::keep_alive<1, 2>())
      .def(
          "match",
          [](RadixTree& self, std::string_view name_space, const py::object& token_ids) {
            const cache::Match match = self.match(name_space, int32_span(token_ids, "token_ids"));
            const auto num_tokens = static_cast<std::int64_t>(match.block_ids.size()) * self.block_size();
            return py::make_tuple(num_tokens, to_numpy(match.block_ids), match.node);
          },
          py::arg("namespace"), py::arg("token_ids"))
      .def(
          "match_length",
          [](const RadixTree& self, std::string_view name_space, const py::object& token_ids) {
            return self.match_length(name_space, int32_span(token_ids, "token_ids"));
          },
          py::arg("namespace"), py::arg("token_ids"))
      .def(
          "insert",
          [](RadixTree& self, std::string_view name_space, const py::object& token_ids,
             const py::object& block_ids, cache::NodeHandle held) {
            const cache::Insertion done = self.insert(name_space, int32_span(token_ids, "token_ids"),
                                                      int32_span(block_ids, "block_ids"), held);
            return py::make_tuple(done.node, to_numpy(done.block_ids), done.num_duplicates);
          },
          py::arg("namespace"), py::arg("token_ids"), py::arg("block_ids"), py::arg("held") = cache::kEmptyPath)
      .def("lock", &RadixTree::lock, py::arg("node"))
      .def("unlock", &RadixTree::unlock, py::arg("node"))
      .def("path_len", &RadixTree::path_len, py::arg("node"))
      .def("evict", &RadixTree::evict, py::arg("num_blocks"))
      .def("clear", &RadixTree::clear)
      .def_property_readonly("block_size", &RadixTree::block_size)
      .def_property_readonly("num_cached_blocks", &RadixTree::num_cached_blocks)
      .def_property_readonly("num_evictable_blocks", &RadixTree::num_evictable_blocks)
      .def_property_readonly("num_nodes", &RadixTree::num_nodes)
      .def_property_readonly("num_namespaces", &RadixTree::num_namespaces)
      .def_property_readonly("stats",
                             [](const RadixTree& self) {
                               const cache::TreeStats& stats = self.stats();
                               py::dict result;
                               result["num_lookups"] = stats.num_lookups;
                               result["num_hits"] = stats.num_hits;
                               result["num_inserted_blocks"] = stats.num_inserted_blocks;
                               result["num_duplicate_blocks"] = stats.num_duplicate_blocks;
                               result["num_evicted_blocks"] = stats.num_evicted_blocks;
                               return result;
                             })
      .def("check", &RadixTree::check);
}

}  // namespace

void bind_cache(py::module_& module) {
  bind_block_allocator(module);
  bind_radix_tree(module);
  module.def(
      "find_repetition",
      [](const py::object& token_ids, std::int64_t num_wanted, std::int64_t most) {
        const cache::Repetition found =
            cache::find_repetition(int32_span(token_ids, "token_ids"), num_wanted, most);
        return py::make_tuple(found.end, found.num_agreed);
      },
      py::arg("token_ids"), py::arg("num_wanted"), py::arg("most"));
}

}  // namespace engine::binding
