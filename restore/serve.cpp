#include "restore/serve.h"

#include <poll.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <list>
#include <memory>
#include <mutex>
#include <system_error>
#include <thread>

#include "formats/descriptor_limit.h"
#include "formats/file.h"
#include "formats/interrupt.h"
#include "formats/log.h"
#include "formats/thread.h"
#include "restore/episode.h"
#include "restore/firecracker.h"
#include "restore/page_server.h"
#include "restore/privileges.h"
#include "snap/vmm/unix_socket.h"

namespace vmsnap {

namespace {

// Newer than Debian 12's headers (Linux 6.5).
constexpr int so_peerpidfd = 77;

// A socket file without a listener is what a killed server left.
Status remove_stale(const std::string& path) {
  struct stat about = {};
  if (::lstat(path.c_str(), &about) < 0) return {};
  if (!S_ISSOCK(about.st_mode)) {
    return tl::unexpected(Error(ErrorCode::exists, path + " exists and is no socket")
                              .with_remedy("Choose another --socket."));
  }
  const auto probe = connect_to_socket(path, SOCK_STREAM);
  if (probe || probe.error().os_errno() != ECONNREFUSED) {
    return tl::unexpected(Error(ErrorCode::exists, "somebody listens on " + path + " already")
                              .with_remedy("Choose another --socket, or end that server."));
  }
  if (::unlink(path.c_str()) < 0) return fail_errno(errno, "cannot replace {}", path);
  return {};
}

Result<Fd> listen_on(const std::string& path) {
  VMSNAP_TRY(socket_address(path));
  VMSNAP_CHECK(remove_stale(path));
  return listen_on_socket(path, SOCK_STREAM | SOCK_NONBLOCK, 16);
}

struct Peer {
  Fd pidfd;
  std::string name = "a VMM";
};

Peer peer_of(int socket) {
  Peer peer;
  ucred credentials = {};
  socklen_t length = sizeof credentials;
  if (::getsockopt(socket, SOL_SOCKET, SO_PEERCRED, &credentials, &length) < 0) return peer;
  if (credentials.pid <= 0) return peer;  // in a pid namespace that we cannot see
  peer.name = fmt::format("VMM {}", credentials.pid);
  int fd = -1;
  length = sizeof fd;
  if (::getsockopt(socket, SOL_SOCKET, so_peerpidfd, &fd, &length) < 0) {
    fd = static_cast<int>(::syscall(SYS_pidfd_open, credentials.pid, 0));
  }
  peer.pidfd = Fd(fd);
  return peer;
}

// One VMM, from its connection to its end.
class Session {
 public:
  // Takes the connection only if it succeeds.
  static Result<std::unique_ptr<Session>> start(Fd& connection, const ImageReader& image,
                                                const ServeOptions& options) {
    std::unique_ptr<Session> session(new Session(std::move(connection), image, options));
    auto thread = start_thread([s = session.get()] { s->run(); });
    if (!thread) {
      connection = std::move(session->connection_);
      return tl::unexpected(std::move(thread).error());
    }
    session->thread_ = *std::move(thread);
    return session;
  }
  ~Session() {
    stop();
    if (thread_.joinable()) thread_.join();
  }

  bool ended() const { return ended_.load(); }
  bool was_served() const { return was_served_.load(); }
  uint64_t unreadable() const { return unreadable_.load(); }
  void stop() {
    std::lock_guard lock(mutex_);
    stopped_ = true;
    if (server_) server_->stop();
  }

 private:
  Session(Fd connection, const ImageReader& image, const ServeOptions& options)
      : connection_(std::move(connection)), image_(image), options_(options) {}

  void run() {
    const Peer peer = peer_of(connection_.get());
    const Status served = serve(peer);
    if (!served && served.error().code() != ErrorCode::interrupted) {
      log_line(LogLevel::error, fmt::format("{}: {}", peer.name, served.error().message()));
    }
    connection_.reset();
    ended_.store(true);
  }

  Status serve(const Peer& peer) {
    Handshake handshake = VMSNAP_TRY(receive_handshake(connection_.get(), image_.page_count()));
    const Uffd uffd = Uffd::adopt(std::move(handshake.uffd));
    PageMarks marks = VMSNAP_TRY(PageMarks::in_memory(image_.page_count()));
    PageServerOptions options;
    options.release = false;
    options.prefetch = options_.prefetch;
    options.write_protect = options_.write_protect;
    options.pidfd = peer.pidfd.get();
    options.vm = peer.name;
    log_info("{}: serving {} regions", peer.name, handshake.ranges.size());
    PageServer server(uffd, image_, marks, std::move(handshake.ranges), std::move(options));
    {
      std::lock_guard lock(mutex_);
      if (stopped_) return {};
      server_ = &server;
    }
    const Result<ServeEnd> end = server.serve();
    {
      std::lock_guard lock(mutex_);
      server_ = nullptr;
    }
    const PageServerCounters counters = server.counters();
    unreadable_.store(counters.poisoned + counters.left_missing);
    if (!end) return tl::unexpected(end.error());
    was_served_.store(true);
    log_info("{}: {}; {} faults answered, {} pages by faults, {} in the background", peer.name,
             *end == ServeEnd::vm_gone ? "it is gone" : "no longer served", counters.faults,
             counters.filled_by_fault, counters.filled_by_background);
    return {};
  }

