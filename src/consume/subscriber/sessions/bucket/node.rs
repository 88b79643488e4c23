//! A node's own sessions in the bucket: what to write, over which revision, and whether a session still
//! belongs to this node.

use std::borrow::Cow;
use std::cmp::Ordering as CmpOrdering;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ops::Bound;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::{StreamExt, stream};
use headgate_bridge_nats::kv::KvRow;
use headgate_bridge_nats::{KvBucket, KvError};
use tokio::runtime::Handle;
use tokio::sync::mpsc;
use tracing::debug;

use super::super::pending::{PendingSessionChange, PendingSessionChanges};
use super::super::place::SessionBackend;
use super::super::row::{CursorMove, SessionRow, decode_session, encode};
use super::super::{SessionStoreError, StoredSession};
use super::wills::NodeWills;
use super::{
    CURSOR_PAGE_BYTES_MAX, CURSOR_PAGES, ClientHash, FoundSession, LostSession, client_hash, page_key,
    page_of_uid, session_key,
};

/// How many cells are read or written at once.
pub(super) const CELLS_AT_ONCE: usize = 256;
/// How long the cell of an ended session stays: longer than any node takes from reading a cell to writing
/// it.
const ENDED_CELL_LIFETIME: Duration = Duration::from_secs(600);
/// A live session's cell is written again after this time, so that it does not age away.
pub(super) const CELL_REFRESH_INTERVAL: Duration = Duration::from_secs(12 * 3_600);
/// How often the node checks whether some of its cells are still its own.
const CELL_CHECK_INTERVAL: Duration = Duration::from_secs(1);
/// In how many such checks all cells are covered.
const CELL_CHECK_ROUNDS: usize = 60;
/// How many cells one check covers after an error, when another node may have taken sessions over.
const HASTY_CHECK_CELLS_MAX: usize = 1024;
/// How often one write reads cells again that others have changed.
const FLUSH_ROUNDS_MAX: usize = 8;

/// This node's sessions, as the bucket should have them.
pub(in super::super) struct NodeSessions {
    cells: KvBucket,
    runtime: Handle,
    node: String,
    /// Whether nothing may be written, because the log may be another one than the sessions are of.
    is_frozen: Box<dyn Fn() -> bool + Send>,
    mine: BTreeMap<ClientHash, OwnedClient>,
    clients: HashMap<u64, ClientHash>,
    /// The clients whose cells are to be written.
    changed: BTreeSet<ClientHash>,
    pages: Vec<CursorPage>,
    wills: NodeWills,
    lost: mpsc::UnboundedSender<LostSession>,
    /// When the next check is, the client after which it begins, and how many cells to check in haste.
    look_at: Instant,
    looked_at: ClientHash,
    hasty: usize,
    /// The number of connections to NATS so far. A new one means that the node may have been cut off.
    connects: u64,
}

/// A client of this node.
struct OwnedClient {
    /// The revision of the client's cell.
    revision: u64,
    /// How often the session has moved to another node, this one included.
    moves: u64,
    session: Option<StoredSession>,
    /// When this node last wrote the cell; `None`: never.
    written_at: Option<Instant>,
}

#[derive(Default)]
struct CursorPage {
    /// The sessions whose cursors have moved since their cells were written.
    moved: BTreeSet<u64>,
    changed: bool,
}

impl NodeSessions {
    /// No sessions yet.
    pub(in super::super) fn new(
        cells: KvBucket,
        node: &str,
        is_frozen: Box<dyn Fn() -> bool + Send>,
        lost: mpsc::UnboundedSender<LostSession>,
    ) -> Self {
        let connects = connect_count(&cells);
        Self {
            cells,
            runtime: Handle::current(),
            node: node.to_owned(),
            is_frozen,
            mine: BTreeMap::new(),
            clients: HashMap::new(),
            changed: BTreeSet::new(),
            pages: std::iter::repeat_with(CursorPage::default).take(CURSOR_PAGES).collect(),
            wills: NodeWills::default(),
            lost,
            look_at: Instant::now(),
            looked_at: [0; 16],
            hasty: 0,
            connects,
        }
    }

