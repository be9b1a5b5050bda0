// vmsnap-libvirt-monitor DOMAIN [URI]: QMP on standard input, which is a Unix stream
// socket, for a VM whose monitor libvirt holds. Started by libvirt_monitor.cpp.
//
// What cannot be is told as QMP tells it, in the place of the greeting or of an answer.
// Ends when the other end of the socket is closed, and when libvirt is gone: whoever
// wants to go on starts another, and knows that it may have missed events.
//
// `stop` and `cont` become libvirt's own suspend and resume: it gives back the leases of
// the VM's disks with the one, and takes them again with the other alone; and it lets no
// other job (a migration, say) be disturbed by them.
#include <libvirt/libvirt-qemu.h>
#include <libvirt/libvirt.h>
#include <libvirt/virterror.h>
#include <poll.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <charconv>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <thread>
#include <vector>

#include "formats/json.h"
#include "formats/thread.h"
#include "snap/vmm/caretaker.h"
#include "snap/vmm/descriptor_message.h"
#include "snap/vmm/qmp.h"

namespace vmsnap {

namespace {

using Json = nlohmann::json;

constexpr int client = STDIN_FILENO;
constexpr size_t max_request = 1 << 20;
constexpr size_t max_descriptors = 8;

// Events come from a thread of their own.
std::mutex sending;

void send_line(const Json& message) {
  const std::string line = json_line(message) + "\n";
  std::lock_guard lock(sending);
  for (size_t sent = 0; sent < line.size();) {
    const ssize_t got = ::send(client, line.data() + sent, line.size() - sent, MSG_NOSIGNAL);
    if (got < 0 && errno == EINTR) continue;
    if (got <= 0) ::_exit(0);
    sent += static_cast<size_t>(got);
  }
}

Json error_of(const std::string& what) {
  return {{"error", {{"class", "GenericError"}, {"desc", what}}}};
}

Json last_error() { return error_of(virGetLastErrorMessage()); }

void pass_event(virConnectPtr, virDomainPtr, const char* event, long long seconds,
                unsigned microseconds, const char* details, void*) {
  Json message = {{"event", event},
                  {"timestamp", {{"seconds", seconds}, {"microseconds", microseconds}}}};
  const Json data = parse_json(details ? details : "{}");
  if (data.is_object()) message["data"] = data;
  send_line(message);
}

// As virsh(1) takes it: a number, a UUID, a name.
virDomainPtr look_up(virConnectPtr libvirt, const std::string& domain) {
  int number = 0;
  const auto parsed = std::from_chars(domain.data(), domain.data() + domain.size(), number);
  if (parsed.ec == std::errc() && parsed.ptr == domain.data() + domain.size()) {
    if (virDomainPtr found = virDomainLookupByID(libvirt, number)) return found;
  }
  if (virDomainPtr found = virDomainLookupByUUIDString(libvirt, domain.c_str())) return found;
  return virDomainLookupByName(libvirt, domain.c_str());
}

Json run(virDomainPtr domain, const Json& request, std::vector<Fd>& descriptors) {
  std::vector<int> files(descriptors.size());
  std::ranges::transform(descriptors, files.begin(), [](const Fd& fd) { return fd.get(); });
  char* answer = nullptr;
  const int done = virDomainQemuMonitorCommandWithFiles(
      domain, json_line(request).c_str(), static_cast<unsigned>(files.size()), files.data(),
      nullptr, nullptr, &answer, 0);
  if (done < 0 || !answer) return last_error();
  Json parsed = parse_json(answer);
  ::free(answer);
  return parsed.is_object() ? parsed : error_of("libvirt gave no answer of QEMU's");
}

// To what is so already libvirt says that it cannot be; QEMU does not mind.
Json change_state(virDomainPtr domain, int (*change)(virDomainPtr), int wanted) {
  if (change(domain) == 0) return {{"return", Json::object()}};
  const Json error = last_error();
  int state = 0;
  const bool is_so = virDomainGetState(domain, &state, nullptr, 0) == 0 && state == wanted;
  return is_so ? Json{{"return", Json::object()}} : error;
}

Json execute(virDomainPtr domain, const Json& request, std::vector<Fd>& descriptors) {
  const std::string command = text_of(request, "execute");
  if (command == "qmp_capabilities") return {{"return", Json::object()}};
  if (command == "stop") return change_state(domain, virDomainSuspend, VIR_DOMAIN_PAUSED);
  if (command == "cont") return change_state(domain, virDomainResume, VIR_DOMAIN_RUNNING);
  return run(domain, request, descriptors);
}

// libvirt counts commands with an "id" of its own.
void answer(virDomainPtr domain, const std::string& line, std::vector<Fd>& descriptors) {
  Json request = parse_json(line);
  if (!request.is_object()) return send_line(error_of("this is no command"));
  std::optional<Json> id;
  if (const auto found = request.find("id"); found != request.end()) {
    id = *found;
    request.erase(found);
  }
  Json reply = execute(domain, request, descriptors);
  reply.erase("id");
  if (id) reply["id"] = *id;
  send_line(reply);
}

void serve(virConnectPtr libvirt, virDomainPtr domain) {
  std::string received;
  std::vector<Fd> descriptors;
  while (virConnectIsAlive(libvirt) == 1) {
    char piece[65536];
    const ssize_t got = receive_with_descriptors(client, std::as_writable_bytes(std::span(piece)),
                                                 max_descriptors, descriptors)
                            .bytes;
    if (got <= 0) return;
    received.append(piece, static_cast<size_t>(got));
    for (size_t end; (end = received.find('\n')) != std::string::npos;) {
      const std::string line = received.substr(0, end);
      received.erase(0, end + 1);
      if (line.find_first_not_of(" \r\t") == std::string::npos) continue;
      answer(domain, line, descriptors);
      descriptors.clear();
    }
    if (received.size() > max_request) return;
  }
}

[[noreturn]] void end_with(const Json& error) {
  send_line(error);
  ::_exit(1);
}

// A libvirt that hangs, also while we connect, does not keep us when nobody waits for it
// any more; one that is gone is not waited for.
void watch(const std::atomic<virConnectPtr>& libvirt) {
  constexpr int look_every_ms = 200;
  for (;;) {
    pollfd hung_up = {client, POLLRDHUP, 0};
    if (::poll(&hung_up, 1, look_every_ms) > 0) ::_exit(0);
    const virConnectPtr connected = libvirt;
    if (connected && virConnectIsAlive(connected) != 1) ::_exit(1);
  }
}

void run_events() {
  while (virEventRunDefaultImpl() == 0) {
  }
}

int run_monitor(const std::string& name, const std::string& uri) {
  virSetErrorFunc(nullptr, [](void*, virErrorPtr) {});
  if (virEventRegisterDefaultImpl() < 0) end_with(last_error());
  static std::atomic<virConnectPtr> connected = nullptr;
  auto watching = start_thread([] { watch(connected); });
  auto running = start_thread(run_events);
  if (!watching || !running) end_with(error_of("there is no room for threads"));
  watching->detach();
  running->detach();
  const virConnectPtr libvirt = virConnectOpen(uri.empty() ? nullptr : uri.c_str());
  if (!libvirt) end_with(last_error());
  connected = libvirt;
  const virDomainPtr domain = look_up(libvirt, name);
  if (!domain) end_with(last_error());
  if (virDomainIsActive(domain) != 1) end_with(error_of("the domain is not running"));
  if (virConnectDomainQemuMonitorEventRegister(libvirt, domain, nullptr, pass_event, nullptr,
                                               nullptr, 0) < 0) {
    end_with(last_error());
  }
  send_line({{"QMP", {{"version", Json::object()}, {"capabilities", Json::array()}}}});
  serve(libvirt, domain);
  return 0;
}

}  // namespace

}  // namespace vmsnap

int main(int count, char** arguments) {
  // Nobody's child, so that nobody has to wait for our end.
  if (const pid_t child = ::fork(); child != 0) ::_exit(child < 0 ? 1 : 0);
  vmsnap::become_caretaker("snaplibvirt");
  if (count < 2) return 2;
  ::_exit(vmsnap::run_monitor(arguments[1], count > 2 ? arguments[2] : ""));
}
