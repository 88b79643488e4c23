//! Why the database did not do what it was asked.

use std::error::Error as _;
use std::time::Duration;

/// Why the database did not do what it was asked. No text holds a secret or a value that was to be stored.
#[derive(Debug, thiserror::Error)]
pub enum PostgresFault {
    /// There is no connection, or there is none any more.
    #[error("PostgreSQL at {place}: {why}")]
    Unreachable {
        /// `HOST:PORT/DATABASE`.
        place: String,
        /// What the network or TLS says.
        why: String,
    },
    /// The server has said no.
    #[error("PostgreSQL at {place}: {message} (SQLSTATE {code})")]
    Refused {
        /// `HOST:PORT/DATABASE`.
        place: String,
        /// Its five letters.
        code: String,
        /// What the server says, without its details, which may quote a value.
        message: String,
    },
    /// The server has not answered in time.
    #[error("PostgreSQL at {place} has not answered within {after:?}")]
    Late {
        /// `HOST:PORT/DATABASE`.
        place: String,
        /// How long it had.
        after: Duration,
    },
    /// A file with certificates, or with the key of one, cannot be used.
    #[error("PostgreSQL: certificates: {0}")]
    Certificate(String),
    /// The operating system gives no thread.
    #[error("PostgreSQL: {0}")]
    Io(#[from] std::io::Error),
}

impl PostgresFault {
    pub(crate) fn of(error: &tokio_postgres::Error, place: &str) -> Self {
        let place = place.to_owned();
        if let Some(refused) = error.as_db_error() {
            let (code, message) = (refused.code().code().to_owned(), refused.message().to_owned());
            return Self::Refused { place, code, message };
        }
        // Its own text says only what it was about.
        let mut why = error.to_string();
        let mut cause = error.source();
        while let Some(error) = cause {
            let words = error.to_string();
            if !why.contains(&words) {
                why = format!("{why}: {words}");
            }
            cause = error.source();
        }
        Self::Unreachable { place, why }
    }

    /// The server's code for what is wrong (SQLSTATE), if it is the server that says so.
    pub fn code(&self) -> Option<&str> {
        match self {
            Self::Refused { code, .. } => Some(code),
            _ => None,
        }
    }

    /// Whether there is no server to ask now, or it lets nobody in: not what it was asked for is the trouble.
    pub fn is_away(&self) -> bool {
        match self {
            // Connection exceptions, who may come in, no such database, no resources, shutting down or starting.
            Self::Refused { code, .. } => {
                ["08", "28", "3D", "53"].iter().any(|class| code.starts_with(class))
                    || code.starts_with("57P")
            }
            Self::Unreachable { .. } | Self::Late { .. } | Self::Certificate(_) | Self::Io(_) => true,
        }
    }

    /// Whether the server has not answered in time.
    pub fn is_late(&self) -> bool {
        matches!(self, Self::Late { .. })
    }

    /// Whether the server has given up because it took too long.
    pub fn is_canceled(&self) -> bool {
        self.code().is_some_and(|code| matches!(code, "57014" | "55P03"))
    }

    /// Whether a value is the trouble: the server cannot take it, however often it is asked.
    pub fn is_of_value(&self) -> bool {
        // Data exception; program limit exceeded.
        !self.is_out_of_ids()
            && self.code().is_some_and(|code| code.starts_with("22") || code.starts_with("54"))
    }

    /// Whether a sequence has given all its numbers (sequence generator limit exceeded).
    pub fn is_out_of_ids(&self) -> bool {
        self.code() == Some("2200H")
    }
}
