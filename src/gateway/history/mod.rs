//! One history: whether the cluster's stream and buckets are those that this gateway has followed, and what is decided when
//! they are not.
//!
//! | what | where |
//! |---|---|
//! | the identity of the log, its epoch, when each stream and bucket was created | the row `history` of the registry's bucket ([`ClusterHistory`]); identity and epoch also in the metadata of each stream and bucket |
//! | what this gateway has followed of each, and how far | `history.json` in its data directory ([`FollowedHistory`]) |
//!
//! A gateway compares the two at its start ([`admission`]), every second, after each connection to NATS, and before it
//! takes anything from a new consumer of the stream ([`watch`]). A difference that nobody has decided closes the log's
//! [gate](crate::log::HistoryGate): nothing is taken, nothing is followed, `/readyz` says what happened. It is over when
//! what was there is back; or when somebody lets the cluster go on from what it has now ([`adoption`]): that is the next
//! epoch, which every gateway begins with a new start, and sets aside what it has beyond ([`set_back`]).

mod admission;
mod adoption;
mod anchors;
mod comparison;
mod missing;
mod notes;
mod set_back;
mod verdict;
mod watch;

use std::collections::BTreeMap;
use std::io;
use std::path::Path;

use headgate_bridge_nats::stream::{StreamExtent, StreamMark, StreamReport};
use headgate_bridge_nats::{ManagedStream, Nats, StreamError};
use serde::{Deserialize, Serialize};

use self::anchors::LogAnchors;
use self::verdict::judge_all;
pub(super) use admission::{AdmissionError, AdmittedHistory};
pub use adoption::{AdoptionOrder, AdoptionReport, ClusterCommandError, adopt_cluster};
pub(super) use set_back::set_back_stores;
pub(super) use verdict::{HistoryVerdict, judge, judge_anchor};
pub(super) use watch::HistoryWatch;

use crate::auth::cluster::{HISTORY_ROW_NAME, REGISTRY_BUCKET, replace_file};
use crate::log::{HistorySetBack, LogHistory};
use crate::message::{Offset, TimeMicros};

/// The file with what a gateway has followed.
pub(super) const HISTORY_FILE_NAME: &str = "history.json";

/// Whose the cluster's stream and buckets are: the row `history`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct ClusterHistory {
    /// The identity of the log: 128 random bits.
    pub(super) id: String,
    pub(super) epoch: u64,
    /// When each stream and bucket was created, in nanoseconds, by its name in JetStream. One that is not here may still be
    /// made.
    pub(super) streams: BTreeMap<String, i64>,
    /// From where later epochs went on.
    #[serde(default)]
    pub(super) set_backs: Vec<SetBackRow>,
}

/// See [`HistorySetBack`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct SetBackRow {
    pub(super) epoch: u64,
    /// When it was decided.
    pub(super) at: TimeMicros,
    pub(super) end: Offset,
    pub(super) sessions: u64,
}

impl ClusterHistory {
    fn mark(&self) -> StreamMark {
        StreamMark { id: self.id.clone(), epoch: self.epoch }
    }

    pub(super) fn of_log(&self) -> LogHistory {
        let set_back =
            |row: &SetBackRow| HistorySetBack { epoch: row.epoch, end: row.end, sessions: row.sessions };
        LogHistory { epoch: self.epoch, set_backs: self.set_backs.iter().map(set_back).collect() }
    }
}

/// What a gateway has followed: the file `history.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct FollowedHistory {
    pub(super) id: String,
    pub(super) epoch: u64,
    pub(super) streams: BTreeMap<String, FollowedExtent>,
    /// Where the log ended before, now and then.
    #[serde(default)]
    pub(super) anchors: LogAnchors,
}

/// How far a stream or bucket was: see [`StreamExtent`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct FollowedExtent {
    pub(super) created: i64,
    pub(super) last: u64,
    pub(super) last_at: i64,
    pub(super) messages: u64,
}

impl From<StreamExtent> for FollowedExtent {
    fn from(StreamExtent { created, last, last_at, messages, .. }: StreamExtent) -> Self {
        Self { created, last, last_at, messages }
    }
}

