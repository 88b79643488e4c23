//! The registry of a cluster: nodes that change it, and feel what others change, on a real nats-server.
//! Each node is a `Registry` of this process, with a connection of its own to NATS.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use headgate::testing::message::{DatasourceId, KeyId, Transport, now_micros};
use headgate::testing::{
    Actor, ApiKey, AuditQuery, Authorizer, CloseReason, ConnectionControl, JoinedRegistry, Key, KeyClient,
    LeakRow, RecordRule, Registry, RegistryError, Scope, Scopes,
};
use headgate_bridge_nats::{Nats, NatsCredentials, NatsSettings, Presence};
use tokio::task::{AbortHandle, JoinHandle};
use tokio_util::sync::CancellationToken;

use crate::common::nats::NatsServer;
use crate::common::servers::Servers;
use crate::common::wire::{Version, Wire};
use crate::common::{Gateway, Setup, scratch, signal, wait_for};

const SOON: Duration = Duration::from_secs(30);
const ACTOR: Actor = Actor::SYSTEM;

/// A node.
struct Node {
    registry: Arc<Registry>,
    presence: Arc<Presence>,
    /// Keys whose end elsewhere it has settled.
    settled: Arc<AtomicUsize>,
    follow: AbortHandle,
}

impl Node {
    async fn join(server: &NatsServer, id: &str) -> Self {
        Self::join_settling(&[server.url()], id, Duration::ZERO).await
    }

    /// One that takes this long until nothing more can come in under a key that has died elsewhere. The
    /// registry is on all the servers.
    async fn join_settling(servers: &[String], id: &str, settles_in: Duration) -> Self {
        let nats = connect(servers, id).await;
        let JoinedRegistry { registry, presence, follow } =
            soon(Registry::join(&nats, servers.len(), id)).await.expect("joins the cluster");
        let settled = Arc::<AtomicUsize>::default();
        let count = settled.clone();
        let settle = move |dead: Vec<Arc<Key>>| {
            let count = count.clone();
            async move {
                tokio::time::sleep(settles_in).await;
                count.fetch_add(dead.len(), Ordering::SeqCst);
            }
        };
        let follow = tokio::spawn(follow.run(settle)).abort_handle();
        presence.announce().await;
        // It gives up after five seconds in which JetStream did not answer, as a busy machine may have it.
        let deadline = Instant::now() + SOON;
        while let Err(error) = registry.caught_up().await {
            assert!(Instant::now() < deadline, "not caught up: {error}");
        }
        Self { registry, presence, settled, follow }
    }

    /// Does something with the registry, where blocking is allowed.
    fn run<T: Send + 'static>(&self, what: impl FnOnce(&Registry) -> T + Send + 'static) -> JoinHandle<T> {
        let registry = self.registry.clone();
        tokio::task::spawn_blocking(move || what(&registry))
    }

    async fn create(&self, id: &str) -> Result<(Arc<Key>, ApiKey), RegistryError> {
        let id = slug(id);
        let created = self.run(move |registry| {
            registry.create_datasource(&ACTOR, Some(id), "a name", Scopes::from_slice(&[Scope::Ingest]))
        });
        let (_, key, secret) = soon(created).await.expect("no panic")?;
        Ok((key, secret))
    }

    async fn revoke(&self, datasource: &DatasourceId, id: KeyId) -> Result<Option<Arc<Key>>, RegistryError> {
        let datasource = datasource.clone();
        soon(self.run(move |registry| registry.revoke_key(&ACTOR, &datasource, id))).await.expect("no panic")
    }

    /// The key with this secret, if it opens anything here.
    fn opens(&self, secret: &ApiKey) -> Option<Arc<Key>> {
        let authorizer = Authorizer::new(self.registry.clone());
        authorizer.identify(secret.expose().as_bytes()).ok().map(|grant| grant.key().clone())
    }

    /// What the audit tells.
    async fn audited(&self) -> Vec<(i64, String)> {
        let page = AuditQuery { from: None, to: None, after: 0, limit: 100_000 };
        let entries = self.run(move |registry| registry.audit_entries(&page)).await.expect("no panic");
        entries.expect("read").into_iter().map(|entry| (entry.id, entry.action)).collect()
    }

    /// Everything that a manager sees of it.
    fn seen(&self) -> Vec<String> {
        let mut seen = Vec::new();
        for datasource in self.registry.datasources() {
            let (limits, schemas) = (datasource.limits.text(), datasource.schemas.text());
            seen.push(format!("{} {} {limits:?} {schemas:?}", datasource.id, datasource.created_at));
        }
        let owners = self.registry.datasources().into_iter().map(|datasource| datasource.id.clone());
        for owner in owners.chain([DatasourceId::all()]) {
            for key in self.registry.keys(&owner) {
                let limits = key.limits.text();
                let (ends, rotation) = (key.ends_at(), key.rotation());
                seen.push(format!("{key:?} {ends:?} {rotation:?} {limits:?} {}", key.holds()));
            }
        }
        seen
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        self.follow.abort();
    }
}

async fn connect(servers: &[String], name: &str) -> Nats {
    let settings = NatsSettings {
        servers: servers.to_vec(),
        credentials: NatsCredentials::None,
        ca: None,
        name: name.to_owned(),
    };
    Nats::connect(&settings).await.expect("settings that can work")
}

fn slug(id: &str) -> DatasourceId {
    DatasourceId::new(id).expect("a slug")
}

async fn soon<T>(what: impl Future<Output = T>) -> T {
    tokio::time::timeout(SOON, what).await.expect("happens soon")
}

