#include "kernels/decode_attention.cuh"
#include "kernels/decode_attention_float.cuh"

#include "launch.h"
#include "launchers.h"

namespace engine::cuda {
namespace {

unsigned num_pieces(const DecodeArgs& args) {
  const int64_t group = args.H / args.cache.G, tiles = (group + kDecodeHeads - 1) / kDecodeHeads;
  const int64_t pieces = static_cast<int64_t>(args.R) * args.max_splits * args.cache.G * tiles;
  if (pieces > 0x40000000)
    throw Error(ErrorCode::kInvalidArgument, "decode_attention: too many rows for one launch");
  return static_cast<unsigned>(pieces);
}

template <auto kKernel, int kSharedBytes>
void launch_kernel(const DecodeArgs& args, void* stream) {
  const unsigned pieces = num_pieces(args);
  // Of this kernel on the device of this process, asked once.
  static const unsigned resident =
      static_cast<unsigned>(resident_blocks(kKernel, kDecodeThreads, static_cast<size_t>(kSharedBytes)));
  launch(kKernel, dim3(pieces < resident ? pieces : resident), dim3(kDecodeThreads),
         static_cast<size_t>(kSharedBytes), stream, args, pieces);
}

template <typename T, typename Multiplied, typename Element>
void launch_dim(const DecodeArgs& args, void* stream) {
  if (args.cache.D <= 64) {
    launch_kernel<decode_attention_kernel<T, Multiplied, Element, 64>, kDecodeShared<Element, 64>>(args,
                                                                                                   stream);
  } else if (args.cache.D <= 128) {
    launch_kernel<decode_attention_kernel<T, Multiplied, Element, 128>, kDecodeShared<Element, 128>>(args,
                                                                                                     stream);
  } else {
    launch_kernel<decode_attention_kernel<T, Multiplied, Element, 256>, kDecodeShared<Element, 256>>(args,
                                                                                                     stream);
  }
}

}  // namespace

void decode_attention(const DecodeArgs& args, void* stream) {
  if (args.R == 0 || args.H == 0) return;
  const bool is_float8 = args.cache.scales != nullptr;
  constexpr int kFloatShared = static_cast<int>(sizeof(WarpResults<kFloatD>));
  switch (args.format) {
    case Format::kFloat32:
      return is_float8 ? launch_kernel<decode_attention_float_kernel<Float8>, kFloatShared>(args, stream)
                       : launch_kernel<decode_attention_float_kernel<float>, kFloatShared>(args, stream);
    case Format::kBFloat16:
      return is_float8 ? launch_dim<BFloat16, BFloat16, Float8>(args, stream)
                       : launch_dim<BFloat16, BFloat16, BFloat16>(args, stream);
    // fp8 times a scale would leave the range of float16: those products are of bfloat16.
    case Format::kFloat16:
      return is_float8 ? launch_dim<Float16, BFloat16, Float8>(args, stream)
                       : launch_dim<Float16, Float16, Float16>(args, stream);
  }
}

}  // namespace engine::cuda
