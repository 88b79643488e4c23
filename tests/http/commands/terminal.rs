//! On a terminal tables fit it, and what cannot be undone is asked for. The terminal is real: a pseudo-terminal of this size.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{FromRawFd, OwnedFd};
use std::process::{Command, Stdio};

use serde_json::Value;

use crate::cli::{fails_with, prints, to};
use crate::common::{Gateway, scratch, wait_for};

/// What a command prints on a terminal with so many columns, to which `typed` is typed; and its exit code.
fn on_terminal(command: &mut Command, columns: u16, typed: &str) -> (String, i32) {
    let (mut own, mut its) = (0, 0);
    let size = libc::winsize { ws_row: 40, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: the two places are for file descriptors, and the size is only read.
    let opened = unsafe {
        libc::openpty(&raw mut own, &raw mut its, std::ptr::null_mut(), std::ptr::null(), &raw const size)
    };
    assert_eq!(opened, 0, "a pseudo-terminal");
    // SAFETY: both were just opened, and nobody else has them.
    let (own, its) = unsafe { (OwnedFd::from_raw_fd(own), OwnedFd::from_raw_fd(its)) };
    let end = || Stdio::from(its.try_clone().expect("another descriptor"));
    let mut child = command.stdin(end()).stdout(end()).stderr(end()).spawn().expect("headgate runs");
    // The command's own descriptors stay in `command`; without them the terminal ends with the child.
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    drop(its);
    let mut terminal = File::from(own);
    terminal.write_all(typed.as_bytes()).expect("typed");
    let mut shown = Vec::new();
    let mut piece = [0; 4096];
    // It ends with an error where nobody has the other end any more.
    while let Ok(bytes @ 1..) = terminal.read(&mut piece) {
        shown.extend_from_slice(&piece[..bytes]);
    }
    let status = wait_for("it to end", || child.try_wait().expect("our child"));
    (String::from_utf8(shown).expect("text"), status.code().expect("a code"))
}

/// `key list` was 210 columns wide, and a terminal of 100 showed rows that were broken at random.
#[test]
fn a_table_fits_its_terminal_and_is_as_wide_as_it_needs_without_one() {
    let dir = scratch();
    let gateway = Gateway::start(dir.path());
    let source = gateway.create("press-4");
    let label = "the gateway at the far end of hall B";
    let create = ["key", "create", "press-4", "--label", label, "--scope", "ingest", "--scope", "subscribe"];
    prints(&mut to(&gateway, &[&create[..], &["--expires-at", "90d"]].concat()));
    let headers = [("content-type", "application/json")];
    for _ in 0..3 {
        let answer = gateway.request("POST", "/v1/ingest/press-4", &source.key, &headers, b"{\"v\": 1}");
        assert_eq!(answer.status, 200);
    }
    let widest = |text: &str| text.lines().map(|line| line.trim_end().chars().count()).max().expect("lines");
    for columns in [60, 80, 100, 200] {
        let (shown, code) = on_terminal(&mut to(&gateway, &["key", "list", "press-4"]), columns, "");
        assert_eq!(code, 0, "{shown}");
        assert!(widest(&shown) <= usize::from(columns), "{columns}:\n{shown}");
        assert!(columns < 100 || shown.contains(&source.key_id), "{shown}");
    }
    let piped = prints(&mut to(&gateway, &["key", "list", "press-4"]));
    for words in [label, "ingest, subscribe", " ago ", "active, 89 d left", "never"] {
        assert!(piped.contains(words), "{words}:\n{piped}");
    }
    assert!(!piped.contains("127.0.0.1"), "who uses it is told with --wide:\n{piped}");
    let (wide, _) = on_terminal(&mut to(&gateway, &["--wide", "key", "list", "press-4"]), 80, "");
    assert!(widest(&wide) > 100 && wide.contains("127.0.0.1"), "{wide}");
    for _ in 0..2 {
        assert_eq!(gateway.request("POST", "/v1/ingest/press-4", "hgk_no", &headers, b"1").status, 401);
    }
    for args in [&["refusals"][..], &["records", "press-4"], &["audit"]] {
        let (shown, code) = on_terminal(&mut to(&gateway, args), 80, "");
        assert!(code == 0 && widest(&shown) <= 80, "{args:?}:\n{shown}");
    }
}

#[test]
fn what_cannot_be_undone_is_asked_for_on_a_terminal_and_nowhere_else() {
    let dir = scratch();
    let gateway = Gateway::start(dir.path());
    let source = gateway.create("press-4");
    let revoke = ["key", "revoke", "press-4", source.key_id.as_str()];
    for (args, refusing) in [(&revoke[..], "n\n"), (&["datasource", "delete", "press-4"], "\n")] {
        let (shown, code) = on_terminal(&mut to(&gateway, args), 100, refusing);
        assert!(
            code == 3 && shown.contains("[y/N]") && shown.contains("nothing was done"),
            "{code}: {shown}"
        );
    }
    let purge = ["datasource", "delete", "press-4", "--purge"];
    let (shown, code) = on_terminal(&mut to(&gateway, &purge), 100, "no\n");
    assert!(code == 3 && shown.contains("everything that is stored"), "{shown}");
    assert_eq!(gateway.request("POST", "/v1/ingest/press-4", &source.key, &[], b"1").status, 200);
    let (shown, code) = on_terminal(&mut to(&gateway, &revoke), 100, "y\n");
    assert!(code == 0 && shown.contains("is dead"), "{shown}");
    let (shown, code) =
        on_terminal(&mut to(&gateway, &["datasource", "delete", "press-4", "--yes"]), 100, "");
    assert!(code == 0 && !shown.contains("[y/N]"), "{shown}");
    gateway.create("press-5");
    let deleted = prints(&mut to(&gateway, &["datasource", "delete", "press-5", "--json"]));
    let deleted: Value = serde_json::from_str(&deleted).expect("JSON");
    assert_eq!((&deleted["deleted"], &deleted["durable"]), (&true.into(), &true.into()));
}

/// A second call, of a script that is run again for instance, made `press-4-2` without a word.
#[test]
fn a_second_datasource_of_one_name_is_asked_for_or_named_by_its_id() {
    let dir = scratch();
    let gateway = Gateway::start(dir.path());
    let create = |args: &[&str]| to(&gateway, &[&["datasource", "create"], args].concat());
    prints(&mut create(&["Press 4"]));
    let said = fails_with(&mut create(&["press 4"]), &[3]);
    assert!(said.contains("press-4") && said.contains("--id"), "{said}");
    prints(&mut create(&["Press 4", "--id", "other"]));
    let (shown, code) = on_terminal(&mut create(&["Press 4"]), 100, "n\n");
    assert!(code == 3 && shown.contains("Create another one?"), "{shown}");
    let (shown, code) = on_terminal(&mut create(&["Press 4"]), 100, "y\n");
    assert!(code == 0 && shown.contains("press-4-2"), "{shown}");
}
