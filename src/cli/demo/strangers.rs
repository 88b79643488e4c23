//! The demo's clients that must not get in: with a key that was never issued, with a misspelt one, with
//! the key of a deleted datasource, and without a key. Each sends a reading to an existing datasource.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context, bail};

use super::senders::{Gate, Progress, TOPIC, dialect, post};
use super::sensors::{Reading, SENSORS, Way};
use crate::auth::ApiKey;
use crate::cli::client::{self, Client, Secret};
use crate::cli::datasource;
use crate::cli::session::{Dialect, Session, SessionError, Step};

/// How many times each stranger tries, spread over the whole replay.
const ROUNDS: u64 = 5;
/// The pause between two checks for a stranger's turn.
const LOOK: Duration = Duration::from_millis(2);
/// How long an attempt may take.
const ATTEMPT_MAX: Duration = Duration::from_secs(30);
/// MQTT's answer to an invalid key: 5 in 3.1.1, 0x87 in 5.
const NOT_AUTHORIZED: &str = "NotAuthorized";

/// MQTT 5's reason for closing a connection whose key is dead: 0x98.
const KEY_DEAD: &str = "AdministrativeAction";

/// Why a stranger must not get in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Cause {
    Unknown,
    Misspelt,
    Deleted,
    DeletedWhileConnected,
    NoKey,
}

impl Cause {
    pub(super) fn describe(self) -> &'static str {
        match self {
            Cause::Unknown => "a well-formed key that nobody was given",
            Cause::Misspelt => "a key with one character wrong",
            Cause::Deleted => "the key of a deleted datasource",
            Cause::DeletedWhileConnected => "connected when its datasource was deleted",
            Cause::NoKey => "no key",
        }
    }
}

/// Refused attempts, over MQTT and over HTTP, by cause.
pub(super) type Refused = BTreeMap<Cause, [u64; 2]>;

/// The invalid keys, and the datasource that the strangers send to.
pub(super) struct Strangers {
    gate: Gate,
    aim: String,
    reading: Reading,
    unknown: Secret,
    misspelt: Secret,
    deleted: Secret,
    refused: Refused,
}

impl Strangers {
    /// Makes the invalid keys. For one of them it creates a datasource, connects a client with its key,
    /// and deletes the datasource: the gateway must disconnect that client at once.
    pub(super) async fn prepare(
        admin: &Client,
        gate: Gate,
        aim: &str,
        good: &Secret,
    ) -> anyhow::Result<Self> {
        let create = {
            let admin = admin.clone();
            move || datasource::create_as(&admin, "retired-sensor", "A sensor that was taken away")
        };
        let (retired, deleted) = tokio::task::spawn_blocking(create).await??;
        let mut session = Session::new(Dialect::V5, gate.mqtt, &retired, Some(&deleted));
        while session.step().await.context("the datasource that is going to be deleted")? != Step::Connected {
        }
        let delete = {
            let admin = admin.clone();
            move || admin.delete(&datasource::path(&retired)?)
        };
        tokio::task::spawn_blocking(delete).await??;
        cut_off(session).await?;

        let reading = SENSORS[0].readings().next().context("the recordings are not empty")?;
        Ok(Self {
            gate,
            aim: aim.to_owned(),
            reading,
            unknown: Secret::new(ApiKey::generate().expose()),
            misspelt: misspell(good),
            deleted,
            refused: Refused::from([(Cause::DeletedWhileConnected, [1, 0])]),
        })
    }

    /// Tries each key over each transport, in rounds, while the devices send.
    pub(super) async fn run(mut self, progress: Progress, readings: u64) -> anyhow::Result<Refused> {
        for round in 0..ROUNDS {
            while progress.acked() < readings * round / ROUNDS {
                tokio::time::sleep(LOOK).await;
            }
            for way in Way::ALL {
                for (cause, key) in [
                    (Cause::Unknown, Some(self.unknown.clone())),
                    (Cause::Misspelt, Some(self.misspelt.clone())),
                    (Cause::Deleted, Some(self.deleted.clone())),
                    (Cause::NoKey, None),
                ] {
                    // Without a key, the three HTTP variants send the same request.
                    if key.is_none() && matches!(way, Way::HttpBearer | Way::HttpApiKey) {
                        continue;
                    }
                    let tried = tokio::time::timeout(ATTEMPT_MAX, self.attempt(way, key)).await;
                    let what = || format!("{} over {}", cause.describe(), way.describe());
                    tried.context("no answer").and_then(|attempt| attempt).with_context(what)?;
                    self.count(cause, way);
                }
            }
        }
        Ok(self.refused)
    }

    fn count(&mut self, cause: Cause, way: Way) {
        self.refused.entry(cause).or_default()[usize::from(!way.is_mqtt())] += 1;
    }

    /// Makes one attempt; an error if it is not refused as it should be.
    async fn attempt(&self, way: Way, key: Option<Secret>) -> anyhow::Result<()> {
        match dialect(way) {
            Some(dialect) => {
                let session = Session::new(dialect, self.gate.mqtt, "stranger", key.as_ref());
                match self.publish(session).await? {
                    Some(why) if why.starts_with(NOT_AUTHORIZED) => Ok(()),
                    Some(why) => bail!("refused, but for another reason: {why}"),
                    None => bail!("was let in"),
                }
            }
            None => {
                let (gate, aim, body) = (self.gate.clone(), self.aim.clone(), self.reading.payload());
                let post = move || post(&client::agent(&gate.http), &gate, &aim, way, key.as_ref(), &body);
                let answer = tokio::task::spawn_blocking(post).await??;
                match answer.status().as_u16() {
                    401 => Ok(()),
                    200 => bail!("was let in"),
                    _ => bail!("was answered otherwise than with 401: {}", client::problem(answer)),
                }
            }
        }
    }

    /// Publishes a reading on a session; `Some` is why it was refused, `None` that it was not.
    async fn publish(&self, mut session: Session) -> anyhow::Result<Option<String>> {
        session.publisher().publish(TOPIC, self.reading.payload().into_bytes())?;
        loop {
            match session.step().await {
                Ok(Step::Acked(_)) => return Ok(None),
                Ok(Step::Refused(_, why)) | Err(SessionError::Refused(why)) => return Ok(Some(why)),
                Ok(_) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

/// Checks that the gateway has ended a connection because its key is dead.
async fn cut_off(mut session: Session) -> anyhow::Result<()> {
    let ended = async {
        loop {
            if let Err(ended) = session.step().await {
                return ended;
            }
        }
    };
    match tokio::time::timeout(ATTEMPT_MAX, ended).await {
        Ok(SessionError::Refused(why)) if why.starts_with(KEY_DEAD) => Ok(()),
        Ok(ended) => {
            bail!("a connection whose datasource was deleted ended otherwise than expected: {ended}")
        }
        Err(_) => bail!("a connection outlives its datasource"),
    }
}

/// The key with its tenth character changed, so that its checksum no longer matches.
fn misspell(key: &Secret) -> Secret {
    let wrong = |(index, c): (usize, char)| match (index, c) {
        (9, 'x') => 'y',
        (9, _) => 'x',
        (_, c) => c,
    };
    Secret::new(&key.expose().chars().enumerate().map(wrong).collect::<String>())
}
