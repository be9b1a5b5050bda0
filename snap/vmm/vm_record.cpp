#include "snap/vmm/vm_record.h"

namespace vmsnap {

using Json = nlohmann::json;

Json to_json(const VmRecord& record) {
  return {
      {"kind", "qemu"},
      {"name", record.name},
      {"executable", record.executable},
      {"arguments", record.arguments},
      {"working_directory", record.working_directory},
      {"machine", record.machine},
      {"qemu_version", record.qemu_version},
      {"was_running", record.was_running},
  };
}

namespace {

Result<std::string> text(const Json& source, const char* key) {
  const auto found = source.find(key);
  if (found == source.end() || !found->is_string() ||
      found->get_ref<const std::string&>().find('\0') != std::string::npos) {
    return fail(ErrorCode::damaged, "the image's record of its VM has no proper '{}'", key);
  }
  return found->get<std::string>();
}

}  // namespace

Result<VmRecord> vm_record_from_json(const Json& source) {
  if (!source.is_object() || source.value("kind", Json()) != "qemu") {
    return tl::unexpected(Error(ErrorCode::refused, "this image holds no virtual machine")
                              .with_remedy("An image made with --pid can be exported and served, "
                                           "not restored."));
  }
  VmRecord record;
  record.name = VMSNAP_TRY(text(source, "name"));
  record.executable = VMSNAP_TRY(text(source, "executable"));
  record.working_directory = VMSNAP_TRY(text(source, "working_directory"));
  record.machine = VMSNAP_TRY(text(source, "machine"));
  record.qemu_version = VMSNAP_TRY(text(source, "qemu_version"));
  const auto running = source.find("was_running");
  const auto arguments = source.find("arguments");
  if (running == source.end() || !running->is_boolean() || arguments == source.end() ||
      !arguments->is_array() || arguments->empty() || arguments->size() > 65536) {
    return fail(ErrorCode::damaged, "the image's record of its VM is not complete");
  }
  record.was_running = running->get<bool>();
  for (const Json& argument : *arguments) {
    if (!argument.is_string() ||
        argument.get_ref<const std::string&>().find('\0') != std::string::npos) {
      return fail(ErrorCode::damaged, "the image's record of its VM has an improper argument");
    }
    record.arguments.push_back(argument.get<std::string>());
  }
  return record;
}

}  // namespace vmsnap
