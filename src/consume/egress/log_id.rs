//! The id that distinguishes the log of this data directory from all others.

use std::fs::File;
use std::io::{self, Write};
use std::path::Path;

use rand::rand_core::TryRng;
use rand::rngs::SysRng;

/// The file with the id, in the data directory.
pub(super) const LOG_ID_FILE: &str = "log.id";

/// The id in the file at `path`: made at its first use and never changed.
pub(super) fn read_or_create_log_id(path: &Path) -> io::Result<String> {
    match std::fs::read_to_string(path) {
        Ok(text) if !text.trim().is_empty() => return Ok(text.trim().to_owned()),
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut random = [0; 6];
    SysRng.try_fill_bytes(&mut random).map_err(io::Error::other)?;
    let id: String = random.iter().map(|byte| format!("{byte:02x}")).collect();
    // Written whole or not at all: with another id the stream would take this for another log.
    let new = path.with_extension("new");
    let mut file = File::create(&new)?;
    writeln!(file, "{id}")?;
    file.sync_all()?;
    std::fs::rename(&new, path)?;
    if let Some(dir) = path.parent() {
        File::open(dir)?.sync_all()?;
    }
    Ok(id)
}
