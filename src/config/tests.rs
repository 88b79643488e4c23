//! Configuration: files, the environment, and what their errors say.

use super::*;

#[test]
fn the_shipped_file_shows_every_key_at_its_default() {
    let shipped = Path::new(env!("CARGO_MANIFEST_DIR")).join("config/headgate.toml");
    let text = std::fs::read_to_string(&shipped).expect("config/headgate.toml is readable");
    // Without the defaults, so that a key missing in the file is an error.
    let config: Config = toml::from_str(&text).expect("every key is there");
    assert_eq!(config, Config::default());
}

#[test]
fn an_unknown_key_is_an_error_that_names_it() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let file = dir.path().join("headgate.toml");
    std::fs::write(&file, "[mqtt]\nlissen = \"127.0.0.1:1\"\n").expect("written");
    let error = Config::load(Some(&file)).expect_err("misspelt").to_string();
    assert!(error.contains("lissen"), "{error}");
}

#[test]
fn a_certificate_needs_its_key_and_client_certificates_need_both() {
    for (tls, key) in [
        ("certificate = \"a.pem\"", "mqtt.tls.key"),
        ("key = \"a.pem\"", "mqtt.tls.key"),
        ("client_ca = \"a.pem\"", "mqtt.tls.client_ca"),
    ] {
        let dir = tempfile::tempdir().expect("temporary directory");
        let file = dir.path().join("headgate.toml");
        std::fs::write(&file, format!("[mqtt.tls]\n{tls}\n")).expect("written");
        let error = Config::load(Some(&file)).expect_err("incomplete").to_string();
        assert!(error.contains(key), "{error}");
    }
}

#[test]
fn sinks_are_a_list_and_the_earlier_name_for_one_of_them_is_understood() {
    let sinks = |text: &str| load_text(&format!("[storage]\n{text}\n")).map(|config| config.storage.sinks);
    for (text, expected) in [
        ("sinks = [\"sqlite\"]", vec![SinkKind::Sqlite]),
        ("sinks = \"sqlite\"", vec![SinkKind::Sqlite]),
        ("sink = \"sqlite\"", vec![SinkKind::Sqlite]),
        ("sink = \"none\"", vec![]),
        ("sinks = []", vec![]),
        ("nice = 3", vec![SinkKind::Sqlite]),
    ] {
        assert_eq!(sinks(text).expect(text), expected, "{text}");
    }
    for (text, expected) in [
        ("sinks = [\"sqlite\", \"sqlite\"]", "each sink once"),
        ("sinks = [\"postgre\"]", "storage.sinks"),
        ("sink = \"none\"\nsinks = [\"sqlite\"]", "storage.sinks"),
        ("sinks = []\nread_from = \"sqlite\"", "storage.read_from"),
        ("sinks = [\"sqlite\"]\nread_from = \"postgres\"", "storage.read_from"),
    ] {
        let error = sinks(text).expect_err(text).to_string();
        assert!(error.contains(expected), "{text}: {error}");
    }
}

/// The tests themselves are built with all features.
#[test]
fn a_sink_that_a_build_does_not_have_is_refused_with_what_to_do() {
    let sinks = |sinks: &[SinkKind]| StorageConfig { sinks: sinks.to_vec(), ..StorageConfig::default() };
    let without = |storage: StorageConfig| storage.check_built(|kind| kind != SinkKind::Delta);
    without(sinks(&[SinkKind::Sqlite, SinkKind::Postgres])).expect("they are in every build");
    let error = without(sinks(&[SinkKind::Sqlite, SinkKind::Delta])).expect_err("it has no lake").to_string();
    assert!(error.contains("storage.sinks") && error.contains("--features delta"), "{error}");
    sinks(&[SinkKind::Delta]).check().expect("this build has it");
}

fn load_text(text: &str) -> Result<Config, ConfigError> {
    let dir = tempfile::tempdir().expect("temporary directory");
    let file = dir.path().join("headgate.toml");
    std::fs::write(&file, text).expect("written");
    Config::load(Some(&file))
}

/// The errors quoted the value, and the whole line of what is no TOML.
#[test]
fn no_error_repeats_a_value_that_could_be_a_secret() {
    for text in [
        "[nats]\npassword = 5309271\n",
        "[nats]\npassword = 5309271.5\n",
        "[nats]\npassword = [\"5309271\"]\n",
        "[nats]\npassword = { a = \"5309271\" }\n",
        "[nats]\npassword = \"5309271\n",
        "[nats]\npassword = s5309271\n",
        "[nats]\npassword = \"5309271\" x\n",
        "[nats]\npassword = \"5309271\\q\"\n",
        "[nats]\npassword = \"5309271\"\npassword = \"5309271\"\n",
        "[nats.callout]\nsystem_password = 2026-11-30\n",
        "[nats]\nusr = \"5309271\"\n",
        "nats = \"5309271\"\n",
        "[log]\nbackend = \"5309271\"\n",
        "[nats]\ningest = \"5309271\"\n",
        "[nats]\nservers = [5309271]\n",
        "[nats]\nservers = \"[5309271\"\n",
    ] {
        let error = load_text(text).expect_err(text);
        for shown in [error.to_string(), format!("{error:?}")] {
            assert!(!shown.contains("5309271") && !shown.contains("2026-11-30"), "{shown}");
        }
    }
}

#[test]
fn a_fault_of_syntax_is_told_by_its_place() {
    let error = load_text("[nats]\npassword = s\n").expect_err("no TOML").to_string();
    assert!(error.contains("line 2, column 12"), "{error}");
}

#[test]
fn sizes_times_and_lists_are_read_as_people_write_them() {
    let config = load_text(
        "[intake]\nmemory_bytes_max = \"1GiB\"\n[log]\nretention_s = \"24h\"\n[http]\nbody_ms_max = \"1m\"\n\
         listen = \"localhost:8080\"\n[nats]\nservers = \"nats://a:1, nats://b:2\"\n",
    )
    .expect("read");
    assert_eq!((config.intake.memory_bytes_max, config.log.retention_s), (1 << 30, 86_400));
    assert_eq!(
        (config.http.body_ms_max, config.http.listen.to_string()),
        (60_000, "localhost:8080".to_owned())
    );
    assert_eq!(config.nats.servers, ["nats://a:1", "nats://b:2"]);
    let error = load_text("[intake]\nmemory_bytes_max = \"64M\"\n").expect_err("it is ambiguous").to_string();
    assert!(error.contains("intake.memory_bytes_max") && error.contains("MiB"), "{error}");
}

#[test]
fn a_number_out_of_its_type_is_an_error_that_says_the_largest() {
    let error = load_text("[mqtt]\nreceive_maximum = 70000\n").expect_err("too large").to_string();
    assert!(error.contains("mqtt.receive_maximum") && error.contains("65535"), "{error}");
    for text in ["-1", "1.5", "true"] {
        let error = load_text(&format!("[mqtt]\nreceive_maximum = {text}\n")).expect_err(text).to_string();
        assert!(error.contains("mqtt.receive_maximum"), "{error}");
    }
}

#[test]
fn a_value_out_of_range_is_an_error_that_names_key_and_rule() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let file = dir.path().join("headgate.toml");
    std::fs::write(&file, "[mqtt]\nreceive_maximum = 0\n").expect("written");
    let error = Config::load(Some(&file)).expect_err("zero").to_string();
    assert!(error.contains("mqtt.receive_maximum") && error.contains("at least 1"), "{error}");
}
