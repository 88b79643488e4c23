//! The signals of a process that serves: SIGTERM and Ctrl-C's SIGINT ask it to end, SIGHUP to read its configuration
//! again. SIGHUP never ends it, from the first line of the command on.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};

use tokio::signal::unix::{Signal, SignalKind, signal};

/// Exit code after a second request to end, as shells give it for SIGINT.
const INTERRUPTED_EXIT_CODE: i32 = 130;

/// Whether SIGHUP has come before there were [`Signals`].
static HUNG_UP_EARLY: AtomicBool = AtomicBool::new(false);

/// Keeps SIGHUP from ending the process, and remembers that it came, until [`Signals::listen`].
pub(super) fn catch_early_hangup() {
    extern "C" fn note(_: libc::c_int) {
        HUNG_UP_EARLY.store(true, Ordering::Relaxed);
    }
    let handler: extern "C" fn(libc::c_int) = note;
    // SAFETY: the handler only stores to an atomic, which a signal handler may.
    unsafe {
        libc::signal(libc::SIGHUP, handler as libc::sighandler_t);
    }
}

/// Listens for requests to end from its creation on: a signal that comes before the call of
/// [`Signals::asked`] is not lost.
pub(super) struct Signals {
    terminate: Signal,
    interrupt: Signal,
    hangup: Signal,
    /// SIGHUP has come before, and is not taken yet.
    hung_up_early: bool,
}

/// What a signal asks for.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum AskedSignal {
    /// To end.
    End,
    /// To read the configuration again.
    Reload,
}

impl Signals {
    pub(super) fn listen() -> io::Result<Self> {
        let terminate = signal(SignalKind::terminate())?;
        let interrupt = signal(SignalKind::interrupt())?;
        let hangup = signal(SignalKind::hangup())?;
        // Read once: the handler of that time is called for later signals too.
        let hung_up_early = HUNG_UP_EARLY.load(Ordering::Relaxed);
        Ok(Self { terminate, interrupt, hangup, hung_up_early })
    }

    /// Returns at the next signal, with what it asks for.
    pub(super) async fn asked_or_hung_up(&mut self) -> AskedSignal {
        if std::mem::take(&mut self.hung_up_early) {
            return AskedSignal::Reload;
        }
        let Self { terminate, interrupt, hangup, .. } = self;
        tokio::select! {
            _ = terminate.recv() => AskedSignal::End,
            _ = interrupt.recv() => AskedSignal::End,
            _ = hangup.recv() => AskedSignal::Reload,
        }
    }

    /// Returns at the next request to end.
    pub(super) async fn asked(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }

    /// Waits for `drain`; a second request to end meanwhile ends the process at once.
    pub(super) async fn finish(&mut self, drain: impl Future<Output = ()>) {
        tokio::select! {
            () = drain => {}
            () = self.asked() => std::process::exit(INTERRUPTED_EXIT_CODE),
        }
    }
}
