// Messages between the processes of a farm: one JSON object a message, with
// descriptors beside it, over a Unix socket that keeps messages whole
// (SOCK_SEQPACKET). A request is an object with "do"; its answer has "error"
// or what was asked for.
//
// Receiving waits, with a limit. Either end may be dead: that is an error value, never
// a signal. What comes in is bounded before it is parsed.
#pragma once

#include <chrono>
#include <nlohmann/json.hpp>
#include <optional>
#include <vector>

#include "formats/error.h"
#include "formats/file.h"

namespace vmsnap {

struct LinkMessage {
  nlohmann::json json;
  std::vector<Fd> descriptors;  // at most eight
};

// ErrorCode::vm when the other end is gone, or does not read: this never waits.
Status send_message(int socket, const nlohmann::json& json,
                    const std::vector<int>& descriptors = {});

// The next message; none: the other end has closed. ErrorCode::vm when nothing
// comes within the limit, ErrorCode::damaged for what is no message of ours.
Result<std::optional<LinkMessage>> receive_message(int socket, std::chrono::milliseconds limit);

// A request and its answer. The error of an answer is ErrorCode::vm.
Result<LinkMessage> ask(int socket, const nlohmann::json& request,
                        const std::vector<int>& descriptors = {},
                        std::chrono::milliseconds limit = std::chrono::seconds(10));

// A socket at `path` (mode 0600), listening; and a connection to one.
// ErrorCode::vm from connect when nobody listens.
Result<Fd> listen_for_messages(const std::string& path);
Result<Fd> connect_for_messages(const std::string& path);

// Two ends that are connected, for a process and its child.
struct MessagePair {
  Fd ours, theirs;
};
Result<MessagePair> message_pair();

}  // namespace vmsnap
