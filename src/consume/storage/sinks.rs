//! All sinks of a gateway. Each has a consumer of its own: a thread, a cursor, a hold on the log, its errors.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::future::join_all;

#[cfg(feature = "delta")]
use super::lake_place::DeltaPlace;
use super::postgres_place::PostgresPlace;
use super::record_sink::SinkPlace;
use super::sqlite_place::SqlitePlace;
use super::{StorageConsumer, StorageError, StoredLimitsSource};
use crate::config::{self, SinkKind};
use crate::consume::sink::latest_board::LatestBoard;
use crate::log::Log;
use crate::message::{Offset, TimeMicros};

/// How often it is looked whether a sink that is waited for has failed.
const SINK_TROUBLE_INTERVAL: Duration = Duration::from_millis(100);

/// The running consumers, one for each sink.
pub struct StorageSinks {
    /// In the order of the settings; at least one.
    consumers: Vec<StorageConsumer>,
    /// Which of them reads are answered from.
    read_from: usize,
    /// Where the newest values in `records.db` are shown from.
    board: Arc<LatestBoard>,
}

/// How a sink does.
#[derive(Debug)]
pub struct SinkState {
    /// Its kind.
    pub kind: SinkKind,
    /// Whether reads are answered from it.
    pub is_read: bool,
    /// Whether this gateway writes into it now; another one may, where they share it.
    pub is_writer: bool,
    /// The first offset that is not stored in it yet.
    pub cursor: Offset,
    /// Records that it took a second, over the last ten seconds.
    pub rate: f64,
    /// The present error, while it fails.
    pub trouble: Option<String>,
    /// The newest error and when it was, also if it is over.
    pub last_error: Option<(TimeMicros, String)>,
    /// What was set aside of it since the start, and where that is.
    pub set_aside: Option<String>,
}

impl StorageSinks {
    /// Starts a consumer for each sink of the settings. `None` without any. `is_shared`: other gateways have the same log. Blocks: a sink in `dir` is opened, which may read the
    /// log.
    ///
    /// # Errors
    /// [`StorageError`].
    pub fn start(
        dir: &Path,
        config: &config::StorageConfig,
        log: &Arc<dyn Log>,
        is_shared: bool,
    ) -> Result<Option<Self>, StorageError> {
        let (mut consumers, board) = (Vec::new(), Arc::<LatestBoard>::default());
        for kind in &config.sinks {
            let place: Box<dyn SinkPlace> = match kind {
                SinkKind::Sqlite => Box::new(SqlitePlace::new(dir, config.samples, board.clone())),
                SinkKind::Postgres => {
                    Box::new(PostgresPlace::new(&config.postgres, config.samples, is_shared))
                }
                #[cfg(feature = "delta")]
                SinkKind::Delta => Box::new(DeltaPlace::new(dir, &config.delta, log.clone(), is_shared)),
                // The settings have been checked.
                #[cfg(not(feature = "delta"))]
                SinkKind::Delta => continue,
            };
            consumers.push(StorageConsumer::start(place, config.nice, log.clone())?);
        }
        if consumers.is_empty() {
            return Ok(None);
        }
        let read_from = config.read_from();
        let read_from = consumers.iter().position(|consumer| Some(consumer.kind()) == read_from);
        Ok(Some(Self { consumers, read_from: read_from.unwrap_or(0), board }))
    }

    /// Removes from now on what is over these limits. They are asked for again and again.
    pub fn begin_retention(&self, limits: &StoredLimitsSource) {
        self.consumers.iter().for_each(|consumer| consumer.begin_retention(limits.clone()));
    }

    /// Where the newest values in `records.db` are shown from.
    pub fn latest_board(&self) -> &Arc<LatestBoard> {
        &self.board
    }

    /// Each sink, in the order of the settings.
    pub fn states(&self) -> Vec<SinkState> {
        let state = |(place, consumer): (usize, &StorageConsumer)| {
            let shared = &consumer.shared;
            SinkState {
                kind: consumer.kind,
                is_read: place == self.read_from,
                is_writer: *shared.is_writer.borrow(),
                cursor: consumer.cursor(),
                rate: shared.pace.lock().per_second(Instant::now()),
                trouble: consumer.trouble(),
                last_error: shared.last_error.lock().clone(),
                set_aside: consumer.set_aside(),
            }
        };
        self.consumers.iter().enumerate().map(state).collect()
    }

    /// The first offset that is not in every sink yet.
    pub fn cursor(&self) -> Offset {
        self.consumers.iter().map(StorageConsumer::cursor).min().unwrap_or(0)
    }

    /// The present error of the first sink that fails.
    pub fn trouble(&self) -> Option<String> {
        self.consumers.iter().find_map(|consumer| consumer.control.trouble())
    }

    /// Returns once every record below `offset` is in the sink that reads are answered from; never, if that
    /// ends first.
    pub async fn wait_stored(&self, offset: Offset) {
        self.consumers[self.read_from].wait_stored(offset).await;
    }

    /// Returns once what is stored follows this version of the rules about what is left out, in every sink but those
    /// that fail; they follow it before they take anything else. The one that reads are answered from is waited for in
    /// any case.
    pub async fn wait_reconciled(&self, version: u64) {
        let waits = self.consumers.iter().enumerate().map(|(place, consumer)| async move {
            let reconciled = consumer.wait_reconciled(version);
            if place == self.read_from {
                return reconciled.await;
            }
            let failing = async {
                while !consumer.is_failing() {
                    tokio::time::sleep(SINK_TROUBLE_INTERVAL).await;
                }
            };
            tokio::select! {
                () = reconciled => {}
                () = failing => {}
            }
        });
        join_all(waits).await;
    }

    /// Stores what the log already has, within the deadline, and ends the threads. The next start stores the rest.
    pub async fn stop(&self, deadline: Instant) {
        join_all(self.consumers.iter().map(|consumer| consumer.stop(deadline))).await;
    }
}
