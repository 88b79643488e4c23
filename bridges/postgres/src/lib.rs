//! PostgreSQL for Headgate: a connection as libpq makes it, its errors, and rows in the format of `COPY BINARY`. It knows
//! nothing of keys or records.
//!
//! Every call blocks: whoever writes into a database has a thread for it.

mod connection;
mod copy_rows;
mod fault;
mod settings;
mod snapshot;
mod time;
mod tls;

pub use connection::{PendingCopy, PostgresConnection};
pub use copy_rows::CopyRows;
pub use fault::PostgresFault;
pub use settings::{PostgresSettings, SettingsFault, SslMode};
pub use snapshot::PostgresSnapshot;
pub use time::PostgresTime;
pub use tokio_postgres::Row;
pub use tokio_postgres::types::ToSql;
