#include "cpu.h"
#include "thread_pool.h"

namespace anybit {

void embed_rows(const Planes& planes, const Affine& affine, const std::int64_t* ids, size_t tokens, float multiplier,
                float* out) {
  const EmbeddingTable& k = ANYBIT_ACTIVE(embedding_table);
  parallel_rows(tokens, 1, planes.bits * planes.columns, [&](size_t begin, size_t end) noexcept {
    for (size_t t = begin; t < end; ++t)
      k.embed_row(planes, affine, static_cast<size_t>(ids[t]), multiplier, out + t * planes.columns);
  });
}

}  // namespace anybit
