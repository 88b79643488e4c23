//! The system account: lists the connections of users on every server of a cluster, and ends them.

use std::time::Duration;

use async_nats::client::RequestErrorKind;
use async_nats::{Client, Subscriber};
use futures_util::{StreamExt, future};
use serde::Deserialize;
use serde_json::{Value, json};
use tracing::debug;

use crate::Nats;

/// How long servers may take to answer.
const SYSTEM_ANSWER_WAIT_MAX: Duration = Duration::from_secs(1);
/// How long to wait for one more answer while the number of servers is unknown.
const SYSTEM_ANSWER_QUIET: Duration = Duration::from_millis(300);
/// Connections in one page of a server's answer.
const CONNZ_PAGE_CONNECTIONS: usize = 1024;

/// A client's connection, as the system account identifies it.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct NatsClientConnection {
    /// The server, by its public key.
    pub server_id: String,
    /// The connection's number in that server.
    pub client_id: u64,
}

/// What happens to a client of an account.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NatsClientEvent {
    /// It was let in.
    Connected {
        /// As which user.
        user: String,
        /// Its connection.
        connection: NatsClientConnection,
    },
    /// Its connection has ended.
    Disconnected(NatsClientConnection),
}

/// The events of an account's clients, as they come.
#[derive(Debug)]
pub struct NatsClientEvents {
    connected: Subscriber,
    disconnected: Subscriber,
}

/// A connection to NATS as a user of the system account.
#[derive(Debug, Clone)]
pub struct SystemAccount(Nats);

/// The connections of an account, with their users.
#[derive(Debug)]
pub struct NatsConnectionList {
    /// Those that the servers have listed.
    pub connections: Vec<(String, NatsClientConnection)>,
    /// Whether every server has answered. One that is slow, asleep or cut off keeps its clients meanwhile.
    pub is_complete: bool,
}

/// What the servers have answered.
struct ServerAnswers<T> {
    answers: Vec<T>,
    is_complete: bool,
}

#[derive(Deserialize)]
struct SystemAnswer {
    server: SystemServer,
    #[serde(default)]
    data: Option<ConnzData>,
    #[serde(default)]
    statsz: Option<StatszData>,
}

#[derive(Deserialize)]
struct SystemServer {
    id: String,
}

#[derive(Deserialize)]
struct ConnzData {
    #[serde(default)]
    connections: Vec<ConnzConnection>,
}

#[derive(Deserialize)]
struct ConnzConnection {
    cid: u64,
    #[serde(default)]
    authorized_user: String,
    #[serde(default)]
    subscriptions_list: Vec<String>,
}

/// The needed part of an event.
#[derive(Deserialize)]
struct ClientEventAdvisory {
    server: SystemServer,
    client: ClientEventSubject,
}

#[derive(Deserialize)]
struct ClientEventSubject {
    id: u64,
    #[serde(default)]
    user: String,
}

#[derive(Deserialize)]
struct StatszData {
    #[serde(default)]
    active_servers: usize,
}

impl NatsClientEvents {
    /// The next event; `None` if there will be no more. Cancel-safe.
    pub async fn next(&mut self) -> Option<NatsClientEvent> {
        loop {
            let (message, is_connect) = tokio::select! {
                message = self.connected.next() => (message?, true),
                message = self.disconnected.next() => (message?, false),
            };
            let Ok(advisory) = serde_json::from_slice::<ClientEventAdvisory>(&message.payload) else {
                debug!("an event of a server cannot be read");
                continue;
            };
            let ClientEventAdvisory { server, client } = advisory;
            let connection = NatsClientConnection { server_id: server.id, client_id: client.id };
            return Some(match is_connect {
                true => NatsClientEvent::Connected { user: client.user, connection },
                false => NatsClientEvent::Disconnected(connection),
            });
        }
    }
}

impl SystemAccount {
    /// Uses a connection whose user is in the system account.
    pub fn new(nats: Nats) -> Self {
        Self(nats)
    }

    /// What keeps NATS away, while it is away.
    pub fn trouble(&self) -> Option<String> {
        self.0.trouble()
    }

