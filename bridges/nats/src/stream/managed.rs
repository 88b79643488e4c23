//! The settings of streams and buckets that belong to a whole cluster: whoever starts finds out how they differ from
//! its own, and changes nothing. They are changed on purpose alone ([`ManagedStream::change`]).

use std::fmt;
use std::time::Duration;

use async_nats::jetstream::context::{Context, UpdateStreamErrorKind};
use async_nats::jetstream::response::Response;
use async_nats::jetstream::stream::{ClusterInfo, Config};
use async_nats::jetstream::{self, ErrorCode};
use serde::Deserialize;
use tokio::time::timeout;

use super::{JetstreamSettings, STREAM_ANSWER_WAIT_MAX, StreamError, stream_error_of_jetstream};
use crate::connection::Nats;
use crate::kv::{KvBucketSettings, kv_stream_config};

/// What a stream or bucket is to be like, for all who use it.
#[derive(Debug, Clone)]
pub struct ManagedStream {
    what: String,
    wanted: Config,
    kind: StreamKind,
}

/// Which settings its users have to agree on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum StreamKind {
    Stream,
    Bucket,
}

/// A setting in words, and what it is in a configuration.
type Setting = (&'static str, fn(&Config) -> String);

const REPLICAS: Setting = ("the number of replicas", |config| config.num_replicas.to_string());
const STREAM_SETTINGS: [Setting; 3] = [
    REPLICAS,
    ("its maximum size", |config| bytes_text(config.max_bytes)),
    ("the time for which it knows an id", |config| age_text(config.duplicate_window)),
];
const BUCKET_SETTINGS: [Setting; 2] =
    [REPLICAS, ("the time for which it keeps a row", |config| age_text(config.max_age))];

/// One setting that is another one than wanted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SettingDifference {
    /// The stream or bucket, as it is named to people.
    pub what: String,
    /// The setting, in words.
    pub setting: &'static str,
    /// What it is.
    pub is: String,
    /// What is wanted.
    pub wanted: String,
}

impl fmt::Display for SettingDifference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { what, setting, is, wanted } = self;
        write!(f, "{what}: {setting} is {is}, not {wanted}")
    }
}

/// What a stream's leader says of it.
#[derive(Debug, Clone, Deserialize)]
pub struct StreamReport {
    config: Config,
    #[serde(default)]
    cluster: Option<ClusterInfo>,
    /// The clock of the server that answered, RFC 3339; `None` from a server older than 2.10.
    #[serde(default, rename = "ts")]
    pub time: Option<String>,
}

impl StreamReport {
    /// The servers that do not have all of it at this moment, in words.
    pub fn peers_behind(&self) -> Vec<String> {
        let peers = self.cluster.iter().flat_map(|cluster| &cluster.replicas);
        peers
            .filter_map(|peer| match (peer.offline, peer.current) {
                (true, _) => Some(format!("{} is offline", peer.name)),
                (false, false) => Some(format!("{} is behind", peer.name)),
                (false, true) => None,
            })
            .collect()
    }
}

impl From<&JetstreamSettings> for ManagedStream {
    fn from(settings: &JetstreamSettings) -> Self {
        Self {
            what: format!("stream {}", settings.name),
            wanted: settings.config(),
            kind: StreamKind::Stream,
        }
    }
}

impl From<&KvBucketSettings> for ManagedStream {
    fn from(settings: &KvBucketSettings) -> Self {
        Self {
            what: format!("bucket {}", settings.name),
            wanted: kv_stream_config(settings),
            kind: StreamKind::Bucket,
        }
    }
}

impl ManagedStream {
    /// What its leader says of it; `None` if there is none.
    ///
    /// # Errors
    /// [`StreamError::Away`]; [`StreamError::Refused`] if this user may not ask.
    pub async fn report(&self, nats: &Nats) -> Result<Option<StreamReport>, StreamError> {
        let subject = format!("STREAM.INFO.{}", self.wanted.name);
        let context = context(nats);
        let asked = timeout(STREAM_ANSWER_WAIT_MAX, context.request(subject, &()));
        let trouble = |detail: &dyn fmt::Display| {
            StreamError::Away(nats.trouble().unwrap_or_else(|| format!("{}: {detail}", self.what)))
        };
        let answer = asked.await.map_err(|_| trouble(&"JetStream does not answer"))?;
        match answer.map_err(|error| trouble(&error))? {
            Response::Ok(report) => Ok(Some(report)),
            Response::Err { error } if error.error_code() == ErrorCode::STREAM_NOT_FOUND => Ok(None),
            Response::Err { error } => {
                Err(stream_error_of_jetstream(format!("{}: {error}", self.what), &error))
            }
        }
    }

    /// In what it differs from what is wanted.
    pub fn differences(&self, report: &StreamReport) -> Vec<SettingDifference> {
        let (is, wanted) = (&report.config, &self.wanted);
        let settings: &[Setting] = match self.kind {
            StreamKind::Stream => &STREAM_SETTINGS,
            StreamKind::Bucket => &BUCKET_SETTINGS,
        };
        let differing = settings.iter().map(|(setting, text)| (*setting, text(is), text(wanted)));
        differing
            .filter(|(_, is, wanted)| is != wanted)
            .map(|(setting, is, wanted)| SettingDifference { what: self.what.clone(), setting, is, wanted })
            .collect()
    }

    /// Changes it to what is wanted. The rest of its configuration stays as it is.
    ///
    /// # Errors
    /// [`StreamError::Away`]; [`StreamError::Refused`] if JetStream cannot: too few servers, too little room.
    pub async fn change(&self, nats: &Nats, report: &StreamReport) -> Result<(), StreamError> {
        let (is, wanted) = (report.config.clone(), self.wanted.clone());
        let num_replicas = wanted.num_replicas;
        let changed = match self.kind {
            StreamKind::Stream => {
                let Config { max_bytes, duplicate_window, .. } = wanted;
                Config { num_replicas, max_bytes, duplicate_window, ..is }
            }
            StreamKind::Bucket => {
                let Config { max_age, subject_delete_marker_ttl, .. } = wanted;
                // No longer than rows live, and without effect: rows have no id.
                let window = is.duplicate_window;
                let duplicate_window = if max_age.is_zero() { window } else { window.min(max_age) };
                Config { num_replicas, max_age, subject_delete_marker_ttl, duplicate_window, ..is }
            }
        };
        context(nats).update_stream(changed).await.map(drop).map_err(|error| {
            let text = format!("{}: {error}", self.what);
            match error.kind() {
                UpdateStreamErrorKind::JetStream(error) => stream_error_of_jetstream(text, &error),
                UpdateStreamErrorKind::TimedOut => StreamError::Away(text),
                _ => StreamError::Refused(text),
            }
        })
    }
}

fn context(nats: &Nats) -> Context {
    let mut context = jetstream::new(nats.client().clone());
    context.set_timeout(STREAM_ANSWER_WAIT_MAX);
    context
}

fn bytes_text(bytes: i64) -> String {
    if bytes <= 0 { "without a limit".to_owned() } else { format!("{bytes} bytes") }
}

fn age_text(age: Duration) -> String {
    if age.is_zero() { "without a limit".to_owned() } else { format!("{} s", age.as_secs()) }
}
