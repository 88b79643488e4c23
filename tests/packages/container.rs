//! The container's image, built of the program under test as `config/container/build` does it, without a registry, and run by
//! podman (`container.py`).

use std::fs;
use std::process::Command;

use crate::common::scratch;
use crate::{project, text};

/// Only root has namespaces of its own everywhere, and podman is installed where `tests/run` can install it; otherwise this is
/// left out.
#[test]
fn the_image_is_built_without_a_registry_run_stopped_and_replaced_by_a_newer_one() {
    // SAFETY: geteuid(2) always succeeds.
    if unsafe { libc::geteuid() } != 0 {
        return eprintln!("left out: only root can run podman in namespaces of its own");
    }
    if Command::new("podman").arg("--version").output().is_err() {
        return eprintln!("left out: there is no podman (apt-get install podman)");
    }
    let dir = scratch();
    let program = dir.path().join("headgate");
    let stripped = Command::new("strip").arg("-o").arg(&program).arg(env!("CARGO_BIN_EXE_headgate")).status();
    assert!(stripped.is_ok_and(|status| status.success()));
    let mut life = Command::new("unshare");
    life.args([
        "--mount",
        "--propagation",
        "private",
        "--net",
        "--pid",
        "--fork",
        "--kill-child",
        "--mount-proc",
    ]);
    life.arg("python3").arg(project("tests/packages/container.py"));
    life.arg(env!("CARGO_MANIFEST_DIR")).arg(&program).arg(dir.path());
    for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("HEADGATE_")) {
        life.env_remove(name);
    }
    let output = life.output().expect("unshare runs");
    let found = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    if let Some(why) = found.lines().find(|line| line.starts_with("left out: ")) {
        return eprintln!("{why}");
    }
    assert!(found.contains("the image has lived"), "{}\n{found}", output.status);
}

#[test]
fn what_builds_the_image_is_of_the_shells_that_are_there() {
    for (shell, script) in [("sh", "config/container/stage"), ("bash", "config/container/build")] {
        assert!(text(script).lines().next().is_some_and(|line| line.ends_with(shell)), "{script}");
        let checked = Command::new(shell).arg("-n").arg(project(script)).status();
        assert!(checked.is_ok_and(|status| status.success()), "{script}");
    }
    let ignored = text(".dockerignore");
    assert!(
        ignored.lines().any(|line| line == "target"),
        "a build in the image has a target directory of its own"
    );
    assert!(fs::metadata(project("config/container/Containerfile")).is_ok());
}
