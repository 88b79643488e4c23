//! The spans of messages, from a front to storage.

use std::borrow::Cow;
use std::collections::{HashMap, VecDeque};
use std::sync::OnceLock;
use std::time::{SystemTime, UNIX_EPOCH};

use headgate_format::codec::properties::Properties;
use opentelemetry::trace::{
    Span as _, SpanContext, SpanKind, Status, TraceContextExt, Tracer as _, TracerProvider as _,
};
use opentelemetry::{Context, KeyValue};
use opentelemetry_sdk::trace::{SdkTracer, SdkTracerProvider, Span};
use parking_lot::Mutex;

use super::TracedMessage;
use super::span_shares::SpanShares;
use super::trace_parent::parse_trace_parent;
use crate::limits::{SPANS_PER_DRAFT_MAX, TRACED_RECORDS_MAX};
use crate::log::SectionOutcome;
use crate::message::{DatasourceId, Offset};

/// The name of the header and of the user property.
const TRACE_PARENT: &str = "traceparent";
/// What a span shows of a topic, in bytes.
const SPAN_TOPIC_BYTES_MAX: usize = 256;

/// Transactions of sinks that are remembered, for spans that end after their records are stored.
const SINK_TRANSACTIONS_MAX: usize = 64;

/// Where the spans of the process go, once that is known.
static DESK: OnceLock<SpanDesk> = OnceLock::new();

struct SpanDesk {
    tracer: SdkTracer,
    shares: Mutex<SpanShares>,
    stores: Mutex<TracedStores>,
}

/// Which records have spans, and what was stored lately: whichever of the two is known first waits for the other.
#[derive(Default)]
struct TracedStores {
    /// The newest records whose messages have spans.
    records: VecDeque<(Offset, SpanContext)>,
    /// The newest transactions of sinks.
    transactions: VecDeque<SinkTransaction>,
}

/// A transaction of a sink.
#[derive(Clone, Copy)]
struct SinkTransaction {
    sink: &'static str,
    from: Offset,
    to: Offset,
    began: SystemTime,
    ended: SystemTime,
}

/// Sends the spans of this process there from now on.
pub(super) fn set_provider(provider: &SdkTracerProvider) {
    let _ = DESK.set(SpanDesk {
        tracer: provider.tracer("headgate"),
        shares: Mutex::default(),
        stores: Mutex::default(),
    });
}

impl SpanDesk {
    /// Whether one more message of this datasource may have a span in this second.
    fn take_share(&self, datasource: &DatasourceId) -> bool {
        let mut shares = self.shares.lock();
        // Looked at in here, or whoever waits for the lock would come from a second that is over.
        let second = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        shares.take(datasource, second)
    }

    /// Begins a span, if it is sampled.
    fn start(
        &self,
        name: impl Into<Cow<'static, str>>,
        kind: SpanKind,
        at: SystemTime,
        parent: Option<&SpanContext>,
    ) -> Option<Span> {
        let context = match parent {
            Some(parent) => Context::new().with_remote_span_context(parent.clone()),
            None => Context::new(),
        };
        let builder = self.tracer.span_builder(name).with_kind(kind).with_start_time(at);
        let span = self.tracer.build_with_context(builder, &context);
        span.is_recording().then_some(span)
    }

    /// Remembers a record for the sinks that have not stored it yet.
    fn note_traced(&self, offset: Offset, context: SpanContext) {
        let mut stores = self.stores.lock();
        for range in stores.transactions.iter().filter(|range| (range.from..range.to).contains(&offset)) {
            self.tell_store(range, &context);
        }
        push_bounded(&mut stores.records, (offset, context), TRACED_RECORDS_MAX);
    }

    fn note_transaction(&self, range: SinkTransaction) {
        let mut stores = self.stores.lock();
        for (_, context) in stores.records.iter().filter(|(at, _)| (range.from..range.to).contains(at)) {
            self.tell_store(&range, context);
        }
        push_bounded(&mut stores.transactions, range, SINK_TRANSACTIONS_MAX);
    }

