//! `headgate nats setup`: what it writes, and what it does not tell.

use std::os::unix::fs::PermissionsExt;

use super::stage::{free_ports, set_up};
use crate::common::{Setup, scratch};

#[test]
fn setup_shows_no_secret_and_writes_each_for_its_owner_alone() {
    let dir = scratch();
    let set = set_up(dir.path(), &free_ports(), &[]);
    assert!(set.status.success(), "{}", String::from_utf8_lossy(&set.stderr));
    let shown = format!("{}{}", String::from_utf8_lossy(&set.stdout), String::from_utf8_lossy(&set.stderr));
    let mut secrets = 0;
    for entry in std::fs::read_dir(dir.path().join("set")).expect("a directory") {
        let path = entry.expect("an entry").path();
        let mode = std::fs::metadata(&path).expect("its metadata").permissions().mode();
        assert_eq!(mode & 0o777, 0o600, "{}", path.display());
        if path.extension().is_some_and(|extension| extension == "seed" || extension == "password") {
            let text = std::fs::read_to_string(&path).expect("readable");
            assert!(text.trim().len() >= 43 && !shown.contains(text.trim()), "{}", path.display());
            secrets += 1;
        }
    }
    assert_eq!(secrets, 5);
    assert!(shown.contains("nats-server --config") && shown.contains("headgate serve --config"), "{shown}");
}

#[test]
fn setup_writes_over_nothing_unless_it_is_forced_to() {
    let dir = scratch();
    let ports = free_ports();
    let read = || std::fs::read_to_string(dir.path().join("set/issuer.seed")).expect("a seed");
    assert!(set_up(dir.path(), &ports, &[]).status.success());
    let before = read();
    let again = set_up(dir.path(), &ports, &[]);
    let said = String::from_utf8_lossy(&again.stderr).into_owned();
    assert!(!again.status.success() && said.contains("--force"), "{said}");
    assert_eq!(read(), before);
    assert!(set_up(dir.path(), &ports, &["--force"]).status.success());
    assert_ne!(read(), before);
}

#[test]
fn a_seed_or_password_that_is_not_there_keeps_the_gateway_from_starting_and_is_named() {
    let dir = scratch();
    assert!(set_up(dir.path(), &free_ports(), &[]).status.success());
    let set = dir.path().join("set");
    let setup = Setup::on(&dir.path().join("data")).set("config", set.join("headgate.toml").display());
    let absent = set.join("absent");
    for setting in ["issuer_seed_file", "xkey_seed_file", "password_file", "system_password_file"] {
        let exit = setup.clone().set(&format!("nats.callout.{setting}"), absent.display()).refused();
        assert!(exit.output.contains(&format!("nats.callout.{setting}")), "{}", exit.output);
        assert!(exit.output.contains("absent"), "{}", exit.output);
    }
    // A seed of the wrong kind is told from none, and is not shown.
    let curve = set.join("curve.seed");
    let exit = setup.clone().set("nats.callout.issuer_seed_file", curve.display()).refused();
    let seed = std::fs::read_to_string(&curve).expect("a seed");
    assert!(exit.output.contains("SA…") && !exit.output.contains(seed.trim()), "{}", exit.output);
    let exit = setup.set("nats.callout.user", "headgate").refused();
    assert!(exit.output.contains("nats.callout.user"), "{}", exit.output);
}
