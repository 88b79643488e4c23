//! The service manager that has started this process, if it is one that wants to be told how it is (systemd with
//! `Type=notify`): that it starts and needs longer, that it serves, that it lives, that it reads its configuration again, and
//! that it drains. The words are those of `sd_notify(3)`. Without such a manager nothing is said.

use std::time::Duration;

use sd_notify::NotifyState;
use tokio::task::JoinHandle;

use crate::gateway::Gateway;

/// By how much a start is extended, again and again while it lasts.
const START_EXTENSION: Duration = Duration::from_secs(30);
/// How often that is said.
const START_EXTENSION_INTERVAL: Duration = Duration::from_secs(10);
/// What a drain may take beyond its own bound: threads end, files close.
const DRAIN_EXTENSION: Duration = Duration::from_secs(10);
/// Signs of life within the time after which a process without one is killed.
const WATCHDOG_SIGNS: u32 = 3;

/// What tells the service manager.
pub(super) struct ServiceManager {
    is_there: bool,
    /// How often it wants a sign of life.
    watchdog_interval: Option<Duration>,
    /// What says again and again what has to be said in this state.
    repeated: Option<JoinHandle<()>>,
}

impl ServiceManager {
    /// The one that the environment names.
    pub(super) fn from_environment() -> Self {
        let is_there = std::env::var_os("NOTIFY_SOCKET").is_some_and(|socket| !socket.is_empty());
        let watchdog = sd_notify::watchdog_enabled().filter(|_| is_there);
        let watchdog_interval =
            watchdog.map(|within| within / WATCHDOG_SIGNS).filter(|every| !every.is_zero());
        Self { is_there, watchdog_interval, repeated: None }
    }

    /// The gateway starts: that takes as long as its log takes to read, or until NATS answers. Signs of life go on if it is a
    /// start again.
    pub(super) fn starting(&mut self) {
        let watchdog = self.watchdog_interval;
        let every =
            watchdog.map_or(START_EXTENSION_INTERVAL, |watchdog| watchdog.min(START_EXTENSION_INTERVAL));
        self.say(&[NotifyState::Status("starting: reading the log")]);
        self.repeat(async move {
            loop {
                tell(&[NotifyState::ExtendTimeoutUsec(micros(START_EXTENSION)), NotifyState::Watchdog]);
                tokio::time::sleep(every).await;
            }
        });
    }

    /// The gateway serves. From here on each sign of life follows an answer of its own threads.
    pub(super) fn ready(&mut self, gateway: &Gateway) {
        self.say(&[
            NotifyState::Ready,
            NotifyState::Status(&format!("serving MQTT at {}", gateway.mqtt_addr)),
        ]);
        let Some(every) = self.watchdog_interval else { return self.end_repeated() };
        let gateway = gateway.watched();
        self.repeat(async move {
            loop {
                // On a task of its own: the runtime has to find a thread for it.
                if tokio::spawn(gateway.pulse()).await.unwrap_or(false) {
                    tell(&[NotifyState::Watchdog]);
                } else {
                    tracing::error!(
                        "the log takes nothing until a restart: the service manager gets no sign of life"
                    );
                }
                tokio::time::sleep(every).await;
            }
        });
    }

    /// The configuration is being read again.
    pub(super) fn reloading(&self) {
        if let Ok(now) = NotifyState::monotonic_usec_now() {
            self.say(&[NotifyState::Reloading, now]);
        }
    }

    /// It was.
    pub(super) fn reloaded(&self) {
        self.say(&[NotifyState::Ready]);
    }

    /// The gateway drains for so long at most, and then the process ends.
    pub(super) fn stopping(&mut self, drain_max: Duration) {
        self.end_repeated();
        let within = NotifyState::ExtendTimeoutUsec(micros(drain_max + DRAIN_EXTENSION));
        self.say(&[NotifyState::Stopping, NotifyState::Status("draining"), within]);
    }

    fn say(&self, states: &[NotifyState<'_>]) {
        if self.is_there {
            tell(states);
        }
    }

    fn repeat(&mut self, saying: impl Future<Output = ()> + Send + 'static) {
        self.end_repeated();
        if self.is_there {
            self.repeated = Some(tokio::spawn(saying));
        }
    }

    fn end_repeated(&mut self) {
        if let Some(repeated) = self.repeated.take() {
            repeated.abort();
        }
    }
}

impl Drop for ServiceManager {
    fn drop(&mut self) {
        self.end_repeated();
    }
}

fn tell(states: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(states) {
        tracing::debug!(%error, "the service manager could not be told");
    }
}

fn micros(time: Duration) -> u32 {
    u32::try_from(time.as_micros()).unwrap_or(u32::MAX)
}
