//! Spans of OpenTelemetry, as a collector gets them: of a message over each transport, under the parent that its sender
//! names, with its commit and its storage; and that a collector that is away, or never answers, keeps nobody waiting.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
use opentelemetry_proto::tonic::common::v1::any_value::Value as SpanValue;
use opentelemetry_proto::tonic::trace::v1::Span;
use prost::Message;

use crate::common::nats::{NatsServer, nats_py};
use crate::common::wire::{self, Version, Wire};
use crate::common::{Setup, scratch, wait_for};

/// A collector: it keeps every span that it is sent.
struct Collector {
    addr: SocketAddr,
    spans: Arc<Mutex<Vec<Span>>>,
}

impl Collector {
    fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let (addr, spans) = (listener.local_addr().expect("bound"), Arc::new(Mutex::new(Vec::new())));
        let kept = spans.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let kept: Arc<Mutex<Vec<Span>>> = kept.clone();
                std::thread::spawn(move || while take_batch(&stream, &kept).is_some() {});
            }
        });
        Self { addr, spans }
    }

    /// The spans of a trace by name, once there are so many.
    fn trace(&self, trace: &str, count: usize) -> BTreeMap<String, Span> {
        let of_trace = || -> Vec<Span> {
            let spans = self.spans.lock().expect("no holder panics");
            spans.iter().filter(|span| hex(&span.trace_id) == trace).cloned().collect()
        };
        let found = wait_for(&format!("{count} spans of {trace}"), || {
            Some(of_trace()).filter(|of| of.len() >= count)
        });
        found.into_iter().map(|span| (span.name.clone(), span)).collect()
    }
}

/// Reads one request and answers it; `None` at the end of the connection.
fn take_batch(mut stream: &TcpStream, kept: &Mutex<Vec<Span>>) -> Option<()> {
    let mut reader = BufReader::new(stream);
    let (mut head, mut length) = (String::new(), 0);
    loop {
        let mut line = String::new();
        reader.read_line(&mut line).ok().filter(|read| *read > 0)?;
        if line == "\r\n" {
            break;
        }
        if let Some((name, value)) = line.split_once(':')
            && name.eq_ignore_ascii_case("content-length")
        {
            length = value.trim().parse().expect("a number");
        }
        head.push_str(&line.to_ascii_lowercase());
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body).ok()?;
    assert!(head.starts_with("post /v1/traces ") && head.contains("application/x-protobuf"), "{head}");
    let batch = ExportTraceServiceRequest::decode(&*body).expect("protobuf");
    for of_resource in batch.resource_spans {
        let resource = of_resource.resource.expect("a resource");
        assert_eq!(text(&resource.attributes, "service.name").as_deref(), Some("headgate"));
        let spans = of_resource.scope_spans.into_iter().flat_map(|of_scope| of_scope.spans);
        kept.lock().expect("no holder panics").extend(spans);
    }
    stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n").ok()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn text(attributes: &[opentelemetry_proto::tonic::common::v1::KeyValue], name: &str) -> Option<String> {
    let attribute = attributes.iter().find(|attribute| attribute.key == name)?;
    match attribute.value.as_ref()?.value.as_ref()? {
        SpanValue::StringValue(text) => Some(text.clone()),
        SpanValue::IntValue(number) => Some(number.to_string()),
        SpanValue::BoolValue(is) => Some(is.to_string()),
        other => panic!("{name} is {other:?}"),
    }
}

/// `traceparent` of a trace, sampled or not, and the trace's id.
fn parent(number: u8, is_sampled: bool) -> (String, String) {
    let trace = format!("{:02x}", number.max(1)).repeat(16);
    (format!("00-{trace}-00f067aa0ba902b7-0{}", u8::from(is_sampled)), trace)
}

