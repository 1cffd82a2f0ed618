#include "cpu.h"
#include "thread_pool.h"

namespace anybit {

void pack_planes(const std::uint8_t* codes, std::uint8_t* planes, size_t bits, size_t rows, size_t columns) {
  const PlanesTable& k = ANYBIT_ACTIVE(planes_table);
  const Planes shape{nullptr, bits, rows, columns};
  parallel_rows(rows, 1, bits * columns, [&](size_t begin, size_t end) noexcept { k.pack_rows(codes, planes, shape, begin, end); });
}

void unpack_planes(const Planes& planes, std::uint8_t* codes) {
  const PlanesTable& k = ANYBIT_ACTIVE(planes_table);
  parallel_rows(planes.rows, 1, planes.bits * planes.columns,
                [&](size_t begin, size_t end) noexcept { k.unpack_rows(planes, codes, begin, end); });
}

}  // namespace anybit
