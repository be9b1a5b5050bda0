#include "restore/farm/clone_start.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <filesystem>
#include <fmt/ranges.h>
#include <thread>

#include "formats/interrupt.h"
#include "formats/json.h"
#include "formats/log.h"
#include "formats/text.h"
#include "restore/farm/clone_process.h"
#include "restore/farm/farm_keeper.h"
#include "restore/farm/farm_link.h"

namespace vmsnap {

namespace {

using Clock = std::chrono::steady_clock;

// What a starting process tells of its clone, through a pipe.
struct Started {
  std::string name;
  pid_t launcher = 0;
  Fd report;
  bool loaded = false;
  nlohmann::json json;  // "error", or "pid", "qmp", "ready_ms"
};

bool lives(const FarmDir& farm, const std::string& name) {
  const auto record = read_restore_record(farm.file(name));
  return record && find_process(*record);
}

class CloneStarter {
 public:
  CloneStarter(const CloneOptions& options, CommandContext& context)
      : options_(options), context_(context) {}

  Status run();

 private:
  Status start_all();
  void remove_unused_farm();
  Status prepare();
  Result<bool> join_farm();
  Status join_or_make_farm();
  Status launch(const std::string& name);
  enum class Until { loaded, running };
  Status collect(Until until, size_t at_most);
  void hear(Started& clone) const;
  void print() const;
  Status check_none_is_left() const;
  Status what_was_lost() const;
  Status wait_for_the_end() const;

