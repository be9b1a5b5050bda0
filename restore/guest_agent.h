// The guest's own agent (qemu-ga), where a VM has one: its channel among the
// VM's character devices, and the one thing that is asked of it here.
//
// What comes from the guest is not trusted: lines are bounded, every wait has a
// limit, and an answer that is none is an error.
//
// Source: QEMU Guest Agent Protocol Reference (guest-sync-delimited,
// guest-set-time).
#pragma once

#include <chrono>
#include <optional>
#include <span>
#include <string>

#include "formats/error.h"

namespace vmsnap {

// The socket of the channel "org.qemu.guest_agent.0" in a QEMU command line;
// none: it has no agent, or not by a socket.
std::optional<std::string> guest_agent_socket(std::span<const std::string> arguments);

// Sets the guest's clock to the host's. Waits for the agent; ErrorCode::vm when
// it does not answer within the limit, or says no.
Status set_guest_clock(const std::string& socket_path,
                       std::chrono::milliseconds limit = std::chrono::seconds(10));

}  // namespace vmsnap
