//! The sockets of one listener: one for each address that the name in its setting stands for.

use std::io;
use std::net::SocketAddr;
use std::task::Poll;

use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tracing::warn;

use crate::config::ListenAddress;
use crate::limits::LISTEN_BACKLOG;

/// How often to begin anew when the port that the system chose for the first address is taken at another.
const FREE_PORT_ATTEMPTS_MAX: usize = 16;

/// Sockets that listen on the same port.
#[derive(Debug)]
pub struct ListenSockets(Vec<TcpListener>);

impl ListenSockets {
    /// Binds all addresses of `at`. An address that this machine does not have is left out as long as there is
    /// another: `localhost` is often an IPv6 address too, also where IPv6 is off.
    ///
    /// # Errors
    /// An address that cannot be bound, with the address; a name that cannot be resolved.
    pub fn bind(at: &ListenAddress) -> anyhow::Result<Self> {
        let addrs = at.resolve().map_err(|error| anyhow::anyhow!("cannot find {at}: {error}"))?;
        let mut attempts = 1;
        loop {
            match bind_all(&addrs) {
                Ok(sockets) => return Ok(Self(sockets)),
                Err((addr, error))
                    if addrs[0].port() == 0
                        && addr != addrs[0]
                        && error.kind() == io::ErrorKind::AddrInUse
                        && attempts < FREE_PORT_ATTEMPTS_MAX =>
                {
                    attempts += 1;
                }
                Err((addr, error)) => {
                    let advice = match error.kind() {
                        io::ErrorKind::AddrInUse => {
                            " (`ss -ltnp` names who has it; `headgate doctor` looks at all ports)"
                        }
                        _ => "",
                    };
                    return Err(anyhow::Error::new(error).context(format!("cannot listen on {addr}{advice}")));
                }
            }
        }
    }

    /// The first address, with the port that the system chose if the setting has none.
    ///
    /// # Errors
    /// The system does not say.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.0[0].local_addr()
    }

    /// The next connection on any of them. Cancel-safe.
    ///
    /// # Errors
    /// Those of [`TcpListener::accept`].
    pub async fn accept(&self) -> io::Result<(TcpStream, SocketAddr)> {
        if let [only] = &self.0[..] {
            return only.accept().await;
        }
        std::future::poll_fn(|cx| {
            let mut accepted = self.0.iter().map(|socket| socket.poll_accept(cx));
            accepted.find(Poll::is_ready).unwrap_or(Poll::Pending)
        })
        .await
    }
}

/// Binds each address, at least one; later ones on the port of the first.
fn bind_all(addrs: &[SocketAddr]) -> Result<Vec<TcpListener>, (SocketAddr, io::Error)> {
    let mut sockets = Vec::with_capacity(addrs.len());
    let (mut port, mut missing) = (None, None);
    for addr in addrs {
        let addr = SocketAddr::new(addr.ip(), port.unwrap_or(addr.port()));
        match bind_one(addr) {
            Ok(socket) => {
                port = Some(socket.local_addr().map_err(|error| (addr, error))?.port());
                sockets.push(socket);
            }
            Err(error) if is_absent_address(&error) => missing = Some((addr, error)),
            Err(error) => return Err((addr, error)),
        }
    }
    match (sockets.is_empty(), missing) {
        (true, Some(missing)) => Err(missing),
        (_, Some((addr, error))) => {
            warn!(%addr, %error, "this machine does not have the address: it is not listened on");
            Ok(sockets)
        }
        (_, None) => Ok(sockets),
    }
}

fn bind_one(addr: SocketAddr) -> io::Result<TcpListener> {
    let socket = if addr.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
    socket.set_reuseaddr(true)?;
    socket.bind(addr)?;
    socket.listen(LISTEN_BACKLOG)
}

/// Whether the machine lacks the address, or its whole family.
fn is_absent_address(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::AddrNotAvailable || error.raw_os_error() == Some(libc::EAFNOSUPPORT)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_name_is_listened_on_at_all_its_addresses_on_one_port() {
        let at: ListenAddress = "localhost:0".parse().expect("read");
        let sockets = ListenSockets::bind(&at).expect("bound");
        let port = sockets.local_addr().expect("an address").port();
        for socket in &sockets.0 {
            let addr = socket.local_addr().expect("an address");
            assert_eq!(addr.port(), port);
            let (client, accepted) = tokio::join!(TcpStream::connect(addr), sockets.accept());
            let (client, (_, peer)) = (client.expect("connected"), accepted.expect("accepted"));
            assert_eq!(client.local_addr().expect("an address"), peer);
        }
    }

    #[tokio::test]
    async fn a_port_that_is_taken_is_an_error_that_names_the_address() {
        let taken = ListenSockets::bind(&"127.0.0.1:0".parse().expect("read")).expect("bound");
        let at = ListenAddress::from(taken.local_addr().expect("an address"));
        let error = format!("{:#}", ListenSockets::bind(&at).expect_err("taken"));
        assert!(error.contains(&format!("cannot listen on {at}")), "{error}");
    }
}