    fn tell_store(&self, range: &SinkTransaction, parent: &SpanContext) {
        if let Some(mut span) = self.start("store", SpanKind::Internal, range.began, Some(parent)) {
            span.set_attribute(KeyValue::new("headgate.sink", range.sink));
            span.end_with_timestamp(range.ended);
        }
    }
}

/// Adds one behind the others, of which the oldest is forgotten if there are too many.
fn push_bounded<T>(all: &mut VecDeque<T>, one: T, count_max: usize) {
    if all.len() >= count_max {
        all.pop_front();
    }
    all.push_back(one);
}

/// What a request says of its trace.
pub struct RequestTrace(Option<(SystemTime, Option<SpanContext>)>);

impl RequestTrace {
    /// A request that begins now, with its `traceparent`.
    pub fn begin(trace_parent: Option<&[u8]>) -> Self {
        Self(DESK.get().map(|_| (SystemTime::now(), trace_parent.and_then(parse_trace_parent))))
    }
}

/// The spans of a draft's messages.
pub struct DraftSpans(Option<Box<OpenSpans>>);

struct OpenSpans {
    desk: &'static SpanDesk,
    began: SystemTime,
    /// The parent of all its messages that name none.
    parent: Option<SpanContext>,
    /// Whether it was decided if those have a span.
    is_decided: bool,
    messages: u64,
    admitted: Option<SystemTime>,
    spans: Vec<MessageSpan>,
    /// How many more each datasource may have in this draft: one of NATS has messages of many.
    room: HashMap<DatasourceId, usize>,
}

/// The span of a message, or of all of a draft that name no parent.
struct MessageSpan {
    origin: usize,
    place: u32,
    span: Span,
    /// Whether it is of one message alone.
    is_own: bool,
}

impl DraftSpans {
    /// None yet, of messages that are read now.
    #[inline]
    pub fn begin() -> Self {
        let Some(desk) = DESK.get() else { return Self(None) };
        Self(Some(Box::new(OpenSpans {
            desk,
            began: SystemTime::now(),
            parent: None,
            is_decided: false,
            messages: 0,
            admitted: None,
            spans: Vec::new(),
            room: HashMap::new(),
        })))
    }

    /// Its messages are those of this request.
    pub fn follow(&mut self, request: &RequestTrace) {
        if let (Some(open), Some((began, parent))) = (&mut self.0, &request.0) {
            (open.began, open.parent) = (*began, parent.clone());
        }
    }

    /// Begins the span of a message that has come in, if it has one.
    #[inline]
    pub fn note_message(&mut self, message: &TracedMessage<'_>) {
        if let Some(open) = &mut self.0 {
            open.note_message(message);
        }
    }

    /// All messages are there, and the log has them from here on.
    pub fn note_admitted(&mut self) {
        if let Some(open) = &mut self.0 {
            open.admitted = Some(SystemTime::now());
        }
    }

    /// Ends all spans, with what became of the messages.
    pub fn note_outcomes(&mut self, outcomes: &[SectionOutcome]) {
        let Some(open) = self.0.take() else { return };
        let now = SystemTime::now();
        let OpenSpans { desk, messages, admitted, spans, .. } = *open;
        for MessageSpan { origin, place, mut span, is_own } in spans {
            let context = span.span_context().clone();
            if !is_own {
                span.set_attribute(KeyValue::new("messaging.batch.message_count", number(messages)));
            }
            match outcomes.get(origin) {
                Some(SectionOutcome::Kept(offsets)) => {
                    let offset = offsets.first() + Offset::from(place);
                    span.set_attribute(KeyValue::new("headgate.offset", number(offset)));
                    desk.note_traced(offset, context.clone());
                }
                Some(SectionOutcome::Duplicate(_) | SectionOutcome::Known(_)) => {
                    span.set_attribute(KeyValue::new("headgate.duplicate", true));
                }
                other => span.set_status(Status::error(match other {
                    Some(SectionOutcome::KeyDead) => "the key has ended meanwhile",
                    _ => "it was not kept",
                })),
            }
            let commit = desk.start("commit", SpanKind::Internal, admitted.unwrap_or(now), Some(&context));
            if let Some(mut commit) = commit {
                commit.end_with_timestamp(now);
            }
            span.end_with_timestamp(now);
        }
    }
}

