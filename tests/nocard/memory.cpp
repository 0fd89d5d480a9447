// Device memory is address space that nobody has written to, so it reads as zeros.
//
// Only what is copied to it takes pages of the host. Copies and fills of zeros onto
// whole pages give the pages back instead of writing them.
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <thread>

#include "nocard.h"

namespace nocard {

static const size_t PAGE = 4096, UNIT = 2 * 1024 * 1024;
static const size_t CONTEXT = 512 * 1024 * 1024;  // what a context and code would take
static const size_t ADDRESSES = size_t{1} << 45;
static const size_t LARGE = 1024 * 1024;          // from here on, zeros are not written

static std::mutex lock;
static std::map<uintptr_t, size_t>& mapped() {
  static auto* regions = new std::map<uintptr_t, size_t>;
  return *regions;
}
static std::map<uintptr_t, size_t>& pinned() {
  static auto* regions = new std::map<uintptr_t, size_t>;
  return *regions;
}
static size_t now_bytes = 0, most_bytes = 0;

static bool holds(const std::map<uintptr_t, size_t>& regions, const void* pointer) {
  auto address = reinterpret_cast<uintptr_t>(pointer);
  auto next = regions.upper_bound(address);
  if (next == regions.begin()) return false;
  --next;
  return address < next->first + next->second;
}

bool is_device_pointer(const void* pointer) {
  std::lock_guard<std::mutex> held(lock);
  return holds(mapped(), pointer);
}

static bool is_pinned(const void* pointer) {
  std::lock_guard<std::mutex> held(lock);
  return holds(pinned(), pointer);
}

Use memory_use() {
  std::lock_guard<std::mutex> held(lock);
  return {now_bytes, most_bytes};
}

// What is copied to the card takes pages here, and this machine has less memory than a
// card: a process ends itself before it takes more than NOCARD_HOST_GIB (default 8).
static void watch_host_memory() {
  const char* text = std::getenv("NOCARD_HOST_GIB");
  const size_t limit = (text ? std::strtoul(text, nullptr, 10) : 8) << 30;
  std::thread([limit] {
    for (;; usleep(50000)) {
      size_t pages = 0;
      if (FILE* file = std::fopen("/proc/self/statm", "r")) {
        if (std::fscanf(file, "%*u %zu", &pages) != 1) pages = 0;
        std::fclose(file);
      }
      if (pages * PAGE > limit) {
        std::fprintf(stderr, "nocard: more than %zu GiB of the host's memory; end\n",
                     limit >> 30);
        std::abort();
      }
    }
  }).detach();
}

static Counter mallocs("cudaMalloc"), refused("cudaMalloc refused"), frees("cudaFree"),
    copies("copies"), fills("memsets");

// Write zeros, without pages where whole ones of the device's are meant.
static void zero(char* to, size_t count) {
  auto start = reinterpret_cast<uintptr_t>(to);
  uintptr_t first = (start + PAGE - 1) / PAGE * PAGE;
  uintptr_t last = (start + count) / PAGE * PAGE;
  if (count < LARGE || first >= last || !is_device_pointer(to)) {
    std::memset(to, 0, count);
    return;
  }
  std::memset(to, 0, first - start);
  madvise(reinterpret_cast<void*>(first), last - first, MADV_DONTNEED);
  std::memset(reinterpret_cast<void*>(last), 0, start + count - last);
}

static bool all_zeros(const char* from, size_t count) {
  return !*from && !std::memcmp(from, from + 1, count - 1);
}

static void copy(void* to, const void* from, size_t count) {
  if (!count || to == from) return;
  auto* target = static_cast<char*>(to);
  auto* source = static_cast<const char*>(from);
  if (count < LARGE || !is_device_pointer(to)) {
    std::memmove(to, from, count);
    return;
  }
  for (size_t done = 0; done < count; done += UNIT) {
    size_t part = std::min(UNIT, count - done);
    if (all_zeros(source + done, part))
      zero(target + done, part);
    else
      std::memmove(target + done, source + done, part);
  }
}

}  // namespace nocard

using namespace nocard;