    /// Applies changes to what the bucket should have. Applying them twice does no harm.
    fn apply_pending(&mut self, pending: &PendingSessionChanges) {
        self.wills.apply(&pending.wills);
        for FoundSession { datasource, client_id, revision, moves, session, .. } in &pending.found {
            let client = client_hash(datasource, client_id);
            if self.mine.get(&client).is_some_and(|mine| mine.revision >= *revision) {
                continue;
            }
            self.forget(client);
            if let Some(session) = session {
                self.clients.insert(session.uid, client);
            }
            let (revision, moves, session) = (*revision, moves + 1, session.clone());
            self.mine.insert(client, OwnedClient { revision, moves, session, written_at: None });
        }
        for (uid, change) in &pending.sessions {
            match change {
                PendingSessionChange::Put(session) => self.put_session(session),
                PendingSessionChange::Update(update) => {
                    let Some(client) = self.clients.get(uid) else { continue };
                    let mine = self.mine.get_mut(client).and_then(|mine| mine.session.as_mut());
                    let Some(session) = mine else { continue };
                    update.apply(session);
                    if update.ended.is_some() {
                        self.changed.insert(*client);
                    } else if update.cursor.is_some() {
                        let page = &mut self.pages[page_of_uid(*uid)];
                        page.moved.insert(*uid);
                        page.changed = true;
                    }
                }
                PendingSessionChange::Remove => {
                    if let Some(client) = self.clients.remove(uid)
                        && let Some(mine) = self.mine.get_mut(&client)
                    {
                        self.pages[page_of_uid(*uid)].moved.remove(uid);
                        mine.session = None;
                        self.changed.insert(client);
                    }
                }
                PendingSessionChange::GiveUp => {
                    if let Some(client) = self.clients.get(uid) {
                        self.forget(*client);
                    }
                }
            }
        }
    }

    fn put_session(&mut self, session: &StoredSession) {
        let client = client_hash(&session.datasource, &session.client_id);
        let new = OwnedClient { revision: 0, moves: 1, session: None, written_at: None };
        let mine = self.mine.entry(client).or_insert(new);
        if mine.written_at.is_some()
            && mine.session.as_ref() == Some(session)
            && !self.changed.contains(&client)
        {
            return;
        }
        if let Some(earlier) = mine.session.replace(session.clone()).filter(|e| e.uid != session.uid) {
            self.clients.remove(&earlier.uid);
            self.pages[page_of_uid(earlier.uid)].moved.remove(&earlier.uid);
        }
        self.clients.insert(session.uid, client);
        self.changed.insert(client);
    }

    /// Removes everything that this node has of a client.
    fn forget(&mut self, client: ClientHash) -> Option<StoredSession> {
        self.changed.remove(&client);
        let session = self.mine.remove(&client)?.session?;
        self.clients.remove(&session.uid);
        self.pages[page_of_uid(session.uid)].moved.remove(&session.uid);
        Some(session)
    }

    /// Removes a client that another node has taken over, and reports it.
    fn lose(&mut self, client: ClientHash) {
        if let Some(StoredSession { datasource, client_id, uid, .. }) = self.forget(client) {
            debug!(%datasource, "another node has taken a session over");
            // The receiver may be gone already.
            let _ = self.lost.send(LostSession { datasource, client_id, uid });
        }
    }

    async fn flush(&mut self) -> Result<(), KvError> {
        self.relieve_pages();
        for _ in 0..FLUSH_ROUNDS_MAX {
            let not_ours = self.write_cells().await?;
            if not_ours.is_empty() {
                return self.write_pages().await;
            }
            self.check_changed_cells(not_ours).await?;
        }
        Err(KvError::Conflict)
    }

