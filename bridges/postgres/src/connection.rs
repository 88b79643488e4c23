//! A connection to one database, whose calls block.

use std::future::Future;
use std::ops::Deref;
use std::sync::Arc;
use std::time::Duration;

use futures_util::SinkExt;
use tokio::runtime::{Builder, Runtime};
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_postgres::config::SslMode as TlsUse;
use tokio_postgres::tls::MakeTlsConnect;
use tokio_postgres::types::ToSql;
use tokio_postgres::{Client, Config, IsolationLevel, Row, Socket};
use tokio_postgres_rustls::MakeRustlsConnect;

use crate::copy_rows::CopyRows;
use crate::fault::PostgresFault;
use crate::settings::{PostgresSettings, SslMode};
use crate::snapshot::{PostgresSnapshot, block_on_answer};
use crate::tls;

/// How long the server may take for one statement, unless the caller says otherwise.
const ANSWER_WAIT_MAX: Duration = Duration::from_secs(60);
/// How long the whole of connecting may take, with all hosts and attempts.
const OPEN_WAIT_MAX: Duration = Duration::from_secs(30);

/// An open connection. Dropping it closes it.
pub struct PostgresConnection {
    /// Shared with the copies that are on their way.
    client: Arc<Client>,
    runtime: IoRuntime,
    place: String,
    answer_wait_max: Duration,
}

/// One thread, which sends and receives while the caller computes. It may be dropped anywhere, and nobody waits for it.
struct IoRuntime(Option<Runtime>);

impl Deref for IoRuntime {
    type Target = Runtime;

    fn deref(&self) -> &Runtime {
        self.0.as_ref().expect("it is taken when it is dropped, and not before")
    }
}

impl Drop for IoRuntime {
    fn drop(&mut self) {
        if let Some(runtime) = self.0.take() {
            runtime.shutdown_background();
        }
    }
}

impl PostgresConnection {
    /// Connects. Blocks: call it where no runtime is.
    ///
    /// # Errors
    /// [`PostgresFault`].
    pub fn open(settings: &PostgresSettings) -> Result<Self, PostgresFault> {
        Self::open_within(settings, OPEN_WAIT_MAX)
    }

    /// As [`PostgresConnection::open`], and gives up after `wait`.
    ///
    /// # Errors
    /// [`PostgresFault`].
    pub fn open_within(settings: &PostgresSettings, wait: Duration) -> Result<Self, PostgresFault> {
        let runtime = IoRuntime(Some(
            Builder::new_multi_thread()
                .worker_threads(1)
                .max_blocking_threads(1)
                .thread_name("postgres-io")
                .enable_all()
                .build()?,
        ));
        let place = settings.place.clone();
        let client = {
            let opening = async { timeout(wait, connect(settings)).await };
            match runtime.block_on(opening) {
                Ok(connected) => connected?,
                Err(_) => return Err(PostgresFault::Late { place, after: wait }),
            }
        };
        Ok(Self { client: Arc::new(client), runtime, place, answer_wait_max: ANSWER_WAIT_MAX })
    }

    /// Where the database is, without secrets.
    pub fn place(&self) -> &str {
        &self.place
    }

    /// How long the server may take for each statement from now on. The connection is of no use after one that was late.
    pub fn set_answer_wait_max(&mut self, wait: Duration) {
        self.answer_wait_max = wait;
    }

    /// As [`PostgresConnection::set_answer_wait_max`], as it was in the beginning.
    pub fn reset_answer_wait_max(&mut self) {
        self.answer_wait_max = ANSWER_WAIT_MAX;
    }

    /// Runs statements without parameters.
    ///
    /// # Errors
    /// [`PostgresFault`].
    pub fn run(&self, statements: &str) -> Result<(), PostgresFault> {
        self.answer(self.client.batch_execute(statements))
    }

    /// Runs a statement; returns how many rows it has changed.
    ///
    /// # Errors
    /// [`PostgresFault`].
    pub fn execute(&self, statement: &str, parameters: &[&(dyn ToSql + Sync)]) -> Result<u64, PostgresFault> {
        self.answer(self.client.execute(statement, parameters))
    }

    /// The rows of a query.
    ///
    /// # Errors
    /// [`PostgresFault`].
    pub fn query(
        &self,
        statement: &str,
        parameters: &[&(dyn ToSql + Sync)],
    ) -> Result<Vec<Row>, PostgresFault> {
        self.answer(self.client.query(statement, parameters))
    }

    /// The only row of a query.
    ///
    /// # Errors
    /// [`PostgresFault`]; also if there is not one row.
    pub fn query_one(
        &self,
        statement: &str,
        parameters: &[&(dyn ToSql + Sync)],
    ) -> Result<Row, PostgresFault> {
        self.answer(self.client.query_one(statement, parameters))
    }

