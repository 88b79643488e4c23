//! The sessions of a cluster, in a KV bucket that all nodes share. A node loads none of them at its start:
//! it [reads](SessionLookup) a client's session when the client connects.
//!
//! | key | value ([`row`](super::row)) |
//! |---|---|
//! | `session.{client}` | the node that has the session, and the session unless it has ended |
//! | `cursors.{node}.{page}` | cursors and flights of a node's sessions that have moved since their cells were written |
//! | `will.{node}.{will}` | the [will](StoredWill) of a client that is connected to the node, or that waits there |
//! | `wills.{node}` | a mark: there may be wills of the node |
//! | `group.{group}.{session}` | a mark: a session that outlives its connection is in this group |
//!
//! `{client}` is a hash of datasource and client identifier. One node at a time writes a session's cell, each
//! time over the revision that it knows: the node that the client is connected to, or was last.
//!
//! A node that takes the client over writes the cell. If the former node was cut off and does not know, its
//! next write is refused, and it learns that it has [lost](LostSession) the session. A node also checks all
//! its cells for such a change, a few at a time.
//!
//! Cursors move all the time, so they are not in the cells: those of a node are gathered in a few pages,
//! written every second, with what is in flight. A cursor names the revision of its session's cell, and is void once
//! the cell has another. What a page has no room for goes into the cells.
//!
//! | event | effect |
//! |---|---|
//! | a session moves to another node | its cell counts the moves, so that a node that was cut off sees that its own state is old |
//! | a node was cut off meanwhile | it checks all its cells as soon as NATS is back, and closes the connections whose session it has lost |
//! | a node is killed | another one publishes the wills of its clients; every session of it continues from a cursor that is at most a second old |

use std::time::Duration;

use headgate_bridge_nats::kv::KvRow;
use headgate_bridge_nats::{KvBucket, KvBucketSettings, KvError, KvWrites, Nats};

use super::row::{CursorMove, SessionRow, decode_moves, decode_session, decode_will};
use super::{SessionStoreError, StoredSession, StoredWill};
use crate::message::{DatasourceId, TimeMicros};

pub(super) mod node;
mod rolls;
mod set_backs;
mod wills;

pub use rolls::GroupRolls;
pub use set_backs::CursorSetBacks;

/// The bucket's name.
pub const SESSIONS_BUCKET_NAME: &str = "headgate-sessions";
/// How much longer a cell stays than the longest session: the longest time between two writes of a live
/// session's cell, and a day of margin.
const CELL_SPARE: Duration = Duration::from_secs(2 * 24 * 3_600);
/// How many pages hold a node's cursors. This bounds the writes a second.
const CURSOR_PAGES: usize = 64;
/// What the entries of a page may take: it is one NATS message, which holds 1 MiB by default.
const CURSOR_PAGE_BYTES_MAX: usize = 512 << 10;
/// A client, as the bucket knows it.
type ClientHash = [u8; 16];

/// Opens the bucket, or makes it, with `replicas` copies of each cell. No session lasts longer than
/// `expiry_s_max` seconds; `u32::MAX`: sessions may last for ever.
///
/// # Errors
/// [`KvError::Away`]; [`KvError::Refused`], if JetStream cannot have such a bucket.
pub async fn open_sessions_bucket(
    nats: &Nats,
    replicas: usize,
    expiry_s_max: u32,
) -> Result<KvBucket, KvError> {
    KvBucket::open(nats, &sessions_bucket_settings(replicas, expiry_s_max)).await
}

/// What that bucket is to be like.
pub fn sessions_bucket_settings(replicas: usize, expiry_s_max: u32) -> KvBucketSettings {
    let longest = Duration::from_secs(u64::from(expiry_s_max)) + CELL_SPARE;
    let age_max = (expiry_s_max != u32::MAX).then_some(longest);
    KvBucketSettings { name: SESSIONS_BUCKET_NAME.to_owned(), replicas, age_max, writes: KvWrites::Single }
}

/// A session that another node has taken over without asking, because this node could not be reached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LostSession {
    /// The datasource of the client's key.
    pub datasource: DatasourceId,
    /// The client.
    pub client_id: String,
    /// The session that it had here.
    pub uid: u64,
}

/// What the bucket has of a client.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FoundSession {
    /// The datasource of the client's key.
    pub datasource: DatasourceId,
    /// The client.
    pub client_id: String,
    /// The revision that a change of the cell is written over.
    pub revision: u64,
    /// How often the session has moved to another node.
    pub moves: u64,
    /// The node that has the session; empty if there is none.
    pub owner: String,
    /// `None`: the client has no session.
    pub session: Option<StoredSession>,
}

/// Reads sessions of any node from the bucket. Cheap to clone.
#[derive(Clone)]
pub struct SessionLookup(KvBucket, CursorSetBacks);

impl SessionLookup {
    /// A lookup in this bucket. Cursors from before the log went on from an earlier state are set back.
    pub fn new(cells: KvBucket, set_backs: CursorSetBacks) -> Self {
        Self(cells, set_backs)
    }

