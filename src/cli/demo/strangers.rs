//! The demo's clients that must not get in: with a key that was never issued, with a misspelt one, with
//! the key of a deleted datasource, and without a key. Each sends a reading to an existing datasource.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context, bail};

use super::senders::{DemoProgress, GatewayAddresses, READING_TOPIC, mqtt_dialect, post};
use super::sensors::{Reading, SENSORS, SensorTransport};
use crate::auth::ApiKey;
use crate::cli::client::{self, ApiClient, KeySecret};
use crate::cli::datasource;
use crate::cli::session::{Dialect, MqttClientError, MqttClientSession, MqttClientStep};

/// How many times each stranger tries, spread over the whole replay.
const STRANGER_ROUNDS: u64 = 5;
/// The pause between two checks for a stranger's turn.
const STRANGER_TURN_POLL_PAUSE: Duration = Duration::from_millis(2);
/// How long an attempt may take.
const STRANGER_ATTEMPT_WAIT_MAX: Duration = Duration::from_secs(30);
/// MQTT's answer to an invalid key: 5 in 3.1.1, 0x87 in 5.
const NOT_AUTHORIZED_REASON: &str = "NotAuthorized";

/// MQTT 5's reason for closing a connection whose key is dead: 0x98.
const KEY_DEAD_REASON: &str = "AdministrativeAction";

/// Why a stranger must not get in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum StrangerCause {
    Unknown,
    Misspelt,
    Deleted,
    DeletedWhileConnected,
    NoKey,
}

impl StrangerCause {
    pub(super) fn describe(self) -> &'static str {
        match self {
            StrangerCause::Unknown => "a well-formed key that nobody was given",
            StrangerCause::Misspelt => "a key with one character wrong",
            StrangerCause::Deleted => "the key of a deleted datasource",
            StrangerCause::DeletedWhileConnected => "connected when its datasource was deleted",
            StrangerCause::NoKey => "no key",
        }
    }
}

/// Refused attempts, over MQTT and over HTTP, by cause.
pub(super) type RefusedAttempts = BTreeMap<StrangerCause, [u64; 2]>;

/// The invalid keys, and the datasource that the strangers send to.
pub(super) struct Strangers {
    gate: GatewayAddresses,
    aim: String,
    reading: Reading,
    unknown: KeySecret,
    misspelt: KeySecret,
    deleted: KeySecret,
    refused: RefusedAttempts,
}

impl Strangers {
    /// Makes the invalid keys. For one of them it creates a datasource, connects a client with its key,
    /// and deletes the datasource: the gateway must disconnect that client at once.
    pub(super) async fn prepare(
        admin: &ApiClient,
        gate: GatewayAddresses,
        aim: &str,
        good: &KeySecret,
    ) -> anyhow::Result<Self> {
        let create = {
            let admin = admin.clone();
            move || datasource::create_for_command(&admin, "retired-sensor", "A sensor that was taken away")
        };
        let (retired, deleted) = tokio::task::spawn_blocking(create).await??;
        let mut session = MqttClientSession::new(Dialect::V5, gate.mqtt, &retired, Some(&deleted));
        while session.step().await.context("the datasource that is going to be deleted")?
            != MqttClientStep::Connected
        {}
        let delete = {
            let admin = admin.clone();
            move || admin.delete(&datasource::path(&retired)?)
        };
        tokio::task::spawn_blocking(delete).await??;
        expect_cut_off(session).await?;

        let reading = SENSORS[0].readings().next().context("the recordings are not empty")?;
        Ok(Self {
            gate,
            aim: aim.to_owned(),
            reading,
            unknown: KeySecret::new(ApiKey::generate().expose()),
            misspelt: misspell_key(good),
            deleted,
            refused: RefusedAttempts::from([(StrangerCause::DeletedWhileConnected, [1, 0])]),
        })
    }

