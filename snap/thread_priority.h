// Who gets a processor first: the guest and those it waits for, then the rest.
#pragma once

namespace vmsnap {

// The calling thread answers those who wait: it gets a processor as soon as it
// wants one, if we may ask for that (CAP_SYS_NICE); nothing else changes.
void prefer_this_thread();
// The calling thread has time: it must not take a processor from the guest.
void defer_this_thread();

}  // namespace vmsnap
