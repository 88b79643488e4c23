//! The two signals that ask a process to end: SIGTERM, and Ctrl-C's SIGINT.

use std::io;

use tokio::signal::unix::{Signal, SignalKind, signal};

/// Exit code after a second request to end, as shells give it for SIGINT.
const INTERRUPTED_EXIT_CODE: i32 = 130;

/// Listens for requests to end from its creation on: a signal that comes before the call of
/// [`Signals::asked`] is not lost.
pub(super) struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    pub(super) fn listen() -> io::Result<Self> {
        Ok(Self { terminate: signal(SignalKind::terminate())?, interrupt: signal(SignalKind::interrupt())? })
    }

    /// Returns at the next request to end.
    pub(super) async fn asked(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }

    /// Waits for `drain`; a second request to end meanwhile ends the process at once.
    pub(super) async fn finish(mut self, drain: impl Future<Output = ()>) {
        tokio::select! {
            () = drain => {}
            () = self.asked() => std::process::exit(INTERRUPTED_EXIT_CODE),
        }
    }
}
