#include <atomic>
#include <cstring>

#include "ops.h"

namespace lingbot::cpu {

#define DECLARE(op, Params) Status op(const Params&, int threads);
namespace generic {
LINGBOT_CPU_OPS(DECLARE)
}
#if defined(LINGBOT_X86_VARIANTS)
namespace avx2 {
LINGBOT_CPU_OPS(DECLARE)
}
namespace avx512 {
LINGBOT_CPU_OPS(DECLARE)
}
namespace avx512vnni {
LINGBOT_CPU_PRODUCTS(DECLARE)
}
#endif
#undef DECLARE

namespace {

struct Table {
  const char* name;
  bool (*supported)();
#define FIELD(op, Params) Status (*op)(const Params&, int);
  LINGBOT_CPU_OPS(FIELD)
#undef FIELD
};

#if defined(LINGBOT_X86_VARIANTS)
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
#endif

constexpr Table kTables[] = {
#if defined(LINGBOT_X86_VARIANTS)
#define ENTRY(op, Params) avx512::op,
#define PRODUCT(op, Params) avx512vnni::op,
    {"avx512vnni", [] { return has_avx512() && __builtin_cpu_supports("avx512vnni"); },
     LINGBOT_CPU_ROW_OPS(ENTRY) LINGBOT_CPU_PRODUCTS(PRODUCT)},
    {"avx512", has_avx512, LINGBOT_CPU_OPS(ENTRY)},
#undef PRODUCT
#undef ENTRY
#define ENTRY(op, Params) avx2::op,
    {"avx2", [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c"); }, LINGBOT_CPU_OPS(ENTRY)},
#undef ENTRY
#endif
#define ENTRY(op, Params) generic::op,
    {"generic", [] { return true; }, LINGBOT_CPU_OPS(ENTRY)},
#undef ENTRY
};
static_assert(sizeof(kTables) / sizeof(Table) <= kMaxIsas);

const Table* best() {
  for (const Table& table : kTables)
    if (table.supported()) return &table;
  return nullptr;  // not reached: generic always is
}

std::atomic<const Table*> g_active{best()};

}  // namespace

const char* const* available_isas() {
  static const char* names[kMaxIsas + 1] = {};
  int count = 0;
  for (const Table& table : kTables)
    if (table.supported()) names[count++] = table.name;
  return names;
}

const char* active_isa() { return g_active.load()->name; }

bool set_isa(const char* name) {
  for (const Table& table : kTables) {
    if (std::strcmp(table.name, name) != 0 || !table.supported()) continue;
    g_active = &table;
    return true;
  }
  return false;
}

#define FORWARD(op, Params) \
  Status op(const Params& p, int threads) { return g_active.load(std::memory_order_relaxed)->op(p, threads); }
LINGBOT_CPU_OPS(FORWARD)
#undef FORWARD

}  // namespace lingbot::cpu
