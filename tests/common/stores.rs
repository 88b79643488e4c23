//! The stores that reads are answered from. A test that takes a [`TestStore`] is a claim about each of them: [`in_each_store`]
//! makes a test of it for each.

use std::path::Path;
use std::sync::{LazyLock, Mutex};

use super::postgres::PostgresServer;
use super::{Gateway, Setup};

/// The PostgreSQL of this process, in which each data directory has a schema of its own.
static SERVER: LazyLock<Mutex<Option<PostgresServer>>> = LazyLock::new(|| {
    extern "C" fn end() {
        if let Ok(mut server) = SERVER.lock() {
            drop(server.take());
        }
    }
    // SAFETY: `end` is a function without arguments, and does not unwind.
    unsafe { libc::atexit(end) };
    Mutex::new(Some(PostgresServer::start()))
});

/// A store that reads are answered from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TestStore {
    Sqlite,
    Postgres,
}

impl TestStore {
    /// A gateway on a data directory that stores there alone.
    pub fn setup(self, dir: &Path) -> Setup {
        let setup = Setup::on(dir);
        match self {
            Self::Sqlite => setup,
            Self::Postgres => with_server(|server| {
                server.stored_into(
                    setup.set("storage.sinks", "postgres").set("storage.postgres.schema", schema_of(dir)),
                )
            }),
        }
    }

    /// The same, started.
    pub fn start(self, dir: &Path) -> Gateway {
        self.setup(dir).start()
    }

    /// Loses all that is stored. No gateway may run.
    pub fn lose(self, dir: &Path) {
        match self {
            Self::Sqlite => std::fs::remove_file(dir.join("records.db")).expect("removed"),
            Self::Postgres => drop(self.sql(dir, &format!("DROP SCHEMA \"{}\" CASCADE", schema_of(dir)))),
        }
    }

    /// How many samples are stored at all, in chunks or by themselves, withheld or not.
    pub fn sample_rows(self, dir: &Path) -> u64 {
        match self {
            Self::Sqlite => {
                let records = rusqlite::Connection::open(dir.join("records.db")).expect("opens");
                let count: i64 = records
                    .query_row("SELECT count(*) FROM sample_chunks", [], |row| row.get(0))
                    .expect("reads");
                count.unsigned_abs()
            }
            Self::Postgres => {
                let select =
                    "SELECT (SELECT count(*) FROM sample_rows) + (SELECT count(*) FROM withheld_samples)";
                self.sql(dir, select)[0].parse().expect("a number")
            }
        }
    }

    /// What `psql` prints for a statement about the schema of a data directory.
    pub fn sql(self, dir: &Path, statement: &str) -> Vec<String> {
        with_server(|server| server.sql(&format!("SET search_path = \"{}\"; {statement}", schema_of(dir))))
    }
}

fn with_server<T>(ask: impl FnOnce(&PostgresServer) -> T) -> T {
    let server = SERVER.lock().expect("no holder panics");
    ask(server.as_ref().expect("it is there until the process ends"))
}

fn schema_of(dir: &Path) -> String {
    dir.file_name().expect("a directory").to_string_lossy().into_owned()
}

/// Makes a test of each of these functions for each store, which it is given.
#[allow(unused_macros, reason = "not every test binary has tests of stores")]
macro_rules! in_each_store {
    ($($test:ident,)+) => {
        mod sqlite {
            $(#[test] fn $test() { super::$test($crate::common::stores::TestStore::Sqlite) })+
        }
        mod postgres {
            $(#[test] fn $test() { super::$test($crate::common::stores::TestStore::Postgres) })+
        }
    };
}
#[allow(unused_imports, reason = "likewise")]
pub(crate) use in_each_store;
