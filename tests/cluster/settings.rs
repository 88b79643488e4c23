//! The settings that all gateways of a cluster share. A gateway with others took the stream from three replicas to one
//! at its start, with one line in its own log.

use crate::common::servers::Servers;
use crate::common::{Gateway, Setup, scratch, wait_for};

fn setup(dir: &std::path::Path, servers: &Servers, replicas: usize) -> Setup {
    Setup::embedded_on(dir)
        .set("log.backend", "jetstream")
        .set("nats.servers", serde_json::to_string(&servers.urls()).expect("JSON"))
        .set("nats.stream.replicas", replicas)
}

/// What a command that has to succeed prints.
fn printed(setup: &Setup, arguments: &[&str]) -> String {
    let output = setup.run(arguments);
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("UTF-8")
}

fn warnings(gateway: &Gateway) -> String {
    gateway.request("GET", "/readyz", "", &[], b"").json()["warnings"].to_string()
}

#[test]
fn a_start_changes_no_setting_of_the_cluster_and_a_command_does() {
    let (servers, first, second) = (Servers::start(), scratch(), scratch());
    let gateway = setup(first.path(), &servers, 3).start();
    let other = setup(second.path(), &servers, 1)
        .set("log.retention_bytes", 1_000_000_000_u64)
        .set("mqtt.session_expiry_s_max", 3_600)
        .set("intake.dedup_window_s", 60);
    let said = other.refused().output;
    for words in [
        "stream headgate: the number of replicas is 3 in the cluster, 1 in the configuration",
        "bucket headgate-registry: the number of replicas is 3 in the cluster, 1 in the configuration",
        "in the cluster, 1000000000 bytes in the configuration",
        "stream headgate: the time for which it knows an id is 600 s in the cluster, 60 s in the configuration",
        "bucket headgate-sessions: the time for which it keeps a row is",
        "headgate cluster change",
    ] {
        assert!(said.contains(words), "{words}: {said}");
    }
    assert!(setup(second.path(), &servers, 3).run(&["cluster", "change"]).status.success());
    assert_eq!(
        printed(&setup(second.path(), &servers, 3), &["cluster", "change"]),
        "the cluster has the settings of this configuration\n"
    );
    assert_eq!(warnings(&gateway), "[]");

    // Told what it would do, and then done; who runs on warns, and serves.
    let told = printed(&other, &["cluster", "change"]);
    assert!(told.contains("stream headgate: the number of replicas: 3 -> 1\n"), "{told}");
    assert!(told.ends_with("nothing is changed yet: with --yes it is done\n"), "{told}");
    assert!(other.refused().output.contains("replicas is 3"));
    assert!(printed(&other, &["cluster", "change", "--yes"]).contains("\ndone"));
    wait_for("a warning", || {
        warnings(&gateway).contains("stream headgate: the number of replicas is 1, not 3").then_some(())
    });
    let source = gateway.create("press-4");
    let sent = gateway.post("/v1/ingest/press-4/t", &source.key, &serde_json::json!({ "value": 1 }));
    assert_eq!(sent.status, 200, "{}", sent.text());
    let newcomer = other.start();
    let sent = newcomer.post("/v1/ingest/press-4/t", &source.key, &serde_json::json!({ "value": 2 }));
    assert_eq!(sent.status, 200, "{}", sent.text());
    gateway.stored("press-4", 2);
}

#[test]
fn a_server_that_is_away_is_warned_of() {
    let (mut servers, dir) = (Servers::start(), scratch());
    let gateway = setup(dir.path(), &servers, 3).start();
    let source = gateway.create("press-4");
    servers.kill(2);
    wait_for("a warning", || warnings(&gateway).contains("n2 is ").then_some(()));
    let sent = gateway.post("/v1/ingest/press-4/t", &source.key, &serde_json::json!({ "value": 1 }));
    assert_eq!(sent.status, 200, "{}", sent.text());
    servers.restart(2);
    wait_for("the warning to end", || (!warnings(&gateway).contains("n2 is ")).then_some(()));
}
