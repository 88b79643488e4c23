//! Presence, on a real nats-server.

use std::time::{Duration, Instant};

use crate::common::{SOON, Server, soon};
use bytes::Bytes;
use headgate_bridge_nats::Presence;
use headgate_bridge_nats::presence::{NodeReply, PRESENCE_SILENCE_MAX};

async fn node(server: &Server, id: &str) -> Presence {
    let nats = server.connect().await;
    let node = Presence::start(&nats, "test.node", id).await.expect("starts");
    // What it waits for then is the answers of the others, which are looked at here.
    let _ = tokio::time::timeout(Duration::from_millis(100), node.announce()).await;
    node
}

async fn knows(node: &Presence, others: &[&str]) {
    let deadline = Instant::now() + SOON;
    loop {
        let mut known = node.others();
        known.sort();
        if known == others {
            return;
        }
        assert!(Instant::now() < deadline, "{} knows {known:?}, not {others:?}", node.id());
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn nodes_know_each_other_at_once_and_who_leaves_is_gone() {
    let server = Server::start();
    let a = node(&server, "a").await;
    tokio::time::sleep(Duration::from_millis(100)).await;
    let started = Instant::now();
    let b = node(&server, "b").await;
    let c = node(&server, "c").await;
    knows(&c, &["a", "b"]).await;
    knows(&a, &["b", "c"]).await;
    assert!(started.elapsed() < Duration::from_millis(800), "sooner than a second has passed");
    let started = Instant::now();
    c.leave().await;
    knows(&a, &["b"]).await;
    assert!(started.elapsed() < Duration::from_millis(800));
    // Dropped without a goodbye, as by a kill.
    drop(b);
    knows(&a, &[]).await;
    assert!(started.elapsed() < PRESENCE_SILENCE_MAX + Duration::from_secs(2));
}

#[tokio::test]
async fn every_other_node_is_asked_and_waited_for_as_long_as_it_is_there() {
    let mut server = Server::start();
    let a = node(&server, "a").await;
    let b = node(&server, "b").await;
    let c = node(&server, "c").await;
    for (node, pause) in [(&b, 10), (&c, 300)] {
        let id = node.id().to_owned();
        let answer = move |body: Bytes| {
            let answer = format!("{id} {}", String::from_utf8_lossy(&body));
            async move {
                tokio::time::sleep(Duration::from_millis(pause)).await;
                Bytes::from(answer)
            }
        };
        node.serve("test.ask", answer).await.expect("serves");
    }
    knows(&a, &["b", "c"]).await;
    let ask = |limit| async move {
        let mut replies = soon(a.ask_all("test.ask", Bytes::from_static(b"hello"), limit)).await;
        replies.sort_by(|one, other| one.0.cmp(&other.0));
        (replies.into_iter().map(|(_, reply)| reply).collect::<Vec<_>>(), a)
    };
    let answer = |text: &'static str| NodeReply::Answer(Bytes::from_static(text.as_bytes()));
    let (replies, a) = ask(SOON).await;
    assert_eq!(replies, [answer("b hello"), answer("c hello")]);
    // A node that is alive and answers nothing.
    let d = node(&server, "d").await;
    knows(&a, &["b", "c", "d"]).await;
    let replies = soon(a.ask_all("test.ask", Bytes::new(), Duration::from_secs(1))).await;
    assert!(replies.contains(&("d".to_owned(), NodeReply::Silent)), "{replies:?}");
    // It is gone before the time is over.
    let started = Instant::now();
    let (replies, ()) = tokio::join!(soon(a.ask_all("test.ask", Bytes::new(), SOON)), d.leave());
    assert!(replies.contains(&("d".to_owned(), NodeReply::Gone)), "{replies:?}");
    assert!(started.elapsed() < PRESENCE_SILENCE_MAX);
    // A node that has lost NATS has lost all others.
    server.kill();
    knows(&a, &[]).await;
    server.restart();
    knows(&a, &["b", "c"]).await;
}
