//! API keys as NATS users. For each client that connects, nats-server asks whether its key is good, and gets
//! the client's permissions: the scope `ingest` may publish messages of the key's datasource, and the scope
//! `subscribe` may subscribe to its stream. Intake checks what the client publishes, like any message, under
//! the key that the server attests (`attested.rs`). A key that dies loses its connections (`kick.rs`).
//!
//! With an access token (`src/auth/token.rs`) a client has the permissions that are left of its key's: fewer subjects, a
//! nearer end. Its name is that of the key, so that it is counted and ended with the key's others; what it publishes is
//! judged as the key's, and which topics it may name is the servers' to enforce.
//!
//! Any gateway may answer a request. The server's permissions are a second fence, not the only one. A leaf
//! node is refused whatever key it presents, because a server speaks for others, and nats-server does not
//! enforce the connection types of an answer.
//!
//! # Four accounts
//!
//! `headgate nats setup` writes them (`src/cli/nats/server.rs`):
//!
//! | account | who is in it | why |
//! |---|---|---|
//! | `APP` | clients with a key | they reach what their permissions name and what is imported, nothing else |
//! | `AUTH` | the gateways alone | requests of auth callout hold keys; and a server's word can be trusted only where no client can write (`attested.rs`) |
//! | `HEADGATE` | the gateways, backends | the stream and the registry; what is published in `APP` never gets here |
//! | `SYS` | the gateway's system user | ends connections |
//!
//! # Answers go where the sender says
//!
//! Servers do not check a reply subject against the sender's permissions. With `stream.press-5.x` as reply
//! subject, the gateway's answer would be delivered to the subscribers of another datasource. In `APP` the
//! mapping `stream.> → denied.>` prevents that: a server maps answers too, but not what comes by the import
//! of the stream.
//!
//! Nothing in `APP` reaches the stream itself, which is in `HEADGATE`. Servers refuse reply subjects in
//! `$JS.ACK` and `_R_`; an answer to `ingest.>` or `$JS.API.>` has no effect (tried).
//!
//! # JetStream is closed to keys
//!
//! Tried on nats-server 2.15.1:
//!
//! - Whoever may create a consumer on one subject of a stream names where it delivers, unchecked, and so
//!   writes into other streams of that account: a record of its own turned up in a KV bucket.
//! - Whoever may pull may pull from every consumer of the stream whose name it knows: a permission cannot say
//!   whose a consumer is.
//!
//! Neither fits keys that do not trust each other.

use std::fmt::Display;
use std::io;
use std::net::{IpAddr, Ipv6Addr};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use headgate_bridge_nats::callout::{
    self, CalloutAuthorizer, CalloutVerdict, ClientPermit, ConnectingClient,
};
use headgate_bridge_nats::system::{NatsClientConnection, SystemAccount};
use headgate_bridge_nats::{Nats, NatsError};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tracing::{debug, error, info};

use super::NatsFront;
use super::attested::{Attestation, nats_user_of_key};
use super::clients::NatsClientTable;
use super::kick::{NatsConnectionKicker, RecentNatsConnections};
use crate::auth::usage::KeyClient;
use crate::auth::{Grant, GrantDenial, RejectedKey, Scope};
use crate::config::{self, ConfigError};
use crate::filter::TopicFilter;
use crate::intake::Intake;
use crate::limits::NATS_SUBSCRIPTIONS_MAX;
use crate::message::{DatasourceId, Transport, now_micros};
use crate::observe::cause::Cause;
use crate::observe::refusals::RefusalNote;
use crate::subject::SubjectSpace;

/// The only denial text for a bad key: it does not say what is wrong with the key.
const KEY_DENIAL_TEXT: &str = "no valid API key as user name, password or token";

/// The kinds of connection that may present an API key.
const NATS_CLIENT_KINDS: [&str; 3] = ["nats", "mqtt", "websocket"];

