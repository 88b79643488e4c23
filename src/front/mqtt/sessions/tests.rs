//! Sessions and the connections that come and leave.

use super::*;
use crate::auth::{Authorizer, Registry};
use crate::config::Config;
use crate::consume::subscriber::SubscriberFeed;
use crate::front::mqtt::outbound::model::{ModelRun, press_4};
use crate::observe::metrics::Metrics;

#[tokio::test]
async fn a_session_is_watched_until_its_connection_leaves_however_it_ends() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let run = ModelRun::bare(1);
    let subscribers = run.gateway.subscribers.clone();
    let registry = Arc::new(Registry::open(dir.path()).expect("opens"));
    let (log, metrics) = (subscribers.log.clone(), Arc::new(Metrics::new()));
    let intake = Intake::new(Authorizer::new(registry), log, metrics, &Config::default().intake);
    let (stored, still_after) = (StoredSessions::default(), Duration::from_secs(60));
    let sessions = Arc::new(Sessions::new(subscribers.clone(), intake, stored, None, still_after));
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
