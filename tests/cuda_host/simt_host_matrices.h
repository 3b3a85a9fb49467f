// Matrix instructions of simt.h, lane by lane as the PTX manual draws them (sections "ldmatrix", "movmatrix"
// and "Matrix Fragments for mma.m16n8k16"). Included by simt_host.h.
#pragma once

namespace engine::cuda {

inline void load_matrices(const void* row, uint32_t (&out)[4], bool is_transposed) {
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) simt::fault("a matrix row is misaligned");
  const unsigned char* rows = simt::exchange(kAllLanes, &row, sizeof(row));
  if (simt::lane_index() == 0) simt::note_matrix_rows(rows);
  const int of_row = simt::lane_index() / 4, pair = 2 * (simt::lane_index() % 4);
  for (int matrix = 0; matrix < 4; ++matrix) {
    uint32_t packed = 0;
    for (int i = 0; i < 2; ++i) {
      const int at_row = is_transposed ? pair + i : of_row, at_column = is_transposed ? of_row : pair + i;
      const auto* from = simt::of_lane<const uint16_t*>(rows, 8 * matrix + at_row);
      packed |= static_cast<uint32_t>(from[at_column]) << (16 * i);
    }
    out[matrix] = packed;
  }
  // What comes next may overwrite the rows: other lanes must have read theirs, as in one instruction.
  __syncwarp();
}
inline void load_matrices(const void* row, uint32_t (&out)[4]) { load_matrices(row, out, false); }
inline void load_matrices_transposed(const void* row, uint32_t (&out)[4]) { load_matrices(row, out, true); }

inline uint32_t transpose_matrix(uint32_t x) {
  const unsigned char* given = simt::exchange(kAllLanes, &x, sizeof(x));
  const int column = simt::lane_index() / 4, pair = 2 * (simt::lane_index() % 4);
  uint32_t out = 0;
  for (int i = 0; i < 2; ++i) {
    const uint32_t of_row = simt::of_lane<uint32_t>(given, 4 * (pair + i) + column / 2);
    out |= (of_row >> (16 * (column % 2)) & 0xffff) << (16 * i);
  }
  return out;
}

template <typename T>
void multiply_tiles(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  struct Fragments {
    uint32_t a[4], b[2];
  } mine;
  std::memcpy(mine.a, a, sizeof(mine.a));
  std::memcpy(mine.b, b, sizeof(mine.b));
  const unsigned char* given = simt::exchange(kAllLanes, &mine, sizeof(mine));
  const int row = simt::lane_index() / 4, pair = 2 * (simt::lane_index() % 4);
  for (int group = 0; group < 8; ++group) {  // pairs of k, in order
    const int holder = group % 4, upper = group / 4;
    const auto left = simt::of_lane<Fragments>(given, 4 * row + holder);
    for (int column = 0; column < 2; ++column) {
      const uint32_t right = simt::of_lane<Fragments>(given, 4 * (pair + column) + holder).b[upper];
      for (int half = 0; half < 2; ++half) {
        for (int i = 0; i < 2; ++i)
          c[2 * half + column] += half_of<T>(left.a[2 * upper + half], i) * half_of<T>(right, i);
      }
    }
  }
}

}  // namespace engine::cuda
