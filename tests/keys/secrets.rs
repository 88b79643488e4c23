//! No secret is anywhere but where it was shown once: whatever the gateway wrote or answered, at the most
//! talkative level, is searched for every secret that it ever made.

use std::path::Path;

use serde_json::json;

use crate::common::tls::{Identity, TlsClient};
use crate::common::wire::{Connect, Version, Wire, publish, publish_with, user_property};
use crate::common::ws::WsClient;
use crate::common::{Gateway, Setup, scratch};
use crate::{Made, create_key, post, revoke, rotate};

/// Every file below a directory.
fn files(dir: &Path, found: &mut Vec<(String, Vec<u8>)>) {
    for entry in std::fs::read_dir(dir).expect("readable") {
        let path = entry.expect("an entry").path();
        match path.is_dir() {
            true => files(&path, found),
            false => found.push((path.display().to_string(), std::fs::read(&path).expect("readable"))),
        }
    }
}

fn holds(bytes: &[u8], part: &[u8]) -> bool {
    bytes.windows(part.len()).any(|window| window == part)
}

#[test]
fn nothing_that_the_gateway_wrote_holds_a_secret() {
    let dir = scratch();
    let issuer = Identity::issuer(dir.path(), "issuer");
    let identity = issuer.issue(dir.path(), "gateway");
    let data = dir.path().join("data");
    let gateway = Setup::on(&data)
        .set("mqtt.tls.certificate", identity.certificate.display())
        .set("mqtt.tls.key", identity.key.display())
        .set("trace.filter", "trace")
        .start();
    let admin_key = gateway.admin_key();
    let mut answers = Vec::new();

    let source = gateway.create("press-4");
    let all = create_key(&gateway, "*", &json!({ "scopes": ["ingest", "subscribe"] }));
    let rotated = Made::of(&rotate(&gateway, "press-4", &source.key_id, &json!({})));
    let revoked = create_key(&gateway, "press-4", &json!({ "label": "soon gone" }));
    let leaked = create_key(&gateway, "press-4", &json!({}));
    let secrets = [&admin_key, &source.key, &all.secret, &rotated.secret, &revoked.secret, &leaked.secret];

    // Used well, over every transport.
    for secret in [&source.key, &rotated.secret, &revoked.secret] {
        assert_eq!(post(&gateway, "press-4", secret), 200);
        let connect = Connect {
            client_id: format!("device of {}", secret.len()),
            clean: false,
            properties: user_property("authorization", secret),
            ..Connect::with_key(Version::V5, secret)
        };
        let (mut wire, _) = Wire::connect(gateway.mqtt, &connect);
        let own = user_property("authorization", &format!("Bearer {}", all.secret));
        wire.send(&publish_with(Version::V5, 1, "t", &own, b"1"));
        wire.packet(4);
        let mut ws = Wire::over(WsClient::open(gateway.http));
        ws.let_in(&Connect::with_key(Version::V311, secret));
        let tls = TlsClient::connect(gateway.mqtts.expect("served"), &issuer, None).expect("a handshake");
        Wire::over(tls).let_in(&Connect::with_key(Version::V311, secret));
    }
    revoke(&gateway, "press-4", &revoked.id);
    gateway.post(
        "/v1/leaks",
        "",
        &json!([{ "token": leaked.secret, "url": format!("https://x/{}", leaked.secret) }]),
    );

    // And badly: where no key belongs, cut short, misspelt, twice.
    for secret in secrets {
        let misspelt = format!("{}x", &secret[..secret.len() - 1]);
        for wrong in [secret.as_str(), &misspelt, &secret[..40], &secret[4..]] {
            for path in [
                format!("/v1/ingest/press-4?key={wrong}"),
                format!("/v1/ingest/press-4/{wrong}"),
                format!("/v1/ingest/{wrong}"),
                format!("/v1/datasources/{wrong}/keys/{wrong}"),
            ] {
                answers.push(gateway.request("POST", &path, wrong, &[("x-api-key", &admin_key)], b"{}"));
            }
            answers.push(gateway.post("/v1/ingest/press-4", wrong, &json!({})));
            answers.push(gateway.post("/v1/datasources", &admin_key, &json!({ "id": wrong, "name": "x" })));
            answers.push(gateway.post("/v1/leaks", "", &json!({ "secret": misspelt, "url": wrong })));
            let mut wire = Wire::open(gateway.mqtt);
            wire.send(
                &Connect { client_id: wrong.to_owned(), ..Connect::with_key(Version::V5, wrong) }.packet(),
            );
            wire.next();
            let mut wire = Wire::open(gateway.mqtt);
            wire.send(wrong.as_bytes());
            wire.finish();
            wire.next();
        }
        if let Ok(mut wire) = login(&gateway, &rotated.secret) {
            wire.send(&publish(Version::V5, 1, secret, b"1"));
            wire.next();
        }
    }
    for path in [
        "/metrics",
        "/v1/audit",
        "/v1/refusals",
        "/v1/datasources",
        "/v1/datasources/press-4/keys",
        "/openapi.json",
    ] {
        answers.push(gateway.get(path, &admin_key));
    }
    answers.push(gateway.get("/v1/datasources/*/keys", &admin_key));
    gateway.settle();
    answers.push(gateway.get("/v1/datasources/press-4/records", &admin_key));

    let mut written = Vec::new();
    // While it runs, and as it leaves them.
    files(&data, &mut written);
    let output = gateway.stop().output;
    files(&data, &mut written);
    assert!(output.contains("TRACE") || output.contains("DEBUG"), "it talked");
    written.push(("its output".to_owned(), output.into_bytes()));
    written.extend(answers.into_iter().map(|answer| {
        (
            format!("an answer with {}", answer.status),
            [answer.text(), format!("{:?}", answer.headers)].concat().into_bytes(),
        )
    }));
    assert!(written.iter().any(|(name, _)| name.ends_with("records.db-wal")), "it looks in the right place");
    for (name, bytes) in &written {
        for secret in secrets {
            if name.ends_with("admin.key") && *secret == admin_key {
                continue;
            }
            // Not even a piece of it that would make the rest easy to guess.
            assert!(!holds(bytes, &secret.as_bytes()[..30]), "{name} holds the beginning of a secret");
            assert!(!holds(bytes, &secret.as_bytes()[23..]), "{name} holds the end of a secret");
        }
    }
}

fn login(gateway: &Gateway, secret: &str) -> Result<Wire, ()> {
    let mut wire = Wire::open(gateway.mqtt);
    wire.send(&Connect::with_key(Version::V5, secret).packet());
    match wire.next() {
        crate::common::wire::Next::Packet(frame) if frame.reason() == 0 => Ok(wire),
        _ => Err(()),
    }
}