  const CloneOptions& options_;
  CommandContext& context_;
  const Clock::time_point started_ = Clock::now();
  std::unique_ptr<ImageReader> image_;
  std::unique_ptr<FarmDir> farm_;
  bool made_farm_ = false;
  Fd connection_;  // keeps the farm while nothing runs yet
  Fd go_, wait_for_go_;  // a pipe
  std::vector<Started> started_clones_;
};

Status CloneStarter::prepare() {
  image_ = VMSNAP_TRY(open_image(options_.vm.image));
  const LaunchRequest request = VMSNAP_TRY(launch_request(options_.vm, *image_));
  const auto& arguments = request.record.arguments;
  if (std::none_of(arguments.begin(), arguments.end(),
                   [](const std::string& word) {
                     // In either syntax; JSON is what libvirt writes.
                     return word.starts_with("vmgenid") || word.find("\"vmgenid\"") != word.npos;
                   })) {
    log_info("the VM has no vmgenid device: nothing tells its guest that it was cloned "
             "(CLONES in vmsnap(1))");
  }
  return {};
}

// False: nobody listens.
Result<bool> CloneStarter::join_farm() {
  auto joined = connect_for_messages(farm_->socket());
  if (!joined) return false;
  connection_ = *std::move(joined);
  if (VMSNAP_TRY(farm_->read()).image_id == image_->info().id) return true;
  return tl::unexpected(
      Error(ErrorCode::exists, fmt::format("the clones in {} are of another image", farm_->path()))
          .with_remedy("Choose another --run-dir."));
}

Status CloneStarter::join_or_make_farm() {
  farm_ = std::make_unique<FarmDir>(VMSNAP_TRY(FarmDir::make(options_.vm.run_dir, &made_farm_)));
  if (VMSNAP_TRY(join_farm())) return {};
  // A keeper holds the lock for a moment longer than it listens, and before it does.
  auto lock = farm_->lock(takeover_patience);
  if (!lock && VMSNAP_TRY(join_farm())) return {};
  FarmSetup setup = {*farm_, VMSNAP_TRY(std::move(lock)), {}, *image_,
                     VMSNAP_TRY(SharedMemory::create(image_->page_count()))};
  for (const std::string& name : farm_->clones()) {
    if (!lives(*farm_, name)) continue;
    return tl::unexpected(
        Error(ErrorCode::exists, fmt::format("clone {} lives in {}, but its page server is dead",
                                             name, farm_->path()))
            .with_remedy(fmt::format("First: vmsnap restore --reattach {}", farm_->path())));
  }
  setup.record.image = std::filesystem::absolute(image_->path()).string();
  setup.record.image_id = image_->info().id;
  setup.record.prefetch = options_.vm.prefetch.value_or(Prefetch::all);
  setup.record.memory = options_.memory;
  VMSNAP_CHECK(farm_->write(setup.record));
  connection_ = VMSNAP_TRY(start_keeper(std::move(setup), {}));
  return {};
}

Status CloneStarter::launch(const std::string& name) {
  int ends[2];
  if (::pipe2(ends, O_CLOEXEC) < 0) return fail_errno(errno, "cannot make a pipe");
  Started clone;
  clone.name = name;
  clone.report = Fd(ends[0]);
  const Fd report(ends[1]);
  clone.launcher = ::fork();
  if (clone.launcher < 0) return fail_errno(errno, "cannot start a process");
  if (clone.launcher == 0) {
    go_.reset();
    const nlohmann::json said = start_clone(options_.vm, *farm_, name, std::move(image_), started_,
                                            {report.get(), wait_for_go_.get()});
    const std::string text = json_line(said);
    (void)write_all(report.get(), std::as_bytes(std::span(text)), "a pipe");
    ::_exit(0);
  }
  started_clones_.push_back(std::move(clone));
  return {};
}

void CloneStarter::hear(Started& clone) const {
  std::string text(8192, '\0');
  const ssize_t got = ::read(clone.report.get(), text.data(), text.size());
  text.resize(got > 0 ? static_cast<size_t>(got) : 0);
  if (text.starts_with('+')) {
    clone.loaded = true;
    text.erase(0, 1);
    if (text.empty()) return;
  }
  clone.json = parse_json(text);
  if (!clone.json.is_object()) clone.json = {{"error", "the process that started it was killed"}};
  clone.report.reset();
  ::waitpid(clone.launcher, nullptr, 0);
}

// Waits until at most so many have not come so far.
Status CloneStarter::collect(Until until, size_t at_most) {
  for (;;) {
    std::vector<pollfd> waits;
    std::vector<Started*> whose;
    for (Started& clone : started_clones_) {
      if (!clone.report || (until == Until::loaded && clone.loaded)) continue;
      waits.push_back({clone.report.get(), POLLIN, 0});
      whose.push_back(&clone);
    }
    if (waits.size() <= at_most) return {};
    if (::poll(waits.data(), waits.size(), 1000) < 0 && errno != EINTR) {
      return fail_errno(errno, "cannot wait for a process");
    }
    for (size_t i = 0; i < waits.size(); ++i) {
      if (waits[i].revents) hear(*whose[i]);
    }
  }
}

void CloneStarter::print() const {
  nlohmann::json clones = nlohmann::json::array();
  double last = 0;
  size_t run = 0;
  for (const Started& clone : started_clones_) {
    nlohmann::json entry = clone.json;
    entry["clone"] = clone.name;
    clones.push_back(std::move(entry));
    if (clone.json.contains("error")) continue;
    ++run;
    last = std::max(last, clone.json.value("ready_ms", 0.0));
  }
  if (options_.vm.json) {
    const nlohmann::json summary = {{"id", image_->info().id},
                                    {"run_dir", farm_->path()},
                                    {"ready_ms", last},
                                    {"clones", std::move(clones)}};
    print_json(context_.out, summary);
  } else {
    context_.out << fmt::format("{} clones of {} in {}, the last after {:.1f} ms\n", run,
                                image_->path(), farm_->path(), last);
    for (const Started& clone : started_clones_) {
      if (clone.json.contains("error")) continue;
      context_.out << fmt::format("  {:>4}  process {}, {:.1f} ms, monitor {}\n", clone.name,
                                  clone.json.value("pid", 0), clone.json.value("ready_ms", 0.0),
                                  clone.json.value("qmp", ""));
    }
  }
  context_.out.flush();
}

Status CloneStarter::what_was_lost() const {
  const auto record = farm_->read();
  if (!record || record->unreadable == 0) return {};  // or the directory was removed
  return tl::unexpected(
      Error(ErrorCode::poisoned, fmt::format("{} pages of {} could not be read back for the clones",
                                             record->unreadable, image_->path()))
          .with_remedy("vmsnap verify names what is damaged."));
}

// The keeper may have been killed, too, and then they wait for their memory.
Status CloneStarter::check_none_is_left() const {
  for (const std::string& name : farm_->clones()) {
    if (!lives(*farm_, name)) continue;
    return tl::unexpected(
        Error(ErrorCode::vm, fmt::format("the page server of the clones in {} is dead; they wait for "
                                         "their memory",
                                         farm_->path()))
            .with_remedy(fmt::format("vmsnap restore --reattach {}", shell_quoted(farm_->path()))));
  }
  return {};
}

Status CloneStarter::wait_for_the_end() const {
  // The keeper removes its socket when the last clone has gone.
  while (!interrupted()) {
    if (!connect_for_messages(farm_->socket())) {
      VMSNAP_CHECK(check_none_is_left());
      return what_was_lost();
    }
    for (int i = 0; i < 10 && !interrupted(); ++i) {
      std::this_thread::sleep_for(std::chrono::milliseconds(50));
    }
  }
  return fail(ErrorCode::interrupted,
              "interrupted; the clones run on: vmsnap clones --run-dir {} lists and stops them",
              shell_quoted(farm_->path()));
}

// Not while its keeper is there, to whom others may have come meanwhile.
void CloneStarter::remove_unused_farm() {
  connection_.reset();
  for (int i = 0; i < 100 && farm_->clones().empty(); ++i) {
    if (const auto lock = farm_->lock()) {
      std::error_code ignored;
      std::filesystem::remove_all(farm_->path(), ignored);
      return;
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(50));
  }
}

Status CloneStarter::run() {
  Status done = start_all();
  if (!done && farm_ && made_farm_) remove_unused_farm();
  return done;
}

Status CloneStarter::start_all() {
  VMSNAP_CHECK(prepare());
  VMSNAP_CHECK(join_or_make_farm());
  int ends[2];
  if (::pipe2(ends, O_CLOEXEC) < 0) return fail_errno(errno, "cannot make a pipe");
  wait_for_go_ = Fd(ends[0]);
  go_ = Fd(ends[1]);
  const size_t at_once = 2 * std::max(1U, std::thread::hardware_concurrency());
  Status launched;
  for (unsigned i = 0; i < options_.count && launched && !interrupted(); ++i) {
    launched = collect(Until::loaded, at_once - 1);
    if (launched) launched = launch(VMSNAP_TRY(farm_->new_clone()));
  }
  if (launched) launched = collect(Until::loaded, 0);
  if (launched && !interrupted()) {
    const std::string words(started_clones_.size(), '+');
    launched = write_all(go_.get(), std::as_bytes(std::span(words)), "a pipe");
  }
  go_.reset();
  VMSNAP_CHECK(collect(Until::running, 0));
  VMSNAP_CHECK(launched);
  size_t failed = 0;
  for (const Started& clone : started_clones_) {
    if (!clone.json.contains("error")) continue;
    ++failed;
    log_line(LogLevel::error, fmt::format("clone {} could not be started: {}", clone.name,
                                          clone.json.value("error", "")));
    const std::string remedy = clone.json.value("remedy", "");
    if (!remedy.empty()) log_line(LogLevel::error, "  " + remedy);
  }
  connection_.reset();
  if (failed == started_clones_.size()) {
    return fail(ErrorCode::vm, "none of the {} clones could be started", failed);
  }
  print();
  if (failed > 0) {
    return fail(ErrorCode::some_failed, "{} of {} clones could not be started", failed,
                started_clones_.size());
  }
  VMSNAP_CHECK(check_interrupted());
  return options_.vm.detach ? Status() : wait_for_the_end();
}

}  // namespace

Status start_clones(const CloneOptions& options, CommandContext& context) {
  return CloneStarter(options, context).run();
}

Status reattach_farm(const std::string& run_dir, const KeySource& key, bool json,
                     CommandContext& context) {
  FarmDir farm = VMSNAP_TRY(FarmDir::open(run_dir));
  Fd lock = VMSNAP_TRY(farm.lock(takeover_patience));
  FarmRecord record = VMSNAP_TRY(farm.read());
  const auto image = VMSNAP_TRY(open_recorded_image(record.image, record.image_id, key));
  std::vector<std::string> living;
  Result<SharedMemory> memory =
      fail(ErrorCode::vm, "no clone lives in {}; there is nothing to take over", farm.path());
  for (const std::string& name : farm.clones()) {
    const auto clone = read_restore_record(farm.file(name));
    if (!clone || clone->phase < RestorePhase::registered) continue;
    const auto process = find_process(*clone);
    if (!process) continue;
    if (clone->phase < RestorePhase::loaded) {
      kill_and_wait(*process);  // it never was complete, and its starter is dead
      continue;
    }
    living.push_back(name);
    if (!memory) memory = SharedMemory::of_clone(*process, image->page_count());
  }
  if (!memory) return tl::unexpected(std::move(memory).error());
  const Fd keeper =
      VMSNAP_TRY(start_keeper({farm, std::move(lock), record, *image, *std::move(memory)}, living));
  const LinkMessage hello =
      VMSNAP_TRY(ask(keeper.get(), {{"do", "hello"}}, {}, std::chrono::seconds(30)));
  const nlohmann::json served = hello.json.value("clones", nlohmann::json::array());
  if (json) {
    print_json(context.out, {{"run_dir", farm.path()}, {"clones", served}});
  } else {
    context.out << fmt::format("{} clones in {} are served again\n", served.size(), farm.path());
  }
  std::erase_if(living, [&](const std::string& name) {
    return std::ranges::count(served.begin(), served.end(), nlohmann::json(name)) > 0 || !lives(farm, name);
  });
  if (living.empty()) return {};
  return tl::unexpected(
      Error(ErrorCode::vm, fmt::format("not served: clone {}; it waits for its memory", fmt::join(living, ", ")))
          .with_remedy(fmt::format("{} says why.", farm.file("vmsnap.log"))));
}

}  // namespace vmsnap
