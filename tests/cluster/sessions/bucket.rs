//! The bucket that gateways of a cluster have their sessions in.

use std::time::{Duration, Instant};

use headgate::testing::message::DatasourceId;
use headgate::testing::{
    Config, FlightOrigin, FoundSession, LostSession, SessionLookup, SessionStore, SessionStoreChange,
    SessionStoreError, StoredFlight, StoredFlights, StoredSession, StoredSubscription, bucket,
};
use headgate_bridge_nats::Nats;
use tokio::sync::mpsc::UnboundedReceiver;

use crate::common::PATIENCE;
use crate::common::nats::{NatsServer, nats_py};

/// What a gateway has of the sessions, without the gateway.
struct Keeper {
    store: SessionStore,
    lost: UnboundedReceiver<LostSession>,
    lookup: SessionLookup,
}

impl Keeper {
    async fn open(server: &NatsServer, node: &str) -> Self {
        let mut config = Config::default();
        config.nats.servers = vec![server.url()];
        let nats = Nats::connect(&config.nats.connection(node).expect("settings")).await.expect("settings");
        let deadline = Instant::now() + PATIENCE;
        let cells = loop {
            match bucket::open_sessions_bucket(&nats, 1, 3600).await {
                Ok(cells) => break cells,
                Err(error) => assert!(Instant::now() < deadline, "{error}"),
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        };
        let lookup = SessionLookup::new(cells.clone(), bucket::CursorSetBacks::default());
        let (store, lost) = SessionStore::in_bucket(cells, node, || false).expect("a thread");
        Self { store, lost, lookup }
    }

    async fn write(&self, changes: Vec<SessionStoreChange>) {
        self.store.write(changes).await.expect("written");
    }

    async fn find(&self, client: usize) -> FoundSession {
        self.lookup.find(&press_4(), &format!("client {client}")).await.expect("read")
    }

    /// What it is told first of what others have taken.
    async fn loses(&mut self) -> LostSession {
        tokio::time::timeout(PATIENCE, self.lost.recv()).await.expect("in time").expect("the store is there")
    }
}

fn press_4() -> DatasourceId {
    DatasourceId::new("press-4").expect("a slug")
}

/// So many messages, and one that waits for its PUBCOMP.
fn in_flight(count: u16) -> StoredFlights {
    let flight = |packet_id| StoredFlight {
        packet_id,
        offset: 1_000_000 + u64::from(packet_id),
        qos: 2,
        origin: FlightOrigin::Log,
    };
    StoredFlights { last_id: count + 1, sent: (1..=count).map(flight).collect(), released: vec![count + 1] }
}

fn stored(client: usize) -> StoredSession {
    StoredSession {
        uid: client as u64,
        datasource: press_4(),
        client_id: format!("client {client}"),
        expiry_s: 3600,
        ended_at: None,
        cursor: 5,
        subscriptions: vec![StoredSubscription {
            filter: "spindle/#".to_owned(),
            qos: 1,
            no_local: true,
            retain_as_published: true,
            identifier: Some(7),
            from: 3,
            replay: Some("tail 9".to_owned()),
            metadata: true,
        }],
        flights: in_flight(1),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn everything_about_a_session_is_found_by_another_gateway() {
    let server = NatsServer::start();
    let (a, b) = (Keeper::open(&server, "a").await, Keeper::open(&server, "b").await);
    assert_eq!(b.find(1).await.session, None);
    a.write(vec![SessionStoreChange::PutSession(stored(1)), SessionStoreChange::PutSession(stored(2))]).await;
    let found = b.find(1).await;
    assert_eq!((found.session, found.moves), (Some(stored(1)), 1));

    // How far it is, and then again in its own cell.
    a.write(vec![SessionStoreChange::MoveCursor { uid: 1, cursor: 60 }]).await;
    let moved = StoredSession { cursor: 60, ..stored(1) };
    assert_eq!(b.find(1).await.session, Some(moved.clone()));
    a.write(vec![SessionStoreChange::MoveFlights { uid: 1, cursor: 61, flights: in_flight(3) }]).await;
    let moved = StoredSession { cursor: 61, flights: in_flight(3), ..moved };
    assert_eq!(b.find(1).await.session, Some(moved.clone()));
    assert_eq!(b.find(2).await.session, Some(stored(2)));
    // It goes back when a client asks for the past.
    let back = StoredSession { cursor: 20, ..moved };
    a.write(vec![SessionStoreChange::PutSession(back.clone())]).await;
    assert_eq!(b.find(1).await.session, Some(back.clone()));
    let ended = SessionStoreChange::SetEnded { uid: 1, ended_at: Some(1_000_000), expiry_s: 60 };
    a.write(vec![SessionStoreChange::MoveCursor { uid: 1, cursor: 21 }, ended]).await;
    let ended = StoredSession { cursor: 21, ended_at: Some(1_000_000), expiry_s: 60, ..back };
    assert_eq!(b.find(1).await.session, Some(ended.clone()));
    assert!(!ended.has_expired(60_999_999) && ended.has_expired(61_000_000));

    a.write(vec![SessionStoreChange::RemoveSession(1)]).await;
    assert_eq!(b.find(1).await.session, None);
    // Of a session that is not there, and of one that is another node's, nothing is written.
    a.write(vec![
        SessionStoreChange::MoveCursor { uid: 1, cursor: 70 },
        SessionStoreChange::RemoveSession(9),
    ])
    .await;
    assert_eq!(b.find(1).await.session, None);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_gateway_writes_that_was_cut_off_is_refused_and_it_is_told() {
    let server = NatsServer::start();
    let (mut a, mut b) = (Keeper::open(&server, "a").await, Keeper::open(&server, "b").await);
    a.write((1..=3).map(|client| SessionStoreChange::PutSession(stored(client))).collect()).await;
    let take = |found: FoundSession| {
        let session = StoredSession { cursor: 9, ..found.session.clone().expect("there") };
        vec![SessionStoreChange::Found(Box::new(found)), SessionStoreChange::PutSession(session)]
    };
    // One that it writes, one of which it writes only how far it is, and one that it leaves alone.
    for client in 1..=3 {
        b.write(take(b.find(client).await)).await;
    }
    a.write(vec![
        SessionStoreChange::SetEnded { uid: 1, ended_at: Some(1), expiry_s: 1 },
        SessionStoreChange::MoveCursor { uid: 2, cursor: 70 },
    ])
    .await;
    let mut lost = [a.loses().await.uid, a.loses().await.uid, a.loses().await.uid];
    lost.sort_unstable();
    assert_eq!(lost, [1, 2, 3]);
    for client in 1..=3 {
        let found = b.find(client).await;
        assert_eq!((found.session.expect("there").cursor, found.moves), (9, 2));
    }
    // What it goes on writing of them is nobody's.
    a.write(vec![
        SessionStoreChange::RemoveSession(1),
        SessionStoreChange::MoveCursor { uid: 2, cursor: 80 },
    ])
    .await;
    assert_eq!(b.find(1).await.session.expect("there").cursor, 9);

    // Of two that take one at the same time the first one has it.
    let (for_a, for_b) = (a.find(1).await, b.find(1).await);
    a.write(take(for_a)).await;
    b.write(vec![SessionStoreChange::GiveUpSession(1)]).await;
    b.write(take(for_b)).await;
    assert_eq!(b.loses().await.uid, 1);
    // A late write of the one that had it before is no claim.
    let for_b = b.find(1).await;
    a.write(vec![SessionStoreChange::SetEnded { uid: 1, ended_at: Some(1), expiry_s: 1 }]).await;
    b.write(take(for_b)).await;
    assert_eq!(b.find(1).await.moves, 4);
    assert_eq!(a.loses().await.uid, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gateway_that_nats_was_away_from_writes_all_when_it_is_back() {
    let mut server = NatsServer::start();
    let a = Keeper::open(&server, "a").await;
    a.write(vec![SessionStoreChange::PutSession(stored(1))]).await;
    server.kill();
    let told = a
        .store
        .write(vec![
            SessionStoreChange::MoveCursor { uid: 1, cursor: 8 },
            SessionStoreChange::PutSession(stored(2)),
        ])
        .await;
    assert!(matches!(told, Err(SessionStoreError::Bucket(_))), "{told:?}");
    assert!(a.store.trouble().is_some());
    let _ = a
        .store
        .write(vec![SessionStoreChange::RemoveSession(2), SessionStoreChange::PutSession(stored(3))])
        .await;
    server.restart();
    let deadline = Instant::now() + PATIENCE;
    while a.store.write(Vec::new()).await.is_err() {
        assert!(Instant::now() < deadline);
    }
    assert_eq!(a.store.trouble(), None);
    assert_eq!(a.find(1).await.session.expect("there").cursor, 8);
    assert_eq!((a.find(2).await.session, a.find(3).await.session), (None, Some(stored(3))));
}

#[tokio::test(flavor = "multi_thread")]
async fn how_far_thousands_of_sessions_are_is_written_in_a_few_messages() {
    const SESSIONS: usize = 5_000;
    let server = NatsServer::start();
    let a = Keeper::open(&server, "a").await;
    a.write((0..SESSIONS).map(|client| SessionStoreChange::PutSession(stored(client))).collect()).await;
    let last = || {
        let body = "print((await js.stream_info('KV_headgate-sessions')).state.last_seq)";
        let output = nats_py(&server.url(), body, &[]);
        String::from_utf8_lossy(&output.stdout).trim().parse::<usize>().expect("a number")
    };
    let before = last();
    assert!(before >= SESSIONS);
    a.write(
        (0..SESSIONS)
            .map(|client| SessionStoreChange::MoveCursor { uid: client as u64, cursor: 100 })
            .collect(),
    )
    .await;
    let written = last() - before;
    assert!(written <= 64, "{written} messages");
    for client in [0, 63, 64, SESSIONS - 1] {
        assert_eq!(a.find(client).await.session.expect("there").cursor, 100);
    }
}

/// A page of cursors is one NATS message, which holds 1 MiB.
#[tokio::test(flavor = "multi_thread")]
async fn what_many_sessions_have_in_flight_is_found_whether_a_page_holds_it_or_not() {
    let server = NatsServer::start();
    let (a, b) = (Keeper::open(&server, "a").await, Keeper::open(&server, "b").await);
    // Their numbers put them all on one page.
    let clients = || (1..=100).map(|n| n * 64);
    a.write(clients().map(|client| SessionStoreChange::PutSession(stored(client))).collect()).await;
    for round in 1..=2_u64 {
        let moves = clients().map(|client| SessionStoreChange::MoveFlights {
            uid: client as u64,
            cursor: 100 + round,
            flights: in_flight(4_000),
        });
        a.write(moves.collect()).await;
        for client in clients() {
            let session = b.find(client).await.session.expect("there");
            assert_eq!((session.cursor, session.flights.sent.len()), (100 + round, 4_000), "{client}");
        }
    }
}