/// Why auth callout cannot start.
#[derive(Debug, thiserror::Error)]
pub enum NatsCalloutError {
    /// A seed's file that cannot be read.
    #[error("{setting}: {}: {error}", path.display())]
    File {
        /// The setting that names it.
        setting: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        error: io::Error,
    },
    /// A file without a valid seed.
    #[error("nats.callout: {} or {}: {error}", issuer.display(), curve.display())]
    Seed {
        /// The file of the issuer's seed.
        issuer: PathBuf,
        /// The file of the curve seed.
        curve: PathBuf,
        /// Which of the two, and what is wrong.
        error: callout::CalloutSeedError,
    },
    /// A password's file that cannot be read.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// A connection that cannot be set up.
    #[error(transparent)]
    Nats(#[from] NatsError),
}

/// The running tasks of auth callout.
#[derive(Debug)]
pub struct NatsKeyCallout {
    nats: Nats,
    service: JoinHandle<()>,
    /// Admits what the clients publish.
    front: Option<JoinHandle<()>>,
    /// Ends connections of dead keys, and counts the others.
    watch: Option<JoinHandle<()>>,
}

impl NatsKeyCallout {
    /// Starts to answer requests, to admit what the clients publish, and to end the connections of dead keys.
    /// NATS may be away. After `drain` this gateway answers no more; other gateways do.
    ///
    /// # Errors
    /// [`NatsCalloutError`] for seeds, passwords and addresses that can never work.
    pub async fn start(
        config: &config::NatsConfig,
        intake: &Intake,
        drain: CancellationToken,
    ) -> Result<Self, NatsCalloutError> {
        let settings = &config.callout;
        let issuer = read_seed_file("nats.callout.issuer_seed_file", &settings.issuer_seed_file)?;
        let has_curve = !settings.xkey_seed_file.as_os_str().is_empty();
        let curve = has_curve
            .then(|| read_seed_file("nats.callout.xkey_seed_file", &settings.xkey_seed_file))
            .transpose()?;
        let let_in = Arc::new(RecentNatsConnections::default());
        let clients = Arc::new(NatsClientTable::default());
        let system = connect_system(config).await?;
        let door = KeyCalloutAuthorizer {
            intake: intake.clone(),
            let_in: let_in.clone(),
            clients: system.is_some().then(|| clients.clone()),
            expiry_s: i64::try_from(settings.expiry_s).unwrap_or(i64::MAX),
            reply_prefixes: reply_prefixes(config),
        };
        let service = callout::CalloutService::new(&issuer, curve.as_deref(), &settings.account, door);
        let service = service.map_err(|error| NatsCalloutError::Seed {
            issuer: settings.issuer_seed_file.clone(),
            curve: settings.xkey_seed_file.clone(),
            error,
        })?;
        let nats = Nats::connect(&config.callout_connection("auth callout")?).await?;
        let front = start_key_ingest(config, intake, system.clone(), &drain)?;
        let watch = system.map(|system| start_kicker(config, intake, system, let_in, clients));
        let over = nats.clone();
        let service = tokio::spawn(async move {
            if let Err(error) = service.serve(&over, drain.cancelled()).await {
                error!(%error, "auth callout requests are not answered");
            }
        });
        Ok(Self { nats, service, front, watch })
    }

    /// The connection on which the requests arrive.
    pub fn nats(&self) -> &Nats {
        &self.nats
    }

