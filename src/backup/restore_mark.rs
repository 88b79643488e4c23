//! The mark in a data directory whose restore is not finished: what is being done, and where what was there is moved aside.
//!
//! | mark | what is in the directory |
//! |---|---|
//! | `before-restore-TIME` | what was there, or a part of it, and nothing else |
//! | `copying before-restore-TIME` | what was copied, which may be removed: all that was there is aside |
//! | `copying` | the same; nothing was there |

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;

use super::BackupError;
use super::error::NamePath;
use super::place::sync_dir;

/// The mark in a data directory whose restore is not finished.
pub(super) const RESTORE_MARK: &str = "restore.unfinished";
/// The mark while it is being written.
pub(super) const NEW_RESTORE_MARK: &str = "restore.unfinished.new";
/// The mark once what was there is moved aside.
const COPYING: &str = "copying";
/// What the directory is called that gets what was there; a time follows.
pub(super) const ASIDE_BEGIN: &str = "before-restore-";

/// What an unfinished restore is doing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum RestoreMark {
    /// It moves what was there to the directory of this name, or back.
    Moving { aside: String },
    /// It copies. What was there, if anything was, is in the directory of this name.
    Copying { aside: Option<String> },
}

impl RestoreMark {
    /// The one in a data directory, if there is one.
    pub(super) fn read(dir: &Path) -> Option<Self> {
        let text = fs::read_to_string(dir.join(RESTORE_MARK)).ok()?;
        let is_aside = |name: &&str| name.starts_with(ASIDE_BEGIN) && !name.contains('/');
        match text.trim().split_once(' ') {
            None if text.trim() == COPYING => Some(Self::Copying { aside: None }),
            None => Some(text.trim()).filter(is_aside).map(|name| Self::Moving { aside: name.to_owned() }),
            Some((COPYING, name)) => {
                Some(name).filter(is_aside).map(|name| Self::Copying { aside: Some(name.to_owned()) })
            }
            Some(_) => None,
        }
    }

    /// Writes it, durably, in place of the one before.
    pub(super) fn write(&self, dir: &Path) -> Result<(), BackupError> {
        let (new, mark) = (dir.join(NEW_RESTORE_MARK), dir.join(RESTORE_MARK));
        let text = match self {
            Self::Moving { aside } => aside.clone(),
            Self::Copying { aside: None } => COPYING.to_owned(),
            Self::Copying { aside: Some(aside) } => format!("{COPYING} {aside}"),
        };
        let written = File::create(&new).and_then(|mut file| {
            writeln!(file, "{text}")?;
            file.sync_all()
        });
        written.name_path(&new)?;
        fs::rename(&new, &mark).name_path(&mark)?;
        sync_dir(dir)
    }
}
