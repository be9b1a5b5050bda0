#include "restore/farm/page_worker.h"

#include <fcntl.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>

#include "formats/log.h"
#include "formats/store/image_argument.h"
#include "restore/farm/farm_link.h"
#include "restore/farm/farm_server.h"
#include "restore/privileges.h"

namespace vmsnap {

namespace {

class PageWorker {
 public:
  explicit PageWorker(const PageWorkerSetup& setup) : setup_(setup) {}

  Status run(std::vector<KeptClone> clones, int link);

 private:
  Status add(const std::string& name, Uffd uffd, Fd pidfd, std::vector<ServedRange> ranges);
  Status answer(int link, LinkMessage request);

  const PageWorkerSetup& setup_;
  std::unique_ptr<PageCache> cache_;
  std::unique_ptr<FarmServer> server_;
};

Status PageWorker::add(const std::string& name, Uffd uffd, Fd pidfd,
                       std::vector<ServedRange> ranges) {
  VMSNAP_CHECK(uffd.make_nonblocking());
  PageMarks marks = VMSNAP_TRY(
      PageMarks::open(setup_.run_dir + "/" + name + "/pages", setup_.image.page_count()));
  return server_->add({name, std::move(uffd), std::move(pidfd), std::move(marks), std::move(ranges)});
}

Status PageWorker::answer(int link, LinkMessage request) {
  nlohmann::json reply = nlohmann::json::object();
  if (request.json["do"] == "status") reply = server_->status();
  reply["number"] = request.json["number"];
  if (request.json["do"] == "status") return send_message(link, reply);
  // "add": the keeper made it, and checked what it says.
  std::vector<ServedRange> ranges;
  for (const nlohmann::json& range : request.json["ranges"]) {
    ranges.push_back({{RemotePtr(range["host"].get<uint64_t>()), range["length"].get<uint64_t>()},
                      range["first_page"].get<uint64_t>(),
                      page_size,
                      range["name"].get<std::string>()});
  }
  const Status added =
      request.descriptors.size() == 2
          ? add(request.json["name"].get<std::string>(), Uffd::adopt(std::move(request.descriptors[0])),
                std::move(request.descriptors[1]), std::move(ranges))
          : fail(ErrorCode::io, "descriptors are missing");
  if (!added) reply["error"] = added.error().message();
  return send_message(link, reply);
}

Status PageWorker::run(std::vector<KeptClone> clones, int link) {
  cache_ = VMSNAP_TRY(PageCache::attach(setup_.memory, setup_.record.memory / page_size));
  server_ = std::make_unique<FarmServer>(setup_.image, *cache_,
                                         FarmServerOptions{.prefetch = setup_.record.prefetch});
  // Before the threads are made. The cache's userfaultfd is there by now.
  std::vector<std::string> read = paths_of(setup_.image);
  read.push_back(setup_.run_dir);  // the clones' own are made by us
  VMSNAP_CHECK(drop_privileges(read));
  VMSNAP_CHECK(server_->prepare());
  for (KeptClone& clone : clones) {
    Fd pidfd(::fcntl(clone.process.pidfd(), F_DUPFD_CLOEXEC, 0));
    const Status added =
        add(clone.name, std::move(clone.uffd), std::move(pidfd), std::move(clone.ranges));
    if (!added) log_line(LogLevel::error, added.error().message());
    clone.process = Process();  // its descriptor: three for each clone would be a third too many
  }
  // Only now: a page that one clone gave back must not come back to it because another,
  // or the loading ahead, brought it before that was known here.
  VMSNAP_CHECK(server_->start());
  for (;;) {
    auto request = VMSNAP_TRY(receive_message(link, std::chrono::milliseconds(-1)));
    if (!request) return {};
    VMSNAP_CHECK(answer(link, std::move(*request)));
  }
}

}  // namespace

int run_page_worker(const PageWorkerSetup& setup, std::vector<KeptClone> clones, int link) {
  ::prctl(PR_SET_NAME, "vmsnap-pages");
  ::prctl(PR_SET_PDEATHSIG, SIGKILL);
  // Who waits for a page is a guest: it must not queue behind other guests.
  (void)::setpriority(PRIO_PROCESS, 0, -10);
  PageWorker worker(setup);
  const Status done = worker.run(std::move(clones), link);
  if (done) return 0;
  log_line(LogLevel::error, done.error().message());
  return 1;
}

Result<nlohmann::json> PageWorkerLink::ask(nlohmann::json request,
                                          const std::vector<int>& descriptors,
                                          std::chrono::milliseconds limit) {
  const auto deadline = std::chrono::steady_clock::now() + limit;
  request["number"] = ++number_;
  VMSNAP_CHECK(send_message(fd_.get(), request, descriptors));
  for (;;) {
    const auto left = std::chrono::duration_cast<std::chrono::milliseconds>(
        deadline - std::chrono::steady_clock::now());
    auto answer = VMSNAP_TRY(receive_message(fd_.get(), std::max(left, std::chrono::milliseconds(0))));
    if (!answer) return fail(ErrorCode::vm, "the farm's page server is gone");
    if (answer->json.value("number", uint64_t{0}) != number_) continue;
    const auto error = answer->json.find("error");
    if (error == answer->json.end()) return std::move(answer->json);
    return fail(ErrorCode::vm, "{}", error->is_string() ? error->get<std::string>() : "it failed");
  }
}

Status PageWorkerLink::add(const KeptClone& clone) {
  nlohmann::json ranges = nlohmann::json::array();
  for (const ServedRange& range : clone.ranges) {
    ranges.push_back({{"host", range.range.start.address()},
                      {"length", range.range.length},
                      {"first_page", range.first_page},
                      {"name", range.name}});
  }
  VMSNAP_TRY(ask({{"do", "add"}, {"name", clone.name}, {"ranges", std::move(ranges)}},
                 {clone.uffd.fd(), clone.process.pidfd()}, std::chrono::seconds(10)));
  return {};
}

Result<nlohmann::json> PageWorkerLink::status() {
  return ask({{"do", "status"}}, {}, std::chrono::seconds(3));
}

}  // namespace vmsnap