    /// Waits until all requests and messages that arrived before the drain are answered.
    pub async fn drained(self) {
        let _ = self.service.await;
        if let Some(front) = self.front {
            let _ = front.await;
        }
        if let Some(watch) = self.watch {
            watch.abort();
        }
    }
}

/// The subjects of the topics that an access token is for. One that has no subject is none.
fn subjects_of(space: SubjectSpace, owner: &DatasourceId, topics: &[TopicFilter]) -> Vec<String> {
    let datasource = (!owner.is_all()).then_some(owner);
    topics.iter().flat_map(|topic| space.filter_wildcards(datasource, topic.as_str())).collect()
}

/// Starts to admit what the clients publish, if messages are taken from NATS.
fn start_key_ingest(
    config: &config::NatsConfig,
    intake: &Intake,
    system: Option<SystemAccount>,
    drain: &CancellationToken,
) -> Result<Option<JoinHandle<()>>, NatsCalloutError> {
    if !config.ingest {
        return Ok(None);
    }
    // A connection of its own, so that published messages do not delay clients that connect.
    let connection = config.callout_connection("ingest by key")?;
    let attestation = Some(Attestation::of_account(&config.callout.account));
    let front = NatsFront::new(connection, config, intake.clone(), attestation, system)?;
    let drain = drain.clone();
    Ok(Some(tokio::spawn(async move { front.serve(drain).await })))
}

/// Connects to the system account, if the gateway has a user in it.
async fn connect_system(config: &config::NatsConfig) -> Result<Option<SystemAccount>, NatsCalloutError> {
    if config.callout.system_user.is_empty() {
        info!(
            "no nats.callout.system_user: NATS connections of dead keys end when their permission expires, \
             limits.connections counts no NATS clients, and what a client sends that can hear no answer is kept"
        );
        return Ok(None);
    }
    Ok(Some(SystemAccount::new(Nats::connect(&config.system_connection("ends connections")?).await?)))
}

/// Starts to end the NATS connections of dead keys, and to count the others.
fn start_kicker(
    config: &config::NatsConfig,
    intake: &Intake,
    system: SystemAccount,
    let_in: Arc<RecentNatsConnections>,
    clients: Arc<NatsClientTable>,
) -> JoinHandle<()> {
    let (account, authorizer) = (&config.callout.account, intake.authorizer().clone());
    let kicker =
        NatsConnectionKicker::new(system.clone(), account, let_in, clients.clone(), authorizer.clone());
    let closer = kicker.clone();
    intake.set_closer(Box::new(move |dead| {
        let (closer, dead) = (closer.clone(), dead.to_vec());
        Box::pin(async move { closer.close(&dead).await })
    }));
    let counting = clients.follow(system, account.clone(), authorizer, kicker.clone());
    tokio::spawn(async move {
        tokio::join!(kicker.watch(), counting);
    })
}

/// The prefixes of answers that clients share: those that are configured, and `_INBOX` only if it may be shared.
fn reply_prefixes(config: &config::NatsConfig) -> Vec<String> {
    let is_usable = |prefix: &&String| config.callout.shared_inbox || *prefix != "_INBOX";
    config.reply_prefixes.iter().filter(is_usable).cloned().collect()
}

fn read_seed_file(setting: &'static str, file: &Path) -> Result<String, NatsCalloutError> {
    let text = std::fs::read_to_string(file);
    text.map_err(|error| NatsCalloutError::File { setting, path: file.to_owned(), error })
}

/// Decides who may connect to NATS.
struct KeyCalloutAuthorizer {
    intake: Intake,
    let_in: Arc<RecentNatsConnections>,
    /// `None` if nobody says when a client goes.
    clients: Option<Arc<NatsClientTable>>,
    expiry_s: i64,
    /// Where clients may subscribe to answers, beside the inbox of their key.
    reply_prefixes: Vec<String>,
}

impl CalloutAuthorizer for KeyCalloutAuthorizer {
    fn judge(&self, visitor: &ConnectingClient) -> CalloutVerdict {
        // All unreadable hosts share one address, so that its failure limit applies to them too.
        let address = visitor.host.parse().unwrap_or(IpAddr::V6(Ipv6Addr::UNSPECIFIED));
        if !NATS_CLIENT_KINDS.contains(&visitor.kind.as_str()) {
            let words = "only a client may present an API key, not another server";
            let note = RefusalNote::new(Transport::Nats, Cause::ConnectionType, &words);
            let client = visitor.name.as_str();
            self.intake.refusals().note(RefusalNote { address: Some(address), client, ..note });
            debug!(%address, "refused a NATS server that connects as a client");
            return CalloutVerdict::Deny(words.to_owned());
        }
        let authorizer = self.intake.authorizer();
        let presented = [&visitor.user, &visitor.password, &visitor.token].map(|text| text.as_bytes());
        let grant = match authorizer.identify_among(&presented, address) {
            Ok(grant) => grant,
            Err(rejected) => return self.deny(visitor, address, &rejected),
        };
        // nats-server keeps sessions and wills beyond the connection, and knows clients by their identifier alone.
        if visitor.kind == "mqtt"
            && let Err(denied) =
                grant.require_key("connect to NATS' MQTT, whose sessions and wills outlive it")
        {
            let rejected = RejectedKey { denied, key_id: Some(grant.key_id()), shape: None };
            return self.deny(visitor, address, &rejected);
        }
        let key = grant.key();
        // Remember the connection before the second check of the grant: a revocation in between then either
        // finds the connection or is seen by the check.
        let connection =
            NatsClientConnection { server_id: visitor.server_id.clone(), client_id: visitor.client_id };
        self.let_in.remember(key.id, key.lease(), connection.clone());
        if !grant.holds() {
            let rejected = RejectedKey { denied: GrantDenial::Revoked, key_id: Some(key.id), shape: None };
            return self.deny(visitor, address, &rejected);
        }
        if let Some(refused) = self.count(visitor, address, &grant, connection) {
            return refused;
        }
        let name = (!visitor.name.is_empty()).then_some(visitor.name.as_str());
        let client = Arc::new(KeyClient::new(Transport::Nats, Some(address), name));
        authorizer.registry().note_use(key, Some(&client), now_micros(), None);
        debug!(%address, key_id = %key.id, datasource = %key.datasource, kind = visitor.kind, "let into NATS");
        CalloutVerdict::Allow(self.permit(&grant))
    }
}

impl KeyCalloutAuthorizer {
    /// Counts the client among the connections of its key; returns the refusal if they are too many.
    fn count(
        &self,
        visitor: &ConnectingClient,
        address: IpAddr,
        grant: &Grant,
        connection: NatsClientConnection,
    ) -> Option<CalloutVerdict> {
        let clients = self.clients.as_ref()?;
        clients.enter(grant.key(), connection.clone());
        let refusal = self.intake.check_connections(grant).err()?;
        clients.leave(&connection);
        let datasource = grant.datasource().as_str();
        self.intake.refusals().note(RefusalNote {
            address: Some(address),
            client: visitor.name.as_str(),
            key_id: Some(grant.key_id()),
            datasource,
            ..refusal.note(Transport::Nats)
        });
        debug!(%address, key_id = %grant.key_id(), why = %refusal, "refused a NATS client");
        Some(CalloutVerdict::Deny(refusal.to_string()))
    }

