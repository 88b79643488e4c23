//! How keys are presented, well and badly.

use std::process::Command;

use serde_json::json;

use crate::common::wire::{CONNACK, Connect, Next, PUBACK, VERSIONS, Version, Wire, publish, subscribe};
use crate::common::{Gateway, Setup, scratch};
use crate::{create_key, post};

/// The CONNACK's code, or `None` if the connection just closes.
fn answered(gateway: &Gateway, connect: &Connect) -> Option<u8> {
    let mut wire = Wire::open(gateway.mqtt);
    wire.send(&connect.packet());
    match wire.next() {
        Next::Packet(frame) if frame.kind() == CONNACK => Some(frame.reason()),
        Next::Closed => None,
        other => panic!("{other:?}"),
    }
}

#[test]
fn white_space_around_a_key_is_what_a_file_or_a_paste_leaves_and_no_part_of_it() {
    let dir = scratch();
    let gateway = Gateway::start(dir.path());
    let source = gateway.create("press-4");
    for presented in
        [format!("{}\n", source.key), format!("  {}\r\n", source.key), format!("\t{}", source.key)]
    {
        for version in VERSIONS {
            assert_eq!(answered(&gateway, &Connect::with_key(version, &presented)), Some(0), "{presented:?}");
            let password = Connect {
                username: Some(b"device".to_vec()),
                password: Some(presented.clone().into_bytes()),
                ..Connect::new(version)
            };
            assert_eq!(answered(&gateway, &password), Some(0));
        }
    }
    assert_eq!(post(&gateway, "press-4", &format!(" {} ", source.key)), 200);
    let sent = Command::new("mosquitto_pub")
        .args(["-h", "127.0.0.1", "-p", &gateway.mqtt.port().to_string(), "-q", "1", "-t", "t", "-m", "1"])
        .args(["-u", &format!("{} ", source.key)])
        .status();
    assert!(sent.expect("mosquitto_pub is installed (tests/run does it)").success());
}

#[test]
fn whatever_is_no_good_key_gets_one_answer_over_mqtt() {
    let dir = scratch();
    let gateway = Setup::on(dir.path()).set("auth.failures_burst", 1_000).start();
    let (source, other) = (gateway.create("press-4"), gateway.create("other"));
    let revoked = create_key(&gateway, "press-4", &json!({}));
    crate::revoke(&gateway, "press-4", &revoked.id);
    let elsewhere = scratch();
    let unknown = Gateway::start(elsewhere.path()).admin_key();
    let mut misspelt = source.key.clone().into_bytes();
    misspelt[20] = if misspelt[20] == b'a' { b'b' } else { b'a' };
    let (head, tail) = source.key.split_at(20);
    for bad in [
        misspelt,
        unknown.into_bytes(),
        revoked.secret.into_bytes(),
        format!("{head} {tail}").into_bytes(),
        b"hgk_".to_vec(),
        vec![b'x'; 65_535],
        [b"hgk_".as_slice(), &[b'x'; 65_531]].concat(),
    ] {
        for (version, code) in [(Version::V5, 0x87), (Version::V311, 5)] {
            let connect = Connect { username: Some(bad.clone()), ..Connect::new(version) };
            let shown = bad.len();
            assert_eq!(answered(&gateway, &connect), Some(code), "{version:?}, {shown} bytes");
            let connect = Connect {
                username: Some(b"u".to_vec()),
                password: Some(bad.clone()),
                ..Connect::new(version)
            };
            assert_eq!(answered(&gateway, &connect), Some(code), "{version:?}, {shown} bytes");
        }
    }
    // NUL is malformed in a user name (MQTT 5, 1.5.4), and no part of a key in a password.
    let nul = format!("{}\0", source.key).into_bytes();
    let username = Connect { username: Some(nul.clone()), ..Connect::new(Version::V5) };
    assert_ne!(answered(&gateway, &username), Some(0));
    let password =
        Connect { username: Some(b"u".to_vec()), password: Some(nul), ..Connect::new(Version::V5) };
    assert_eq!(answered(&gateway, &password), Some(0x87));
    let both = Connect {
        username: Some(source.key.clone().into_bytes()),
        password: Some(other.key.into_bytes()),
        ..Connect::new(Version::V5)
    };
    assert_eq!(answered(&gateway, &both), Some(0x87), "two different keys");
    let twice = Connect { password: both.username.clone(), ..both };
    assert_eq!(answered(&gateway, &twice), Some(0), "the same key twice is one key");
}

#[test]
fn a_key_in_a_topic_is_refused_said_why_and_never_stored() {
    let dir = scratch();
    let gateway = Gateway::start(dir.path());
    let source = gateway.create("press-4");
    let all = create_key(&gateway, "press-4", &json!({ "scopes": ["ingest", "subscribe"] }));
    let mut device = Wire::login(gateway.mqtt, Version::V5, &all.secret);
    for topic in [source.key.clone(), format!("a/{}/b", source.key), "x/HGK_abc".to_owned()] {
        device.send(&publish(Version::V5, 7, &topic, b"1"));
        let puback = device.packet(PUBACK);
        assert_eq!(puback.reason(), 0x90);
        let words = puback.text(0x1F).expect("a reason string");
        assert!(words.contains("API key") && !words.contains(&source.key), "{words}");
        let answer = gateway.post(&format!("/v1/ingest/press-4/{topic}"), &source.key, &json!({}));
        assert!(matches!(answer.status, 400 | 401), "{}", answer.text());
        assert!(!answer.text().contains(&source.key));
    }
    device.send(&subscribe(Version::V5, 8, &[&format!("{}/#", source.key)]));
    let suback = device.packet(9);
    assert_eq!(suback.codes(Version::V5), [0x8F]);
    assert_eq!(
        device.publish(Version::V5, 9, "hgk/a_b", b"1"),
        0,
        "a topic that only looks a little like one"
    );
    gateway.stored("press-4", 1);

    let as_id = Connect { client_id: source.key.clone(), ..Connect::with_key(Version::V5, &source.key) };
    assert_eq!(answered(&gateway, &as_id), Some(0x85), "nor is a client identifier a place for it");
}
