// The static shared memory of a kernel, from the symbols of the library that it is in: a variable `x` of the function
// `_Zf` has the symbol `_ZZfE1x`.

#include "static_shared.h"

#include <dlfcn.h>
#include <elf.h>
#include <link.h>

#include <fstream>
#include <iterator>
#include <map>
#include <mutex>
#include <string>
#include <vector>

namespace emulator {
namespace {

struct Library {
  std::vector<char> bytes;

  explicit Library(const char* path) {
    std::ifstream file(path, std::ios::binary);
    bytes.assign(std::istreambuf_iterator<char>(file), {});
  }

  template <class T>
  const T* at(std::size_t offset) const {
    return reinterpret_cast<const T*>(bytes.data() + offset);
  }

  // Calls call(symbols, count, names) for the symbol table, if there is one.
  template <class Call>
  void with_symbols(const Call& call) const {
    const auto* header = at<ElfW(Ehdr)>(0);
    const auto* sections = at<ElfW(Shdr)>(header->e_shoff);
    for (int i = 0; i < header->e_shnum; ++i) {
      if (sections[i].sh_type != SHT_SYMTAB) continue;
      const char* names = at<char>(sections[sections[i].sh_link].sh_offset);
      call(at<ElfW(Sym)>(sections[i].sh_offset), sections[i].sh_size / sizeof(ElfW(Sym)), names);
    }
  }
};

int type_of(const ElfW(Sym) & symbol) { return symbol.st_info & 0xf; }

// Variables of a kernel stand between the same names of source files as the kernel itself: another file may have a
// kernel of the same name.
std::size_t find(const Library& library, std::uintptr_t offset) {
  std::size_t bytes = 0;
  library.with_symbols([&](const ElfW(Sym)* symbols, std::size_t count, const char* names) {
    std::size_t kernel = 0;
    while (kernel < count && !(type_of(symbols[kernel]) == STT_FUNC && symbols[kernel].st_value == offset)) ++kernel;
    if (kernel == count) return;
    const std::string prefix = "_ZZ" + std::string(names + symbols[kernel].st_name).substr(2) + "E";
    std::size_t first = kernel, end = kernel;
    while (first > 0 && type_of(symbols[first]) != STT_FILE) --first;
    while (end < count && type_of(symbols[end]) != STT_FILE) ++end;
    for (std::size_t i = first; i < end; ++i) {
      const bool variable = type_of(symbols[i]) == STT_TLS || type_of(symbols[i]) == STT_OBJECT;
      if (variable && !std::string(names + symbols[i].st_name).compare(0, prefix.size(), prefix)) {
        bytes += (symbols[i].st_size + 15) / 16 * 16;
      }
    }
  });
  return bytes;
}

}  // namespace

std::size_t static_shared(const void* kernel) {
  static std::mutex mutex;
  static std::map<const void*, std::size_t> known;
  static std::map<std::string, Library> libraries;
  const std::lock_guard lock(mutex);
  if (const auto found = known.find(kernel); found != known.end()) return found->second;
  Dl_info info{};
  if (!dladdr(kernel, &info)) return 0;
  const Library& library = libraries.try_emplace(info.dli_fname, info.dli_fname).first->second;
  const auto base = reinterpret_cast<std::uintptr_t>(info.dli_fbase);
  const auto address = reinterpret_cast<std::uintptr_t>(kernel);
  // The addresses in a program that is not relocatable are absolute.
  const bool relocatable = library.at<ElfW(Ehdr)>(0)->e_type == ET_DYN;
  return known[kernel] = find(library, relocatable ? address - base : address);
}

}  // namespace emulator