    /// Has the sessions that a page has no room for written in their cells.
    fn relieve_pages(&mut self) {
        const ENTRY_BYTES: usize = 40;
        for page in self.pages.iter().filter(|page| page.changed) {
            let mut bytes = page.moved.len() * ENTRY_BYTES;
            for client in page.moved.iter().filter_map(|uid| self.clients.get(uid)) {
                let session = self.mine.get(client).and_then(|mine| mine.session.as_ref());
                bytes += session.map_or(0, |session| session.flights.encoded_bytes());
                if bytes > CURSOR_PAGE_BYTES_MAX {
                    self.changed.insert(*client);
                }
            }
        }
    }

    /// Writes the changed cells. Returns the clients whose cells another node has changed.
    async fn write_cells(&mut self) -> Result<Vec<ClientHash>, KvError> {
        let Self { cells, node, mine, changed, .. } = self;
        let writes = changed.iter().filter_map(|client| {
            let OwnedClient { revision, moves, session, .. } = mine.get(client)?;
            let session_in_row = session.as_ref().map(Cow::Borrowed);
            let row = SessionRow { owner: node.as_str().into(), moves: *moves, session: session_in_row };
            let (value, lasts) = (encode(&row), session.is_none().then_some(ENDED_CELL_LIFETIME));
            let (cells, client, revision) = (&*cells, *client, *revision);
            Some(async move { (client, cells.put(&session_key(client), value, Some(revision), lasts).await) })
        });
        let written: Vec<_> = stream::iter(writes).buffer_unordered(CELLS_AT_ONCE).collect().await;
        let (mut not_ours, mut failed) = (Vec::new(), None);
        for (client, written) in written {
            match written {
                Ok(revision) => self.mark_written(client, revision),
                Err(KvError::Conflict) => not_ours.push(client),
                Err(error) => failed = Some(error),
            }
        }
        failed.map_or(Ok(not_ours), Err)
    }

    fn mark_written(&mut self, client: ClientHash, revision: u64) {
        self.changed.remove(&client);
        let Some(mine) = self.mine.get_mut(&client) else { return };
        (mine.revision, mine.written_at) = (revision, Some(Instant::now()));
        match &mine.session {
            Some(session) => {
                // The cell has the cursor, so the page need not.
                self.pages[page_of_uid(session.uid)].moved.remove(&session.uid);
            }
            None => {
                self.mine.remove(&client);
            }
        }
    }

    /// Checks cells that have another revision than the one known here. The cause may be an own write whose
    /// answer was lost, a late write of the node that had the session before, or a takeover by another node.
    async fn check_changed_cells(&mut self, clients: Vec<ClientHash>) -> Result<(), KvError> {
        let cells = &self.cells;
        let reads =
            clients.into_iter().map(|client| async move { (client, cells.get(&session_key(client)).await) });
        let read: Vec<_> = stream::iter(reads).buffer_unordered(CELLS_AT_ONCE).collect().await;
        for (client, cell) in read {
            let KvRow { revision, value, .. } = cell?;
            let Some(mine) = self.mine.get_mut(&client) else { continue };
            let still_ours = match value.as_deref().map(decode_session) {
                Some(Some(row)) => match row.moves.cmp(&mine.moves) {
                    CmpOrdering::Less => true,
                    CmpOrdering::Equal => row.owner == self.node.as_str(),
                    CmpOrdering::Greater => false,
                },
                // A node with a newer Headgate has written it.
                Some(None) => false,
                // Only the cell of an ended session expires, and a cell that this node wrote does not.
                None => mine.written_at.is_none(),
            };
            if still_ours {
                mine.revision = revision;
            } else {
                self.lose(client);
            }
        }
        Ok(())
    }

