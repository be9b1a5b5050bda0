#include "restore/launch_rules.h"

#include <algorithm>
#include <cctype>
#include <ranges>
#include <span>

#include "restore/launch_rewriter.h"
#include "restore/option_value.h"

namespace vmsnap {

Status LaunchRewriter::apply_rules(QemuOption& option) {
  if (option.written.empty()) return {};
  VMSNAP_CHECK(refuse_descriptors(option));
  for (const RuleEntry& entry : rules()) {
    if (entry.option == option.name) return (this->*entry.rule)(option);
  }
  return {};
}

Status LaunchRewriter::replace_texts(std::vector<QemuOption>& options) const {
  for (const Replacement& replacement : request_.replacements) {
    bool found = false;
    for (QemuOption& option : options) {
      if (!option.value) continue;
      for (size_t at = 0; (at = option.value->find(replacement.from, at)) != std::string::npos;) {
        option.value->replace(at, replacement.from.size(), replacement.to);
        at += replacement.to.size();
        found = true;
      }
    }
    if (!found) {
      return tl::unexpected(
          Error(ErrorCode::usage, fmt::format("--replace {}={}: no recorded argument contains it",
                                              replacement.from, replacement.to))
              .with_remedy("--dry-run without it prints the command line."));
    }
  }
  return {};
}

namespace {

// -set GROUP.ID.KEY=VALUE changes an option before it: written there, it is for the
// rules of that option. One that names none stays.
void fold_settings(std::vector<QemuOption>& options) {
  for (auto setting = options.begin(); setting != options.end(); ++setting) {
    if (setting->name != "set" || !setting->value) continue;
    const std::string& text = *setting->value;
    const size_t id = text.find('.');
    const size_t key = id == std::string::npos ? id : text.find('.', id + 1);
    const size_t value = key == std::string::npos ? key : text.find('=', key + 1);
    if (value == std::string::npos) continue;
    const std::string group = text.substr(0, id), name = text.substr(id + 1, key - id - 1);
    const auto named = std::find_if(options.begin(), setting, [&](const QemuOption& option) {
      return option.name == group && identity(option) == name;
    });
    if (named == setting) continue;
    OptionValue changed = OptionValue::parse(*named->value, implied_key(named->name));
    if (changed.is_json()) continue;  // QEMU knows no such option by its id
    changed.set(text.substr(key + 1, value - key - 1), text.substr(value + 1));
    named->value = changed.text();
    setting->dropped = true;
  }
}

}  // namespace

namespace {

bool is_secret(const QemuOption& option) {
  if (option.name != "object" || !option.value) return false;
  return OptionValue::parse(*option.value, "qom-type").get("qom-type") == "secret";
}

// Whether `name` is in the text, and not as a part of a longer one.
bool has_name(const std::string& text, const std::string& name) {
  const auto goes_on = [&](size_t at) {
    return at < text.size() && std::isalnum(static_cast<unsigned char>(text[at]));
  };
  for (size_t at = 0; (at = text.find(name, at)) != std::string::npos; ++at) {
    if (!goes_on(at + name.size()) && (at == 0 || !goes_on(at - 1))) return true;
  }
  return false;
}

}  // namespace

// Descriptors for what has become a file of ours, and libvirt's key for what it would
// send later, which lies in a file that goes with the original.
Status LaunchRewriter::drop_what_nothing_names(std::vector<QemuOption>& options,
                                               const std::vector<QemuOption>& extra) {
  const auto is_named = [&](const QemuOption& named, const std::string& name) {
    const auto names = [&](const QemuOption& other) {
      return &other != &named && !other.dropped && other.value && has_name(*other.value, name);
    };
    return std::ranges::any_of(options, names) || std::ranges::any_of(extra, names);
  };
  // The last first: what is dropped names nothing any more, and only what stands before it.
  for (QemuOption& option : std::views::reverse(options)) {
    if (option.dropped || option.is_replacement) continue;
    const auto id = identity(option);
    if (option.name == "add-fd") {
      if (!id || is_named(option, "/dev/fdset/" + *id)) return refuse_add_fd(option);
      option.dropped = true;
    } else if (is_secret(option)) {
      option.dropped = id && !is_named(option, *id);
    }
  }
  return {};
}

Result<std::vector<std::string>> LaunchRewriter::rewrite() {
  const std::span<const std::string> recorded(request_.record.arguments);
  std::vector<QemuOption> options = parse_qemu_options(recorded.subspan(1));
  VMSNAP_CHECK(replace_texts(options));
  fold_settings(options);
  std::vector<QemuOption> extra = parse_qemu_options(request_.extra);

  for (QemuOption& option : options) {
    if (option.dropped) continue;
    const auto same = std::find_if(extra.begin(), extra.end(), [&](const QemuOption& other) {
      return identity(option) && other.name == option.name && identity(other) == identity(option);
    });
    if (same != extra.end()) {
      option = *same;
      option.is_replacement = true;
      same->dropped = true;  // it has its place now
      continue;
    }
    VMSNAP_CHECK(apply_rules(option));
  }
  VMSNAP_CHECK(drop_what_nothing_names(options, extra));

  std::vector<std::string> arguments;
  const auto append = [&](const QemuOption& option) {
    if (option.dropped) return;
    if (!option.written.empty()) arguments.push_back(option.written);
    if (option.value) arguments.push_back(*option.value);
  };
  for (const QemuOption& option : options) append(option);
  const auto add = [&](std::initializer_list<std::string> words) {
    arguments.insert(arguments.end(), words);
  };
  if (!machine_pinned_ && !request_.record.machine.empty()) {
    add({"-machine", "type=" + request_.record.machine});
  }
  if (default_serial_) add({"-serial", "file:" + in_dir("serial0.log")});
  if (!nographic_) add({"-display", "none"});
  const std::string qmp = VMSNAP_TRY(socket_path("qmp.sock"));
  add({"-monitor", "none"});
  add({"-qmp", "unix:" + escape_commas(qmp) + ",server=on,wait=off"});
  add({"-pidfile", in_dir("qemu.pid")});
  add({"-global", std::string(send_configuration_off)});
  add({"-S", "-incoming", "defer"});
  for (const QemuOption& option : extra) append(option);
  return arguments;
}

Result<Replacement> parse_replacement(const std::string& text) {
  const size_t equals = text.find('=');
  if (equals == 0 || equals == std::string::npos) {
    return fail(ErrorCode::usage, "--replace wants OLD=NEW, not \"{}\"", text);
  }
  return Replacement{text.substr(0, equals), text.substr(equals + 1)};
}

Result<LaunchLine> derive_launch_line(const LaunchRequest& request) {
  if (request.record.arguments.empty()) {
    return fail(ErrorCode::damaged, "the image records no command line");
  }
  LaunchLine line;
  line.executable = request.executable.empty() ? request.record.executable : request.executable;
  line.working_directory = request.working_directory.empty() ? request.record.working_directory
                                                             : request.working_directory;
  LaunchRewriter rewriter(request);
  line.arguments = VMSNAP_TRY(rewriter.rewrite());
  line.arguments.insert(line.arguments.begin(), line.executable);
  return line;
}

std::string shell_quoted(std::string_view argument) {
  static constexpr std::string_view plain =
      "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_./:=,+@%";
  if (!argument.empty() && argument.find_first_not_of(plain) == std::string_view::npos) {
    return std::string(argument);
  }
  std::string quoted = "'";
  for (const char c : argument) {
    if (c == '\'') {
      quoted += "'\\''";
    } else {
      quoted += c;
    }
  }
  return quoted + "'";
}

std::string shell_quoted(const LaunchLine& line) {
  std::string text;
  for (const std::string& argument : line.arguments) {
    if (!text.empty()) text += ' ';
    text += shell_quoted(argument);
  }
  return text;
}

}  // namespace vmsnap