  Fd connection_;
  const ImageReader& image_;
  const ServeOptions& options_;
  std::mutex mutex_;
  PageServer* server_ = nullptr;  // while it serves
  bool stopped_ = false;
  std::atomic<bool> ended_ = false, was_served_ = false;
  std::atomic<uint64_t> unreadable_ = 0;
  std::thread thread_;  // last: it uses the others
};

// Accepts what waits, drops what has ended. Returns the first session that was
// served and has ended, if there is one.
class SessionList {
 public:
  static constexpr size_t limit = 256;

  // False: nobody can be taken in for now, and who waits makes the listener ready
  // again at once.
  Result<bool> accept_all(int listener, const ImageReader& image, const ServeOptions& options) {
    while (sessions_.size() < limit) {
      Fd connection = std::exchange(waiting_, Fd());
      if (!connection) connection = Fd(::accept4(listener, nullptr, nullptr, SOCK_CLOEXEC));
      if (!connection) {
        if (errno == EAGAIN || errno == EINTR || errno == ECONNABORTED) return true;
        if (errno == EMFILE || errno == ENFILE || errno == ENOBUFS || errno == ENOMEM) {
          say_full(std::generic_category().message(errno), "Raise that limit");
          return false;
        }
        return fail_errno(errno, "cannot accept a connection");
      }
      auto session = Session::start(connection, image, options);
      if (!session) {
        // To hang up would not help it: it does not look, and waits for its pages.
        waiting_ = std::move(connection);
        say_full(session.error().message(), "Raise the limit of threads");
        return false;
      }
      sessions_.push_back(*std::move(session));
    }
    say_full(fmt::format("{} are here, which is all there can be", limit), "End some");
    return false;
  }

  // Drops the sessions that have ended; true if one of them was a VMM's.
  bool reap() {
    bool one_left = false;
    for (auto it = sessions_.begin(); it != sessions_.end();) {
      if (!(*it)->ended()) {
        ++it;
        continue;
      }
      one_left |= (*it)->was_served();
      unreadable_ += (*it)->unreadable();
      it = sessions_.erase(it);
    }
    return one_left;
  }

  uint64_t unreadable() const { return unreadable_; }

 private:
  void say_full(std::string_view why, std::string_view what_to_do) {
    if (!full_.begins()) return;
    log_warning("VMMs that connect have to wait: {}. {}, or start another server.", why, what_to_do);
  }

  std::list<std::unique_ptr<Session>> sessions_;
  Fd waiting_;  // a connection that there was no thread for
  Episode full_;
  uint64_t unreadable_ = 0;
};

class SocketFile {
 public:
  explicit SocketFile(std::string path) : path_(std::move(path)) {}
  ~SocketFile() { ::unlink(path_.c_str()); }

 private:
  std::string path_;
};

}  // namespace

Status serve(const ServeOptions& options, CommandContext& context) {
  const auto image = VMSNAP_TRY(open_image(options.image));
  const Fd listener = VMSNAP_TRY(listen_on(options.socket));
  const SocketFile file(options.socket);
  VMSNAP_CHECK(drop_privileges(paths_of(*image)));
  context.out << fmt::format("serving {} ({} pages) on {}\n", image->path(), image->page_count(),
                             options.socket)
              << std::flush;
  const MoreDescriptors some_for_each_vmm;
  SessionList sessions;
  bool has_room = true;
  for (;;) {
    VMSNAP_CHECK(check_interrupted());
    // The limit is for what no descriptor tells of: a session that ended, a
    // signal that another thread took.
    pollfd incoming = {listener.get(), POLLIN, 0};
    const int ready = ::poll(&incoming, has_room ? 1 : 0, 100);
    if (ready > 0 || !has_room) {
      has_room = VMSNAP_TRY(sessions.accept_all(listener.get(), *image, options));
    }
    if (sessions.reap() && options.once) break;
  }
  if (sessions.unreadable() == 0) return {};
  return tl::unexpected(
      Error(ErrorCode::poisoned, fmt::format("{} pages of {} could not be read back",
                                             sessions.unreadable(), image->path()))
          .with_remedy("vmsnap verify names what is damaged."));
}

}  // namespace vmsnap
