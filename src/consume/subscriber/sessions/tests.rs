//! The session store against kills, full disks and files that were tampered with.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use proptest::prelude::*;
use rusqlite::Connection;
use tempfile::TempDir;

use super::*;

const DEADLINE: Duration = Duration::from_secs(30);

fn id(datasource: &str) -> DatasourceId {
    DatasourceId::new(datasource).expect("slug")
}

fn subscription(filter: &str) -> StoredSubscription {
    StoredSubscription {
        filter: filter.to_owned(),
        qos: 1,
        no_local: false,
        retain_as_published: false,
        identifier: None,
        from: 7,
        replay: None,
    }
}

fn session(uid: u64, filters: &[&str]) -> StoredSession {
    StoredSession {
        uid,
        datasource: id("press-4"),
        client_id: format!("client {uid}"),
        expiry_s: 3600,
        ended_at: None,
        cursor: 5,
        subscriptions: filters.iter().map(|filter| subscription(filter)).collect(),
        flights: StoredFlights::default(),
    }
}

/// A message of each kind.
fn flights(first: Offset) -> StoredFlights {
    let origins = [FlightOrigin::Log, FlightOrigin::Retained, FlightOrigin::Shared];
    let sent = origins.into_iter().zip([(u16::MAX, 1, first), (1, 2, first + 7), (3, 2, first + 8)]);
    let sent = sent.map(|(origin, (packet_id, qos, offset))| StoredFlight { packet_id, offset, qos, origin });
    StoredFlights { last_id: 4, sent: sent.collect(), released: vec![4, 2] }
}

fn group(name: &str, cursor: Offset) -> StoredGroup {
    StoredGroup { datasource: id("press-4"), group: name.to_owned(), filter: "spindle/#".to_owned(), cursor }
}

fn open(dir: &Path) -> (SessionStore, StoredSessions) {
    SessionStore::open(dir).expect("opens")
}

async fn written(store: &SessionStore, changes: Vec<SessionStoreChange>) {
    tokio::time::timeout(DEADLINE, store.write(changes)).await.expect("answered").expect("written");
}

async fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !holds() {
        assert!(begun.elapsed() < DEADLINE, "{what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// What a start after a kill at this moment finds.
fn as_killed(dir: &Path) -> StoredSessions {
    let copy = tempfile::tempdir().expect("temporary directory");
    for file in std::fs::read_dir(dir).expect("readable") {
        let file = file.expect("readable");
        std::fs::copy(file.path(), copy.path().join(file.file_name())).expect("copied");
    }
    open(copy.path()).1
}

fn directory() -> TempDir {
    tempfile::tempdir().expect("temporary directory")
}

#[tokio::test]
async fn everything_about_a_session_comes_back() {
    let dir = directory();
    let (store, stored) = open(dir.path());
    assert_eq!(stored, StoredSessions::default());
    let one = StoredSession {
        uid: u64::MAX,
        datasource: DatasourceId::all(),
        client_id: "a'b\u{1F600}".to_owned(),
        expiry_s: u32::MAX,
        ended_at: Some(1_795_426_119_000_000),
        cursor: 1 << 60,
        subscriptions: vec![
            StoredSubscription {
                filter: "$share/workers/+/spindle/#".to_owned(),
                qos: 0,
                no_local: true,
                retain_as_published: true,
                identifier: Some(268_435_455),
                from: 1 << 59,
                replay: Some("from-offset 576460752303423488".to_owned()),
            },
            subscription("+/x"),
        ],
        flights: flights(1 << 59),
    };
    let none = StoredSession { expiry_s: 0, ..session(0, &[]) };
    let of_all = StoredGroup { datasource: DatasourceId::all(), ..group("workers", 9) };
    let changes = vec![
        SessionStoreChange::PutSession(one.clone()),
        SessionStoreChange::PutSession(none.clone()),
        SessionStoreChange::PutGroup(group("workers", 8)),
        SessionStoreChange::PutGroup(of_all.clone()),
    ];
    written(&store, changes).await;
    store.close().await;
    let expected = StoredSessions { sessions: vec![one, none], groups: vec![of_all, group("workers", 8)] };
    assert_eq!(open(dir.path()).1, expected);
}

#[tokio::test]
async fn what_was_acknowledged_survives_a_kill_at_any_moment() {
    let dir = directory();
    let (store, _) = open(dir.path());
    written(&store, vec![SessionStoreChange::PutSession(session(1, &["a", "b"]))]).await;
    assert_eq!(as_killed(dir.path()).sessions, [session(1, &["a", "b"])]);
    written(
        &store,
        vec![SessionStoreChange::PutSession(session(1, &["c"])), SessionStoreChange::PutGroup(group("g", 1))],
    )
    .await;
    let killed = as_killed(dir.path());
    assert_eq!((killed.sessions, killed.groups), (vec![session(1, &["c"])], vec![group("g", 1)]));
    let moved = vec![
        SessionStoreChange::MoveFlights { uid: 1, cursor: 40, flights: flights(30) },
        SessionStoreChange::MoveCursor { uid: 1, cursor: 50 },
        SessionStoreChange::SetEnded { uid: 1, ended_at: Some(99), expiry_s: 7 },
        SessionStoreChange::PutGroup(group("g", 2)),
    ];
    written(&store, moved).await;
    let expected = session(1, &["c"]);
    let expected =
        StoredSession { cursor: 50, ended_at: Some(99), expiry_s: 7, flights: flights(30), ..expected };
    let killed = as_killed(dir.path());
    assert_eq!((killed.sessions, killed.groups), (vec![expected], vec![group("g", 2)]));
    let StoredGroup { datasource, group, filter, .. } = group("g", 2);
    let removed = vec![
        SessionStoreChange::RemoveSession(1),
        SessionStoreChange::RemoveGroup { datasource, group, filter },
    ];
    written(&store, removed).await;
    assert_eq!(as_killed(dir.path()), StoredSessions::default());
}

#[tokio::test]
async fn changes_of_a_session_that_is_not_there_do_nothing() {
    let dir = directory();
    let (store, _) = open(dir.path());
    let late = || {
        vec![
            SessionStoreChange::MoveCursor { uid: 1, cursor: 50 },
            SessionStoreChange::SetEnded { uid: 1, ended_at: None, expiry_s: 7 },
            SessionStoreChange::RemoveSession(1),
        ]
    };
    written(&store, late()).await;
    // In the same transaction as the removal, and after it.
    let removed =
        vec![SessionStoreChange::PutSession(session(1, &["a"])), SessionStoreChange::RemoveSession(1)];
    written(&store, removed.into_iter().chain(late()).collect()).await;
    written(&store, late()).await;
    written(&store, Vec::new()).await;
    assert_eq!(as_killed(dir.path()), StoredSessions::default());
}

#[tokio::test]
async fn a_change_that_nobody_waits_for_is_written() {
    let dir = directory();
    let (store, _) = open(dir.path());
    drop(store.write(vec![SessionStoreChange::PutSession(session(1, &["a"]))]));
    drop(store.write(vec![SessionStoreChange::MoveCursor { uid: 1, cursor: 6 }]));
    // All clones are gone, and nobody has closed it: the thread finishes and lets go of the file.
    drop(store);
    assert_eq!(open(dir.path()).1.sessions, [StoredSession { cursor: 6, ..session(1, &["a"]) }]);
}

#[tokio::test]
async fn a_closed_store_has_written_all_and_takes_no_more() {
    let dir = directory();
    let (store, _) = open(dir.path());
    let waiting: Vec<_> = (0..1000)
        .map(|uid| store.write(vec![SessionStoreChange::PutSession(session(uid, &["a", "b/#"]))]))
        .collect();
    store.close().await;
    for write in waiting {
        assert_eq!(write.await, Ok(()));
    }
    let refused = store.write(vec![SessionStoreChange::RemoveSession(1)]).await;
    assert_eq!(refused, Err(SessionStoreError::Closed));
    store.close().await;
    assert_eq!(open(dir.path()).1.sessions.len(), 1000);
}

#[tokio::test]
async fn on_a_full_disk_waiters_are_told_and_their_changes_are_written_when_there_is_room() {
    let dir = directory();
    let (store, _) = open(dir.path());
    written(&store, vec![SessionStoreChange::PutSession(session(1, &["a"]))]).await;
    store.meddle(|table| table.set("max_page_count", 1));
    let filters: Vec<String> = (0..2000).map(|n| format!("some/long/filter/{n:05}")).collect();
    let filters: Vec<&str> = filters.iter().map(String::as_str).collect();
    let first = store.write(vec![SessionStoreChange::PutSession(session(2, &filters))]);
    until("trouble is told", || store.trouble().is_some()).await;
    let later = store.write(vec![
        SessionStoreChange::MoveCursor { uid: 2, cursor: 60 },
        SessionStoreChange::RemoveSession(1),
    ]);
    let begun = Instant::now();
    let error = tokio::time::timeout(DEADLINE, first).await.expect("answered").expect_err("no room");
    assert!(begun.elapsed() >= SESSION_WRITE_WAIT_MAX / 2, "it waited {:?}", begun.elapsed());
    assert!(matches!(error, SessionStoreError::Database(SqliteError::Full { .. })), "{error}");
    assert!(error.to_string().contains("sessions.db"), "{error}");
    assert_eq!(as_killed(dir.path()).sessions, [session(1, &["a"])]);

    store.meddle(|table| table.set("max_page_count", 1_000_000));
    // Whether the second one had waited long enough to be told is a matter of time.
    let _ = tokio::time::timeout(DEADLINE, later).await.expect("answered");
    written(&store, Vec::new()).await;
    assert_eq!(store.trouble(), None);
    assert_eq!(as_killed(dir.path()).sessions, [StoredSession { cursor: 60, ..session(2, &filters) }]);
}

#[tokio::test]
async fn after_an_error_of_another_kind_the_database_is_opened_again() {
    let dir = directory();
    let (store, _) = open(dir.path());
    store.meddle(|table| table.set("query_only", 1));
    written(&store, vec![SessionStoreChange::PutSession(session(1, &["a"]))]).await;
    assert_eq!(store.trouble(), None);
    assert_eq!(as_killed(dir.path()).sessions, [session(1, &["a"])]);
}

#[tokio::test]
async fn a_store_that_cannot_write_still_closes() {
    let dir = directory();
    let (store, _) = open(dir.path());
    store.meddle(|table| table.set("max_page_count", 1));
    let client_id = "c".repeat(100_000);
    let write =
        store.write(vec![SessionStoreChange::PutSession(StoredSession { client_id, ..session(1, &[]) })]);
    tokio::time::timeout(DEADLINE, store.close()).await.expect("closed in time");
    let error = write.await.expect_err("no room");
    assert!(matches!(error, SessionStoreError::Database(SqliteError::Full { .. })), "{error}");
}

#[tokio::test]
async fn a_hundred_thousand_sessions_are_loaded_at_once() {
    let dir = directory();
    let (store, _) = open(dir.path());
    let sessions =
        (0..100_000).map(|uid| SessionStoreChange::PutSession(session(uid, &["spindle/#", "+/temp"])));
    written(&store, sessions.collect()).await;
    store.close().await;
    let begun = Instant::now();
    let (_, stored) = open(dir.path());
    let took = begun.elapsed();
    assert_eq!(stored.sessions.len(), 100_000);
    assert!(stored.sessions.iter().all(|session| session.subscriptions.len() == 2));
    assert!(took < Duration::from_secs(10), "{took:?}");
}

#[test]
fn a_database_that_makes_no_sense_is_set_aside_and_named() {
    for (change, named) in [
        ("INSERT INTO sessions VALUES (1, 'Not a slug', 'c', 0, NULL, 0, NULL)", "datasource id"),
        ("INSERT INTO sessions VALUES (1, '*', 'c', -1, NULL, 0, NULL)", "-1"),
        ("INSERT INTO sessions VALUES (1, '*', 'c', 0, NULL, 0, x'0100')", "in flight"),
        ("INSERT INTO subscriptions VALUES (3, 'a', 1, 0, 0, NULL, 0, NULL)", "session 3"),
    ] {
        let dir = directory();
        drop(SessionTable::open(dir.path()).expect("made"));
        let connection = Connection::open(dir.path().join(SESSIONS_FILE_NAME)).expect("opens");
        connection.execute_batch(change).expect("runs");
        drop(connection);
        let error = SessionTable::open(dir.path()).and_then(|table| table.load()).expect_err("no sense");
        let error = error.to_string();
        assert!(error.contains("sessions.db is damaged") && error.contains(named), "{error}");
        let (store, stored) = SessionStore::open(dir.path()).expect("opens anew");
        assert_eq!(stored, StoredSessions::default());
        let said = store.set_aside().expect("it is said");
        let files =
            std::fs::read_dir(dir.path()).expect("readable").map(|file| file.expect("an entry").path());
        let asides = files.filter(|path| path.to_string_lossy().contains("sessions-set-aside-"));
        assert!(asides.into_iter().any(|path| said.contains(&*path.to_string_lossy())), "{said}");
    }
}

/// A simple model of what the store should hold.
#[derive(Default)]
struct Model {
    sessions: BTreeMap<u64, StoredSession>,
    groups: BTreeMap<String, StoredGroup>,
}

impl Model {
    fn apply(&mut self, change: SessionStoreChange) {
        match change {
            SessionStoreChange::PutSession(session) => drop(self.sessions.insert(session.uid, session)),
            SessionStoreChange::RemoveSession(uid) => drop(self.sessions.remove(&uid)),
            SessionStoreChange::MoveCursor { uid, cursor } => {
                self.sessions.entry(uid).and_modify(|session| session.cursor = cursor);
            }
            SessionStoreChange::MoveFlights { uid, cursor, flights } => {
                let moved =
                    |session: &mut StoredSession| (session.cursor, session.flights) = (cursor, flights);
                self.sessions.entry(uid).and_modify(moved);
            }
            SessionStoreChange::SetEnded { uid, ended_at, expiry_s } => {
                self.sessions
                    .entry(uid)
                    .and_modify(|session| (session.ended_at, session.expiry_s) = (ended_at, expiry_s));
            }
            SessionStoreChange::PutGroup(group) => drop(self.groups.insert(group.group.clone(), group)),
            SessionStoreChange::RemoveGroup { group, .. } => drop(self.groups.remove(&group)),
            SessionStoreChange::Found(_) | SessionStoreChange::GiveUpSession(_) => {}
        }
    }

    fn stored(&self) -> StoredSessions {
        StoredSessions {
            sessions: self.sessions.values().cloned().collect(),
            groups: self.groups.values().cloned().collect(),
        }
    }
}

fn any_change() -> impl Strategy<Value = SessionStoreChange> {
    let uid = 0..3_u64;
    let filters = prop::sample::subsequence(vec!["a", "b/#", "c/+"], 0..=3);
    let name = prop::sample::select(vec!["g", "h"]);
    prop_oneof![
        (uid.clone(), filters)
            .prop_map(|(uid, filters)| SessionStoreChange::PutSession(session(uid, &filters))),
        uid.clone().prop_map(SessionStoreChange::RemoveSession),
        (uid.clone(), 10..100_u64).prop_map(|(uid, cursor)| SessionStoreChange::MoveCursor { uid, cursor }),
        (uid.clone(), 10..100_u64, 0..50_u64).prop_map(|(uid, cursor, first)| {
            let flights = if first < 25 { flights(first) } else { StoredFlights::default() };
            SessionStoreChange::MoveFlights { uid, cursor, flights }
        }),
        (uid, prop::option::of(any::<i64>()), any::<u32>())
            .prop_map(|(uid, ended_at, expiry_s)| SessionStoreChange::SetEnded { uid, ended_at, expiry_s }),
        (name.clone(), 0..100_u64)
            .prop_map(|(name, cursor)| SessionStoreChange::PutGroup(group(name, cursor))),
        name.prop_map(|name| {
            let StoredGroup { datasource, group, filter, .. } = group(name, 0);
            SessionStoreChange::RemoveGroup { datasource, group, filter }
        }),
    ]
}

#[tokio::test]
async fn a_database_that_is_damaged_while_it_is_used_is_set_aside_and_nothing_is_lost() {
    let dir = directory();
    let path = dir.path().join(SESSIONS_FILE_NAME);
    let (store, _) = SessionStore::open(dir.path()).expect("opens");
    let puts = (0..300).map(|uid| SessionStoreChange::PutSession(session(uid, &["a", "b/#"])));
    store.write(puts.collect()).await.expect("written");
    store.write(vec![SessionStoreChange::PutGroup(group("g", 1))]).await.expect("written");
    let damaged = path.clone();
    store.meddle(move |table| table.damage(&damaged));
    let changes = vec![
        SessionStoreChange::RemoveSession(1),
        SessionStoreChange::MoveCursor { uid: 2, cursor: 77 },
        SessionStoreChange::PutSession(session(300, &["c"])),
    ];
    store.write(changes).await.expect("written to another one");
    let said = store.set_aside().expect("it is said");
    assert!(said.contains("sessions-set-aside-"), "{said}");
    assert_eq!(store.trouble(), None);
    store.close().await;
    let (_, stored) = SessionStore::open(dir.path()).expect("opens");
    assert_eq!((stored.sessions.len(), stored.groups.len()), (300, 1));
    assert!(stored.sessions.iter().all(|session| session.uid != 1));
    assert_eq!(
        stored.sessions.iter().find(|session| session.uid == 2).map(|session| session.cursor),
        Some(77)
    );
}

/// Makes every attempt to make another `stem.db` fail: a file that was half set aside cannot go where it has to.
/// Returns the directory to remove for it to succeed.
fn prevent_another(dir: &Path, stem: &str) -> std::path::PathBuf {
    let aside = dir.join(format!("{stem}-set-aside-20260101T000000Z.db"));
    std::fs::write(&aside, b"earlier").expect("written");
    std::fs::write(dir.join(format!("{stem}-set-aside-20260101T000000Z.db-wal.moving")), b"")
        .expect("written");
    let taken = dir.join(format!("{stem}-set-aside-20260101T000000Z.db-wal"));
    std::fs::create_dir(&taken).expect("made");
    taken
}

#[tokio::test]
async fn another_database_that_cannot_be_made_at_once_has_all_that_the_damaged_one_had() {
    let dir = directory();
    let path = dir.path().join(SESSIONS_FILE_NAME);
    let (store, _) = SessionStore::open(dir.path()).expect("opens");
    let puts = (0..300).map(|uid| SessionStoreChange::PutSession(session(uid, &["a", "b/#"])));
    store.write(puts.collect()).await.expect("written");
    store.write(vec![SessionStoreChange::PutGroup(group("g", 1))]).await.expect("written");
    let damaged = path.clone();
    store.meddle(move |table| table.damage(&damaged));
    let taken = prevent_another(dir.path(), "sessions");
    let first = store.write(vec![SessionStoreChange::RemoveSession(1)]);
    until("trouble is told", || store.trouble().is_some()).await;
    let later = store.write(vec![SessionStoreChange::PutSession(session(300, &["c"]))]);
    assert!(!path.exists());
    std::fs::remove_dir(&taken).expect("removed");
    // Whether they had waited long enough to be told of the trouble is a matter of time.
    let _ = tokio::time::timeout(DEADLINE, async { (first.await, later.await) }).await.expect("answered");
    written(&store, Vec::new()).await;
    assert_eq!(store.trouble(), None);
    assert!(store.set_aside().expect("it is said").contains("sessions-set-aside-"));
    let stored = as_killed(dir.path());
    let mut uids: Vec<_> = stored.sessions.iter().map(|session| session.uid).collect();
    uids.sort_unstable();
    assert_eq!(uids, (0..=300).filter(|uid| *uid != 1).collect::<Vec<_>>());
    assert_eq!(stored.groups.len(), 1);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn however_changes_are_gathered_the_last_ones_count(
        transactions in prop::collection::vec(prop::collection::vec(any_change(), 0..8), 1..6),
        twice in any::<bool>(),
    ) {
        let dir = directory();
        let mut table = SessionTable::open(dir.path()).expect("opens");
        let mut model = Model::default();
        for changes in transactions {
            let mut pending = PendingSessionChanges::default();
            for change in changes {
                model.apply(change.clone());
                pending.fold(change);
            }
            table.write(&pending, false).expect("written");
            if twice {
                // As after a commit that succeeded but reported an error.
                table.write(&pending, false).expect("written");
            }
            prop_assert_eq!(table.load().expect("read"), model.stored());
        }
    }
}

/// The tables of Headgate 0.1, which had nothing in flight: everything from the cursor on was sent again.
#[tokio::test]
async fn sessions_of_the_first_version_are_read_and_written() {
    let dir = directory();
    let connection = Connection::open(dir.path().join(SESSIONS_FILE_NAME)).expect("opens");
    let made = connection.execute_batch(
        "CREATE TABLE sessions (uid INTEGER PRIMARY KEY, datasource TEXT NOT NULL, client_id TEXT NOT NULL,
             expiry_s INTEGER NOT NULL, ended_at INTEGER, cursor INTEGER NOT NULL) STRICT;
         CREATE TABLE subscriptions (uid INTEGER NOT NULL, filter TEXT NOT NULL, qos INTEGER NOT NULL,
             no_local INTEGER NOT NULL, retain_as_published INTEGER NOT NULL, identifier INTEGER,
             from_offset INTEGER NOT NULL, PRIMARY KEY (uid, filter)) STRICT, WITHOUT ROWID;
         CREATE TABLE share_groups (datasource TEXT NOT NULL, name TEXT NOT NULL, filter TEXT NOT NULL,
             cursor INTEGER NOT NULL, PRIMARY KEY (datasource, name, filter)) STRICT, WITHOUT ROWID;
         INSERT INTO sessions VALUES (1, 'press-4', 'client 1', 3600, NULL, 5);
         INSERT INTO subscriptions VALUES (1, 'a', 1, 0, 0, NULL, 7);
         INSERT INTO share_groups VALUES ('press-4', 'g', 'spindle/#', 8);
         PRAGMA journal_mode = WAL; PRAGMA user_version = 1;",
    );
    made.expect("made");
    drop(connection);
    let (store, stored) = open(dir.path());
    assert_eq!((stored.sessions, stored.groups), (vec![session(1, &["a"])], vec![group("g", 8)]));
    written(&store, vec![SessionStoreChange::MoveFlights { uid: 1, cursor: 9, flights: flights(3) }]).await;
    store.close().await;
    let moved = StoredSession { cursor: 9, flights: flights(3), ..session(1, &["a"]) };
    assert_eq!(open(dir.path()).1.sessions, [moved]);
}

#[test]
fn a_log_that_ends_earlier_takes_back_what_was_in_flight_beyond_it() {
    let mut stored = StoredSessions { sessions: vec![session(1, &["a"])], groups: Vec::new() };
    stored.sessions[0].flights = flights(1);
    assert_eq!(stored.set_back(20), [], "nothing is beyond the end");
    let changes = stored.set_back(8);
    let StoredFlights { sent, released, .. } = &stored.sessions[0].flights;
    assert_eq!((sent.len(), released.len()), (1, 2));
    assert_eq!(changes, [SessionStoreChange::PutSession(stored.sessions[0].clone())]);
}