impl Drop for DraftSpans {
    fn drop(&mut self) {
        for MessageSpan { span, .. } in self.0.iter_mut().flat_map(|open| &mut open.spans) {
            span.set_status(Status::error("it was refused, or its client left before it was durable"));
        }
    }
}

impl OpenSpans {
    fn note_message(&mut self, message: &TracedMessage<'_>) {
        self.messages += 1;
        let own = parent_in(message.properties);
        if own.is_none() && std::mem::replace(&mut self.is_decided, true) {
            return;
        }
        let parent = own.as_ref().or(self.parent.as_ref());
        // A parent that is not sampled decides for its messages.
        if parent.is_some_and(|parent| !parent.is_sampled()) {
            return;
        }
        // Whoever names a parent that is sampled has a span, but for what would be too many.
        if parent.is_some() && !take_room(&mut self.room, self.desk, message.datasource) {
            return;
        }
        let Some(mut span) = self.desk.start("publish", SpanKind::Server, self.began, parent) else { return };
        if parent.is_none() && !take_room(&mut self.room, self.desk, message.datasource) {
            return;
        }
        let topic = &message.topic[..message.topic.floor_char_boundary(SPAN_TOPIC_BYTES_MAX)];
        for attribute in [
            KeyValue::new("messaging.system", "headgate"),
            KeyValue::new("messaging.destination.name", topic.to_owned()),
            KeyValue::new("messaging.message.body.size", number(message.payload_bytes as u64)),
            KeyValue::new("headgate.datasource", message.datasource.as_str().to_owned()),
            KeyValue::new("headgate.transport", message.transport.as_str()),
        ] {
            span.set_attribute(attribute);
        }
        let TracedMessage { origin, place, .. } = *message;
        self.spans.push(MessageSpan { origin, place, span, is_own: own.is_some() });
    }
}

/// Whether one more message of this datasource may have a span in this draft, of which `room` has what is left to each, and in
/// this second.
fn take_room(room: &mut HashMap<DatasourceId, usize>, desk: &SpanDesk, datasource: &DatasourceId) -> bool {
    let left = match room.get_mut(datasource) {
        Some(left) => left,
        None => room.entry(datasource.clone()).or_insert(SPANS_PER_DRAFT_MAX),
    };
    let may_have = *left > 0 && desk.take_share(datasource);
    // Who is over its share is not asked about again in this draft.
    *left = if may_have { *left - 1 } else { 0 };
    may_have
}

/// The parent that a message names in its properties.
fn parent_in(properties: &[u8]) -> Option<SpanContext> {
    if properties.is_empty() {
        return None;
    }
    let mut named = Properties::from_wire(properties).user();
    let (_, value) = named.find(|(name, _)| name.eq_ignore_ascii_case(TRACE_PARENT))?;
    parse_trace_parent(value.as_bytes())
}

fn number(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

/// A transaction of a sink.
pub struct StoreSpan(Option<(&'static SpanDesk, SystemTime)>);

impl StoreSpan {
    /// One that begins now.
    #[inline]
    pub fn begin() -> Self {
        Self(DESK.get().map(|desk| (desk, SystemTime::now())))
    }

    /// It has stored the records from one offset to another.
    #[inline]
    pub fn end(self, sink: &'static str, from: Offset, to: Offset) {
        if let Some((desk, began)) = self.0
            && from < to
        {
            desk.note_transaction(SinkTransaction { sink, from, to, began, ended: SystemTime::now() });
        }
    }
}