/// Waits until the nodes know each other.
async fn acquainted(nodes: &[&Node]) {
    let deadline = Instant::now() + SOON;
    while nodes.iter().any(|node| node.presence.others().len() + 1 != nodes.len()) {
        assert!(Instant::now() < deadline, "the nodes do not know each other");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

async fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    let deadline = Instant::now() + SOON;
    while !is_so() {
        assert!(Instant::now() < deadline, "never: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// Tries until NATS is back.
async fn until_ok<E: std::fmt::Debug>(what: impl Fn() -> JoinHandle<Result<(), E>>) {
    let deadline = Instant::now() + SOON;
    while let Err(error) = what().await.expect("no panic") {
        assert!(Instant::now() < deadline, "{error:?}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_token_of_one_node_is_good_on_the_others_and_after_a_restart_and_dies_with_its_key_everywhere() {
    let server = NatsServer::start();
    let (a, b) = (Node::join(&server, "a").await, Node::join(&server, "b").await);
    acquainted(&[&a, &b]).await;
    let (key, _) = a.create("press-4").await.expect("created");
    let ends_at = now_micros() + 3_600_000_000;
    let make = |node: &Node| {
        let key = key.clone();
        let scopes = Scopes::from_slice(&[Scope::Ingest]);
        node.run(move |registry| registry.make_token(&key, scopes, ends_at, Vec::new()))
    };
    // At once, so that each would have a secret of its own.
    let (of_a, of_b) = tokio::join!(make(&a), make(&b));
    let tokens = [of_a, of_b].map(|made| made.expect("no panic").expect("made").token);
    let is_good = |node: &Node| {
        let authorizer = Authorizer::new(node.registry.clone());
        tokens.each_ref().map(|token| authorizer.identify(token.expose().as_bytes()).is_ok())
    };
    assert_eq!((is_good(&a), is_good(&b)), ([true; 2], [true; 2]));
    let before = a.audited().await.len();
    let more = make(&b).await.expect("no panic").expect("made").token;
    assert_eq!(a.audited().await.len(), before, "no more is written");
    assert!(Authorizer::new(a.registry.clone()).identify(more.expose().as_bytes()).is_ok());
    let late = Node::join(&server, "late").await;
    assert_eq!(is_good(&late), [true; 2]);
    acquainted(&[&a, &b, &late]).await;
    b.revoke(&slug("press-4"), key.id).await.expect("revoked").expect("was live");
    assert_eq!((is_good(&a), is_good(&b), is_good(&late)), ([false; 2], [false; 2], [false; 2]));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_one_node_changes_holds_on_the_other_before_the_call_returns() {
    let server = NatsServer::start();
    let (a, b) = (Node::join(&server, "a").await, Node::join(&server, "b").await);
    acquainted(&[&a, &b]).await;
    let press = slug("press-4");
    let (_, secret) = a.create("press-4").await.expect("created");
    assert!(b.opens(&secret).is_some());
    assert_eq!(a.seen(), b.seen());

    let of = press.clone();
    let limits = || Some("{\"messages_per_s\":5}".to_owned());
    let set = b.run(move |registry| {
        registry.set_datasource_limits(&ACTOR, &of, limits())?;
        registry.set_datasource_schemas(&ACTOR, &of, Some("[]".to_owned()))
    });
    set.await.expect("no panic").expect("set");
    let here = a.registry.datasource("press-4").expect("there");
    assert_eq!(
        (here.limits.text().as_deref(), here.schemas.text().as_deref()),
        (limits().as_deref(), Some("[]"))
    );
    // A setting that stays as it is keeps what was made of it.
    let made = here.limits.made(|text| text.map(str::len));

    let of = press.clone();
    let created = a.run(move |registry| {
        registry.create_key(&ACTOR, &of, "left", Scopes::from_slice(&[Scope::Ingest, Scope::Subscribe]), None)
    });
    let (key, old_secret) = created.await.expect("no panic").expect("created");
    let (of, id) = (press.clone(), key.id);
    let rotated = b.run(move |registry| {
        assert!(registry.set_key_limits(&ACTOR, &of, id, limits()).expect("set"));
        registry.rotate_key(&ACTOR, &of, id, Duration::from_secs(60))
    });
    let rotated = rotated.await.expect("no panic").expect("rotated").expect("there");
    assert_eq!(a.seen(), b.seen());
    assert_eq!(key.rotation().replaced_by, Some((rotated.key.id, rotated.grace_ends_at)));
    assert!(a.opens(&rotated.secret).is_some() && a.opens(&old_secret).is_some());
    let of = press.clone();
    let undone = a.run(move |registry| registry.undo_rotation(&ACTOR, &of, id));
    assert!(undone.await.expect("no panic").expect("undone").is_some());
    assert!(b.opens(&rotated.secret).is_none() && b.opens(&old_secret).is_some());
    assert!(Arc::ptr_eq(&made, &here.limits.made(|_| -> Option<usize> { panic!("made again") })));

    let of = press.clone();
    let dead = b.run(move |registry| registry.delete_datasource(&ACTOR, &of)).await.expect("no panic");
    assert_eq!(dead.expect("deleted").len(), 2);
    assert!(a.opens(&secret).is_none() && a.opens(&old_secret).is_none());
    assert!(!a.registry.has_datasource("press-4") && a.registry.was_revoked(&old_secret.digest()));
    assert_eq!(a.seen(), b.seen());
    let (of_a, of_b) = (a.audited().await, b.audited().await);
    assert_eq!(of_a, of_b);
    let ids: Vec<i64> = of_a.iter().map(|(id, _)| *id).collect();
    assert_eq!(ids, (1..=8).collect::<Vec<_>>(), "{of_a:?}");
    // Who comes later has all of it.
    let c = Node::join(&server, "c").await;
    assert_eq!((c.seen(), c.audited().await), (a.seen(), of_a));
    assert!(c.registry.was_revoked(&old_secret.digest()));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_two_nodes_that_take_the_same_id_at_once_one_has_it() {
    let server = NatsServer::start();
    let (a, b) = (Node::join(&server, "a").await, Node::join(&server, "b").await);
    acquainted(&[&a, &b]).await;
    for n in 0..25 {
        let id = format!("press-{n}");
        let (one, other) = tokio::join!(a.create(&id), b.create(&id));
        let exists = |result: &Result<_, _>| matches!(result, Err(RegistryError::Exists(_)));
        assert!(one.is_ok() != other.is_ok() && (exists(&one) || exists(&other)), "{one:?} {other:?}");
    }
    // The same without ids of their own: each gets another one.
    let unnamed = |node: &Node| {
        node.run(|registry| {
            let created =
                registry.create_datasource(&ACTOR, None, "Pump", Scopes::from_slice(&[Scope::Ingest]));
            created.expect("created").0.id.clone()
        })
    };
    let mut ids = BTreeSet::new();
    for _ in 0..10 {
        let (one, other) = tokio::join!(unnamed(&a), unnamed(&b));
        ids.insert(one.expect("no panic"));
        ids.insert(other.expect("no panic"));
    }
    assert_eq!(ids.len(), 20);
    assert_eq!((a.seen(), a.audited().await), (b.seen(), b.audited().await));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_key_that_is_revoked_on_one_node_is_dead_on_the_other_and_its_connections_are_told() {
    let server = NatsServer::start();
    let settles_in = Duration::from_millis(300);
    let a = Node::join(&server, "a").await;
    let b = Node::join_settling(&[server.url()], "b", settles_in).await;
    acquainted(&[&a, &b]).await;
    let (key, secret) = a.create("press-4").await.expect("created");
    let live = b.opens(&secret).expect("opens");
    let control = Arc::new(ConnectionControl::default());
    let _entered = live.connections().enter(control.clone());
    let lease = live.lease().clone();
    let started = Instant::now();
    let revoked = a.revoke(&key.datasource, key.id).await.expect("revoked");
    assert!(revoked.is_some());
    assert!(started.elapsed() >= settles_in, "the call waits until the other node has settled it");
    assert_eq!(b.settled.load(Ordering::SeqCst), 1);
    assert_eq!((control.closed(), lease.holds()), (Some(CloseReason::KeyDead), false));
    assert!(b.opens(&secret).is_none());
    // It is dead for good.
    assert!(b.revoke(&key.datasource, key.id).await.expect("answered").is_none());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_revocation_is_felt_on_the_other_node_within_milliseconds() {
    const KEYS: usize = 100;
    let server = NatsServer::start();
    let (a, b) = (Node::join(&server, "a").await, Node::join(&server, "b").await);
    acquainted(&[&a, &b]).await;
    let mut felt_after = Vec::new();
    let mut returned_after = Vec::new();
    for n in 0..KEYS {
        let (key, secret) = a.create(&format!("press-{n}")).await.expect("created");
        let live = b.opens(&secret).expect("opens");
        let control = Arc::new(ConnectionControl::default());
        let entered = live.connections().enter(control.clone());
        let felt = tokio::spawn({
            let control = control.clone();
            async move {
                std::future::poll_fn(|cx| control.poll_closed(cx)).await;
                drop(entered);
                Instant::now()
            }
        });
        let started = Instant::now();
        a.revoke(&key.datasource, key.id).await.expect("revoked").expect("there");
        returned_after.push(started.elapsed());
        assert!(b.opens(&secret).is_none());
        felt_after.push(soon(felt).await.expect("no panic") - started);
    }
    for (what, mut times) in [("felt elsewhere", felt_after), ("returned", returned_after)] {
        times.sort();
        let (p50, p99) = (times[KEYS / 2], times[KEYS * 99 / 100 - 1]);
        eprintln!("{what}: p50 {p50:?}, p99 {p99:?}, max {:?}", times[KEYS - 1]);
        assert!(p50 < Duration::from_millis(100), "{what}: p50 {p50:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn while_nats_is_away_a_key_dies_here_and_nothing_else_is_changed_and_after_it_everything_goes_on() {
    let mut server = NatsServer::start();
    let (a, b) = (Node::join(&server, "a").await, Node::join(&server, "b").await);
    acquainted(&[&a, &b]).await;
    let (key, secret) = a.create("press-4").await.expect("created");
    server.kill();
    until("a node misses NATS", || !a.presence.others().contains(&"b".to_owned())).await;
    let away = a.create("press-5").await;
    assert!(matches!(away, Err(RegistryError::Away(_))), "{away:?}");
    // A key that has to die dies at the node that was asked; the other one cannot know it yet.
    assert!(a.revoke(&key.datasource, key.id).await.expect("dead here").is_some());
    assert!(a.opens(&secret).is_none() && b.opens(&secret).is_some());
    let unwritten = a.registry.describe_unwritten(&key.datasource, Some(key.id)).expect("not durable");
    assert!(unwritten.contains("Other gateways"), "{unwritten}");
    assert!(a.registry.trouble().is_some_and(|trouble| trouble.contains(&key.id.to_string())));
    server.restart();
    a.run(write_ends).await.expect("no panic");
    assert_eq!(a.registry.trouble(), None);
    // The nodes may not have found each other again when it was made.
    until("the other node has it", || b.opens(&secret).is_none()).await;
    acquainted(&[&a, &b]).await;
    a.create("press-5").await.expect("created");
    assert_eq!((a.seen(), a.audited().await), (b.seen(), b.audited().await));
}

/// Ends with what was made, whether it was revoked, and how often NATS was away.
type Making = JoinHandle<(Vec<(ApiKey, bool)>, usize)>;

/// What a node makes and takes away until it is told to stop: secrets, and whether they have been revoked.
fn make_and_revoke(node: &Node, name: &'static str, stop: &CancellationToken) -> Making {
    let stop = stop.clone();
    node.run(move |registry| {
        let (mut made, mut away) = (Vec::new(), 0);
        for n in 0.. {
            if stop.is_cancelled() {
                break;
            }
            let id = slug(&format!("{name}-{n}"));
            match registry.create_datasource(&ACTOR, Some(id), "x", Scopes::from_slice(&[Scope::Ingest])) {
                Ok((datasource, key, secret)) => {
                    // Every third is taken away again.
                    let revoked = n % 3 == 0
                        && matches!(registry.revoke_key(&ACTOR, &datasource.id, key.id), Ok(Some(_)));
                    made.push((secret, revoked));
                }
                Err(RegistryError::Away(_) | RegistryError::Overtaken) => {
                    away += 1;
                    std::thread::sleep(Duration::from_millis(20));
                }
                Err(error) => panic!("{error}"),
            }
        }
        write_ends(registry);
        (made, away)
    })
}

/// Writes the ends of keys that could not be written while NATS was away, as a gateway does in the background.
fn write_ends(registry: &Registry) {
    let deadline = Instant::now() + SOON;
    while let Err(error) = registry.write_ends() {
        assert!(Instant::now() < deadline, "{error}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Checks that the nodes are alike, and have what was made.
async fn alike(nodes: &[&Node], making: Vec<Making>) {
    let mut made = Vec::new();
    for making in making {
        let (of_node, away) = soon(making).await.expect("no panic");
        eprintln!("{} made, {away} times NATS was away", of_node.len());
        assert!(!of_node.is_empty());
        made.extend(of_node);
    }
    for node in nodes {
        soon(node.registry.caught_up()).await.expect("caught up");
    }
    for node in nodes {
        assert_eq!((node.seen(), node.audited().await), (nodes[0].seen(), nodes[0].audited().await));
        for (secret, revoked) in &made {
            let opens = node.opens(secret).is_some();
            // A revocation whose answer was lost may have been made.
            assert!(opens || node.registry.was_revoked(&secret.digest()));
            assert!(!(opens && *revoked), "it was revoked");
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn changes_on_both_nodes_while_nats_is_killed_again_and_again_leave_them_alike() {
    let mut server = NatsServer::start();
    let (a, b) = (Node::join(&server, "a").await, Node::join(&server, "b").await);
    acquainted(&[&a, &b]).await;
    let stop = CancellationToken::new();
    let making = vec![make_and_revoke(&a, "a", &stop), make_and_revoke(&b, "b", &stop)];
    for _ in 0..4 {
        tokio::time::sleep(Duration::from_millis(400)).await;
        server.kill();
        tokio::time::sleep(Duration::from_millis(200)).await;
        server.restart();
        tokio::time::sleep(Duration::from_millis(600)).await;
    }
    stop.cancel();
    alike(&[&a, &b], making).await;
    let late = Node::join(&server, "late").await;
    assert_eq!((late.seen(), late.audited().await), (a.seen(), a.audited().await));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn with_three_servers_the_kill_of_any_one_of_them_costs_no_change() {
    let mut servers = Servers::start();
    let urls = servers.urls();
    let a = Node::join_settling(&urls, "a", Duration::ZERO).await;
    let b = Node::join_settling(&urls, "b", Duration::ZERO).await;
    acquainted(&[&a, &b]).await;
    let stop = CancellationToken::new();
    let making = vec![make_and_revoke(&a, "a", &stop), make_and_revoke(&b, "b", &stop)];
    for n in [0, 1, 2] {
        tokio::time::sleep(Duration::from_millis(500)).await;
        servers.kill(n);
        tokio::time::sleep(Duration::from_millis(1_000)).await;
        servers.restart(n);
        // Until it has what it missed: with two that have not, there is no majority.
        servers.settle();
    }
    stop.cancel();
    alike(&[&a, &b], making).await;
    let late = Node::join_settling(&urls, "late", Duration::ZERO).await;
    assert_eq!((late.seen(), late.audited().await), (a.seen(), a.audited().await));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_nodes_that_start_together_make_one_admin_key() {
    for _ in 0..5 {
        let server = NatsServer::start();
        let (a, b) = tokio::join!(Node::join(&server, "a"), Node::join(&server, "b"));
        let make = |node: &Node| {
            node.run(|registry| {
                let mut secret = None;
                let made = registry.create_first_admin("admin.key", |key| {
                    secret = Some(key.digest());
                    Ok(())
                });
                made.expect("answered").map(|key| (key.id, secret.expect("kept before it counts").key_id()))
            })
        };
        let (of_a, of_b) = tokio::join!(make(&a), make(&b));
        let made: Vec<_> = [of_a, of_b].into_iter().filter_map(|made| made.expect("no panic")).collect();
        let [(id, kept)] = made[..] else { panic!("{made:?}") };
        assert_eq!(id, kept);
        soon(a.registry.caught_up()).await.expect("caught up");
        let late = Node::join(&server, "late").await;
        assert!(make(&late).await.expect("no panic").is_none());
        for node in [&a, &late] {
            assert_eq!(node.registry.keys(&DatasourceId::all()).len(), 1);
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_two_admins_that_end_each_others_key_at_once_one_stays() {
    let server = NatsServer::start();
    let (a, b) = (Node::join(&server, "a").await, Node::join(&server, "b").await);
    acquainted(&[&a, &b]).await;
    let create = |node: &Node| {
        node.run(|registry| {
            let scopes = Scopes::from_slice(&[Scope::Admin]);
            registry.create_key(&ACTOR, &DatasourceId::all(), "", scopes, None).expect("created")
        })
    };
    let (mut kept, _) = create(&a).await.expect("no panic");
    for n in 0..20 {
        let (other, secret) = create(&b).await.expect("no panic");
        let one = a.revoke(&kept.datasource, kept.id);
        // A leak report ends a key by the same rule.
        let (one, other_ended) = if n % 2 == 0 {
            let (one, ended) = tokio::join!(one, b.revoke(&other.datasource, other.id));
            let is_last = matches!(ended, Err(RegistryError::LastAdmin));
            assert!(is_last || matches!(ended, Ok(Some(_))), "{ended:?}");
            (one, !is_last)
        } else {
            let report = b.run(move |registry| registry.revoke_leaked(&ACTOR, &secret.digest(), ""));
            let (one, fate) = tokio::join!(one, soon(report));
            let fate = format!("{:?}", fate.expect("no panic").expect("answered"));
            assert!(fate == "Kept" || fate.starts_with("Revoked"), "{fate}");
            (one, fate != "Kept")
        };
        let one_ended = match &one {
            Ok(Some(_)) => true,
            Err(RegistryError::LastAdmin) => false,
            other => panic!("{other:?}"),
        };
        assert!(one_ended != other_ended, "{n}: {one_ended} {other_ended}");
        for node in [&a, &b] {
            soon(node.registry.caught_up()).await.expect("caught up");
            let left: Vec<_> = node.registry.keys(&DatasourceId::all()).iter().map(|key| key.id).collect();
            assert_eq!(left, [if one_ended { other.id } else { kept.id }], "{n}");
        }
        if one_ended {
            kept = other;
        }
    }
    assert_eq!((a.seen(), a.audited().await), (b.seen(), b.audited().await));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_secret_that_was_not_kept_is_no_key() {
    let server = NatsServer::start();
    let a = Node::join(&server, "a").await;
    let failed =
        a.run(|registry| registry.create_first_admin("x", |_| Err(std::io::ErrorKind::StorageFull.into())));
    assert!(matches!(failed.await.expect("no panic"), Err(RegistryError::Io(_))));
    assert_eq!(a.registry.key_count(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rules_about_leaked_keys_have_the_same_versions_everywhere() {
    let server = NatsServer::start();
    let (a, b) = (Node::join(&server, "a").await, Node::join(&server, "b").await);
    acquainted(&[&a, &b]).await;
    let rule = |n: u8| LeakRow {
        datasource: DatasourceId::all(),
        key_id: KeyId([n; 6]),
        since: Some(1),
        below: Some(u64::from(n)),
        at: now_micros(),
    };
    let followed = |node: &Node| {
        let heard = Arc::<std::sync::Mutex<Vec<KeyId>>>::default();
        let hears = heard.clone();
        let follow = move |rule: &RecordRule| {
            if let RecordRule::Leak(row) = rule {
                hears.lock().expect("no panic").push(row.key_id);
            }
        };
        node.registry.follow_record_rules(follow).expect("readable");
        heard
    };
    let add = |node: &Node, n| {
        node.run(move |registry| registry.add_leak_rule(&ACTOR, &rule(n), 21).expect("added"))
    };
    assert_eq!(add(&a, 0).await.expect("no panic"), Some(1));
    let (of_a, of_b) = (followed(&a), followed(&b));
    for n in 0..10 {
        let (one, other) = tokio::join!(add(&a, 2 * n + 1), add(&b, 2 * n + 2));
        let mut versions = [one.expect("no panic"), other.expect("no panic")];
        versions.sort();
        assert_eq!(versions, [Some(u64::from(n) * 2 + 2), Some(u64::from(n) * 2 + 3)]);
    }
    assert_eq!(add(&a, 99).await.expect("no panic"), None, "there are as many as there may be");
    let of_c = followed(&Node::join(&server, "c").await);
    let heard: Vec<_> =
        [of_a, of_b, of_c].iter().map(|heard| heard.lock().expect("no panic").clone()).collect();
    assert_eq!((heard[0].len(), &heard[0], &heard[0]), (21, &heard[1], &heard[2]));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_happens_to_incarnations_is_told_everywhere_in_the_same_order_and_with_the_same_keys() {
    let server = NatsServer::start();
    let (a, b) = (Node::join(&server, "a").await, Node::join(&server, "b").await);
    acquainted(&[&a, &b]).await;
    let followed = |node: &Node| {
        let heard = Arc::<std::sync::Mutex<Vec<RecordRule>>>::default();
        let hears = heard.clone();
        let follow = move |rule: &RecordRule| hears.lock().expect("no panic").push(rule.clone());
        node.registry.follow_record_rules(follow).expect("readable");
        heard
    };
    let (of_a, of_b) = (followed(&a), followed(&b));
    let mut keys = Vec::new();
    for (creator, deleter) in [(&a, &b), (&b, &a), (&a, &a)] {
        let (key, _) = creator.create("press-4").await.expect("created");
        keys.push(key.id);
        let of = key.datasource.clone();
        let deleted = deleter.run(move |registry| registry.delete_datasource(&ACTOR, &of)).await;
        assert_eq!(deleted.expect("no panic").expect("there").len(), 1);
    }
    let press = DatasourceId::new("press-4").expect("a slug");
    let purged = b.run(move |registry| registry.purge_incarnation(&ACTOR, &press, 2)).await;
    assert_eq!(purged.expect("no panic").expect("ended"), 6);
    until("both have heard of all", || {
        [&of_a, &of_b].iter().all(|of| of.lock().expect("no panic").len() == 6)
    })
    .await;
    let of_c = followed(&Node::join(&server, "c").await);
    let heard = [of_a, of_b, of_c].map(|of| of.lock().expect("no panic").clone());
    assert_eq!((&heard[0], &heard[0]), (&heard[1], &heard[2]));
    let told = heard[0].iter().map(|rule| match rule {
        RecordRule::Incarnation(row, keys) => (row.incarnation, keys.first().copied()),
        RecordRule::Leak(row) => panic!("{row:?}"),
    });
    let [first, second, third] = keys[..] else { panic!("{keys:?}") };
    let expected = [(1, Some(first)), (2, None), (2, Some(second)), (3, None), (3, Some(third)), (2, None)];
    assert_eq!(told.collect::<Vec<_>>(), expected);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_key_whose_time_is_over_ends_on_every_node_and_the_audit_says_so_once() {
    let server = NatsServer::start();
    let (a, b) = (Node::join(&server, "a").await, Node::join(&server, "b").await);
    acquainted(&[&a, &b]).await;
    let (key, secret) = a.create("press-4").await.expect("created");
    let of = key.datasource.clone();
    let expires_at = now_micros() + 700_000;
    let created = a.run(move |registry| {
        registry.create_key(&ACTOR, &of, "", Scopes::from_slice(&[Scope::Ingest]), Some(expires_at))
    });
    let (_, short) = created.await.expect("no panic").expect("created");
    let (of, id) = (key.datasource.clone(), key.id);
    let rotated = b.run(move |registry| registry.rotate_key(&ACTOR, &of, id, Duration::from_millis(700)));
    rotated.await.expect("no panic").expect("rotated").expect("there");
    let ended = Arc::<AtomicUsize>::default();
    let deadlines: Vec<_> = [&a, &b]
        .map(|node| {
            let ended = ended.clone();
            let settle = move |dead: Vec<Arc<Key>>, _| {
                ended.fetch_add(dead.len(), Ordering::SeqCst);
                async {}
            };
            tokio::spawn(headgate::testing::run_deadlines(node.registry.clone(), settle))
        })
        .into_iter()
        .collect();
    for node in [&a, &b] {
        assert!(node.opens(&short).is_some() && node.opens(&secret).is_some());
    }
    until("both have ended", || {
        [&a, &b].iter().all(|node| node.opens(&short).is_none() && node.opens(&secret).is_none())
    })
    .await;
    until("the one that retires is revoked", || {
        [&a, &b].iter().all(|node| node.registry.was_revoked(&secret.digest()))
    })
    .await;
    soon(a.registry.caught_up()).await.expect("caught up");
    soon(b.registry.caught_up()).await.expect("caught up");
    let audited = a.audited().await;
    let times = |action: &str| audited.iter().filter(|(_, what)| what == action).count();
    assert_eq!((times("key.expired"), times("key.retired")), (1, 1), "{audited:?}");
    assert_eq!((a.seen(), audited.clone()), (b.seen(), b.audited().await));
    deadlines.iter().for_each(JoinHandle::abort);
    // It stays so for who comes later.
    let c = Node::join(&server, "c").await;
    assert!(c.opens(&short).is_none());
    assert_eq!(c.seen(), a.seen());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_is_killed_is_waited_for_no_longer_than_it_is_missed() {
    let server = NatsServer::start();
    let (a, b) = (Node::join(&server, "a").await, Node::join(&server, "b").await);
    acquainted(&[&a, &b]).await;
    // It goes without a word; its registry stands still, and its connection is as good as gone.
    b.follow.abort();
    let presence = b.presence.clone();
    let started = Instant::now();
    let created = tokio::spawn(async move {
        tokio::time::sleep(Duration::from_millis(200)).await;
        presence.leave().await;
    });
    a.create("press-4").await.expect("created");
    assert!(started.elapsed() < Duration::from_secs(4), "{:?}", started.elapsed());
    created.await.expect("no panic");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_datasource_with_more_keys_than_fit_in_a_batch_is_deleted_with_all_of_them() {
    const KEYS: usize = 1_100;
    let server = NatsServer::start();
    let a = Node::join(&server, "a").await;
    let (key, _) = a.create("press-4").await.expect("created");
    let of = key.datasource.clone();
    let secrets = a.run(move |registry| {
        let scopes = Scopes::from_slice(&[Scope::Ingest]);
        let create = || registry.create_key(&ACTOR, &of, "", scopes, None).expect("created").1;
        (0..KEYS).map(|_| create()).collect::<Vec<_>>()
    });
    let secrets = secrets.await.expect("no panic");
    let b = Node::join(&server, "b").await;
    acquainted(&[&a, &b]).await;
    let of = key.datasource.clone();
    let dead = a.run(move |registry| registry.delete_datasource(&ACTOR, &of)).await.expect("no panic");
    assert_eq!(dead.expect("deleted").len(), KEYS + 1);
    assert!(secrets.iter().all(|secret| b.registry.was_revoked(&secret.digest())));
    assert_eq!(b.registry.key_count(), 0);
    assert!(!b.registry.has_datasource("press-4"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_joins_a_cluster_of_a_thousand_datasources_at_once() {
    const DATASOURCES: usize = 1_000;
    let server = NatsServer::start();
    let a = Node::join(&server, "a").await;
    let made = a.run(|registry| {
        let started = Instant::now();
        let scopes = Scopes::from_slice(&[Scope::Ingest]);
        for n in 0..DATASOURCES {
            let id = slug(&format!("machine-{n}"));
            let deadline = Instant::now() + SOON;
            loop {
                match registry.create_datasource(&ACTOR, Some(id.clone()), "a machine", scopes) {
                    // What JetStream did not answer in time it may have written.
                    Ok(_) | Err(RegistryError::Exists(_)) => break,
                    Err(RegistryError::Away(_)) if Instant::now() < deadline => {}
                    Err(error) => panic!("{id}: {error}"),
                }
            }
        }
        started.elapsed()
    });
    let made_in = made.await.expect("no panic");
    let started = Instant::now();
    let b = Node::join(&server, "b").await;
    let joined_in = started.elapsed();
    // All of it comes at once, and not one after the other as it was made.
    assert!(joined_in < made_in / 2, "made in {made_in:?}, joined in {joined_in:?}");
    assert_eq!(b.registry.key_count(), DATASOURCES);
    assert_eq!(a.seen(), b.seen());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_key_is_used_for_on_any_node_is_known_on_all_and_after_they_are_gone() {
    let mut server = NatsServer::start();
    let (a, b) = (Node::join(&server, "a").await, Node::join(&server, "b").await);
    acquainted(&[&a, &b]).await;
    let (key, secret) = a.create("press-4").await.expect("created");
    let client = |name| Arc::new(KeyClient::new(Transport::Mqtt, None, Some(name)));
    let uses = |node: &Node, name, at, accepted, offset| {
        let key = node.opens(&secret).expect("opens");
        node.registry.note_use(&key, Some(&client(name)), at, Some((accepted, offset)));
        node.registry.note_refusal(&key);
    };
    let write = |node: &Node| node.run(|registry| registry.write_usage());
    let known = |node: &Node| {
        let keys = node.registry.keys(&key.datasource);
        node.run(move |registry| {
            let used = registry.usage(&keys).expect("read").remove(0);
            let users = used.users.iter().map(|user| user.client.client_id.clone().unwrap_or_default());
            (used.accepted, used.refused, used.offset, users.collect::<Vec<_>>())
        })
    };
    uses(&a, "left", 10, 5, 7);
    uses(&b, "right", 20, 3, 9);
    assert_eq!(known(&a).await.expect("no panic"), (5, 1, Some(7), vec!["left".into()]));
    let (one, other) = tokio::join!(write(&a), write(&b));
    one.expect("no panic").expect("written");
    other.expect("no panic").expect("written");
    let both = (8, 2, Some(9), vec!["right".into(), "left".into()]);
    assert_eq!(
        (known(&a).await.expect("no panic"), known(&b).await.expect("no panic")),
        (both.clone(), both)
    );
    uses(&a, "left", 30, 1, 12);
    server.kill();
    assert!(write(&a).await.expect("no panic").is_err());
    uses(&a, "left", 31, 1, 13);
    server.restart();
    until_ok(|| write(&a)).await;
    drop((a, b));
    let late = Node::join(&server, "late").await;
    assert_eq!(known(&late).await.expect("no panic"), (10, 4, Some(13), vec!["left".into(), "right".into()]));
}

/// Writes a row into the registry's bucket, as somebody with access to NATS can.
async fn write_row(server: &NatsServer, name: &str, value: &'static str) {
    let nats = connect(&[server.url()], "somebody").await;
    let subject = format!("$KV.headgate-registry.{name}");
    soon(nats.client().request(subject, value.into())).await.expect("an answer");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_key_whose_row_is_taken_out_of_the_bucket_is_dead_on_every_node() {
    let server = NatsServer::start();
    let (a, b) = (Node::join(&server, "a").await, Node::join(&server, "b").await);
    acquainted(&[&a, &b]).await;
    let (_, secret) = a.create("press-4").await.expect("created");
    let hex: String = secret.digest().0.iter().map(|byte| format!("{byte:02x}")).collect();
    let nats = connect(&[server.url()], "somebody").await;
    let bucket = headgate_bridge_nats::KvBucketSettings {
        name: headgate::testing::REGISTRY_BUCKET.to_owned(),
        replicas: 1,
        age_max: None,
        writes: headgate_bridge_nats::KvWrites::Batched,
    };
    until("NATS is connected", || nats.trouble().is_none()).await;
    let bucket = headgate_bridge_nats::KvBucket::open(&nats, &bucket).await.expect("opens");
    let gone = headgate_bridge_nats::kv::KvPut { key: format!("key.{hex}"), value: None, expected: None };
    bucket.put_all(&[gone], None).await.expect("written");
    until("it is dead", || a.opens(&secret).is_none() && b.opens(&secret).is_none()).await;
    // What nobody knows is left alone, and changes go on.
    write_row(&server, "of.another.kind", "?").await;
    a.create("press-5").await.expect("created");
    assert_eq!(a.seen(), b.seen());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_registry_of_a_newer_headgate_is_not_joined() {
    let server = NatsServer::start();
    drop(Node::join(&server, "a").await);
    write_row(&server, "format", "3").await;
    let nats = connect(&[server.url()], "b").await;
    let refused = soon(Registry::join(&nats, 1, "b")).await.err().expect("refused");
    assert!(refused.to_string().contains("format 3"), "{refused}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_registry_in_the_place_of_one_is_not_followed() {
    let server = NatsServer::start();
    let a = Node::join(&server, "a").await;
    let (_, secret) = a.create("press-4").await.expect("created");
    let nats = connect(&[server.url()], "somebody").await;
    let delete = nats.client().request("$JS.API.STREAM.DELETE.KV_headgate-registry", "".into());
    soon(delete).await.expect("an answer");
    let b = Node::join(&server, "b").await;
    let (_, new_secret) = b.create("press-5").await.expect("created");
    until("it knows that it may be behind", || a.registry.may_be_behind()).await;
    assert!(a.opens(&secret).is_some() && a.opens(&new_secret).is_none());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_secret_of_a_key_is_on_nats_disk() {
    let server = NatsServer::start();
    let a = Node::join(&server, "a").await;
    let mut secrets = Vec::new();
    for n in 0..10 {
        secrets.push(a.create(&format!("press-{n}")).await.expect("created").1);
    }
    let mut files = vec![server.dir().to_owned()];
    let (mut bytes, mut digests) = (0, 0);
    while let Some(path) = files.pop() {
        if path.is_dir() {
            files.extend(std::fs::read_dir(&path).expect("read").map(|entry| entry.expect("read").path()));
            continue;
        }
        let text = String::from_utf8_lossy(&std::fs::read(&path).expect("read")).into_owned();
        bytes += text.len();
        digests += text.matches("$KV.headgate-registry.key.").count();
        assert!(!text.contains("hgk_"), "{}", path.display());
        assert!(secrets.iter().all(|secret| !text.contains(&secret.expose()[4..20])), "{}", path.display());
    }
    assert!(
        bytes > 0 && digests >= secrets.len(),
        "the files are the ones that hold the registry: {digests}"
    );
}

/// A gateway of a cluster; its settings are the same whatever its directory.
fn gateway(server: &NatsServer, dir: &std::path::Path) -> Gateway {
    Setup::on(dir)
        .set("log.backend", "jetstream")
        .set("nats.servers", format!("[\"{}\"]", server.url()))
        .start()
}

#[test]
fn a_key_that_is_revoked_at_one_gateway_loses_its_connections_at_the_other() {
    let server = NatsServer::start();
    let (dir_a, dir_b) = (scratch(), scratch());
    let a = gateway(&server, dir_a.path());
    let b = gateway(&server, dir_b.path());
    let admin = a.admin_key();
    assert!(!dir_b.path().join("admin.key").exists(), "there is one admin key in a cluster");
    b.says("the cluster has its admin keys");
    let source = a.create("press-4");
    let post = |gateway: &Gateway| {
        gateway.request("POST", "/v1/ingest/press-4", &source.key, &[], b"{\"x\":1}").status
    };
    assert_eq!((post(&a), post(&b)), (200, 200));
    let mut wire = Wire::login(b.mqtt, Version::V5, &source.key);
    let path = format!("/v1/datasources/press-4/keys/{}", source.key_id);
    let started = Instant::now();
    assert_eq!(a.request("DELETE", &path, &admin, &[], b"").status, 204);
    assert!(started.elapsed() < Duration::from_secs(4));
    wire.disconnected(0x98);
    assert_eq!((post(&a), post(&b)), (401, 401));
    let metrics = b.request("GET", "/metrics", &admin, &[], b"").text();
    assert!(metrics.contains("headgate_revocation_seconds_count 1\n"), "{metrics}");
    // One that leaves is not waited for, and one that comes back finds what there is.
    b.stop();
    let started = Instant::now();
    let other = a.create("press-5");
    assert!(started.elapsed() < Duration::from_secs(2), "{:?}", started.elapsed());
    let b = gateway(&server, dir_b.path());
    let posted = b.request("POST", "/v1/ingest/press-5", &other.key, &[], b"{}").status;
    assert_eq!((post(&b), posted), (401, 200));
}

#[test]
fn what_a_leaked_key_let_in_is_withheld_at_every_gateway() {
    let server = NatsServer::start();
    let (dir_a, dir_b) = (scratch(), scratch());
    let a = gateway(&server, dir_a.path());
    let b = gateway(&server, dir_b.path());
    let admin = a.admin_key();
    let source = a.create("press-4");
    for (n, gateway) in [&a, &b, &a, &b].into_iter().enumerate() {
        let body = format!("{{\"n\": {n}}}");
        assert_eq!(
            gateway.request("POST", "/v1/ingest/press-4", &source.key, &[], body.as_bytes()).status,
            200
        );
    }
    let stored = |gateway: &Gateway| {
        let records = gateway.request("GET", "/v1/datasources/press-4/records", &admin, &[], b"").json();
        records["records"].as_array().map_or(0, Vec::len)
    };
    for gateway in [&a, &b] {
        wait_for("all to be stored", || (stored(gateway) == 4).then_some(()));
    }
    let path = format!("/v1/datasources/press-4/keys/{}/quarantine", source.key_id);
    // All of it, wherever it came in: what the one gateway has not read yet, too.
    let answer = a.request("POST", &path, &admin, &[], b"{\"since\": \"2020-01-01T00:00:00Z\"}");
    assert_eq!(answer.status, 200, "{}", answer.text());
    for gateway in [&a, &b] {
        wait_for("all to be withheld", || (stored(gateway) == 0).then_some(()));
    }
}

#[test]
fn a_gateway_that_stood_still_lets_nothing_in_under_a_key_that_was_revoked_meanwhile() {
    let server = NatsServer::start();
    let (dir_a, dir_b) = (scratch(), scratch());
    let a = gateway(&server, dir_a.path());
    let b = gateway(&server, dir_b.path());
    let admin = a.admin_key();
    for n in 0..4 {
        let source = a.create(&format!("press-{n}"));
        let ingest = format!("/v1/ingest/press-{n}");
        let post = || b.request("POST", &ingest, &source.key, &[], b"{}").status;
        assert_eq!(post(), 200);
        signal(b.pid(), libc::SIGSTOP);
        let path = format!("/v1/datasources/press-{n}/keys/{}", source.key_id);
        let started = Instant::now();
        // It is waited for, for a while.
        assert_eq!(a.request("DELETE", &path, &admin, &[], b"").status, 204);
        assert!(started.elapsed() > Duration::from_secs(1) && started.elapsed() < Duration::from_secs(5));
        std::thread::sleep(Duration::from_millis(500));
        // What waits for it when it goes on is taken up before it has heard of anything.
        let posting = std::thread::scope(|scope| {
            let posting: Vec<_> = (0..4).map(|_| scope.spawn(post)).collect();
            std::thread::sleep(Duration::from_millis(50));
            signal(b.pid(), libc::SIGCONT);
            posting.into_iter().map(|post| post.join().expect("no panic")).collect::<Vec<_>>()
        });
        assert!(posting.iter().all(|status| [401, 503].contains(status)), "{posting:?}");
        wait_for("it to have caught up", || (post() == 401).then_some(()));
    }
}

#[test]
fn a_registry_that_cannot_be_changed_says_so_and_when_to_come_again() {
    let mut server = NatsServer::start();
    let dir = scratch();
    let a = gateway(&server, dir.path());
    let admin = a.admin_key();
    let create = || a.request("POST", "/v1/datasources", &admin, &[], b"{\"name\": \"Press 4\"}");
    server.kill();
    let refused = create();
    assert_eq!(refused.status, 503, "{}", refused.text());
    assert!(refused.headers.contains_key("retry-after"));
    assert!(refused.text().contains("NATS"), "{}", refused.text());
    server.restart();
    wait_for("NATS to come back", || (create().status == 201).then_some(()));
}

/// What a gateway of a cluster has on its own disk are copies: a backup of that would be none.
#[test]
fn a_backup_of_a_cluster_is_refused_with_what_to_do_instead() {
    let (server, dir) = (NatsServer::start(), scratch());
    let gateway = gateway(&server, dir.path());
    let body = serde_json::json!({ "dir": dir.path().with_extension("backup") });
    let answer = gateway.post("/v1/backup", &gateway.admin_key(), &body);
    assert_eq!(answer.status, 409, "{}", answer.text());
    assert!(answer.text().contains("KV_headgate-registry"), "{}", answer.text());
    assert!(!dir.path().with_extension("backup").exists());
}
