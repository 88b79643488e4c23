//! What storage asks of a database that it writes into, whichever it is. [`RecordSink`] is an open one; [`SinkPlace`]
//! is where it is and how it is opened.

use std::time::Duration;

use crate::config::SinkKind;
#[cfg(feature = "delta")]
use crate::consume::sink::lake::LakeFault;
use crate::consume::sink::postgres::PostgresError;
use crate::consume::sink::sqlite::SinkError;
use crate::log::{Log, WithheldRules};
use crate::message::{Offset, RecordRef};

use super::{StorageError, StoredLimitsSource};

/// An open database with its cursor in the log. All methods may block on a disk or a network.
pub(in crate::consume) trait RecordSink: Send {
    /// The first offset that it has not taken yet.
    fn cursor(&self) -> Offset;

    /// The first offset that is not stored: a sink may hold what it has taken until its next commit.
    fn stored_cursor(&self) -> Offset {
        self.cursor()
    }

    /// The cursor as a loss of power would leave it: the sink never needs the log below this.
    fn durable_cursor(&self) -> Offset;

    /// The version of the rules about what is left out that the stored records follow.
    fn withheld_version(&self) -> u64;

    /// Whether it has those rules, since it was opened.
    fn has_rules(&self) -> bool;

    /// Whether this gateway is the one that writes now. Where gateways share a database one of them does, and the
    /// others learn here how far it is.
    ///
    /// # Errors
    /// [`SinkFault`].
    fn is_writer(&mut self) -> Result<bool, SinkFault> {
        Ok(true)
    }

    /// Makes the stored records follow the rules about what is left out, and whatever is stored later, durably. Work
    /// that takes long is cut: `false` says that there is more to do. Records may be stored meanwhile.
    ///
    /// # Errors
    /// [`SinkFault`].
    fn reconcile_some(&mut self, withheld: &WithheldRules) -> Result<bool, SinkFault>;

    /// Stores `records`, which are in order and below `next`, and moves the cursor to `next`, in one transaction.
    /// Skips records below the cursor. Those of a leaked key go into quarantine, those of a purged incarnation nowhere. With `sync`,
    /// this transaction and all before it are durable afterwards.
    ///
    /// # Errors
    /// [`SinkFault`]. Unless it [says otherwise](SinkFault::is_clean_rollback) the sink has to be opened again: the
    /// transaction may have been committed after all.
    fn store<'a>(
        &mut self,
        records: &mut dyn Iterator<Item = RecordRef<'a>>,
        next: Offset,
        sync: bool,
    ) -> Result<(), SinkFault>;

    /// Stores what it has taken while it was behind, now that the log has nothing more.
    ///
    /// # Errors
    /// [`SinkFault`].
    fn end_catching_up(&mut self) -> Result<(), SinkFault> {
        Ok(())
    }

    /// Removes some of what is over these limits, for about as long as `storing` has just taken, if it is time.
    ///
    /// # Errors
    /// [`SinkFault`].
    fn keep_within(&mut self, limits: &StoredLimitsSource, storing: Duration) -> Result<(), SinkFault>;

    /// What the operator has to be told of it although it takes records.
    fn warning(&self) -> Option<String> {
        None
    }

    /// Brings it into its best state to be left alone, once no more is stored.
    ///
    /// # Errors
    /// [`SinkFault`].
    fn finish(&mut self) -> Result<(), SinkFault>;
}

/// A sink that was just opened, and what the operator has to be told of that: what was set aside, and where it is.
pub(in crate::consume) struct OpenedSink {
    pub(in crate::consume) sink: Box<dyn RecordSink>,
    pub(in crate::consume) said: Option<String>,
}

/// Where a sink is, and how it is opened.
pub(in crate::consume) trait SinkPlace: Send + 'static {
    /// What it is called in settings, metrics and answers.
    fn kind(&self) -> SinkKind;

    /// Whether it is here, so that a start opens it before anything else. One that is elsewhere is opened by the thread:
    /// no start waits for a network.
    fn is_local(&self) -> bool;

    /// Opens it for the first time since the start. `log_end` is the end of the log at the start: what the sink has behind
    /// that is set aside. If something acknowledged is in doubt that is done with `is_ordered` alone.
    ///
    /// # Errors
    /// [`StorageError::Sink`] if it cannot be opened; [`StorageError::LogBehind`].
    fn open(&mut self, log: &dyn Log, log_end: Offset, is_ordered: bool) -> Result<OpenedSink, StorageError>;

    /// Opens it again, after an error that left its state in doubt.
    ///
    /// # Errors
    /// [`SinkFault`].
    fn reopen(&mut self) -> Result<Box<dyn RecordSink>, SinkFault>;

    /// Sets a damaged one aside and begins another one where the log begins.
    ///
    /// # Errors
    /// [`SinkFault`].
    fn begin_anew(&mut self, log: &dyn Log) -> Result<OpenedSink, SinkFault>;
}

/// Why a sink could not be opened, or has not taken records.
#[derive(Debug, thiserror::Error)]
pub enum SinkFault {
    /// `records.db`.
    #[error(transparent)]
    Sqlite(#[from] SinkError),
    /// The Delta lake.
    #[cfg(feature = "delta")]
    #[error(transparent)]
    Lake(#[from] LakeFault),
    /// PostgreSQL.
    #[error(transparent)]
    Postgres(#[from] PostgresError),
}

impl SinkFault {
    /// Whether what it has stored is damaged, so that no later attempt can do better.
    pub fn is_damage(&self) -> bool {
        match self {
            Self::Sqlite(error) => error.is_damage(),
            #[cfg(feature = "delta")]
            Self::Lake(_) => false,
            Self::Postgres(_) => false,
        }
    }

    /// Whether the transaction left no trace and the sink can still be used.
    pub fn is_clean_rollback(&self) -> bool {
        match self {
            Self::Sqlite(error) => error.is_clean_rollback(),
            #[cfg(feature = "delta")]
            Self::Lake(_) => false,
            Self::Postgres(_) => false,
        }
    }

    /// What to do about it.
    pub fn remedy(&self) -> &'static str {
        match self {
            Self::Sqlite(SinkError::Database(error)) => error.remedy(),
            Self::Sqlite(SinkError::CursorMoved { .. }) | Self::Postgres(_) => "it is tried again",
            #[cfg(feature = "delta")]
            Self::Lake(fault) => fault.remedy(),
        }
    }
}
