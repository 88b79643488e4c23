//! Spans of OpenTelemetry: of a message from its front to its commit, of the commit, and of its storage. Only with the cargo
//! feature `otlp`, and with `trace.otlp.endpoint`; without the feature all of this is nothing, and costs nothing.
//!
//! A message has the parent that its sender names (W3C Trace Context): in the header `traceparent` over HTTP, in the user
//! property of that name in MQTT 5, in the header of that name over NATS. Without one, one read of a connection or one
//! request in so many has a span of its own.
//!
//! Nobody waits for a span: what the exporter cannot take is lost, and so is what comes faster than
//! [`SPANS_PER_S_MAX`](crate::limits::SPANS_PER_S_MAX), of which each datasource gets a share.

#[cfg(not(feature = "otlp"))]
mod absent;
#[cfg(feature = "otlp")]
mod collector;
#[cfg(feature = "otlp")]
mod recorder;
#[cfg(feature = "otlp")]
mod span_shares;
#[cfg(feature = "otlp")]
mod trace_parent;

use crate::message::{DatasourceId, Transport};

#[cfg(not(feature = "otlp"))]
pub use absent::{DraftSpans, RequestTrace, SpanExport, StoreSpan};
#[cfg(feature = "otlp")]
pub use collector::SpanExport;
#[cfg(feature = "otlp")]
pub use recorder::{DraftSpans, RequestTrace, StoreSpan};

/// A message that comes into a draft, as its span tells it.
#[cfg_attr(not(feature = "otlp"), expect(dead_code, reason = "what tells spans is not in this build"))]
pub struct TracedMessage<'a> {
    /// Its origin in the draft.
    pub origin: usize,
    /// Its place among the messages of that.
    pub place: u32,
    /// Which way it came.
    pub transport: Transport,
    /// Its datasource.
    pub datasource: &'a DatasourceId,
    /// Its topic in that.
    pub topic: &'a str,
    /// The length of its payload.
    pub payload_bytes: usize,
    /// Its MQTT 5 properties in wire form.
    pub properties: &'a [u8],
}