    /// Reads a client's session, as it was last acknowledged.
    ///
    /// # Errors
    /// [`SessionStoreError::Bucket`], when it cannot be read.
    pub async fn find(
        &self,
        datasource: &DatasourceId,
        client_id: &str,
    ) -> Result<FoundSession, SessionStoreError> {
        let KvRow { revision, value, .. } =
            self.0.get(&session_key(client_hash(datasource, client_id))).await?;
        let (datasource, client_id) = (datasource.clone(), client_id.to_owned());
        let mut nothing =
            FoundSession { datasource, client_id, revision, moves: 0, owner: String::new(), session: None };
        let Some(value) = value else { return Ok(nothing) };
        let Some(SessionRow { owner, moves, session }) = decode_session(&value) else {
            let words = "a session in the bucket is not as this Headgate writes it: use a newer one";
            return Err(SessionStoreError::Bucket(words.into()));
        };
        (nothing.moves, nothing.owner) = (moves, owner.clone().into_owned());
        let Some(session) = session else { return Ok(nothing) };
        let mut session = session.into_owned();
        let mut written = revision;
        if (&session.datasource, &session.client_id) != (&nothing.datasource, &nothing.client_id) {
            return Ok(nothing);
        }
        if session.ended_at.is_none() {
            // Its node ended without writing the cell, so the newest cursor is in the node's page.
            let page = self.0.get(&page_key(&owner, page_of_uid(session.uid))).await?;
            let moved = page.value.as_deref().and_then(decode_moves).unwrap_or_default();
            let same = |moved: &CursorMove<'_>| moved.uid == session.uid && moved.revision == revision;
            if let Some(moved) = moved.into_iter().find(same) {
                (session.cursor, session.flights) = (moved.cursor, moved.flights.into_owned());
                // The cell has the filters, and is older.
                written = revision.min(page.revision);
            }
        }
        self.1.apply(&mut session, written);
        Ok(FoundSession { session: Some(session), ..nothing })
    }

    /// The nodes that may have wills in the bucket.
    ///
    /// # Errors
    /// [`SessionStoreError::Bucket`], when it cannot be read.
    pub async fn nodes_with_wills(&self) -> Result<Vec<String>, SessionStoreError> {
        let keys = self.0.keys_below(WILLS_MARK).await?;
        Ok(keys.iter().filter_map(|key| Some(key.split_once('.')?.1.to_owned())).collect())
    }

    /// The ids of a node's wills.
    ///
    /// # Errors
    /// [`SessionStoreError::Bucket`], when it cannot be read.
    pub async fn will_ids(&self, node: &str) -> Result<Vec<u64>, SessionStoreError> {
        let keys = self.0.keys_below(&format!("will.{node}")).await?;
        let id = |key: &String| u64::from_str_radix(key.rsplit('.').next()?, 16).ok();
        Ok(keys.iter().filter_map(id).collect())
    }

    /// One of a node's wills. `None`: it is gone, or a newer Headgate has written it.
    ///
    /// # Errors
    /// [`SessionStoreError::Bucket`], when it cannot be read.
    pub async fn will(&self, node: &str, id: u64) -> Result<Option<StoredWill>, SessionStoreError> {
        let row = self.0.get(&will_key(node, id)).await?;
        Ok(row.value.and_then(|value| decode_will(&value)))
    }

    /// Removes one of a node's wills.
    ///
    /// # Errors
    /// [`SessionStoreError::Bucket`].
    pub async fn remove_will(&self, node: &str, id: u64) -> Result<(), SessionStoreError> {
        Ok(self.0.remove(&will_key(node, id)).await?)
    }

    /// Removes the mark of a node that has no wills any more.
    ///
    /// # Errors
    /// [`SessionStoreError::Bucket`].
    pub async fn remove_wills_mark(&self, node: &str) -> Result<(), SessionStoreError> {
        Ok(self.0.remove(&wills_mark_key(node)).await?)
    }
}

/// The first part of the marks of nodes with wills.
const WILLS_MARK: &str = "wills";

fn will_key(node: &str, id: u64) -> String {
    format!("will.{node}.{id:016x}")
}

fn wills_mark_key(node: &str) -> String {
    format!("{WILLS_MARK}.{node}")
}

impl StoredSession {
    /// Whether the session has expired at `now`.
    pub fn has_expired(&self, now: TimeMicros) -> bool {
        let expiry = i64::from(self.expiry_s) * 1_000_000;
        self.expiry_s != u32::MAX && self.ended_at.is_some_and(|ended| now.saturating_sub(ended) >= expiry)
    }
}

impl From<KvError> for SessionStoreError {
    fn from(error: KvError) -> Self {
        SessionStoreError::Bucket(error.to_string().into())
    }
}

fn client_hash(datasource: &DatasourceId, client_id: &str) -> ClientHash {
    let mut hash = blake3::Hasher::new();
    hash.update(datasource.as_str().as_bytes()).update(&[0]).update(client_id.as_bytes());
    let mut bytes = [0; 16];
    hash.finalize_xof().fill(&mut bytes);
    bytes
}

fn session_key(client: ClientHash) -> String {
    format!("session.{:032x}", u128::from_be_bytes(client))
}

fn page_key(node: &str, page: usize) -> String {
    format!("cursors.{node}.{page}")
}

fn page_of_uid(uid: u64) -> usize {
    usize::try_from(uid % CURSOR_PAGES as u64).unwrap_or(0)
}
