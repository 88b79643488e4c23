//! Where the log of each data directory is that a test uses, when all gateways are to be of a cluster: a
//! nats-server, which lives until the process of the tests ends.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, LazyLock, Mutex};
use std::time::{Duration, Instant};

use headgate::testing::{Config, EmbeddedLog, JetstreamLog, Log, LogOpenError, check_topic_has_subject};
use headgate_bridge_nats::Nats;
use tokio::runtime::Runtime;

use super::PATIENCE;
use super::nats::NatsServer;

static SERVERS: LazyLock<Mutex<BTreeMap<PathBuf, NatsServer>>> = LazyLock::new(|| {
    extern "C" fn end() {
        if let Ok(mut servers) = SERVERS.lock() {
            servers.clear();
        }
    }
    // SAFETY: `end` is a function without arguments, and does not unwind.
    unsafe { libc::atexit(end) };
    Mutex::default()
});

/// Whether gateways are to be of a cluster.
pub fn is_wanted() -> bool {
    match std::env::var("HEADGATE_TEST_LOG").as_deref() {
        Ok("jetstream") => true,
        Ok("embedded" | "") | Err(_) => false,
        Ok(other) => panic!("HEADGATE_TEST_LOG is {other:?}, and there is \"embedded\" and \"jetstream\""),
    }
}

/// Where the log of a data directory is; `None` if it is in the directory.
pub fn server_of(dir: &Path) -> Option<String> {
    is_wanted().then(|| {
        let mut servers = SERVERS.lock().expect("no holder panics");
        // Room for the largest payload, and what is said about it.
        let server = || NatsServer::with("max_payload: 4MB");
        servers.entry(dir.to_owned()).or_insert_with(server).url()
    })
}

/// The offset of the first record that there ever is: JetStream counts from 1.
pub fn first_offset() -> u64 {
    u64::from(is_wanted())
}

/// The log of a data directory whose gateway has ended.
pub fn log_of(dir: &Path) -> Arc<dyn Log> {
    let config = Config::default();
    match server_of(dir) {
        Some(url) => log_at(url),
        None => Arc::new(EmbeddedLog::open(dir, &config.log, &config.intake).expect("the log opens")),
    }
}

/// The log that a NATS server has.
pub fn log_at(url: String) -> Arc<dyn Log> {
    let mut config = Config::default();
    config.nats.servers = vec![url];
    static RUNTIME: LazyLock<Runtime> = LazyLock::new(|| Runtime::new().expect("a runtime"));
    RUNTIME.block_on(async {
        let settings = config.nats.connection("test").expect("no file is named");
        let nats = Nats::connect(&settings).await.expect("settings that can work");
        let deadline = Instant::now() + PATIENCE;
        loop {
            match JetstreamLog::open(&nats, &nats, &config, "test").await {
                Ok(log) => return Arc::new(log) as Arc<dyn Log>,
                Err(LogOpenError::Away(_)) if Instant::now() < deadline => {
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
                Err(error) => panic!("the log does not open: {error}"),
            }
        }
    })
}

/// Whether a log can have records with this topic: one in JetStream has those that are subjects of NATS.
pub fn has_room_for(topic: &str) -> bool {
    !is_wanted() || check_topic_has_subject(topic).is_ok()
}
