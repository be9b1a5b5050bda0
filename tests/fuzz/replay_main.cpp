// Feeds every file of a directory to a fuzzer's entry point, without libFuzzer.
#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <vector>

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);

int main(int argc, char** argv) {
  if (argc != 2) {
    std::fprintf(stderr, "usage: %s DIRECTORY\n", argv[0]);
    return 2;
  }
  std::error_code error;
  std::filesystem::recursive_directory_iterator entries(argv[1], error);
  if (error) {
    std::fprintf(stderr, "cannot list %s: %s\n", argv[1], error.message().c_str());
    return 1;
  }
  int files = 0;
  for (const auto& entry : entries) {
    if (!entry.is_regular_file()) continue;
    std::ifstream file(entry.path(), std::ios::binary);
    const std::vector<char> bytes{std::istreambuf_iterator<char>(file), {}};
    LLVMFuzzerTestOneInput(reinterpret_cast<const uint8_t*>(bytes.data()), bytes.size());
    ++files;
  }
  std::printf("%d files\n", files);
  if (files == 0) std::fprintf(stderr, "%s holds no files: nothing was tested\n", argv[1]);
  return files == 0 ? 1 : 0;
}
