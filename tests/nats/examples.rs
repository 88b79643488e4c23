//! The programs of `examples/`, as a reader would run them: one publishes over MQTT, and the other gets what
//! it published from the validated stream.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use crate::common::nats::NatsServer;
use crate::common::{Gateway, Setup, scratch, wait_for};

/// An example's program: cargo builds them beside the tests.
fn example(name: &str) -> PathBuf {
    let gateway = Path::new(env!("CARGO_BIN_EXE_headgate"));
    gateway.parent().expect("the directory of the build").join("examples").join(name)
}

fn run(name: &str, arguments: &[&str], environment: &[(&str, &str)]) -> Output {
    let output = Command::new(example(name)).args(arguments).envs(environment.iter().copied()).output();
    output.expect("the example is built")
}

#[test]
fn what_the_example_publishes_the_other_example_consumes() {
    let (dir, nats) = (scratch(), NatsServer::start());
    let servers = format!("[\"{}\"]", nats.url());
    let setup = Setup::embedded_on(dir.path()).set("nats.servers", servers);
    let gateway: Gateway = setup.set("log.retention_bytes", 1_u64 << 30).start();
    let source = gateway.create("press-4");

    let (mqtt, key) = (gateway.mqtt.to_string(), source.key.as_str());
    let environment = [("MQTT_ADDRESS", mqtt.as_str()), ("HEADGATE_API_KEY", key)];
    let published = run("publish", &["spindle/temp", "21.5", "21.7"], &environment);
    assert!(published.status.success(), "{}", String::from_utf8_lossy(&published.stderr));
    assert_eq!(String::from_utf8_lossy(&published.stdout), "2 readings are kept\n");

    let url = nats.url();
    wait_for("both readings to be on the stream", || {
        (gateway.metric("headgate_egress_cursor") >= 2.0).then_some(())
    });
    let consumed = run("consume", &["press-4", "line-3", "2"], &[("NATS_URL", url.as_str())]);
    assert!(consumed.status.success(), "{}", String::from_utf8_lossy(&consumed.stderr));
    let lines = String::from_utf8(consumed.stdout).expect("text");
    let readings: Vec<_> =
        lines.lines().filter_map(|line| line.split_once(' ')).map(|(_, rest)| rest).collect();
    assert_eq!(readings, ["stream.press-4.spindle.temp 21.5", "stream.press-4.spindle.temp 21.7"]);

    let refused = run("publish", &["spindle/temp", "1"], &[environment[0], ("HEADGATE_API_KEY", "hgk_no")]);
    assert!(!refused.status.success(), "a bad key is told so");
}