/// That a trace has a message's span, its commit and its storage, each below the other and in its time.
fn check_trace(collector: &Collector, trace: &str, transport: &str, topic: &str) {
    let spans = collector.trace(trace, 3);
    let (publish, commit, store) = (&spans["publish"], &spans["commit"], &spans["store"]);
    assert_eq!(hex(&publish.parent_span_id), "00f067aa0ba902b7");
    assert_eq!((&commit.parent_span_id, &store.parent_span_id), (&publish.span_id, &publish.span_id));
    let (began, ended) = (publish.start_time_unix_nano, publish.end_time_unix_nano);
    assert!(began <= commit.start_time_unix_nano && commit.end_time_unix_nano <= ended, "{spans:?}");
    assert!(store.end_time_unix_nano >= commit.start_time_unix_nano, "stored before it was there: {spans:?}");
    let of = |name: &str| text(&publish.attributes, name);
    assert_eq!(of("headgate.datasource").as_deref(), Some("press-4"));
    assert_eq!(of("headgate.transport").as_deref(), Some(transport));
    assert_eq!(of("messaging.destination.name").as_deref(), Some(topic));
    assert!(of("headgate.offset").is_some(), "{publish:?}");
    assert_eq!(text(&store.attributes, "headgate.sink").as_deref(), Some("sqlite"));
}

#[test]
fn a_message_over_each_transport_has_the_parent_that_it_names_and_its_commit_and_storage_below() {
    let dir = scratch();
    let (collector, nats) = (Collector::start(), NatsServer::start());
    let gateway = Setup::embedded_on(dir.path())
        .set("trace.otlp.endpoint", format!("http://{}", collector.addr))
        .set("trace.otlp.sampled_per_million", 0)
        .set("nats.servers", format!("[\"{}\"]", nats.url()))
        .start();
    let source = gateway.create_open("press-4");
    let post = |trace_parent: &str| {
        let headers = [("content-type", "application/json"), ("traceparent", trace_parent)];
        gateway.request("POST", "/v1/ingest/press-4/over/http", &source.key, &headers, b"[1,2,3]")
    };
    let (sampled, http_trace) = parent(0xa1, true);
    let (not_sampled, silent_trace) = parent(0xa2, false);
    for trace_parent in [&*not_sampled, "no parent at all", &sampled] {
        assert_eq!(post(trace_parent).status, 200);
    }
    check_trace(&collector, &http_trace, "http", "over/http");
    let publish = &collector.trace(&http_trace, 3)["publish"];
    assert_eq!(text(&publish.attributes, "messaging.batch.message_count").as_deref(), Some("3"));

    // Two messages of one read, each with a parent of its own.
    let mut wire = Wire::login(gateway.mqtt, Version::V5, &source.key);
    let (of_first, of_second) = (parent(0xb1, true), parent(0xb2, true));
    let packet = |id: u16, topic: &str, trace_parent: &str| {
        let property = wire::user_property("traceparent", trace_parent);
        wire::publish_with(Version::V5, id, topic, &property, b"1")
    };
    wire.send(&[packet(1, "over/mqtt", &of_first.0), packet(2, "over/mqtt/too", &of_second.0)].concat());
    (0..2).for_each(|_| assert_eq!(wire.packet(wire::PUBACK).reason(), 0));
    check_trace(&collector, &of_first.1, "mqtt", "over/mqtt");
    check_trace(&collector, &of_second.1, "mqtt", "over/mqtt/too");
    let offset = |trace: &str| {
        let publish = &collector.trace(trace, 3)["publish"];
        text(&publish.attributes, "headgate.offset").expect("an offset").parse::<u64>().expect("a number")
    };
    assert_eq!(offset(&of_first.1) + 1, offset(&of_second.1));

    let (of_nats, nats_trace) = parent(0xc1, true);
    let body = "await nc.request('ingest.press-4.over.nats', b'1', timeout=10, headers={'Authorization': sys.argv[2], 'traceparent': sys.argv[3]})";
    let output = nats_py(&nats.url(), body, &[&source.key, &of_nats]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    check_trace(&collector, &nats_trace, "nats", "over/nats");

    let spans = collector.spans.lock().expect("no holder panics");
    let others = spans.iter().filter(|span| hex(&span.parent_span_id).is_empty()).count();
    assert_eq!(others, 0, "with a ratio of 0 nothing else is sampled");
    assert!(spans.iter().all(|span| hex(&span.trace_id) != silent_trace), "its sender does not sample it");
}

/// It took all that a second had, and all of a read that had messages of several.
#[test]
fn a_datasource_that_has_every_message_traced_leaves_the_others_their_spans() {
    let dir = scratch();
    let collector = Collector::start();
    let gateway = Setup::embedded_on(dir.path())
        .set("trace.otlp.endpoint", format!("http://{}", collector.addr))
        .set("trace.otlp.sampled_per_million", 0)
        .start();
    let (loud, quiet) = (gateway.create("loud"), gateway.create("quiet"));
    let is_over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        // Also when what is expected does not come.
        let _end = SetAtEnd(&is_over);
        scope.spawn(|| {
            let mut wire = Wire::login(gateway.mqtt, Version::V5, &loud.key);
            let property = wire::user_property("traceparent", &parent(0xee, true).0);
            let packets: Vec<u8> = (1..=50_u16)
                .flat_map(|id| wire::publish_with(Version::V5, id, "t", &property, b"1"))
                .collect();
            while !is_over.load(Ordering::Relaxed) {
                wire.send(&packets);
                (0..50).for_each(|_| assert_eq!(wire.packet(wire::PUBACK).reason(), 0));
            }
        });
        collector.trace(&parent(0xee, true).1, 1);
        for number in 1..=10 {
            let (trace_parent, trace) = parent(number, true);
            let headers = [("content-type", "application/json"), ("traceparent", &*trace_parent)];
            let answer = gateway.request("POST", "/v1/ingest/quiet/t", &quiet.key, &headers, b"1");
            assert_eq!(answer.status, 200);
            collector.trace(&trace, 2);
        }
    });
}

