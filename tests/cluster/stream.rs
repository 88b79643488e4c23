//! Streams over HTTP in a cluster: a client goes on at any gateway where it was, and what ends a stream does so on all.

use serde_json::Value;

use crate::common::Gateway;
use crate::common::events::EventStream;
use crate::sessions::Cluster;

fn post(gateway: &Gateway, key: &str, numbers: std::ops::Range<usize>) {
    for n in numbers {
        let answer = gateway.request("POST", "/v1/ingest/press-4/n", key, &[], n.to_string().as_bytes());
        assert_eq!(answer.status, 200, "{}", answer.text());
    }
}

#[test]
fn a_stream_goes_on_at_another_gateway_after_a_kill() {
    let (cluster, a, b) = Cluster::two();
    let mut stream = EventStream::open(a.http, &cluster.key, "");
    stream.event().expect("it says where it begins");
    post(&b, &cluster.key, 0..50);
    let mut received = stream.payloads(20);
    for _ in 0..3 {
        stream = stream.come_back(b.http, &cluster.key, "");
        received.extend(stream.payloads(5));
        stream = stream.come_back(a.http, &cluster.key, "");
        received.extend(stream.payloads(5));
    }
    post(&a, &cluster.key, 50..80);
    a.kill();
    post(&b, &cluster.key, 80..100);
    let mut stream = stream.come_back(b.http, &cluster.key, "");
    received.extend(stream.payloads(50));
    let wanted: Vec<Value> = (0..100).map(Value::from).collect();
    assert_eq!(received, wanted);
}

#[test]
fn a_stream_ends_on_every_gateway_with_its_datasource() {
    let (cluster, a, b) = Cluster::two();
    let mut streams = [&a, &b].map(|gateway| EventStream::open(gateway.http, &cluster.key, "?from_offset=0"));
    post(&a, &cluster.key, 0..3);
    for stream in &mut streams {
        stream.payloads(3);
    }
    a.delete("press-4");
    for stream in &mut streams {
        assert_eq!(stream.end(), "datasource_deleted");
    }
}