    /// Tries each key over each transport, in rounds, while the devices send.
    pub(super) async fn run(
        mut self,
        progress: DemoProgress,
        readings: u64,
    ) -> anyhow::Result<RefusedAttempts> {
        for round in 0..STRANGER_ROUNDS {
            while progress.acked() < readings * round / STRANGER_ROUNDS {
                tokio::time::sleep(STRANGER_TURN_POLL_PAUSE).await;
            }
            for way in SensorTransport::ALL {
                for (cause, key) in [
                    (StrangerCause::Unknown, Some(self.unknown.clone())),
                    (StrangerCause::Misspelt, Some(self.misspelt.clone())),
                    (StrangerCause::Deleted, Some(self.deleted.clone())),
                    (StrangerCause::NoKey, None),
                ] {
                    // Without a key, the three HTTP variants send the same request.
                    if key.is_none()
                        && matches!(way, SensorTransport::HttpBearer | SensorTransport::HttpApiKey)
                    {
                        continue;
                    }
                    let tried = tokio::time::timeout(STRANGER_ATTEMPT_WAIT_MAX, self.attempt(way, key)).await;
                    let what = || format!("{} over {}", cause.describe(), way.describe());
                    tried.context("no answer").and_then(|attempt| attempt).with_context(what)?;
                    self.count(cause, way);
                }
            }
        }
        Ok(self.refused)
    }

    fn count(&mut self, cause: StrangerCause, way: SensorTransport) {
        self.refused.entry(cause).or_default()[usize::from(!way.is_mqtt())] += 1;
    }

    /// Makes one attempt; an error if it is not refused as it should be.
    async fn attempt(&self, way: SensorTransport, key: Option<KeySecret>) -> anyhow::Result<()> {
        match mqtt_dialect(way) {
            Some(dialect) => {
                let session = MqttClientSession::new(dialect, self.gate.mqtt, "stranger", key.as_ref());
                match self.publish(session).await? {
                    Some(why) if why.starts_with(NOT_AUTHORIZED_REASON) => Ok(()),
                    Some(why) => bail!("refused, but for another reason: {why}"),
                    None => bail!("was let in"),
                }
            }
            None => {
                let (gate, aim, body) = (self.gate.clone(), self.aim.clone(), self.reading.payload());
                let post = move || post(&client::agent(&gate.http)?, &gate, &aim, way, key.as_ref(), &body);
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
    async fn publish(&self, mut session: MqttClientSession) -> anyhow::Result<Option<String>> {
        session.publisher().publish(READING_TOPIC, self.reading.payload().into_bytes())?;
        loop {
            match session.step().await {
                Ok(MqttClientStep::Acked(_)) => return Ok(None),
                Ok(MqttClientStep::Refused(_, why)) | Err(MqttClientError::Refused(why)) => {
                    return Ok(Some(why));
                }
                Ok(_) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

/// Checks that the gateway has ended a connection because its key is dead.
async fn expect_cut_off(mut session: MqttClientSession) -> anyhow::Result<()> {
    let ended = async {
        loop {
            if let Err(ended) = session.step().await {
                return ended;
            }
        }
    };
    match tokio::time::timeout(STRANGER_ATTEMPT_WAIT_MAX, ended).await {
        Ok(MqttClientError::Refused(why)) if why.starts_with(KEY_DEAD_REASON) => Ok(()),
        Ok(ended) => {
            bail!("a connection whose datasource was deleted ended otherwise than expected: {ended}")
        }
        Err(_) => bail!("a connection outlives its datasource"),
    }
}

/// The key with its tenth character changed, so that its checksum no longer matches.
fn misspell_key(key: &KeySecret) -> KeySecret {
    let wrong = |(index, c): (usize, char)| match (index, c) {
        (9, 'x') => 'y',
        (9, _) => 'x',
        (_, c) => c,
    };
    KeySecret::new(&key.expose().chars().enumerate().map(wrong).collect::<String>())
}