    /// Begins to listen for clients of the account that come and go, on all servers. `None` if NATS is gone for good.
    pub async fn client_events(&self, account: &str) -> Option<NatsClientEvents> {
        let client = self.0.client();
        let connected = client.subscribe(format!("$SYS.ACCOUNT.{account}.CONNECT")).await.ok()?;
        let disconnected = client.subscribe(format!("$SYS.ACCOUNT.{account}.DISCONNECT")).await.ok()?;
        Some(NatsClientEvents { connected, disconnected })
    }

    /// What a connection is subscribed to, of the server of this name. `None` if the server does not say.
    pub async fn subscriptions(&self, server: &str, client_id: u64) -> Option<Vec<String>> {
        let query = json!({
            "server_name": server, "exact_match": true, "cid": client_id, "subscriptions": true,
        });
        let asked = self.0.client().request("$SYS.REQ.SERVER.PING.CONNZ", query.to_string().into());
        let answer = tokio::time::timeout(SYSTEM_ANSWER_WAIT_MAX, asked).await.ok()?.ok()?;
        let answer: SystemAnswer = serde_json::from_slice(&answer.payload).ok()?;
        let connection = answer.data?.connections.into_iter().find(|one| one.cid == client_id)?;
        Some(connection.subscriptions_list)
    }

    /// The connections of the account on all servers that answer. `None` if NATS is away.
    pub async fn connections(&self, account: &str) -> Option<NatsConnectionList> {
        let mut all = NatsConnectionList { connections: Vec::new(), is_complete: true };
        let mut answering = None;
        for page in 0.. {
            let query = json!({ "auth": true, "acc": account, "limit": CONNZ_PAGE_CONNECTIONS, "offset": page * CONNZ_PAGE_CONNECTIONS });
            let ServerAnswers { answers, is_complete } = self.ask_connections(&query, answering).await?;
            // One that does not answer is waited for once, and not for each page.
            if !is_complete {
                answering = Some(answers.len());
            }
            let more = answers.iter().any(|(_, connections)| connections.len() >= CONNZ_PAGE_CONNECTIONS);
            all.is_complete &= is_complete;
            all.connections.extend(answers.into_iter().flat_map(|(server_id, connections)| {
                connections.into_iter().map(move |one| {
                    (
                        one.authorized_user,
                        NatsClientConnection { server_id: server_id.clone(), client_id: one.cid },
                    )
                })
            }));
            if !more {
                break;
            }
        }
        Some(all)
    }

    /// Ends every connection of the user in the account, on all servers that answer. Returns once no server has
    /// one: how many there were. `None` if one may be left, because NATS went away or a server has not answered.
    /// It does not end while the user keeps being admitted again, so the caller has to bound it in time.
    pub async fn end_all(&self, account: &str, user: &str) -> Option<usize> {
        let mut ended = 0;
        loop {
            let query =
                json!({ "auth": true, "acc": account, "user": user, "limit": CONNZ_PAGE_CONNECTIONS });
            let ServerAnswers { answers, is_complete } = self.ask_connections(&query, None).await?;
            let found: Vec<_> = answers
                .into_iter()
                .flat_map(|(server_id, connections)| {
                    connections.into_iter().map(move |one| NatsClientConnection {
                        server_id: server_id.clone(),
                        client_id: one.cid,
                    })
                })
                .collect();
            if found.is_empty() && is_complete {
                return Some(ended);
            }
            ended += found.len();
            future::join_all(found.iter().map(|connection| self.end(connection))).await;
            if !is_complete {
                return None;
            }
        }
    }

    /// Ends one connection, even one that is about to be admitted. Returns when its server has answered, or
    /// after a second: `false` if it has not.
    pub async fn end(&self, connection: &NatsClientConnection) -> bool {
        let (subject, payload) = kick_request(connection);
        let asked = self.0.client().request(subject, payload.into());
        match tokio::time::timeout(SYSTEM_ANSWER_WAIT_MAX, asked).await {
            Ok(Ok(_)) => return true,
            // A server or connection that is gone already is as good.
            Ok(Err(error)) if error.kind() == RequestErrorKind::NoResponders => return true,
            Ok(Err(error)) => debug!(%error, "a connection was not ended"),
            Err(_) => debug!("a server does not answer"),
        }
        false
    }

