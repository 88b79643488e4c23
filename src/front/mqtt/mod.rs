//! The MQTT front: 3.1, 3.1.1 and 5 over TCP.
//!
//! A connection is one task. It [shakes hands](handshake), enters its key's connections and the
//! [sessions], and then is [served](connection): each read of the socket is decoded in place and
//! handed to intake as one draft; while the log makes it durable the next is read; the answers of a
//! draft leave in one write.

mod acks;
pub mod codec;
mod connection;
mod credentials;
mod handshake;
mod inbound;
mod sessions;

use std::sync::Arc;
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{debug, warn};

use crate::config;
use crate::intake::Intake;
use sessions::Sessions;

/// What every connection works with.
pub(super) struct Front {
    intake: Intake,
    config: config::Mqtt,
    sessions: Arc<Sessions>,
    drain: CancellationToken,
}

/// Serves MQTT on `listener` until `drain` is cancelled, then lets every connection send the
/// acknowledgements that it owes, and returns when the last is closed.
pub async fn serve(listener: TcpListener, intake: Intake, config: config::Mqtt, drain: CancellationToken) {
    let permits = Arc::new(Semaphore::new(config.connections_max.min(Semaphore::MAX_PERMITS)));
    let connections = TaskTracker::new();
    let front = Arc::new(Front { intake, config, sessions: Arc::default(), drain: drain.clone() });
    loop {
        let accepted = tokio::select! {
            () = drain.cancelled() => break,
            accepted = listener.accept() => accepted,
        };
        let (stream, peer) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                // Out of file descriptors, mostly: others have to close before it gets better.
                warn!(%error, "cannot accept an MQTT connection");
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            }
        };
        let Ok(permit) = permits.clone().try_acquire_owned() else {
            front.intake.metrics().refused(crate::message::Transport::Mqtt, "connections_max");
            debug!(%peer, connections_max = front.config.connections_max, "refused a connection: there are too many");
            continue;
        };
        let front = front.clone();
        connections.spawn(async move {
            connection::run(&front, stream, peer).await;
            drop(permit);
        });
    }
    drop(listener);
    front.sessions.drain();
    connections.close();
    connections.wait().await;
}