    fn permit(&self, grant: &Grant) -> ClientPermit {
        let key = grant.key();
        let datasource = if key.datasource.is_all() { "" } else { key.datasource.as_str() };
        let under = |root: &str| match datasource {
            "" => format!("{root}.>"),
            datasource => format!("{root}.{datasource}.>"),
        };
        let parent = |root: &str| under(root).trim_end_matches(".>").to_owned();
        let (mut publish, mut subscribe, mut deny_subscribe) = (Vec::new(), Vec::new(), Vec::new());
        if grant.is_of_token() {
            // No queue group, whose others would miss what it takes.
            deny_subscribe.push("> >".to_owned());
        }
        if grant.allows_scope(Scope::Ingest).is_ok() {
            match grant.topics() {
                None => {
                    publish.push(under("ingest"));
                    subscribe.push(format!("_INBOX_{}.>", key.id));
                }
                // Answers to others with the key may quote what they have sent: such a token hears none of them.
                Some(topics) => publish.extend(subjects_of(SubjectSpace::Ingest, &key.datasource, topics)),
            }
            subscribe.extend(self.reply_prefixes.iter().map(|prefix| format!("{prefix}.>")));
        }
        if grant.allows_scope(Scope::Subscribe).is_ok() {
            match grant.topics() {
                None => {
                    subscribe.push(under("stream"));
                    // The MQTT filter `stream/press-4/#` includes its parent level (MQTT 3.1.1 section 4.7.1.2).
                    subscribe.push(parent("stream"));
                }
                Some(topics) => {
                    let subjects = subjects_of(SubjectSpace::Stream, &key.datasource, topics);
                    // nats-server lets a subscription `a.>` pass for the permission `a.*`.
                    deny_subscribe
                        .extend(subjects.iter().filter(|s| s.ends_with(".*")).map(|s| format!("{s}.>")));
                    subscribe.extend(subjects);
                }
            }
        }
        let soon_s = (now_micros() / 1_000_000).saturating_add(self.expiry_s);
        let expires_at_s = grant.ends_at().map_or(soon_s, |at| soon_s.min(at / 1_000_000));
        let subscriptions_max = NATS_SUBSCRIPTIONS_MAX;
        let name = nats_user_of_key(key);
        ClientPermit { name, publish, subscribe, deny_subscribe, expires_at_s, subscriptions_max }
    }

    fn deny(&self, visitor: &ConnectingClient, address: IpAddr, rejected: &RejectedKey) -> CalloutVerdict {
        let RejectedKey { denied, key_id, shape } = rejected;
        let note = RefusalNote::new(Transport::Nats, denied.cause(), denied);
        let client = visitor.name.as_str();
        let about =
            RefusalNote { address: Some(address), client, key_id: *key_id, key_shape: *shape, ..note };
        self.intake.refusals().note(about);
        let key_id = key_id.as_ref().map(display);
        // A flood of bad keys must not flood the log.
        if let GrantDenial::TooManyFailures { .. } = denied {
            debug!(%address, cause = denied.cause().name(), "refused a NATS client");
            return CalloutVerdict::Deny(denied.to_string());
        }
        info!(%address, cause = denied.cause().name(), key_id, why = %denied, "refused a NATS client");
        CalloutVerdict::Deny(KEY_DENIAL_TEXT.to_owned())
    }
}

fn display(what: &impl Display) -> tracing::field::DisplayValue<&impl Display> {
    tracing::field::display(what)
}