    /// Begins to copy rows; `statement` is `COPY … FROM STDIN WITH (FORMAT binary)`. Whoever waits for it may compute
    /// meanwhile. What is asked before its end may be answered before it or after it.
    pub fn begin_copy(&self, statement: String, rows: CopyRows) -> PendingCopy {
        let (client, place, wait) = (self.client.clone(), self.place.clone(), self.answer_wait_max);
        PendingCopy(self.runtime.spawn(async move { copy_in(&client, &statement, rows, &place, wait).await }))
    }

    /// Waits for the end of a copy.
    ///
    /// # Errors
    /// [`PostgresFault`].
    pub fn finish_copy(&self, copy: PendingCopy) -> Result<(), PostgresFault> {
        match self.runtime.block_on(copy.0) {
            Ok(copied) => copied,
            Err(error) => Err(PostgresFault::Io(std::io::Error::other(error))),
        }
    }

    /// What the database holds now.
    ///
    /// # Errors
    /// [`PostgresFault`].
    pub fn snapshot(&mut self) -> Result<PostgresSnapshot<'_>, PostgresFault> {
        let Self { client, runtime, place, answer_wait_max } = self;
        let client = Arc::get_mut(client)
            .ok_or_else(|| PostgresFault::Io(std::io::Error::other("a copy is on its way")))?;
        let begun =
            client.build_transaction().isolation_level(IsolationLevel::RepeatableRead).read_only(true);
        let transaction = block_on_answer(runtime, place, *answer_wait_max, begun.start())?;
        Ok(PostgresSnapshot { transaction, runtime, place, answer_wait_max: *answer_wait_max })
    }

    fn answer<T>(
        &self,
        asked: impl Future<Output = Result<T, tokio_postgres::Error>>,
    ) -> Result<T, PostgresFault> {
        block_on_answer(&self.runtime, &self.place, self.answer_wait_max, asked)
    }
}

/// A copy that is on its way. It has to be waited for before its transaction ends.
#[must_use]
pub struct PendingCopy(JoinHandle<Result<(), PostgresFault>>);

async fn copy_in(
    client: &Client,
    statement: &str,
    rows: CopyRows,
    place: &str,
    wait: Duration,
) -> Result<(), PostgresFault> {
    let late = |_| PostgresFault::Late { place: place.to_owned(), after: wait };
    let failed = |error| PostgresFault::of(&error, place);
    let sink = timeout(wait, client.copy_in(statement)).await.map_err(late)?.map_err(failed)?;
    let mut sink = std::pin::pin!(sink);
    for piece in rows.into_pieces() {
        // What the server has found wrong is told by the end of the copy.
        if timeout(wait, sink.send(piece)).await.map_err(late)?.is_err() {
            break;
        }
    }
    timeout(wait, sink.as_mut().finish()).await.map_err(late)?.map_err(failed).map(drop)
}

async fn connect(settings: &PostgresSettings) -> Result<Client, PostgresFault> {
    let mut config = settings.config.clone();
    let attempt = |config: Config| async move { connect_once(&config, settings).await };
    match settings.ssl_mode {
        SslMode::Disable => attempt(config.ssl_mode(TlsUse::Disable).clone()).await,
        SslMode::Require | SslMode::VerifyCa | SslMode::VerifyFull => {
            attempt(config.ssl_mode(TlsUse::Require).clone()).await
        }
        SslMode::Allow => match attempt(config.ssl_mode(TlsUse::Disable).clone()).await {
            Err(PostgresFault::Refused { .. }) => attempt(config.ssl_mode(TlsUse::Require).clone()).await,
            connected => connected,
        },
        // With TLS if the server has it; if it has and does not let in over it, without.
        SslMode::Prefer => match attempt(config.ssl_mode(TlsUse::Prefer).clone()).await {
            Err(PostgresFault::Refused { code, place, message }) if code.starts_with("28") => {
                let plain = attempt(config.ssl_mode(TlsUse::Disable).clone()).await;
                plain.map_err(|_| PostgresFault::Refused { code, place, message })
            }
            connected => connected,
        },
    }
}

async fn connect_once(config: &Config, settings: &PostgresSettings) -> Result<Client, PostgresFault> {
    let tls = MakeRustlsConnect::new(tls::client_config(settings)?);
    let client =
        connect_over(config, tls).await.map_err(|error| PostgresFault::of(&error, &settings.place))?;
    Ok(client)
}

async fn connect_over<T>(config: &Config, tls: T) -> Result<Client, tokio_postgres::Error>
where
    T: MakeTlsConnect<Socket> + Send + 'static,
    T::Stream: Send + 'static,
    T::TlsConnect: Send,
    <T::TlsConnect as tokio_postgres::tls::TlsConnect<Socket>>::Future: Send,
{
    let (client, connection) = config.connect(tls).await?;
    tokio::spawn(async move {
        // Whoever waits for an answer is told as well.
        if let Err(error) = connection.await {
            tracing::debug!(%error, "a connection to PostgreSQL has ended");
        }
    });
    Ok(client)
}