/// Sets it when it is dropped.
struct SetAtEnd<'a>(&'a AtomicBool);

impl Drop for SetAtEnd<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn a_collector_that_is_away_or_never_answers_keeps_nobody_waiting_and_loses_no_message() {
    // One that accepts connections and says nothing, and one that is not there.
    let silent = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let gone = TcpListener::bind("127.0.0.1:0").expect("a free port").local_addr().expect("bound");
    for addr in [silent.local_addr().expect("bound"), gone] {
        let dir = scratch();
        let gateway = Setup::embedded_on(dir.path())
            .set("trace.otlp.endpoint", format!("http://{addr}"))
            .set("trace.otlp.sampled_per_million", 1_000_000)
            .start();
        let source = gateway.create("press-4");
        let mut wire = Wire::login(gateway.mqtt, Version::V5, &source.key);
        // More than the queue has room for.
        for round in 0..40_u16 {
            let packets: Vec<u8> = (1..=100_u16)
                .flat_map(|id| wire::publish(Version::V5, id, format!("t/{round}"), b"1"))
                .collect();
            wire.send(&packets);
            (0..100).for_each(|_| assert_eq!(wire.packet(wire::PUBACK).reason(), 0));
        }
        gateway.stored("press-4", 4_000);
        gateway.stop();
    }
}

#[test]
fn an_endpoint_that_cannot_be_one_is_an_error_of_the_configuration() {
    let dir = scratch();
    for bad in ["collector:4318", "ftp://collector", "http://", "http://user:secret@collector:4318"] {
        let refused = Setup::embedded_on(dir.path()).set("trace.otlp.endpoint", bad).refused();
        assert!(refused.output.contains("trace.otlp.endpoint"), "{bad}: {}", refused.output);
        assert!(!refused.output.contains("secret"), "{}", refused.output);
    }
    let refused = Setup::embedded_on(dir.path()).set("trace.otlp.sampled_per_million", 1_000_001).refused();
    assert!(refused.output.contains("trace.otlp.sampled_per_million"), "{}", refused.output);
}