    /// Writes the pages with moved cursors.
    async fn write_pages(&mut self) -> Result<(), KvError> {
        let Self { cells, node, mine, clients, pages, .. } = self;
        let changed = pages.iter().enumerate().filter(|(_, page)| page.changed);
        let writes = changed.map(|(at, page)| {
            let moved = page.moved.iter().filter_map(|uid| {
                let OwnedClient { revision, session, .. } = mine.get(clients.get(uid)?)?;
                let StoredSession { cursor, flights, .. } = session.as_ref()?;
                let flights = Cow::Borrowed(flights);
                Some(CursorMove { uid: *uid, revision: *revision, cursor: *cursor, flights })
            });
            let value: Bytes = encode(&moved.collect::<Vec<_>>());
            let (cells, key) = (&*cells, page_key(node, at));
            async move { (at, cells.put(&key, value, None, None).await) }
        });
        let written: Vec<_> = stream::iter(writes).buffer_unordered(CELLS_AT_ONCE).collect().await;
        let mut failed = None;
        for (at, written) in written {
            match written {
                Ok(_) => pages[at].changed = false,
                Err(error) => failed = Some(error),
            }
        }
        failed.map_or(Ok(()), Err)
    }

    /// Checks whether some of the cells are still this node's, and refreshes old ones.
    async fn check_some_cells(&mut self) -> Result<(), KvError> {
        if self.look_at > Instant::now() {
            return Ok(());
        }
        let now = connect_count(&self.cells);
        if std::mem::replace(&mut self.connects, now) != now {
            self.hasty = self.mine.len();
        }
        let count = match self.hasty {
            0 => self.mine.len().div_ceil(CELL_CHECK_ROUNDS),
            hasty => hasty.min(HASTY_CHECK_CELLS_MAX),
        };
        let after = (Bound::Excluded(self.looked_at), Bound::Unbounded);
        let next = self.mine.range(after).chain(self.mine.range(..=self.looked_at));
        let clients: Vec<ClientHash> = next.map(|(client, _)| *client).take(count).collect();
        let known: Vec<_> = clients.iter().map(|client| (*client, self.mine[client].revision)).collect();
        let cells = &self.cells;
        let reads = known.into_iter().map(|(client, revision)| async move {
            let cell = cells.get(&session_key(client)).await?;
            Ok::<_, KvError>((cell.revision != revision).then_some(client))
        });
        let read: Vec<_> = stream::iter(reads).buffer_unordered(CELLS_AT_ONCE).collect().await;
        let not_ours = read.into_iter().filter_map(Result::transpose).collect::<Result<Vec<_>, _>>()?;
        self.check_changed_cells(not_ours).await?;
        let live =
            |mine: &OwnedClient| mine.session.as_ref().is_some_and(|session| session.ended_at.is_none());
        for client in &clients {
            let old = |mine: &OwnedClient| {
                mine.written_at.is_some_and(|written_at| written_at.elapsed() > CELL_REFRESH_INTERVAL)
            };
            if self.mine.get(client).is_some_and(|mine| live(mine) && old(mine)) {
                self.changed.insert(*client);
            }
        }
        self.hasty = self.hasty.saturating_sub(count);
        self.looked_at = clients.last().copied().unwrap_or_default();
        self.look_at = Instant::now() + CELL_CHECK_INTERVAL;
        Ok(())
    }
}

impl SessionBackend for NodeSessions {
    fn write(&mut self, pending: &PendingSessionChanges) -> Result<(), SessionStoreError> {
        self.apply_pending(pending);
        if (self.is_frozen)() {
            let words = "the log may be another one than this gateway has followed: see /readyz";
            return Err(SessionStoreError::Bucket(words.into()));
        }
        let runtime = self.runtime.clone();
        let written = runtime.block_on(async {
            self.wills.write(&self.cells, &self.node).await?;
            self.flush().await?;
            self.check_some_cells().await
        });
        written.map_err(|error| {
            // Another node may have taken sessions over meanwhile, whatever became of this write.
            self.hasty = self.mine.len();
            error.into()
        })
    }

    fn idle_time(&self) -> Option<Duration> {
        Some(self.look_at.saturating_duration_since(Instant::now()))
    }
}

/// The number of connections to NATS so far.
fn connect_count(cells: &KvBucket) -> u64 {
    cells.nats().client().statistics().connects.load(std::sync::atomic::Ordering::Relaxed)
}
