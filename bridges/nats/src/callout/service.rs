//! The service that answers auth callout. It takes requests from a queue group, so that any number of
//! gateways share them, lets the authorizer decide, and sends the signed answer.

use parking_lot::Mutex;
use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use async_nats::Message;
use futures_util::StreamExt;
use nkeys::{KeyPair, KeyPairType, XKey};
use tokio::task::JoinSet;
use tracing::{debug, warn};

use super::jwt::{CalloutRequest, CalloutRequestError};
use super::{CalloutAuthorizer, CalloutVerdict};
use crate::{Nats, NatsError};

/// The subject of the servers' requests.
const CALLOUT_SUBJECT: &str = "$SYS.REQ.USER.AUTH";
/// The queue group in which all gateways share the requests.
const CALLOUT_QUEUE_GROUP: &str = "headgate";
/// The header with the public curve key of the server that encrypted a request.
const XKEY_HEADER: &str = "Nats-Server-Xkey";
/// Requests that are decided at the same time; more wait.
const CALLOUT_REQUESTS_AT_ONCE_MAX: usize = 256;
/// The shortest time between two warnings about unreadable requests: there may be many.
const CALLOUT_COMPLAINT_INTERVAL: Duration = Duration::from_secs(10);

/// Which seed of auth callout is not usable.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum CalloutSeedError {
    /// The issuer's seed.
    #[error("it holds no seed of an account (SA…)")]
    IssuerSeed,
    /// The curve seed.
    #[error("it holds no curve seed (SX…)")]
    CurveSeed,
}

/// Answers auth callout.
pub struct CalloutService {
    issuer: KeyPair,
    xkey: Option<XKey>,
    account: String,
    doorman: Box<dyn CalloutAuthorizer>,
    /// When the last warning about an unreadable request was logged.
    complained: Mutex<Option<Instant>>,
}

impl fmt::Debug for CalloutService {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CalloutService").field("account", &self.account).finish_non_exhaustive()
    }
}

impl CalloutService {
    /// Checks the seeds. Admitted clients join `account`.
    ///
    /// # Errors
    /// [`CalloutSeedError`] for a seed that is none of its kind.
    pub fn new(
        issuer_seed: &str,
        curve_seed: Option<&str>,
        account: &str,
        doorman: impl CalloutAuthorizer,
    ) -> Result<Self, CalloutSeedError> {
        let issuer = KeyPair::from_seed(issuer_seed.trim())
            .ok()
            .filter(|issuer| issuer.key_pair_type() == KeyPairType::Account)
            .ok_or(CalloutSeedError::IssuerSeed)?;
        let xkey = curve_seed.map(|seed| XKey::from_seed(seed.trim())).transpose();
        Ok(Self {
            issuer,
            xkey: xkey.map_err(|_| CalloutSeedError::CurveSeed)?,
            account: account.to_owned(),
            doorman: Box::new(doorman),
            complained: Mutex::new(None),
        })
    }

    /// Answers the requests on `nats`, whose user is in the account of the requests, until `stop` resolves.
    /// Requests that have arrived by then are still answered.
    ///
    /// # Errors
    /// [`NatsError::Client`] if the subscription is impossible. An absent NATS is not an error.
    pub async fn serve(self, nats: &Nats, stop: impl Future<Output = ()>) -> Result<(), NatsError> {
        let client = nats.client();
        let asked = client.queue_subscribe(CALLOUT_SUBJECT, CALLOUT_QUEUE_GROUP.to_owned()).await;
        let mut asked = asked.map_err(|error| NatsError::Client(error.to_string()))?;
        let callout = Arc::new(self);
        let mut judged = JoinSet::new();
        tokio::pin!(stop);
        loop {
            let message = tokio::select! {
                message = asked.next() => message,
                () = &mut stop => break,
            };
            let Some(message) = message else { break };
            let (callout, client) = (callout.clone(), client.clone());
            judged.spawn(async move { callout.answer(&client, &message).await });
            while judged.try_join_next().is_some() {}
            if judged.len() >= CALLOUT_REQUESTS_AT_ONCE_MAX {
                judged.join_next().await;
            }
        }
        // Leave the queue group only after the last answers are under way.
        while judged.join_next().await.is_some() {}
        if let Err(error) = asked.unsubscribe().await {
            debug!(%error, "auth callout");
        }
        let _ = tokio::time::timeout(Duration::from_secs(1), client.flush()).await;
        Ok(())
    }

    async fn answer(&self, client: &async_nats::Client, message: &Message) {
        let Some(reply) = &message.reply else { return };
        let (request, sender) = match self.read_request(message) {
            Ok(read) => read,
            Err(error) => return self.complain(error),
        };
        let now_s = now_s();
        let answer = match self.doorman.judge(&request.visitor) {
            CalloutVerdict::Allow(permit) => request.allow(&self.issuer, &self.account, &permit, now_s),
            CalloutVerdict::Deny(why) => request.deny(&self.issuer, &why, now_s),
        };
        let answer = match (answer, sender.as_ref().zip(self.xkey.as_ref())) {
            (Ok(answer), None) => Ok(answer.into_bytes()),
            (Ok(answer), Some((sender, xkey))) => xkey.seal(answer.as_bytes(), sender),
            (Err(error), _) => Err(error),
        };
        match answer {
            Ok(answer) => {
                if let Err(error) = client.publish(reply.clone(), answer.into()).await {
                    debug!(%error, "auth callout: an answer was not sent");
                }
            }
            Err(error) => warn!(%error, "auth callout: an answer cannot be signed"),
        }
    }

    /// Reads the request, and the curve key of the server if the request is encrypted.
    fn read_request(&self, message: &Message) -> Result<(CalloutRequest, Option<XKey>), CalloutRequestError> {
        let sender = message.headers.as_ref().and_then(|headers| headers.get(XKEY_HEADER));
        let Some(sender) = sender else {
            return Ok((CalloutRequest::read(&message.payload, now_s())?, None));
        };
        let xkey = self.xkey.as_ref().ok_or(CalloutRequestError::Encrypted)?;
        let sender = XKey::from_public_key(sender.as_str()).map_err(|_| CalloutRequestError::Form)?;
        let opened = xkey.open(&message.payload, &sender).map_err(|_| CalloutRequestError::Sealed)?;
        Ok((CalloutRequest::read(&opened, now_s())?, Some(sender)))
    }

    /// Warns, at most every ten seconds, about an unreadable request, without its content.
    fn complain(&self, error: CalloutRequestError) {
        let mut last = self.complained.lock();
        if last.is_none_or(|at| at.elapsed() >= CALLOUT_COMPLAINT_INTERVAL) {
            *last = Some(Instant::now());
            warn!(%error, "auth callout: a request cannot be answered");
        }
    }
}

/// Seconds since 1970.
fn now_s() -> i64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(now.as_secs()).unwrap_or(i64::MAX)
}
