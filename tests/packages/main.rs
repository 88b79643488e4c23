//! What is around the program: the package and its service, the container, the proxies, Kubernetes, the description of the API as others
//! read it, and the documentation.

#[path = "../common/mod.rs"]
mod common;

mod container;
mod deb;
mod documentation;
mod kubernetes;
mod openapi;
mod proxies;
mod service;
mod snippets;

use std::path::{Path, PathBuf};

/// A file of the project.
fn project(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

/// The text of a file of the project.
fn text(path: &str) -> String {
    std::fs::read_to_string(project(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// A directory beside the build that `tests/run` fills: `venv`, `node`, `proxies`.
fn installed(path: &str) -> PathBuf {
    Path::new(env!("CARGO_TARGET_TMPDIR")).join("..").join(path)
}
