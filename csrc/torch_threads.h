#pragma once

namespace fastbert {

// Calls work(data, rank, size) on `threads` threads at once, or on fewer, `size`, of the OpenMP that PyTorch has loaded.
// What PyTorch computes leaves these spinning for a while, on the cores that threads of our own would need. Returns false,
// and has called nothing, where PyTorch has another OpenMP than GNU's, or in a forked process, where GNU's hangs.
bool run_on_torch_threads(int threads, void (*work)(void* data, int rank, int size), void* data);

}  // namespace fastbert
