//! The two signals that ask a process to end: SIGTERM, and Ctrl-C's SIGINT.

use std::io;

use tokio::signal::unix::{Signal, SignalKind, signal};

/// Exit code after a second request to end, as shells give it for SIGINT.
const INTERRUPTED: i32 = 130;

/// Listens for requests to end, from its creation on: one that comes before [`Signals::asked`] is
/// called is not lost.
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

    /// Lets `drain` finish; ends the process on the spot if it is asked again meanwhile.
    pub(super) async fn finish(mut self, drain: impl Future<Output = ()>) {
        tokio::select! {
            () = drain => {}
            () = self.asked() => std::process::exit(INTERRUPTED),
        }
    }
}
