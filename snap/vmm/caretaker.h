// A forked helper that must outlive us, so that a VM never pays for our end.
#pragma once

namespace vmsnap {

// To be called in the child, first thing: a session of its own, every signal
// ignored that can be (SIGCHLD stays, for waitpid(2)), and a process name that
// killall(1) of ours does not find. At most 15 characters.
void become_caretaker(const char* name);

}  // namespace vmsnap
