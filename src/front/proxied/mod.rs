//! Who a client behind a proxy is. A proxy says it in a PROXY protocol header, before the first byte of the connection
//! that it passes on, or in the headers of an HTTP request. Only those that `trusted_proxies` names are believed: to
//! anybody else such a header would be a way to come from any address that it likes.

mod forwarded;
mod header;

use std::net::IpAddr;

use crate::config::{Config, ProxyProtocol};
use crate::network::Network;

pub(super) use forwarded::{forwarded_address, is_forwarded_https};
pub(super) use header::{
    PROXY_HEADER_STARTS, ProxyHeaderError, is_proxy_header, peek_proxy_header, read_proxy_header,
};

/// Which proxies are believed.
#[derive(Debug, Clone)]
pub struct ProxyTrust {
    networks: Vec<Network>,
    protocol: ProxyProtocol,
}

impl ProxyTrust {
    /// As the configuration says.
    pub fn new(config: &Config) -> Self {
        Self { networks: config.trusted_proxies.clone(), protocol: config.proxy_protocol }
    }

    /// Whether this is the address of a proxy that is believed.
    pub(super) fn is_trusted(&self, address: IpAddr) -> bool {
        self.networks.iter().any(|network| network.contains(address))
    }

    /// Whether a connection from this address may begin with a PROXY protocol header.
    pub(super) fn may_send_header(&self, address: IpAddr) -> bool {
        self.protocol != ProxyProtocol::Off && self.is_trusted(address)
    }

    /// Whether a connection that may begin with such a header has to.
    fn is_header_required(&self) -> bool {
        self.protocol == ProxyProtocol::Required
    }
}
