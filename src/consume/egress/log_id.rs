//! The id that distinguishes the log of this data directory from all others, and those of the logs that it was restored
//! from. A log that is restored has the records of another one up to its end at that time, and a history of its own from
//! there: what comes after that end under the other's id is not in it.

use std::fs::File;
use std::io::{self, Write};
use std::path::Path;

use headgate_bridge_nats::stream::StoredMessage;
use rand::rand_core::TryRng;
use rand::rngs::SysRng;

use super::message::record_offset_of;
use crate::message::Offset;

/// The file with the id, in the data directory.
pub(super) const LOG_ID_FILE: &str = "log.id";
/// The file beside it with the logs that it was restored from: an id and the offset behind what is common, a line each.
const LOG_PARENTS_FILE: &str = "log.parents";

/// The id of a log, and those of the logs that it was restored from.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct LogLineage {
    pub(super) id: String,
    /// Oldest first, each with the offset behind the last record that both have.
    parents: Vec<(String, Offset)>,
}

/// Where the record of a message is.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum MessageOrigin<'a> {
    /// In this log, under that id.
    Here { offset: Offset, log_id: &'a str },
    /// In a log that this one was restored from, behind the `end` of what both have.
    BehindRestore { offset: Offset, end: Offset },
}

impl LogLineage {
    /// That of the log whose id is in the file at `path`, which is made at its first use.
    pub(super) fn read_or_create(path: &Path) -> io::Result<Self> {
        let id = match read_id(path)? {
            Some(id) => id,
            None => create_id(path)?,
        };
        Ok(Self { id, parents: read_parents(&path.with_file_name(LOG_PARENTS_FILE))? })
    }

    /// Where the record of a message is; `None` if another log has sent it.
    pub(super) fn origin_of(&self, message: &StoredMessage) -> Option<MessageOrigin<'_>> {
        if let Some(offset) = record_offset_of(message, &self.id) {
            return Some(MessageOrigin::Here { offset, log_id: &self.id });
        }
        self.parents.iter().find_map(|(id, end)| {
            let (offset, end) = (record_offset_of(message, id)?, *end);
            Some(match offset < end {
                true => MessageOrigin::Here { offset, log_id: id },
                false => MessageOrigin::BehindRestore { offset, end },
            })
        })
    }

    /// The offset of a message's record, if this log has it.
    pub(super) fn offset_of(&self, message: &StoredMessage) -> Option<Offset> {
        match self.origin_of(message)? {
            MessageOrigin::Here { offset, .. } => Some(offset),
            MessageOrigin::BehindRestore { .. } => None,
        }
    }
}

/// Gives the log in `dir`, which was restored and ends at `end`, an id of its own, if it has one.
///
/// # Errors
/// The operating system's.
pub fn begin_history(dir: &Path, end: Offset) -> io::Result<()> {
    let path = dir.join(LOG_ID_FILE);
    let Some(parent) = read_id(&path)? else { return Ok(()) };
    let parents = path.with_file_name(LOG_PARENTS_FILE);
    let mut lineage = read_parents(&parents)?;
    lineage.iter_mut().for_each(|(_, common)| *common = end.min(*common));
    lineage.push((parent, end));
    let lines: String = lineage.iter().map(|(id, common)| format!("{id} {common}\n")).collect();
    write_whole(&parents, &lines)?;
    create_id(&path).map(drop)
}

/// The id in a file; `None` if it is empty or not there.
fn read_id(path: &Path) -> io::Result<Option<String>> {
    match std::fs::read_to_string(path) {
        Ok(text) => Ok(Some(text.trim().to_owned()).filter(|id| !id.is_empty())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// Writes another id to a file.
fn create_id(path: &Path) -> io::Result<String> {
    let mut random = [0; 6];
    SysRng.try_fill_bytes(&mut random).map_err(io::Error::other)?;
    let id: String = random.iter().map(|byte| format!("{byte:02x}")).collect();
    write_whole(path, &format!("{id}\n"))?;
    Ok(id)
}

fn read_parents(path: &Path) -> io::Result<Vec<(String, Offset)>> {
    let text = match std::fs::read_to_string(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        text => text?,
    };
    let parsed = text.lines().map(|line| {
        let (id, end) = line.split_once(' ')?;
        Some((id.to_owned(), end.parse().ok()?))
    });
    let parents: Option<_> = parsed.collect();
    parents.ok_or_else(|| io::Error::other(format!("{} is not what was written", path.display())))
}

/// Written whole or not at all: with another id the stream would take this for another log.
fn write_whole(path: &Path, text: &str) -> io::Result<()> {
    let new = path.with_extension("new");
    let mut file = File::create(&new)?;
    file.write_all(text.as_bytes())?;
    file.sync_all()?;
    std::fs::rename(&new, path)?;
    if let Some(dir) = path.parent() {
        File::open(dir)?.sync_all()?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_restored_log_knows_what_it_has_of_those_before_it_and_no_more() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let path = dir.path().join(LOG_ID_FILE);
        begin_history(dir.path(), 7).expect("nothing to do");
        assert!(!path.exists(), "without egress there is no id");
        let first = LogLineage::read_or_create(&path).expect("made");
        assert_eq!(LogLineage::read_or_create(&path).expect("read"), first);
        begin_history(dir.path(), 100).expect("begun");
        let second = LogLineage::read_or_create(&path).expect("read");
        assert_ne!(second.id, first.id);
        assert_eq!(second.parents, [(first.id.clone(), 100)]);
        begin_history(dir.path(), 60).expect("begun");
        let third = LogLineage::read_or_create(&path).expect("read");
        assert_eq!(third.parents, [(first.id, 60), (second.id, 60)], "restored to before the first restore");
        std::fs::write(dir.path().join(LOG_PARENTS_FILE), "x").expect("written");
        assert!(LogLineage::read_or_create(&path).is_err(), "not taken for a log without parents");
    }
}