    /// Asks the server of a connection to end it, and does not wait: a server that is asleep finds the request
    /// when it wakes.
    pub async fn ask_to_end(&self, connection: &NatsClientConnection) {
        let (subject, payload) = kick_request(connection);
        if let Err(error) = self.0.client().publish(subject, payload.into()).await {
            debug!(%error, "no server was asked to end a connection");
        }
    }

    /// Asks each server for its connections, and waits for all, or for as many as are known to answer.
    async fn ask_connections(
        &self,
        query: &Value,
        answering: Option<usize>,
    ) -> Option<ServerAnswers<(String, Vec<ConnzConnection>)>> {
        let ServerAnswers { answers, is_complete } = self.ask_all_servers("CONNZ", query, answering).await?;
        let is_complete = is_complete && answering.is_none();
        let of_server = |SystemAnswer { server, data, .. }: SystemAnswer| {
            (server.id, data.map_or_else(Vec::new, |data| data.connections))
        };
        Some(ServerAnswers { answers: answers.into_iter().map(of_server).collect(), is_complete })
    }

    /// Asks every server, and waits until all have answered, or as many as are known to answer, or for
    /// [`SYSTEM_ANSWER_WAIT_MAX`]. `None` if NATS is away.
    async fn ask_all_servers(
        &self,
        what: &str,
        query: &Value,
        answering: Option<usize>,
    ) -> Option<ServerAnswers<SystemAnswer>> {
        let client = self.0.client();
        let inbox = client.new_inbox();
        let mut answers = client.subscribe(inbox.clone()).await.ok()?;
        let asked = format!("$SYS.REQ.SERVER.PING.{what}");
        client.publish_with_reply(asked, inbox, query.to_string().into()).await.ok()?;
        let count = self.server_count(client);
        tokio::pin!(count);
        let mut expected = answering.map(ServerCount::Known);
        let mut got = Vec::new();
        let give_up = tokio::time::Instant::now() + SYSTEM_ANSWER_WAIT_MAX;
        loop {
            let until = match expected {
                Some(ServerCount::Known(count)) if got.len() >= count => {
                    return Some(ServerAnswers { answers: got, is_complete: true });
                }
                Some(ServerCount::Untold) => tokio::time::Instant::now() + SYSTEM_ANSWER_QUIET,
                _ => give_up,
            };
            tokio::select! {
                answer = answers.next() => match serde_json::from_slice(&answer?.payload) {
                    Ok(answer) => got.push(answer),
                    Err(error) => debug!(%error, "a server's answer cannot be read"),
                },
                servers = &mut count, if expected.is_none() => match servers {
                    Some(servers) => expected = Some(servers),
                    // Who has answered has, although nobody says how many there are.
                    None => return (!got.is_empty()).then_some(ServerAnswers { answers: got, is_complete: false }),
                },
                () = tokio::time::sleep_until(until.min(give_up)) => {
                    let is_complete = matches!(expected, Some(ServerCount::Untold));
                    return (!got.is_empty()).then_some(ServerAnswers { answers: got, is_complete });
                }
            }
        }
    }

    /// The number of servers, as one of them reports it. `None` if none answers.
    async fn server_count(&self, client: &Client) -> Option<ServerCount> {
        let asked = client.request("$SYS.REQ.SERVER.PING.STATSZ", "".into());
        let answer = tokio::time::timeout(SYSTEM_ANSWER_WAIT_MAX, asked).await.ok()?.ok()?;
        let answer: Option<SystemAnswer> = serde_json::from_slice(&answer.payload).ok();
        let count = answer.and_then(|answer| answer.statsz).map_or(0, |stats| stats.active_servers);
        Some(if count > 0 { ServerCount::Known(count) } else { ServerCount::Untold })
    }
}

/// How many servers have to answer.
enum ServerCount {
    Known(usize),
    /// A server that does not tell: a silence means that all have answered.
    Untold,
}

/// The subject and payload that end a connection.
fn kick_request(NatsClientConnection { server_id, client_id }: &NatsClientConnection) -> (String, String) {
    (format!("$SYS.REQ.SERVER.{server_id}.KICK"), json!({ "cid": client_id }).to_string())
}
