#include "restore/served_vm.h"

#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <filesystem>
#include <functional>
#include <optional>

#include "formats/elapsed.h"
#include "formats/interrupt.h"
#include "formats/json.h"
#include "formats/log.h"
#include "formats/store/image_argument.h"
#include "formats/store/recorded_working_set.h"
#include "formats/test_point.h"
#include "formats/thread.h"
#include "formats/working_set_file.h"
#include "restore/background.h"
#include "restore/privileges.h"
#include "restore/progress.h"
#include "restore/uffd_closer.h"
#include "snap/vmm/handover.h"

namespace vmsnap {

Result<uint64_t> wanted_features() {
  const uint64_t offered = VMSNAP_TRY(Uffd::kernel_features());
  return page_server_features | (offered & uffd_feature::poison);
}

std::unique_ptr<Serving> Serving::start(ServedVm& vm) {
  PageServerOptions options;
  options.prefetch = vm.record.prefetch;
  options.prefetch_at_once = false;
  if (vm.record.record_working_set && !vm.recorder) {
    vm.recorder =
        std::make_unique<WorkingSetRecorder>(vm.image->page_count(), layout::working_set_max_pages);
  }
  options.recorder = vm.recorder.get();
  options.pidfd = vm.process.pidfd();
  options.vm = vm.process.describe();
  const auto features = Uffd::kernel_features();
  options.use_poison = features && (*features & uffd_feature::poison);
  std::unique_ptr<Serving> serving(new Serving());
  serving->server_ = std::make_unique<PageServer>(vm.uffd, *vm.image, vm.marks, vm.record.ranges,
                                                  std::move(options));
  auto thread = start_thread([s = serving.get()] {
    s->end_ = s->server_->serve();
    s->ended_.store(true);
  });
  if (thread) {
    serving->thread_ = *std::move(thread);
  } else {
    serving->end_ = tl::unexpected(std::move(thread).error());
    serving->ended_.store(true);
  }
  return serving;
}

Serving::~Serving() { (void)stop(); }

Result<ServeEnd> Serving::stop() {
  server_->stop();
  return wait();
}

Result<ServeEnd> Serving::wait() {
  if (thread_.joinable()) thread_.join();
  return *end_;
}

nlohmann::json to_json(const PageServerCounters& counters) {
  return {{"filled_by_fault", counters.filled_by_fault},
          {"filled_by_background", counters.filled_by_background},
          {"found_filled", counters.found_filled},
          {"removed", counters.removed},
          {"poisoned", counters.poisoned},
          {"left_missing", counters.left_missing},
          {"faults", counters.faults}};
}

namespace {

std::string_view what_it_does(const RestoreRecord& record) {
  if (record.phase == RestorePhase::ended) return "has ended; it ran";
  return record.resume ? "runs" : "is paused";
}

void print_summary(const ServedVm& vm, const PageServerCounters& counters,
                   const ServeManner& manner, CommandContext& context) {
  const ImageSummary& image = vm.image->summary();
  if (manner.json) {
    nlohmann::json pages = to_json(counters);
    pages.erase("faults");
    pages["total"] = image.page_count;
    pages["zero"] = image.zero_pages;
    const nlohmann::json summary = {{"id", vm.record.image_id},
                                    {"run_dir", vm.dir.path()},
                                    {"pid", vm.record.pid},
                                    {"qmp", vm.record.qmp},
                                    {"phase", phase_name(vm.record.phase)},
                                    {"ready_ms", vm.record.ready_ms},
                                    {"total_ms", ms_since(manner.started)},
                                    {"pages", std::move(pages)},
                                    {"faults", counters.faults},
                                    {"fault_us",
                                     {{"p50", counters.fault_us.p50},
                                      {"p99", counters.fault_us.p99},
                                      {"max", counters.fault_us.max}}}};
    print_json(context.out, summary);
  } else {
    context.out << fmt::format(
        "{} {} after {:.1f} ms in {}\n"
        "  monitor {}\n"
        "  pages   {} zero, {} by faults, {} in the background, {} of {} to come\n"
        "  faults  {}, answered in {:.0f} us (median), {:.0f} us (99 %), {:.0f} us (longest)\n",
        vm.process.describe(), what_it_does(vm.record), vm.record.ready_ms, vm.dir.path(),
        vm.record.qmp, image.zero_pages, counters.filled_by_fault,
        counters.filled_by_background + counters.found_filled,
        counters.data_pages - std::min(counters.data_pages, counters.filled()), counters.data_pages,
        counters.faults, counters.fault_us.p50, counters.fault_us.p99, counters.fault_us.max);
  }
  context.out.flush();
}

// A hint for the next restore: that it cannot be written harms nobody.
void save_recorded(const ServedVm& vm) {
  if (!vm.recorder) return;
  const std::vector<uint64_t> pages = vm.recorder->pages();
  const Status saved = save_working_set(*vm.image, pages);
  if (!saved) {
    log_warning("the working set is not recorded: {}", saved.error().message());
    return;
  }
  log_info("{} pages of the working set recorded in {}", pages.size(), working_set_path(*vm.image));
}

// After the page server: writes down how it ended and lets go of the VM, by
// `close_uffd`, which closes the VM's own userfaultfd.
Status conclude(ServedVm& vm, const Result<ServeEnd>& end, const PageServerCounters& counters,
                const std::function<Status()>& close_uffd) {
  vm.record.counters = to_json(counters);
  vm.record.server_pid = 0;
  save_recorded(vm);
  if (!end) {
    (void)vm.dir.write(vm.record);
    return tl::unexpected(
        Error(end.error())
            .with_remedy(fmt::format("The VM waits for its memory: vmsnap restore --reattach {}",
                                     vm.dir.path())));
  }
  if (*end == ServeEnd::vm_gone) {
    vm.record.phase = RestorePhase::ended;
    VMSNAP_CHECK(vm.dir.write(vm.record));
    vm.dir.finish();
    if (const uint64_t lost = counters.poisoned + counters.left_missing; lost > 0) {
      return tl::unexpected(
          Error(ErrorCode::poisoned,
                fmt::format("{} pages of {} could not be read back for process {}, which has ended",
                            lost, vm.record.image, vm.record.pid))
              .with_remedy("vmsnap verify names what is damaged."));
    }
    if (vm.record.prefetch != Prefetch::all) return {};
    return fail(ErrorCode::vm, "process {} ended before all of its memory was there",
                vm.record.pid);
  }
  if (*end == ServeEnd::stopped) return vm.dir.write(vm.record);
  vm.record.phase = RestorePhase::filled;
  VMSNAP_CHECK(vm.dir.write(vm.record));
  if (counters.left_missing > 0) {
    return tl::unexpected(
        Error(ErrorCode::poisoned,
              fmt::format("{} pages of {} cannot be read back; what touches them in process {} "
                          "waits for ever",
                          counters.left_missing, vm.record.image, vm.record.pid))
            .with_remedy(fmt::format("If the image can be repaired: vmsnap restore --reattach {}",
                                     vm.dir.path())));
  }
  VMSNAP_CHECK(close_uffd());
  vm.uffd.close();
  vm.record.phase = RestorePhase::complete;
  VMSNAP_CHECK(vm.dir.write(vm.record));
  vm.dir.finish();
  if (counters.poisoned == 0) return {};
  return tl::unexpected(
      Error(ErrorCode::poisoned,
            fmt::format("{} pages of {} could not be read back and are poisoned in process {}",
                        counters.poisoned, vm.record.image, vm.record.pid))
          .with_remedy("The guest meets a memory error where it touches one; vmsnap verify names "
                       "what is damaged."));
}

// In the background, where a server may stay for as long as its VM. It goes on
// reading the image, and writes into the run directory, and beside the image.
Result<UffdCloser> give_up_privileges(const ServedVm& vm) {
  auto closer = VMSNAP_TRY(UffdCloser::start(vm.record));
  std::vector<std::string> written = {vm.dir.path()};
  if (vm.record.record_working_set) {
    written.push_back(std::filesystem::path(working_set_path(*vm.image)).parent_path());
  }
  VMSNAP_CHECK(drop_privileges(paths_of(*vm.image), written));
  return closer;
}

void listen_to_snapshots(ServedVm& vm) {
  if (vm.requests.fd() >= 0) return;
  auto requests = FillRequests::listen(vm.process);
  if (requests) {
    vm.requests = *std::move(requests);
  } else {
    log_warning("{}", requests.error().message());
  }
}

// Somebody snapshots the VM: all is loaded then, whatever was wished at first.
// By a new page server: faults wait for the millisecond in between.
void fill_if_asked(ServedVm& vm, std::unique_ptr<Serving>& serving) {
  if (vm.requests.fd() < 0 || !vm.requests.answer(FillAnswer::comes)) return;
  if (vm.record.prefetch == Prefetch::all) return;
  const Result<ServeEnd> end = serving->stop();
  if (!end || *end != ServeEnd::stopped) return;
  log_info("a snapshot is wanted: all pages are loaded");
  vm.record.prefetch = Prefetch::all;
  const Status written = vm.dir.write(vm.record);
  if (!written) log_warning("{}", written.error().message());
  serving = Serving::start(vm);
  serving->begin_fill();
}

std::string how_to_take_over(const ServedVm& vm) {
  return fmt::format("The VM waits for its memory: vmsnap restore --reattach {}", vm.dir.path());
}

// Nobody is to find the record of the process before, nor be told of a page server
// that came to nothing.
Status wait_until_it_serves(const ServedVm& vm, int from) {
  char byte;
  ssize_t got;
  while ((got = ::read(from, &byte, 1)) < 0 && errno == EINTR) {
  }
  if (got == 1) return {};
  return tl::unexpected(
      Error(ErrorCode::io, fmt::format("the page server of {} ended as it began (log: {})",
                                       vm.process.describe(), vm.dir.file("vmsnap.log")))
          .with_remedy(how_to_take_over(vm)));
}

volatile sig_atomic_t told_to_end = 0;

// Returns when the VM is to be unparked, or the serving has ended.
void wait_for_unpark(ServedVm& vm, const Serving& serving) {
  for (;;) {
    pollfd words[] = {{vm.control.get(), POLLIN, 0}, {vm.requests.fd(), POLLIN, 0}};
    // Now and then, whether the VM is still there.
    const int ready = ::poll(words, std::size(words), 500);
    if (serving.ended()) return;
    if (ready > 0 && words[0].revents) break;
    if (ready > 0 && words[1].revents) vm.requests.answer(FillAnswer::parked);
  }
  vm.control.reset();
  VMSNAP_TEST_POINT("unpark.told");
  vm.record.phase = RestorePhase::running;
  const Status written = vm.dir.write(vm.record);
  if (!written) log_warning("{}", written.error().message());
}

}  // namespace

Status open_control(ServedVm& vm) {
  const std::string name = vm.dir.file("control");
  if (::mkfifo(name.c_str(), 0600) < 0 && errno != EEXIST) {
    return fail_errno(errno, "cannot make the FIFO {}", name);
  }
  // For reading and writing: it is never at its end, and whoever opens it for
  // writing alone learns whether we live.
  vm.control = VMSNAP_TRY(open_file(name, O_RDWR | O_NONBLOCK | O_NOFOLLOW));
  return {};
}

Result<pid_t> serve_in_background(ServedVm& vm) {
  int ends[2];
  const auto cannot = [&](const char* what) {
    return tl::unexpected(Error::from_errno(errno, what).with_remedy(how_to_take_over(vm)));
  };
  if (::pipe2(ends, O_CLOEXEC) < 0) return cannot("cannot make a pipe");
  const Fd hear(ends[0]);
  Fd tell(ends[1]);
  std::optional<HeldSignals> held(std::in_place);
  const pid_t child = ::fork();
  if (child < 0) return cannot("cannot start a background process");
  if (child > 0) {
    held.reset();
    tell.reset();
    VMSNAP_CHECK(wait_until_it_serves(vm, hear.get()));
    return child;
  }
  become_background(vm.dir.file("vmsnap.log"));
  VMSNAP_TEST_POINT("background.start");
  // One that records writes that down first.
  if (vm.recorder) ::signal(SIGTERM, [](int) { told_to_end = 1; });
  held.reset();
  vm.record.server_pid = ::getpid();
  Status written = vm.dir.write(vm.record);
  if (!written) log_warning("{}", written.error().message());
  auto closer = give_up_privileges(vm);
  if (!closer) {
    log_line(LogLevel::error, closer.error().message());
    ::_exit(exit_status(closer.error().code()));
  }
  listen_to_snapshots(vm);
  auto serving = Serving::start(vm);
  (void)!::write(tell.get(), "+", 1);  // unless whoever waits for it was killed
  tell.reset();
  if (vm.record.phase == RestorePhase::parked) wait_for_unpark(vm, *serving);
  serving->begin_fill();
  while (!serving->ended() && !told_to_end) {
    fill_if_asked(vm, serving);
    ::usleep(50000);
  }
  const Result<ServeEnd> end = serving->stop();
  const Status concluded =
      conclude(vm, end, serving->counters(), [&] { return closer->close(); });
  if (concluded) {
    log_info("{}", *end == ServeEnd::filled    ? "all pages are there"
                   : *end == ServeEnd::vm_gone ? "the VM has ended"
                                               : "told to end");
    ::_exit(0);
  }
  log_line(LogLevel::error, concluded.error().message());
  ::_exit(exit_status(concluded.error().code()));
}

Status serve_to_end(ServedVm& vm, std::unique_ptr<Serving> serving, const ServeManner& manner,
                    CommandContext& context) {
  // The guest runs by now: it comes before any loading ahead.
  if (!manner.detach) serving->begin_fill();
  listen_to_snapshots(vm);
  RestoreProgress progress(context);
  while (!manner.detach && !serving->ended() && !interrupted()) {
    ::usleep(20000);
    fill_if_asked(vm, serving);
    progress.show(serving->counters(), vm.record.prefetch);
  }
  progress.clear();
  const bool was_interrupted = !manner.detach && !serving->ended();
  const Result<ServeEnd> end = serving->stop();
  const PageServerCounters counters = serving->counters();
  serving.reset();
  if (!end || *end != ServeEnd::stopped) {
    const Status concluded = conclude(vm, end, counters, [&] {
      return close_in_process(vm.process, vm.record.uffd);
    });
    const bool lost = !concluded && concluded.error().code() == ErrorCode::poisoned;
    if (concluded || lost || (end && *end == ServeEnd::filled)) {
      print_summary(vm, counters, manner, context);
    }
    return concluded;
  }

  const pid_t server = VMSNAP_TRY(serve_in_background(vm));
  print_summary(vm, counters, manner, context);
  if (!was_interrupted) return {};
  return fail(ErrorCode::interrupted,
              "interrupted; the VM runs, and process {} goes on loading its memory (log: {})",
              server, vm.dir.file("vmsnap.log"));
}

}  // namespace vmsnap
