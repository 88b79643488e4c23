//! The Debian package. `cargo deb` makes it of what `[package.metadata.deb]` in Cargo.toml names; a release build for that would
//! take longer than all tests. So the same parts are put together here around the program under test, and that is installed,
//! started, upgraded, removed and purged by a real systemd, on a copy of this machine that nobody else sees (`life.py`).

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

use crate::common::scratch;
use crate::common::tls::Identity;
use crate::{project, text};

fn run(command: &mut Command) -> String {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let words = [output.stdout, output.stderr].concat();
    let words = String::from_utf8_lossy(&words).into_owned();
    assert!(output.status.success(), "{command:?}: {}\n{words}", output.status);
    words
}

fn manifest() -> Value {
    toml::from_str(&text("Cargo.toml")).expect("TOML")
}

fn deb() -> Value {
    manifest().pointer("/package/metadata/deb").expect("the package").clone()
}

/// The files that an asset's source names: a file, or `*.EXTENSION` or `*` in a directory.
fn sources(source: &str, built: &Path) -> Vec<PathBuf> {
    let path = match source.strip_prefix("target/release/") {
        Some(rest) => built.join(rest),
        None => project(source),
    };
    let name = path.file_name().and_then(|name| name.to_str()).expect("a name").to_owned();
    let Some(ending) = name.strip_prefix('*') else { return vec![path] };
    let entries =
        fs::read_dir(path.parent().expect("a directory")).unwrap_or_else(|e| panic!("{source}: {e}"));
    let entries = entries.map(|entry| entry.expect("readable").path());
    let mut found: Vec<PathBuf> = entries
        .filter(|path| path.is_file() && path.to_str().is_some_and(|path| path.ends_with(ending)))
        .collect();
    found.sort();
    assert!(!found.is_empty(), "{source}");
    found
}

/// The program under test without its symbols, and what the package has of it.
fn build(dir: &Path) -> PathBuf {
    let built = dir.join("built");
    fs::create_dir(&built).expect("made");
    let program = built.join("headgate");
    run(Command::new("strip").arg("-o").arg(&program).arg(env!("CARGO_BIN_EXE_headgate")));
    run(Command::new(project("config/deb/stage")).arg(&program).arg(built.join("package")));
    built
}

/// Puts the package together as cargo-deb does.
fn assemble(dir: &Path, built: &Path, version: &str) -> PathBuf {
    let (deb, root) = (deb(), dir.join(format!("root-{version}")));
    for asset in deb["assets"].as_array().expect("assets") {
        let part = |n: usize| asset[n].as_str().expect("a text");
        let mode = u32::from_str_radix(part(2), 8).expect("a mode");
        for source in sources(part(0), built) {
            let place = root.join(part(1));
            let place = match part(1).ends_with('/') {
                true => place.join(source.file_name().expect("a name")),
                false => place,
            };
            fs::create_dir_all(place.parent().expect("a directory")).expect("made");
            fs::copy(&source, &place).unwrap_or_else(|error| panic!("{}: {error}", source.display()));
            fs::set_permissions(&place, fs::Permissions::from_mode(mode)).expect("set");
            if part(1).starts_with("usr/share/man/") {
                run(Command::new("gzip").arg("-9n").arg(&place));
            }
        }
    }
    let control = root.join("DEBIAN");
    fs::create_dir(&control).expect("made");
    let architecture = run(Command::new("dpkg").arg("--print-architecture"));
    let word = |name: &str| deb[name].as_str().unwrap_or_else(|| panic!("{name}")).to_owned();
    let depends = word("depends").replace("$auto", "libc6");
    let fields = format!(
        "Package: headgate\nVersion: {version}\nArchitecture: {}\nMaintainer: {}\nDepends: {depends}\nSection: {}\n\
         Priority: {}\nDescription: a gate\n {}\n",
        architecture.trim(),
        word("maintainer"),
        word("section"),
        word("priority"),
        word("extended-description"),
    );
    fs::write(control.join("control"), fields).expect("written");
    let files = deb["conf-files"].as_array().expect("files").iter();
    let files: String = files.map(|file| format!("{}\n", file.as_str().expect("a path"))).collect();
    fs::write(control.join("conffiles"), files).expect("written");
    for script in ["postinst", "prerm", "postrm"] {
        let place = control.join(script);
        fs::copy(project(&word("maintainer-scripts")).join(script), &place).expect("copied");
        fs::set_permissions(&place, fs::Permissions::from_mode(0o755)).expect("set");
    }
    let package = dir.join(format!("headgate_{version}.deb"));
    run(Command::new("dpkg-deb").args(["--root-owner-group", "-Znone", "--build"]).arg(&root).arg(&package));
    fs::remove_dir_all(&root).expect("removed");
    package
}

