// Counts what the memory system would do: 32-byte sectors of global memory, and the passes over the
// 32 banks of shared memory.
//
// A warp's lanes run one after the other here, so a request is put together again: the n-th time
// that the lanes of a warp come to the same place in the kernel is one request.
#include <algorithm>
#include <map>
#include <set>
#include <unordered_map>

#include "machine.h"

namespace emulation {
namespace {

struct Request {
  const char* tensor;
  Access access;
  size_t bytes;  // a lane
  std::vector<std::pair<int, uintptr_t>> lanes;
};

struct Count {
  int64_t requests = 0, bytes = 0;
  int64_t sectors = 0;            // global: 32-byte sectors, summed over the requests
  int64_t passes = 0, ideal = 0;  // shared: passes over the banks, and without conflicts
};

using Place = std::pair<Site, uint64_t>;  // where, and how often the lane was there before

struct Key {
  int warp;
  Site site;
  uint64_t turn;
  bool operator<(const Key& o) const {
    return std::tie(warp, site, turn) < std::tie(o.warp, o.site, o.turn);
  }
};

std::map<Key, Request> open_requests;
std::vector<std::unordered_map<const void*, uint64_t>> turns;  // by thread

struct Launch {
  std::string kernel;
  int64_t blocks = 0;
  std::map<std::string, Count> by_tensor;  // "read x", "write y", "read shared"
  std::map<Site, Count> by_site;           // of shared memory with conflicts
};

std::vector<Launch> launches;
Launch open_launch;

// Lanes that hardware serves in one pass if their banks differ: 32 of 4 bytes, 16 of 8, 8 of 16.
void count_banks(const Request& request, Count& count) {
  const int lanes_a_pass =
      static_cast<int>(std::max<size_t>(1, 128 / std::max<size_t>(4, request.bytes)));
  for (int first = 0; first < kWarp; first += lanes_a_pass) {
    std::set<uintptr_t> words;
    for (const auto& [lane, address] : request.lanes)
      if (lane >= first && lane < first + lanes_a_pass)
        for (uintptr_t word = address / 4; word <= (address + request.bytes - 1) / 4; ++word)
          words.insert(word);
    if (words.empty()) continue;
    int in_bank[32] = {};
    for (uintptr_t word : words) ++in_bank[word % 32];
    count.passes += *std::max_element(in_bank, in_bank + 32);
    ++count.ideal;
  }
}

void add(Count& to, const Count& from) {
  to.requests += from.requests;
  to.bytes += from.bytes;
  to.sectors += from.sectors;
  to.passes += from.passes;
  to.ideal += from.ideal;
}

void append(std::string& text, const std::string& name, const Count& c) {
  if (text.back() != '{') text += ", ";
  text +=
      "\"" + name + "\": {\"requests\": " + std::to_string(c.requests) +
      ", \"bytes\": " + std::to_string(c.bytes) + ", \"sectors\": " + std::to_string(c.sectors) +
      ", \"passes\": " + std::to_string(c.passes) + ", \"ideal\": " + std::to_string(c.ideal) + "}";
}

}  // namespace

void count_access(int thread, Site site, const void* address, size_t bytes, Access access,
                  const char* tensor) {
  const size_t index = static_cast<size_t>(thread);
  if (turns.size() <= index) turns.resize(index + 1);
  // One instruction may read one place and write another (a copy): they are two requests.
  const void* place = static_cast<const char*>(site) + (tensor ? 1 : 0);
  const uint64_t turn = turns[index][place]++;
  Request& request = open_requests[{thread / kWarp, place, turn}];
  request.tensor = tensor;
  request.access = access;
  request.bytes = std::max(request.bytes, bytes);
  request.lanes.emplace_back(thread % kWarp, reinterpret_cast<uintptr_t>(address));
}

void finish_block_counts() {
  if (!machine.counting) return;
  ++open_launch.blocks;
  for (const auto& [key, request] : open_requests) {
    Count count;
    count.requests = 1;
    count.bytes = static_cast<int64_t>(request.bytes * request.lanes.size());
    std::set<uintptr_t> sectors;
    for (const auto& [lane, address] : request.lanes)
      for (uintptr_t s = address / 32; s <= (address + request.bytes - 1) / 32; ++s)
        sectors.insert(s);
    if (request.tensor)
      count.sectors = static_cast<int64_t>(sectors.size());
    else
      count_banks(request, count);
    const std::string name = std::string(request.access == Access::kRead ? "read " : "write ") +
                             (request.tensor ? request.tensor : "shared");
    add(open_launch.by_tensor[name], count);
    if (!request.tensor) add(open_launch.by_site[key.site], count);
  }
  open_requests.clear();
  turns.clear();
}

void finish_launch_counts() {
  if (!machine.counting) return;
  open_launch.kernel = machine.kernel;
  launches.push_back(open_launch);
  open_launch = {};
}

void count(bool enabled) {
  machine.counting = enabled;
  launches.clear();
  open_launch = {};
  open_requests.clear();
  turns.clear();
}

std::string counts() {
  std::string text = "[";
  for (const Launch& launch : launches) {
    if (text.back() != '[') text += ", ";
    text += "{\"kernel\": \"" + launch.kernel + "\", \"blocks\": " + std::to_string(launch.blocks);
    text += ", \"memory\": {";
    for (const auto& [name, c] : launch.by_tensor) append(text, name, c);
    text += "}, \"conflicts\": {";
    for (const auto& [site, c] : launch.by_site) {
      char address[32];
      std::snprintf(address, sizeof(address), "%p", site);
      if (c.passes > c.ideal) append(text, address, c);
    }
    text += "}}";
  }
  return text + "]";
}

}  // namespace emulation
