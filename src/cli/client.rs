//! The commands' client of a running gateway: its HTTP API and the key to present to it.

use std::env;
use std::fmt;
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, bail};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use ureq::http::{Response, StatusCode, Uri};
use ureq::{Agent, Body};

use crate::config::Config;

/// How long one request may take. A page of records takes milliseconds; creating a datasource waits
/// for a disk.
const REQUEST_MAX: Duration = Duration::from_secs(60);

/// The HTTP API of a gateway, with a key for it.
#[derive(Clone)]
pub(super) struct ApiClient {
    agent: Agent,
    url: String,
    key: KeySecret,
}

/// A key's text on its way to the gateway. It has no `Debug` or `Display`.
#[derive(Clone)]
pub(super) struct KeySecret(String);

impl KeySecret {
    pub(super) fn new(text: &str) -> Self {
        Self(text.trim().to_owned())
    }

    /// The text, for presenting it to the gateway.
    pub(super) fn expose(&self) -> &str {
        &self.0
    }
}

/// The gateway's answer when it refuses a request: a problem document (RFC 9457).
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct ProblemAnswer {
    /// The HTTP status.
    pub(super) status: u16,
    title: String,
    detail: String,
}

impl fmt::Display for ProblemAnswer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "refused: ")?;
        match (self.title.as_str(), self.detail.as_str()) {
            ("", "") => write!(f, "HTTP status {}", self.status),
            (text, "") | ("", text) => f.write_str(text),
            (title, detail) => write!(f, "{title}: {detail}"),
        }
    }
}

impl std::error::Error for ProblemAnswer {}

impl ApiClient {
    /// A client of the gateway at `url` (`http://host:port`), with this key.
    pub(super) fn new(url: &str, key: KeySecret) -> Self {
        Self { agent: agent(url), url: url.trim_end_matches('/').to_owned(), key }
    }

    /// A client of the gateway at `HEADGATE_URL`, with the environment's key.
    pub(super) fn from_environment() -> anyhow::Result<Self> {
        let url = gateway_url()?;
        let (key, _) = key_from_environment(&url)?;
        Ok(Self::new(&url, key))
    }

    pub(super) fn get<T: DeserializeOwned>(&self, path: &str, query: &[(&str, &str)]) -> anyhow::Result<T> {
        let request =
            self.agent.get(format!("{}{path}", self.url)).header("authorization", self.key.expose());
        self.read_answer(request.query_pairs(query.iter().copied()).call())
    }

    pub(super) fn post<T: DeserializeOwned>(&self, path: &str, body: &Value) -> anyhow::Result<T> {
        let request = self.agent.post(format!("{}{path}", self.url));
        self.read_answer(request.header("authorization", self.key.expose()).send_json(body))
    }

    pub(super) fn put<T: DeserializeOwned>(&self, path: &str, body: &Value) -> anyhow::Result<T> {
        let request = self.agent.put(format!("{}{path}", self.url));
        self.read_answer(request.header("authorization", self.key.expose()).send_json(body))
    }

    /// Deletes what is at the path. Returns the gateway's words if that is done but not durable yet.
    pub(super) fn delete(&self, path: &str) -> anyhow::Result<Option<String>> {
        #[derive(Deserialize)]
        struct UndurableAnswer {
            detail: String,
        }
        let request = self.agent.delete(format!("{}{path}", self.url));
        let mut response = self.success(request.header("authorization", self.key.expose()).call())?;
        if response.status() != StatusCode::ACCEPTED {
            return Ok(None);
        }
        let answer: UndurableAnswer =
            response.body_mut().read_json().context("the gateway's answer is not what was expected")?;
        Ok(Some(answer.detail))
    }

    /// Deletes what is at the path, where the gateway answers with what that was.
    pub(super) fn delete_with_answer<T: DeserializeOwned>(&self, path: &str) -> anyhow::Result<T> {
        let request = self.agent.delete(format!("{}{path}", self.url));
        self.read_answer(request.header("authorization", self.key.expose()).call())
    }

    /// The text of a page that is not JSON (`/metrics`).
    pub(super) fn text(&self, path: &str) -> anyhow::Result<String> {
        let request = self.agent.get(format!("{}{path}", self.url));
        let mut response = self.success(request.header("authorization", self.key.expose()).call())?;
        response.body_mut().read_to_string().context("the gateway's answer broke off")
    }

    fn read_answer<T: DeserializeOwned>(
        &self,
        answered: Result<Response<Body>, ureq::Error>,
    ) -> anyhow::Result<T> {
        let mut response = self.success(answered)?;
        // A page of records may exceed ureq's own limit; our request bounds its size.
        let body = response.body_mut().with_config().limit(u64::MAX);
        body.read_json().context("the gateway's answer is not what was expected")
    }