/// Only root can boot a systemd; for others this is left out.
#[test]
fn the_package_is_installed_started_upgraded_removed_and_purged_under_systemd() {
    // SAFETY: geteuid(2) always succeeds.
    if unsafe { libc::geteuid() } != 0 {
        return eprintln!("left out: only root can boot a systemd of its own");
    }
    let dir = scratch();
    let built = build(dir.path());
    assemble(dir.path(), &built, "0.1.0-1");
    assemble(dir.path(), &built, "0.1.1-1");
    fs::remove_dir_all(&built).expect("removed");
    let issuer = Identity::issuer(dir.path(), "issuer");
    issuer.issue(dir.path(), "own");
    let mut life = Command::new("unshare");
    life.args([
        "--mount",
        "--propagation",
        "private",
        "--pid",
        "--fork",
        "--uts",
        "--ipc",
        "--net",
        "--cgroup",
    ]);
    life.arg("python3").arg(project("tests/packages/life.py")).arg("boot").arg(dir.path());
    // It ends as process 1 does whose machine is powered off: by a signal.
    let output = life.output().expect("unshare runs");
    let found = fs::read_to_string(dir.path().join("found")).unwrap_or_default();
    let boot = fs::read_to_string(dir.path().join("boot.log")).unwrap_or_default();
    assert!(
        found.contains("the package has lived"),
        "{}\n{found}\n{}\n{boot}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
}

#[test]
fn the_scripts_of_the_package_are_of_the_shell_that_every_debian_has() {
    for script in ["postinst", "prerm", "postrm", "stage"] {
        let path = project("config/deb").join(script);
        assert!(text(&format!("config/deb/{script}")).starts_with("#!/bin/sh\n"), "{script}");
        run(Command::new("sh").arg("-n").arg(&path));
    }
    run(Command::new("bash").arg("-n").arg(project("config/deb/build")));
}

/// `headgate --version`: the first line has the version, and that with its parts is the long one.
#[test]
fn the_version_says_which_parts_are_built_in() {
    let program = || Command::new(env!("CARGO_BIN_EXE_headgate"));
    let version =
        manifest().pointer("/package/version").and_then(Value::as_str).expect("a version").to_owned();
    let long = run(program().arg("--version"));
    assert!(long.starts_with(&format!("headgate {version}")), "{long}");
    assert!(long.contains("the features delta and otlp"), "{long}");
    assert_eq!(run(program().arg("-V")).trim(), format!("headgate {version}"));
}

/// What the published files are built with: a release build without symbols, and the same code with lines for the package, whose
/// symbols go into one of their own.
#[test]
fn a_release_has_no_symbols_and_those_of_the_package_are_beside_it() {
    let manifest = manifest();
    assert_eq!(manifest["profile"]["release"]["strip"], "symbols");
    assert_eq!(manifest["profile"]["release"]["debug"], false);
    assert_eq!(manifest["profile"]["profiling"]["inherits"], "release");
    let build = text("config/deb/build");
    assert!(build.contains("--profile profiling") && build.contains("--dbgsym"), "{build}");
}
