//! What stands for spans in a build without the feature `otlp`: nothing.

use super::TracedMessage;
use crate::config::OtlpConfig;
use crate::log::SectionOutcome;
use crate::message::Offset;

/// No spans to export.
pub struct SpanExport;

impl SpanExport {
    /// Begins nothing.
    ///
    /// # Errors
    /// None.
    pub fn begin(_: &OtlpConfig) -> Result<Self, std::convert::Infallible> {
        Ok(Self)
    }

    /// Ends nothing.
    pub async fn end(self) {}
}

/// Nothing of a request.
pub struct RequestTrace;

impl RequestTrace {
    /// Nothing.
    #[inline]
    pub fn begin(_: Option<&[u8]>) -> Self {
        Self
    }
}

/// Nothing of a draft.
pub struct DraftSpans;

impl DraftSpans {
    /// Nothing.
    #[inline]
    pub fn begin() -> Self {
        Self
    }

    /// Nothing.
    #[inline]
    pub fn follow(&mut self, _: &RequestTrace) {}

    /// Nothing.
    #[inline]
    pub fn note_message(&mut self, _: &TracedMessage<'_>) {}

    /// Nothing.
    #[inline]
    pub fn note_admitted(&mut self) {}

    /// Nothing.
    #[inline]
    pub fn note_outcomes(&mut self, _: &[SectionOutcome]) {}
}

/// Nothing of a transaction.
pub struct StoreSpan;

impl StoreSpan {
    /// Nothing.
    #[inline]
    pub fn begin() -> Self {
        Self
    }

    /// Nothing.
    #[inline]
    pub fn end(self, _: &'static str, _: Offset, _: Offset) {}
}