    fn success(&self, answered: Result<Response<Body>, ureq::Error>) -> anyhow::Result<Response<Body>> {
        let response = answered.with_context(|| format!("no gateway answers at {}", self.url))?;
        if response.status().is_success() { Ok(response) } else { Err(problem(response).into()) }
    }
}

/// An agent that returns every status as an answer. For a gateway on this machine it ignores the
/// environment's proxy.
pub(super) fn agent(url: &str) -> Agent {
    let config = Agent::config_builder().http_status_as_error(false).timeout_global(Some(REQUEST_MAX));
    let config = if is_loopback(url) { config.proxy(None) } else { config };
    config.build().new_agent()
}

/// Reads the problem from an answer that is no success.
pub(super) fn problem(mut response: Response<Body>) -> ProblemAnswer {
    let status = response.status().as_u16();
    let mut problem: ProblemAnswer = response.body_mut().read_json().unwrap_or_default();
    problem.status = status;
    problem
}

/// `HEADGATE_URL`, or the default.
pub(super) fn gateway_url() -> anyhow::Result<String> {
    match env::var("HEADGATE_URL") {
        Ok(url) if url.starts_with("http://") => Ok(url),
        Ok(url) => bail!("HEADGATE_URL is {url:?}; it has to begin with http://"),
        Err(_) => Ok("http://127.0.0.1:8080".to_owned()),
    }
}

/// Where a key was found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum KeySource {
    /// `HEADGATE_API_KEY` or `HEADGATE_API_KEY_FILE`.
    Environment,
    /// The data directory of a gateway on this machine: its first admin key, good for everything.
    AdminKey,
}

/// The key to present to the gateway at `url`. The local `admin.key` is used only for a gateway on
/// this machine: without an explicit key, it must not be sent to another host.
pub(super) fn key_from_environment(url: &str) -> anyhow::Result<(KeySecret, KeySource)> {
    if let Some(key) = named_key()? {
        return Ok((key, KeySource::Environment));
    }
    if !is_loopback(url) {
        bail!("no API key for {url}: neither HEADGATE_API_KEY nor HEADGATE_API_KEY_FILE is set");
    }
    let data_dir = env::var_os("HEADGATE_DATA_DIR").map_or_else(|| Config::default().data_dir, PathBuf::from);
    let file = data_dir.join("admin.key");
    match std::fs::read_to_string(&file) {
        Ok(text) => Ok((KeySecret::new(&text), KeySource::AdminKey)),
        Err(error) => bail!(
            "no API key: neither HEADGATE_API_KEY nor HEADGATE_API_KEY_FILE is set, and {} cannot be read ({error}); \
             HEADGATE_DATA_DIR says where the gateway keeps its data",
            file.display()
        ),
    }
}

/// The key that the environment names, if any.
pub(super) fn named_key() -> anyhow::Result<Option<KeySecret>> {
    if let Ok(key) = env::var("HEADGATE_API_KEY") {
        return Ok(Some(KeySecret::new(&key)));
    }
    let Some(file) = env::var_os("HEADGATE_API_KEY_FILE") else { return Ok(None) };
    let text = std::fs::read_to_string(&file)
        .with_context(|| format!("HEADGATE_API_KEY_FILE: {}", PathBuf::from(&file).display()))?;
    Ok(Some(KeySecret::new(&text)))
}

/// Whether `url` is on this machine's loopback.
fn is_loopback(url: &str) -> bool {
    let Ok(uri) = url.parse::<Uri>() else { return false };
    let host = uri.host().unwrap_or_default().trim_matches(['[', ']']);
    host == "localhost" || host.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loopback_is_told_from_everywhere_else() {
        for near in ["http://127.0.0.1:8080", "http://localhost", "http://[::1]:80/", "http://127.8.9.1"] {
            assert!(is_loopback(near), "{near}");
        }
        for far in
            ["http://10.0.0.1:8080", "http://localhost.example.com", "http://[2001:db8::1]/", "http://", ""]
        {
            assert!(!is_loopback(far), "{far}");
        }
    }

    #[test]
    fn a_problem_is_told_in_its_own_words() {
        let problem =
            |text| serde_json::from_str::<ProblemAnswer>(text).expect("a problem document").to_string();
        assert_eq!(
            problem(r#"{"status":404,"title":"No such datasource","detail":"there is no x"}"#),
            "refused: No such datasource: there is no x"
        );
        assert_eq!(problem(r#"{"status":401,"title":"Unauthorized"}"#), "refused: Unauthorized");
        assert_eq!(problem(r#"{"status":502}"#), "refused: HTTP status 502");
    }
}
