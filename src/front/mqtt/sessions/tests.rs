//! Sessions and the connections that come and leave.

use std::cell::RefCell;
use std::task::{Context, Waker};

use super::*;
use crate::auth::{Authorizer, Registry};
use crate::config::Config;
use crate::consume::subscriber::SubscriberFeed;
use crate::front::mqtt::outbound::model::{ModelRun, press_4};
use crate::observe::metrics::Metrics;

/// Sessions over a gateway without clients.
fn empty_sessions(dir: &std::path::Path, subscribers: &Arc<Subscribers>) -> Arc<Sessions> {
    let registry = Arc::new(Registry::open(dir).expect("opens"));
    let (log, metrics) = (subscribers.log.clone(), Arc::new(Metrics::new()));
    let intake = Intake::new(Authorizer::new(registry), log, metrics, &Config::default().intake);
    let (stored, still_after) = (StoredSessions::default(), Duration::from_secs(60));
    Arc::new(Sessions::new(subscribers.clone(), intake, stored, None, still_after))
}

#[tokio::test]
async fn a_session_is_watched_until_its_connection_leaves_however_it_ends() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let run = ModelRun::bare(1);
    let subscribers = run.gateway.subscribers.clone();
    let sessions = empty_sessions(dir.path(), &subscribers);
    // By a DISCONNECT with the Session Expiry Interval 0, or not.
    for expiry_s in [0, 60] {
        let client = "c".into();
        let entered = sessions.enter(&press_4(), client, Arc::default(), true, false, 60, || Ok(())).await;
        let EnteredClient { present, mut session, .. } = entered.expect("let in");
        let Subscribers { router, log, shares, .. } = &*subscribers;
        let feed = SubscriberFeed::new(router.clone(), log.clone(), shares, &press_4(), 0);
        present.watch(&session, feed.mailbox());
        assert_eq!(sessions.lock_clients().watched.len(), 1);
        session.expiry_s = expiry_s;
        assert!(present.leave(session, None).is_none());
        assert!(sessions.lock_clients().watched.is_empty(), "{expiry_s}");
    }
}

/// The earlier one pushed out the later one, which had entered while it was asked.
#[tokio::test]
async fn a_connection_that_comes_while_an_earlier_one_is_asked_enters_behind_it() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let run = ModelRun::bare(1);
    let sessions = empty_sessions(dir.path(), &run.gateway.subscribers);
    let (press, client): (_, Arc<str>) = (press_4(), "c".into());
    for is_refused in [false, true] {
        let (first_control, later_control): (Arc<ConnectionControl>, Arc<ConnectionControl>) =
            Default::default();
        let enter_later = || {
            let control = Arc::clone(&later_control);
            sessions.enter(&press, client.clone(), control, false, false, 0, || Ok(()))
        };
        let later = RefCell::new(Box::pin(enter_later()));
        let may_enter = || {
            let mut cx = Context::from_waker(Waker::noop());
            assert!(later.borrow_mut().as_mut().poll(&mut cx).is_pending(), "it is not its turn");
            if is_refused { Err(Refusal::Exchanges) } else { Ok(()) }
        };
        let control = first_control.clone();
        let first = sessions.enter(&press, client.clone(), control, false, false, 0, may_enter).await;
        assert_eq!(first.is_err(), is_refused);
        let is_taken_over = first_control.closed() == Some(CloseReason::TakenOver);
        assert_eq!(is_taken_over, !is_refused, "it only says what its client has sent");
        drop(first);
        let later = later.into_inner().await.expect("let in");
        assert_eq!(later_control.closed(), None);
        let entry_has_queue = || sessions.lock_clients().entries[&later.present.key].queue.is_some();
        assert!(!entry_has_queue(), "a connected client holds no queue");
    }
    assert!(sessions.lock_clients().entries.is_empty());
}

/// The session that it waited for had expired meanwhile, and it waited for ever.
#[tokio::test]
async fn a_connection_that_waits_enters_also_when_the_session_expires_meanwhile() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let run = ModelRun::bare(1);
    let sessions = empty_sessions(dir.path(), &run.gateway.subscribers);
    let (press, client): (_, Arc<str>) = (press_4(), "c".into());
    for is_refused in [false, true] {
        let enter = || sessions.enter(&press, client.clone(), Arc::default(), false, false, 1, || Ok(()));
        let EnteredClient { present, session, .. } = enter().await.expect("let in");
        assert!(present.leave(session, None).is_none());
        let later = RefCell::new(Box::pin(enter()));
        let may_enter = || {
            let mut cx = Context::from_waker(Waker::noop());
            assert!(later.borrow_mut().as_mut().poll(&mut cx).is_pending(), "it is not its turn");
            sessions.run_due(Instant::now() + Duration::from_secs(2));
            if is_refused { Err(Refusal::Exchanges) } else { Ok(()) }
        };
        let first = sessions.enter(&press, client.clone(), Arc::default(), false, false, 1, may_enter).await;
        assert_eq!(first.as_ref().map(|first| first.resumed).ok(), (!is_refused).then_some(false));
        drop(first);
        let later = tokio::time::timeout(Duration::from_secs(10), later.into_inner()).await;
        drop(later.expect("it is its turn").expect("let in"));
    }
    assert!(sessions.lock_clients().entries.is_empty());
}
