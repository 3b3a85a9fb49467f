#include "cpu/lora_adapter.h"

#include <algorithm>
#include <string>
#include <utility>

#include "cpu/float_formats.h"
#include "engine/error.h"
#include "engine/tensor_spec.h"

namespace engine::cpu {
namespace {

constexpr int64_t kMaxFeatures = int64_t{1} << 24;
constexpr int64_t kMaxRank = 4096;
constexpr int64_t kLanes = 32;

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t round_up(int64_t a) { return divide_up(a, kLanes) * kLanes; }

void check_range(int64_t value, int64_t least, int64_t most, const char* name) {
  if (value < least || value > most) {
    throw Error(ErrorCode::kInvalidArgument, std::string(name) + ": expected " + std::to_string(least) +
                                                 " to " + std::to_string(most) + ", got " +
                                                 std::to_string(value));
  }
}

// Visits the elements of a contiguous-row matrix as floats.
template <typename Source, typename Store>
void visit_as(const TensorView& view, const Store& store) {
  for (int64_t row = 0; row < view.shape[0]; ++row) {
    const Source* source = view.as<const Source>() + row * view.strides[0];
    for (int64_t column = 0; column < view.shape[1]; ++column) store(row, column, to_float(source[column]));
  }
}

template <typename Store>
void visit(const TensorView& view, const Store& store) {
  switch (view.dtype) {
    case DType::kFloat32: return visit_as<float>(view, store);
    case DType::kFloat16: return visit_as<Fp16>(view, store);
    default: return visit_as<Bf16>(view, store);
  }
}

}  // namespace

std::vector<LoraAdapter::Place> LoraAdapter::places(std::vector<LoraSite> sites) {
  std::vector<Place> places;
  int64_t end = 0;
  for (LoraSite& site : sites) {
    check_range(site.in_features, 1, kMaxFeatures, "in_features");
    Place place{};
    int64_t next_column = 0;  // threads write the columns of different modules at the same time
    for (const LoraModule& module : site.modules) {
      check_range(module.rank, 1, kMaxRank, "rank");
      check_range(module.num_columns, 1, kMaxFeatures, "num_columns");
      check_range(module.first_column, next_column, kMaxFeatures, "first_column");
      next_column = module.first_column + module.num_columns;
      place.parts.push_back({module.first_column, module.num_columns, module.rank, place.rank, nullptr});
      place.scales.insert(place.scales.end(), static_cast<size_t>(module.rank), module.scale);
      place.rank += module.rank;
    }
    place.a_start = end;
    place.b_start =
        end + round_up((site.is_embedding ? site.in_features : round_up(site.in_features)) * place.rank);
    end = place.b_start;
    for (const LoraModule& module : site.modules) end += round_up(module.num_columns) * module.rank;
    place.is_packed.resize(site.modules.size());
    place.site = std::move(site);
    places.push_back(std::move(place));
  }
  return places;
}

int64_t LoraAdapter::num_elements(const std::vector<Place>& places) {
  int64_t end = 0;
  for (const Place& place : places) {
    end = place.b_start;
    for (const LoraModule& module : place.site.modules) end += round_up(module.num_columns) * module.rank;
  }
  return std::max<int64_t>(end, 1);
}

LoraAdapter::LoraAdapter(WeightFormat format, std::vector<LoraSite> sites)
    : format_(format),
      places_(places(std::move(sites))),
      buffer_(num_elements(places_) * (format == WeightFormat::kBFloat16 ? 2 : 4)) {
  for (Place& place : places_) {
    int64_t start = place.b_start;
    for (LoraPart& part : place.parts) {
      part.b = static_cast<const char*>(buffer_.data()) + start * (format == WeightFormat::kBFloat16 ? 2 : 4);
      start += round_up(part.num_columns) * part.rank;
      ++num_missing_;
    }
  }
}

template <typename Stored>
void LoraAdapter::pack_as(Place& place, const LoraPart& part, const TensorView& a, const TensorView& b) {
  Stored* start = static_cast<Stored*>(buffer_.data()) + place.a_start;
  const Stored* kind = nullptr;
  if (place.site.is_embedding) {
    visit(a, [&](int64_t rank, int64_t id, float value) {
      convert(value, start[id * place.rank + part.first_rank + rank]);
    });
  } else {
    const int64_t padded = round_up(place.site.in_features);
    visit(a, [&](int64_t rank, int64_t k, float value) {
      const int64_t row = part.first_rank + rank, panel = row / kLoraPanelRanks;
      const int64_t height = std::min(kLoraPanelRanks, place.rank - panel * kLoraPanelRanks);
      const int64_t block = panel * kLoraPanelRanks * padded + k / kLanes * kLanes * height;
      convert(value, start[block + row % kLoraPanelRanks * kLanes + stored_position(k % kLanes, kind)]);
    });
  }
  Stored* columns = static_cast<Stored*>(const_cast<void*>(part.b));
  visit(b, [&](int64_t column, int64_t rank, float value) {
    const int64_t panel = column / kLanes * kLanes * part.rank;
    convert(value, columns[panel + rank * kLanes + stored_position(column % kLanes, kind)]);
  });
}

void LoraAdapter::pack(int64_t site, int64_t module, const TensorView& a, const TensorView& b) {
  check_range(site, 0, num_sites() - 1, "site");
  Place& place = places_[static_cast<size_t>(site)];
  check_range(module, 0, static_cast<int64_t>(place.parts.size()) - 1, "module");
  const LoraPart& part = place.parts[static_cast<size_t>(module)];
  Dim rank("rank", part.rank), K("K", place.site.in_features), N("N", part.num_columns);
  const auto dtypes = {DType::kFloat32, DType::kBFloat16, DType::kFloat16};
  expect(a, "a", dtypes, {rank, K}, Layout::kRows);
  expect(b, "b", dtypes, {N, rank}, Layout::kRows);
  if (place.is_packed[static_cast<size_t>(module)]) {
    throw Error(ErrorCode::kInvalidArgument, "module: packed already");
  }
  if (format_ == WeightFormat::kBFloat16) {
    pack_as<Bf16>(place, part, a, b);
  } else {
    pack_as<float>(place, part, a, b);
  }
  place.is_packed[static_cast<size_t>(module)] = true;
  --num_missing_;
}

LoraGroup LoraAdapter::group(int64_t index) const {
  const Place& place = places_[static_cast<size_t>(index)];
  const int64_t bytes = format_ == WeightFormat::kBFloat16 ? 2 : 4;
  LoraGroup group{};
  group.a = static_cast<const char*>(buffer_.data()) + place.a_start * bytes;
  group.scales = place.scales.data();
  group.parts = place.parts.data();
  group.num_parts = static_cast<int64_t>(place.parts.size());
  group.rank = place.rank;
  group.format = format_;
  return group;
}

}  // namespace engine::cpu