impl FollowedHistory {
    /// What there is now, of a history.
    pub(super) fn of(history: &ClusterHistory, found: &HistoryFindings) -> Self {
        let streams = found.extents().map(|(name, extent)| (name.to_owned(), extent.into()));
        let anchors = LogAnchors::default();
        Self { id: history.id.clone(), epoch: history.epoch, streams: streams.collect(), anchors }
    }

    /// Notes what there is now of the same history.
    fn go_on(&mut self, found: &HistoryFindings) {
        let streams = found.extents().map(|(name, extent)| (name.to_owned(), FollowedExtent::from(extent)));
        self.streams.extend(streams);
        if let Some(log) = found.log() {
            self.anchors.note(log.last, log.last_at);
        }
    }

    /// Reads the file; `None` if there is none.
    ///
    /// # Errors
    /// The operating system's, and [`io::ErrorKind::InvalidData`].
    pub(super) fn load(dir: &Path) -> io::Result<Option<Self>> {
        match std::fs::read(dir.join(HISTORY_FILE_NAME)) {
            Ok(text) => Ok(Some(serde_json::from_slice(&text)?)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Writes the file, durably.
    ///
    /// # Errors
    /// The operating system's.
    pub(super) fn save(&self, dir: &Path) -> io::Result<()> {
        replace_file(&dir.join(HISTORY_FILE_NAME), &serde_json::to_vec(self)?)
    }
}

/// What the servers say of a cluster's history.
pub(super) struct HistoryFindings {
    /// The row, and its revision; `None` if there is none that can be read.
    pub(super) history: Option<ClusterHistory>,
    pub(super) revision: u64,
    /// Each stream and bucket, the log's stream first; without a report, it is not there.
    pub(super) streams: Vec<(ManagedStream, Option<StreamReport>)>,
}

impl HistoryFindings {
    /// Asks the servers.
    ///
    /// # Errors
    /// [`StreamError::Away`]; [`StreamError::Refused`] if this user may not ask.
    pub(super) async fn ask(nats: &Nats, streams: &[ManagedStream]) -> Result<Self, StreamError> {
        let asked = streams
            .iter()
            .map(|stream| async move { Ok::<_, StreamError>((stream.clone(), stream.report(nats).await?)) });
        let found = futures_util::future::try_join_all(asked).await?;
        let registry =
            found.iter().find(|(stream, report)| stream.name() == registry_stream() && report.is_some());
        let row = match registry {
            Some((registry, _)) => registry.newest_on(nats, &history_subject()).await?,
            None => None,
        };
        let revision = row.as_ref().map_or(0, |(_, revision)| *revision);
        let history = row.and_then(|(value, _)| serde_json::from_slice(&value).ok());
        Ok(Self { history, revision, streams: found })
    }

    /// The streams and buckets that are there.
    pub(super) fn extents(&self) -> impl Iterator<Item = (&str, StreamExtent)> {
        self.streams.iter().filter_map(|(stream, report)| Some((stream.name(), report.as_ref()?.extent())))
    }

    /// One of them, if it is there.
    pub(super) fn extent_of(&self, name: &str) -> Option<StreamExtent> {
        self.extents().find(|(stream, _)| *stream == name).map(|(_, extent)| extent)
    }

    /// The log's stream, if it is there.
    pub(super) fn log(&self) -> Option<StreamExtent> {
        Some(self.streams.first()?.1.as_ref()?.extent())
    }

    /// The registry's bucket, if it is there.
    pub(super) fn registry(&self) -> Option<StreamExtent> {
        self.extent_of(&registry_stream())
    }

    /// The marks of all that is there.
    pub(super) fn marks(&self) -> impl Iterator<Item = StreamMark> {
        self.streams.iter().filter_map(|(_, report)| report.as_ref()?.mark())
    }
}

pub(super) fn registry_stream() -> String {
    format!("KV_{REGISTRY_BUCKET}")
}

fn history_subject() -> String {
    format!("$KV.{REGISTRY_BUCKET}.{HISTORY_ROW_NAME}")
}
