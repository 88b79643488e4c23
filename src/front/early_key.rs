//! The key in the first bytes of a connection, which are looked at and left where they are. A crowd of strangers stands in
//! line to be let in; whoever shows a valid key at the door does not: its tenant pays from the beginning, and it is served
//! where that is. Nothing is decided here: whether the key lets anybody in is found out as ever. A key that cannot be
//! seen (over TLS, compressed by HTTP/2) waits in the line.

use std::future::poll_fn;
use std::mem::MaybeUninit;
use std::net::SocketAddr;
use std::task::Poll;

use headgate_format::key::{API_KEY_PREFIX, KEY_CHARS};
use tokio::io::ReadBuf;
use tokio::net::TcpStream;
use tokio::time::timeout;
use tracing::trace;

use super::connection_table::TableEntry;
use crate::auth::token::ACCESS_TOKEN_PREFIX;
use crate::auth::{Authorizer, Grant};
use crate::limits::{EARLY_KEY_BYTES_MAX, EARLY_KEY_WAIT_MAX, EARLY_KEYS_MAX};
use crate::processor::{ProcessorTime, TaskPayer};

/// Looks at the first bytes of a connection while others stand in line to be let in; with a valid key in them, its tenant
/// pays from now on. `false` if the connection has to make room for others.
pub(super) async fn greet(
    (tcp, peer): (&TcpStream, SocketAddr),
    entry: &TableEntry,
    authorizer: &Authorizer,
    (processor, payer): (&ProcessorTime, &TaskPayer),
) -> bool {
    if !processor.is_somebody_slow() {
        return true;
    }
    tokio::select! {
        biased;
        () = poll_fn(|cx| entry.eviction().poll_due(cx)) => return false,
        found = timeout(EARLY_KEY_WAIT_MAX, early_grant(tcp, authorizer)) => if let Ok(Some(grant)) = found {
            trace!(%peer, key_id = %grant.key_id(), "a key at the door");
            entry.present(grant.key_id());
            payer.set(processor.of_grant(&grant));
        },
    }
    true
}

/// The grant of a valid key in what comes first on a connection.
async fn early_grant(tcp: &TcpStream, authorizer: &Authorizer) -> Option<Grant> {
    poll_fn(|cx| {
        let mut bytes = [MaybeUninit::uninit(); EARLY_KEY_BYTES_MAX];
        let mut bytes = ReadBuf::uninit(&mut bytes);
        match tcp.poll_peek(cx, &mut bytes) {
            Poll::Ready(Ok(_)) => Poll::Ready(valid_key_in(bytes.filled(), authorizer)),
            Poll::Ready(Err(_)) => Poll::Ready(None),
            Poll::Pending => Poll::Pending,
        }
    })
    .await
}

/// The grant of the first valid key in these bytes.
fn valid_key_in(bytes: &[u8], authorizer: &Authorizer) -> Option<Grant> {
    let places = bytes.windows(API_KEY_PREFIX.len()).enumerate();
    let begins = places.filter(|(_, text)| *text == API_KEY_PREFIX || *text == ACCESS_TOKEN_PREFIX);
    let keys = begins.filter_map(|(at, prefix)| match prefix == API_KEY_PREFIX {
        true => bytes.get(at..at + KEY_CHARS),
        false => {
            let is_of_token = |b: &&u8| b.is_ascii_alphanumeric() || matches!(**b, b'-' | b'_');
            Some(&bytes[at..at + bytes[at..].iter().take_while(is_of_token).count()])
        }
    });
    keys.take(EARLY_KEYS_MAX).find_map(|key| authorizer.identify(key).ok())
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use tokio::io::AsyncWriteExt;
    use tokio::net::TcpListener;

    use super::*;
    use crate::auth::{Actor, Registry, Scope, Scopes};
    use crate::front::connection_table::{ConnectionTable, StrangerLimits};

    #[tokio::test]
    async fn who_shows_a_valid_key_at_the_door_is_its_tenant_s_and_nobody_else_is() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let registry = Arc::new(Registry::open(dir.path()).expect("opens"));
        let scopes = Scopes::from_slice(&[Scope::Ingest]);
        let made = registry.create_datasource(&Actor::SYSTEM, None, "press-4", scopes);
        let (datasource, key, secret) = made.expect("created");
        let authorizer = Authorizer::new(registry.clone());
        let secret = secret.expose().to_owned();
        let other = format!("hgk_{}", "a".repeat(49));
        let of = |bytes: &[u8]| valid_key_in(bytes, &authorizer).map(|grant| grant.key_id());
        assert_eq!(of(format!("GET / HTTP/1.1\r\nx-api-key: {secret}\r\n\r\n").as_bytes()), Some(key.id));
        assert_eq!(of(format!("{other}\0\x35{secret}").as_bytes()), Some(key.id));
        assert_eq!(of(&secret.as_bytes()[..52]), None);
        assert_eq!(of(other.as_bytes()), None);
        assert_eq!(of(format!("{}{secret}", other.repeat(EARLY_KEYS_MAX)).as_bytes()), None, "guesses end");

        let processor = ProcessorTime::new();
        let strangers = processor.of_strangers();
        processor.slow_down(&strangers);
        let limits = StrangerLimits { strangers_max: 2, per_address_max: 2 };
        let table = Arc::new(ConnectionTable::new(limits));
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let mut client = TcpStream::connect(listener.local_addr().expect("bound")).await.expect("connects");
        let (tcp, peer) = listener.accept().await.expect("accepts");
        client.write_all(format!("GET / HTTP/1.1\r\nx-api-key: {secret}").as_bytes()).await.expect("sent");
        let (entry, _) = table.enter(peer.ip());
        let payer = TaskPayer::stranger(&processor);
        assert!(payer.is_newcomer());
        let stays = greet((&tcp, peer), &entry, &authorizer, (&processor, &payer)).await;
        assert!(stays && !payer.is_newcomer() && table.stranger_count() == 0);
        // What was looked at is still there.
        let mut bytes = [0; 3];
        assert_eq!(tcp.peek(&mut bytes).await.expect("bytes"), 3);

        registry.revoke_key(&Actor::SYSTEM, &datasource.id, key.id).expect("revoked");
        assert_eq!(of(secret.as_bytes()), None);
        let (entry, _) = table.enter(peer.ip());
        let payer = TaskPayer::stranger(&processor);
        assert!(greet((&tcp, peer), &entry, &authorizer, (&processor, &payer)).await);
        assert!(payer.is_newcomer(), "it stands in line");
        // Too many have come since.
        let _others = [table.enter(peer.ip()), table.enter(peer.ip())];
        assert!(!greet((&tcp, peer), &entry, &authorizer, (&processor, &payer)).await);
    }
}