// Reserve address space for all that will ever be allocated; it takes no memory.
static uintptr_t reserved() {
  void* raw = mmap(nullptr, ADDRESSES, PROT_NONE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (raw == MAP_FAILED) return 0;
  return (reinterpret_cast<uintptr_t>(raw) + UNIT - 1) / UNIT * UNIT;
}

EXPORT cudaError_t cudaMalloc(void** pointer, size_t size) {
  static std::once_flag watched;
  std::call_once(watched, watch_host_memory);
  mallocs++;
  *pointer = nullptr;
  if (!size) return cudaSuccess;
  size_t taken = (size + UNIT - 1) / UNIT * UNIT;
  std::lock_guard<std::mutex> held(lock);
  if (now_bytes + taken > card().memory - CONTEXT) {
    refused++;
    return fail(cudaErrorMemoryAllocation);
  }
  // Addresses rise, as a driver's do, so that of two free blocks of one size PyTorch's
  // allocator takes the older one.
  static const uintptr_t first = reserved();
  static uintptr_t next = first;
  if (!first || next + taken > first + ADDRESSES - UNIT) {
    std::fprintf(stderr, "nocard: no address space left for %zu bytes\n", taken);
    return fail(cudaErrorMemoryAllocation);
  }
  auto* start = reinterpret_cast<void*>(next);
  mprotect(start, taken, PROT_READ | PROT_WRITE);
  madvise(start, taken, MADV_NOHUGEPAGE);
  const uintptr_t aligned = next;
  next += taken;
  mapped()[aligned] = taken;
  now_bytes += taken;
  most_bytes = std::max(most_bytes, now_bytes);
  *pointer = reinterpret_cast<void*>(aligned);
  return cudaSuccess;
}

EXPORT cudaError_t cudaFree(void* pointer) {
  if (!pointer) return cudaSuccess;
  frees++;
  std::lock_guard<std::mutex> held(lock);
  auto found = mapped().find(reinterpret_cast<uintptr_t>(pointer));
  if (found == mapped().end()) return fail(cudaErrorInvalidValue);
  madvise(pointer, found->second, MADV_DONTNEED);
  mprotect(pointer, found->second, PROT_NONE);
  now_bytes -= found->second;
  mapped().erase(found);
  return cudaSuccess;
}

EXPORT cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
  *total = card().memory;
  *free = card().memory - CONTEXT - memory_use().now;
  return cudaSuccess;
}

EXPORT cudaError_t cudaHostAlloc(void** pointer, size_t size, unsigned) {
  size_t taken = (std::max<size_t>(size, 1) + PAGE - 1) / PAGE * PAGE;
  *pointer = std::aligned_alloc(PAGE, taken);
  if (!*pointer) return fail(cudaErrorMemoryAllocation);
  std::lock_guard<std::mutex> held(lock);
  pinned()[reinterpret_cast<uintptr_t>(*pointer)] = taken;
  return cudaSuccess;
}

EXPORT cudaError_t cudaFreeHost(void* pointer) {
  std::lock_guard<std::mutex> held(lock);
  pinned().erase(reinterpret_cast<uintptr_t>(pointer));
  std::free(pointer);
  return cudaSuccess;
}

EXPORT cudaError_t cudaHostRegister(void* pointer, size_t size, unsigned) {
  std::lock_guard<std::mutex> held(lock);
  pinned()[reinterpret_cast<uintptr_t>(pointer)] = size;
  return cudaSuccess;
}

EXPORT cudaError_t cudaHostUnregister(void* pointer) {
  std::lock_guard<std::mutex> held(lock);
  pinned().erase(reinterpret_cast<uintptr_t>(pointer));
  return cudaSuccess;
}

EXPORT cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* out, const void* pointer) {
  std::memset(out, 0, sizeof *out);
  auto* address = const_cast<void*>(pointer);
  if (is_device_pointer(pointer)) {
    out->type = cudaMemoryTypeDevice;
    out->devicePointer = address;
  } else if (is_pinned(pointer)) {
    out->type = cudaMemoryTypeHost;
    out->devicePointer = out->hostPointer = address;
  } else {
    out->type = cudaMemoryTypeUnregistered;
    out->device = -2;  // cudaInvalidDeviceId
    out->hostPointer = address;
  }
  return cudaSuccess;
}

EXPORT cudaError_t cudaMemcpy(void* to, const void* from, size_t count, cudaMemcpyKind) {
  copies++;
  copy(to, from, count);
  return cudaSuccess;
}

EXPORT cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t count,
                                   cudaMemcpyKind, cudaStream_t) {
  copies++;
  copy(to, from, count);
  return cudaSuccess;
}

EXPORT cudaError_t cudaMemcpyPeerAsync(void* to, int, const void* from, int, size_t count,
                                       cudaStream_t) {
  copies++;
  copy(to, from, count);
  return cudaSuccess;
}

EXPORT cudaError_t cudaMemcpy2DAsync(void* to, size_t to_pitch, const void* from,
                                     size_t from_pitch, size_t width, size_t height,
                                     cudaMemcpyKind, cudaStream_t) {
  copies++;
  for (size_t row = 0; row < height; row++)
    copy(static_cast<char*>(to) + row * to_pitch,
         static_cast<const char*>(from) + row * from_pitch, width);
  return cudaSuccess;
}

EXPORT cudaError_t cudaMemset(void* to, int value, size_t count) {
  fills++;
  if (!value)
    zero(static_cast<char*>(to), count);
  else if (count < LARGE)  // a large fill is a kernel's work here: nothing happens
    std::memset(to, value, count);
  return cudaSuccess;
}

EXPORT cudaError_t cudaMemsetAsync(void* to, int value, size_t count, cudaStream_t) {
  return cudaMemset(to, value, count);
}
