// Splits independent rows over a small persistent pool of threads. Rows never share a result, so that the number of
// threads does not change a bit.
#pragma once

#include <cstdint>

namespace lingbot::cpu {

using Body = void (*)(const void* context, int64_t begin, int64_t end);

// Calls body(context, begin, end) over [0, count), in blocks. Work of less than some tens of microseconds stays on the
// calling thread, as does all work while another caller holds the pool. threads 0: every core this process may use.
void run_blocks(int64_t count, int64_t bytes_each, int threads, Body body, const void* context);

namespace {  // internal linkage: this header is compiled once an instruction set

template <class F>
void parallel_for(int64_t count, int64_t bytes_each, int threads, const F& f) {
  run_blocks(
      count, bytes_each, threads,
      [](const void* context, int64_t begin, int64_t end) { (*static_cast<const F*>(context))(begin, end); }, &f);
}

}  // namespace
}  // namespace lingbot::cpu
