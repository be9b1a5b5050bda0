// Where a VM's monitor (QMP) is reached.
#pragma once

#include <fmt/format.h>

#include <compare>
#include <string>
#include <utility>

namespace vmsnap {

struct MonitorAddress {
  std::string socket;  // of QEMU's -qmp unix:PATH; or, if that is empty:
  std::string domain;  // a libvirt domain's name, UUID or number
  std::string uri;     // of the libvirt that runs it; empty: libvirt's default

  MonitorAddress() = default;
  MonitorAddress(std::string path) : socket(std::move(path)) {}
  static MonitorAddress of_domain(std::string domain, std::string uri) {
    MonitorAddress address;
    address.domain = std::move(domain);
    address.uri = std::move(uri);
    return address;
  }

  auto operator<=>(const MonitorAddress&) const = default;

  bool is_libvirt() const { return socket.empty(); }

  const std::string& place() const { return is_libvirt() ? domain : socket; }

  // For messages.
  std::string describe() const {
    return is_libvirt() ? fmt::format("libvirt domain '{}'", domain) : "QMP socket " + socket;
  }
};

}  // namespace vmsnap
