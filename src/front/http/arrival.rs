//! A connection before HTTP is spoken on it: what a proxy says about it, and the TLS handshake. Both have to be over within
//! `http.header_ms_max`.

use std::future::poll_fn;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::TcpStream;
use tokio::time::{Instant, timeout_at};
use tokio_util::sync::CancellationToken;
use tracing::debug;

use super::server::HttpCrowd;
use crate::front::connection_table::TableEntry;
use crate::front::peer_stream::PeerStream;
use crate::front::proxied::{ProxyHeaderError, ProxyTrust, peek_proxy_header, read_proxy_header};
use crate::front::tls::Tls;
use crate::limits::TLS_HANDSHAKE_BYTES;
use crate::memory::MemoryBudget;
use crate::observe::cause::Cause;

/// What a listener does with a connection before HTTP is spoken on it.
#[derive(Clone)]
pub(super) struct HttpPort {
    /// The certificate, if it serves HTTPS.
    pub(super) tls: Option<Arc<Tls>>,
    pub(super) proxies: Arc<ProxyTrust>,
    /// Who pays for handshakes; `None` while the gateway is not ready.
    pub(super) memory: Option<MemoryBudget>,
}

/// A connection that HTTP can be spoken on.
pub(super) struct ArrivedConnection {
    pub(super) stream: PeerStream,
    /// The client, or the proxy that is next to the gateway if it did not say who that is.
    pub(super) peer: SocketAddr,
    pub(super) entry: Arc<TableEntry>,
}

impl HttpPort {
    /// Whether it is known only later whose a connection from this address is.
    pub(super) fn is_proxied(&self, peer: SocketAddr) -> bool {
        self.proxies.may_send_header(peer.ip())
    }

    /// Makes a connection ready for HTTP. `entry` is its place in the crowd, if it is known whose it is. `None` if it
    /// has to be closed; the reason is in the refusals then.
    pub(super) async fn arrive(
        &self,
        mut tcp: TcpStream,
        mut peer: SocketAddr,
        entry: Option<Arc<TableEntry>>,
        crowd: &HttpCrowd,
        (header_max, drain): (Duration, &CancellationToken),
    ) -> Option<ArrivedConnection> {
        let deadline = Instant::now() + header_max;
        let entry = match entry {
            Some(entry) => entry,
            None => {
                let reading = read_proxy_header(&mut tcp, peer, &self.proxies, deadline);
                match drain.run_until_cancelled(reading).await? {
                    Ok(client) => peer = client,
                    Err(error) => {
                        report_proxy_header(crowd, peer, &error);
                        return None;
                    }
                }
                Arc::new(crowd.enter(peer.ip()))
            }
        };
        let Some(tls) = &self.tls else {
            return Some(ArrivedConnection { stream: PeerStream::Tcp(tcp), peer, entry });
        };
        // The handshake needs more memory than the connection: it is on the heap only while it lasts.
        let shaking = Box::pin(self.shake_hands(tls, tcp, peer, crowd, deadline));
        let stream = tokio::select! {
            biased;
            shaken = shaking => shaken?,
            () = drain.cancelled() => return None,
            () = poll_fn(|cx| entry.eviction().poll_due(cx)) => {
                debug!(%peer, "an HTTPS connection makes room for others in its handshake");
                return None;
            }
        };
        Some(ArrivedConnection { stream, peer, entry })
    }

    async fn shake_hands(
        &self,
        tls: &Tls,
        tcp: TcpStream,
        peer: SocketAddr,
        crowd: &HttpCrowd,
        deadline: Instant,
    ) -> Option<PeerStream> {
        let shaken = timeout_at(deadline, async {
            let _memory = match &self.memory {
                Some(memory) => {
                    Some(memory.account_of_stranger(peer.ip()).wait_for(TLS_HANDSHAKE_BYTES).await)
                }
                None => None,
            };
            if let Err(error @ ProxyHeaderError::Untrusted) = peek_proxy_header(&tcp).await {
                report_proxy_header(crowd, peer, &error);
                return None;
            }
            Some(tls.accept(tcp).await)
        });
        match shaken.await {
            Ok(Some(Ok(stream))) => return Some(PeerStream::Tls(Box::new(stream))),
            Ok(Some(Err(error))) => match tls.handshake_fault(&error) {
                Some(fault) => crowd.report(peer.ip(), Cause::TlsHandshake, &fault),
                None => debug!(%peer, "a client left in the TLS handshake"),
            },
            Ok(None) => {}
            Err(_) => debug!(%peer, "a TLS handshake was not over within http.header_ms_max"),
        }
        None
    }
}

/// Reports a connection that is closed for its PROXY protocol header.
pub(super) fn report_proxy_header(crowd: &HttpCrowd, peer: SocketAddr, error: &ProxyHeaderError) {
    match error.cause() {
        Some(cause) => crowd.report(peer.ip(), cause, &error.to_string()),
        None => debug!(%peer, %error, "a connection ended"),
    }
}
