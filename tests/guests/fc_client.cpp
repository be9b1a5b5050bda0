// The VMM's side of Firecracker's UFFD handshake, and a client that can read
// every byte of the memory it is served.
//
// fc_client --socket PATH --regions OFFSET:BYTES,... [--page-size-field both|new|old]
//           [--pieces N] [--handshake TEXT] [--no-fd 1]
// fc_client --register-only 1
//
// Maps each region, registers it for missing faults, connects, and sends a JSON
// array that says where the regions are and where their content begins in the
// raw export, in N pieces, with the uffd beside the first one. Prints RANGE
// lines and READY. Commands on stdin:
//   read OFFSET LEN PATH     the bytes of the memory, as a file
//   touch OFFSET             reads one byte: "BYTE value"
//   dontneed OFFSET LEN      madvise(MADV_DONTNEED): "DONE errno"
//   closed                   "CLOSED" once the server has closed the connection
// Offsets count through the regions, in order. --handshake sends TEXT instead.
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <unistd.h>

#include <cerrno>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iostream>
#include <sstream>
#include <string>
#include <vector>

namespace {

struct Region {
  uint8_t* start;
  uint64_t bytes;
  uint64_t offset;  // in the raw export
};

[[noreturn]] void die(const char* what) {
  std::fprintf(stderr, "fc_client: %s: %s\n", what, std::strerror(errno));
  _exit(1);
}

int open_uffd() {
  const int fd = static_cast<int>(syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK));
  uffdio_api api = {};
  api.api = UFFD_API;
  api.features = UFFD_FEATURE_EVENT_REMOVE;
  if (fd < 0 || ioctl(fd, UFFDIO_API, &api) != 0) die("userfaultfd");
  return fd;
}

Region make_region(int uffd, uint64_t bytes, uint64_t offset) {
  void* map = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (map == MAP_FAILED) die("mmap");
  uffdio_register range = {};
  range.range = {reinterpret_cast<uint64_t>(map), bytes};
  range.mode = UFFDIO_REGISTER_MODE_MISSING;
  if (ioctl(uffd, UFFDIO_REGISTER, &range) != 0) die("UFFDIO_REGISTER");
  return {static_cast<uint8_t*>(map), bytes, offset};
}

std::string handshake(const std::vector<Region>& regions, const std::string& field) {
  std::string text = "[";
  for (const Region& region : regions) {
    text += text.size() > 1 ? "," : "";
    text += "{\"base_host_virt_addr\":" + std::to_string(reinterpret_cast<uint64_t>(region.start)) +
            ",\"size\":" + std::to_string(region.bytes) +
            ",\"offset\":" + std::to_string(region.offset);
    // Firecracker gives both in bytes, whatever the old one's name says.
    if (field != "old") text += ",\"page_size\":4096";
    if (field != "new") text += ",\"page_size_kib\":4096";
    text += "}";
  }
  return text + "]";
}

int connect_to(const std::string& path) {
  const int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
  sockaddr_un address = {};
  address.sun_family = AF_UNIX;
  std::strncpy(address.sun_path, path.c_str(), sizeof address.sun_path - 1);
  if (connect(fd, reinterpret_cast<sockaddr*>(&address), sizeof address) != 0) die("connect");
  return fd;
}

void send_piece(int connection, const std::string& piece, int with_fd) {
  iovec part = {const_cast<char*>(piece.data()), piece.size()};
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int))] = {};
  msghdr message = {};
  message.msg_iov = &part;
  message.msg_iovlen = 1;
  if (with_fd >= 0) {
    message.msg_control = control;
    message.msg_controllen = sizeof control;
    cmsghdr* header = CMSG_FIRSTHDR(&message);
    header->cmsg_level = SOL_SOCKET;
    header->cmsg_type = SCM_RIGHTS;
    header->cmsg_len = CMSG_LEN(sizeof(int));
    std::memcpy(CMSG_DATA(header), &with_fd, sizeof(int));
  }
  if (sendmsg(connection, &message, MSG_NOSIGNAL) < 0) die("sendmsg");
}

// The place in memory of an offset that counts through the regions.
uint8_t* locate(const std::vector<Region>& regions, uint64_t offset) {
  for (const Region& region : regions) {
    if (offset < region.bytes) return region.start + offset;
    offset -= region.bytes;
  }
  return nullptr;
}

void write_file(const std::vector<Region>& regions, uint64_t offset, uint64_t bytes,
                const std::string& path) {
  std::ofstream out(path, std::ios::binary);
  std::vector<char> page(4096);
  for (uint64_t at = offset; at < offset + bytes; at += page.size()) {
    std::memcpy(page.data(), locate(regions, at), page.size());  // faults here, not in write(2)
    out.write(page.data(), static_cast<std::streamsize>(page.size()));
  }
}

}  // namespace

int main(int argc, char** argv) {
  std::string path, layout = "0:1048576", field = "both", text;
  unsigned pieces = 1;
  bool register_only = false, send_fd = true;
  for (int i = 1; i + 1 < argc; i += 2) {
    const std::string option = argv[i], value = argv[i + 1];
    if (option == "--socket") path = value;
    if (option == "--regions") layout = value;
    if (option == "--page-size-field") field = value;
    if (option == "--pieces") pieces = static_cast<unsigned>(std::stoul(value));
    if (option == "--handshake") text = value;
    if (option == "--no-fd") send_fd = value != "1";
    if (option == "--register-only") register_only = value == "1";
  }
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  const int uffd = open_uffd();
  std::vector<Region> regions;
  std::istringstream list(layout);
  for (std::string word; std::getline(list, word, ',');) {
    const size_t colon = word.find(':');
    regions.push_back(
        make_region(uffd, std::stoull(word.substr(colon + 1)), std::stoull(word.substr(0, colon))));
  }
  int connection = -1;
  if (!register_only) {
    connection = connect_to(path);
    if (text.empty()) text = handshake(regions, field);
    const size_t length = (text.size() + pieces - 1) / pieces;
    for (size_t at = 0; at < text.size(); at += length) {
      send_piece(connection, text.substr(at, length), at == 0 && send_fd ? uffd : -1);
      if (pieces > 1) usleep(20000);  // so that they do arrive one by one
    }
  }
  for (const Region& region : regions) {
    const uint64_t start = reinterpret_cast<uint64_t>(region.start);
    std::printf("RANGE %lx-%lx\n", start, start + region.bytes);
  }
  std::printf("READY\n");
  std::fflush(stdout);

  for (std::string line; std::getline(std::cin, line);) {
    std::istringstream words(line);
    std::string command, file;
    uint64_t offset = 0, bytes = 0;
    words >> command >> offset >> bytes >> file;
    if (command == "read") {
      write_file(regions, offset, bytes, file);
      std::cout << "READ " << bytes << std::endl;
    } else if (command == "touch") {
      const volatile uint8_t* byte = locate(regions, offset);
      std::cout << "BYTE " << unsigned{*byte} << std::endl;
    } else if (command == "dontneed") {
      const int result = madvise(locate(regions, offset), bytes, MADV_DONTNEED);
      std::cout << "DONE " << (result == 0 ? 0 : errno) << std::endl;
    } else if (command == "closed") {
      char byte;
      const ssize_t got = recv(connection, &byte, 1, 0);
      std::cout << (got <= 0 ? "CLOSED" : "DATA") << std::endl;
    } else {
      std::cout << "BAD unknown command" << std::endl;
    }
  }
  _exit(0);
}
