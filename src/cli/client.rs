//! The commands' client of a running gateway: its HTTP API and the key to present to it.

use std::env;
use std::ffi::OsString;
use std::fmt;
use std::io::ErrorKind;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, bail};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use ureq::http::{Response, StatusCode, Uri};
use ureq::{Agent, Body};

use super::trust;
use crate::auth::Digest;
use crate::auth::shape::KeyShape;
use crate::config::Config;
use crate::message::KeyId;
use crate::observe::advice::shape_advice;

/// How long one request may take. A page of records takes milliseconds; creating a datasource waits
/// for a disk.
const REQUEST_MAX: Duration = Duration::from_secs(60);

/// Where the gateway of the Debian package keeps its data (`config/deb/headgate.toml`).
const INSTALLED_DATA_DIR: &str = "/var/lib/headgate";

/// The HTTP API of a gateway, with a key for it.
#[derive(Clone)]
pub(super) struct ApiClient {
    agent: Agent,
    url: String,
    key: KeySecret,
}

/// A key's text on its way to the gateway, and where it was found. It has no `Debug` or `Display`.
#[derive(Clone)]
pub(super) struct KeySecret {
    text: String,
    source: KeySource,
}

impl KeySecret {
    /// A key that the command has made itself.
    pub(super) fn new(text: &str) -> Self {
        Self::from_source(text, KeySource::Command)
    }

    fn from_source(text: &str, source: KeySource) -> Self {
        Self { text: text.trim().to_owned(), source }
    }

    /// The text, for presenting it to the gateway.
    pub(super) fn expose(&self) -> &str {
        &self.text
    }

    /// Where it was found.
    pub(super) fn source(&self) -> &KeySource {
        &self.source
    }

    /// Its id, which follows from its text and reveals nothing of it; `None` for what is no key.
    pub(super) fn id(&self) -> Option<KeyId> {
        Digest::from_presented(self.text.as_bytes()).map(|digest| digest.key_id())
    }

    /// Which key it is and where from, without any of its characters.
    fn describe(&self) -> String {
        let source = &self.source;
        match self.id() {
            Some(id) => format!("the key used is {id}, from {source}"),
            None => {
                let advice = shape_advice(KeyShape::from_presented(self.text.as_bytes()));
                format!("what was used as the key, from {source}, is none: {advice}")
            }
        }
    }
}

/// No gateway has answered.
#[derive(Debug, thiserror::Error)]
#[error("no gateway answers at {place}")]
pub(super) struct GatewayAway {
    /// The URL or the address.
    pub(super) place: String,
    /// Why not.
    pub(super) source: Box<dyn std::error::Error + Send + Sync>,
}

/// The gateway's answer when it refuses a request: a problem document (RFC 9457).
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct ProblemAnswer {
    /// The HTTP status.
    pub(super) status: u16,
    r#type: String,
    title: String,
    detail: String,
    /// Which key was presented, if that is what the refusal may be about.
    #[serde(skip)]
    key: Option<String>,
}

/// What the API calls what an argument says, and the argument.
const SPOKEN_ARGUMENTS: &[(&str, &str)] = &[
    ("grace_seconds", "--grace"),
    ("expires_at", "--expires-at"),
    ("event_from", "--event-from"),
    ("event_to", "--event-to"),
    ("from_offset", "--from-offset"),
    ("to_offset", "--to-offset"),
    ("after_offset", "--after"),
    ("from_time", "--from"),
    ("key_id", "--key"),
];

impl ProblemAnswer {
    /// That of whoever answers in a gateway's place.
    pub(super) fn of_stranger(status: u16) -> Self {
        Self { status, ..Self::default() }
    }

    /// Whether a gateway has written it, and not whatever else answers at its address.
    pub(super) fn is_gateways(&self) -> bool {
        self.r#type.starts_with("/problems/")
    }

    /// What stands against it, in words for whoever has typed a command.
    fn words(&self) -> String {
        // Its words are about headers, of which a command knows nothing.
        if self.r#type.ends_with("/unauthorized") && self.key.is_some() {
            return "the gateway does not let this key do it: it is unknown, revoked, expired, or another \
                    datasource's"
                .to_owned();
        }
        let words = if self.detail.is_empty() { &self.title } else { &self.detail };
        let spoken = |words: String, (name, argument): &(&str, &str)| match words.strip_prefix(name) {
            Some(rest) if rest.starts_with(' ') => format!("{argument}{rest}"),
            _ => words,
        };
        let words = SPOKEN_ARGUMENTS.iter().fold(words.trim_end_matches('.').to_owned(), spoken);
        let mut letters = words.chars();
        // "There is no …", but not "API key …".
        match (letters.next(), letters.next()) {
            (Some(first), Some(second)) if !second.is_uppercase() => {
                format!("{}{second}{}", first.to_lowercase(), letters.as_str())
            }
            _ => words,
        }
    }
}

impl fmt::Display for ProblemAnswer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !self.is_gateways() && self.title.is_empty() && self.detail.is_empty() {
            let status = self.status;
            return write!(f, "what answers there is no gateway, or stands before it (HTTP status {status})");
        }
        let words = self.words();
        match self.status {
            404 => write!(f, "not found: {words}")?,
            500.. => write!(f, "the gateway cannot do it: {words}")?,
            _ => write!(f, "refused: {words}")?,
        }
        self.key.as_ref().map_or(Ok(()), |key| write!(f, "; {key}"))
    }
}

impl std::error::Error for ProblemAnswer {}

impl ApiClient {
    /// A client of the gateway at `url` (`http://host:port` or `https://…`), with this key.
    ///
    /// # Errors
    /// Those of [`agent`].
    pub(super) fn new(url: &str, key: KeySecret) -> anyhow::Result<Self> {
        Ok(Self { agent: agent(url)?, url: url.trim_end_matches('/').to_owned(), key })
    }

    /// A client of the gateway at `HEADGATE_URL`, with the environment's key.
    pub(super) fn from_environment() -> anyhow::Result<Self> {
        let url = gateway_url()?;
        let key = key_from_environment(&url)?;
        Self::new(&url, key)
    }

    /// The key that is presented.
    pub(super) fn key(&self) -> &KeySecret {
        &self.key
    }

    pub(super) fn get<T: DeserializeOwned>(&self, path: &str, query: &[(&str, &str)]) -> anyhow::Result<T> {
        let request =
            self.agent.get(format!("{}{path}", self.url)).header("authorization", self.key.expose());
        self.read_answer(request.query_pairs(query.iter().copied()).call())
    }

    /// An answer that may go on for as long as it takes to read it.
    pub(super) fn stream(&self, path: &str, query: &[(&str, &str)]) -> anyhow::Result<Response<Body>> {
        self.stream_with(path, query, &[])
    }

    /// As [`ApiClient::stream`], asked for with these headers.
    pub(super) fn stream_with(
        &self,
        path: &str,
        query: &[(&str, &str)],
        headers: &[(&str, &str)],
    ) -> anyhow::Result<Response<Body>> {
        let request =
            self.agent.get(format!("{}{path}", self.url)).header("authorization", self.key.expose());
        let request = headers.iter().fold(request, |request, (name, value)| request.header(*name, *value));
        let request = request.query_pairs(query.iter().copied()).config();
        let request = request.timeout_global(None).timeout_recv_response(Some(REQUEST_MAX)).build();
        self.success(request.call())
    }

    pub(super) fn post<T: DeserializeOwned>(&self, path: &str, body: &Value) -> anyhow::Result<T> {
        let request = self.agent.post(format!("{}{path}", self.url));
        self.read_answer(request.header("authorization", self.key.expose()).send_json(body))
    }

    pub(super) fn put<T: DeserializeOwned>(&self, path: &str, body: &Value) -> anyhow::Result<T> {
        let request = self.agent.put(format!("{}{path}", self.url));
        self.read_answer(request.header("authorization", self.key.expose()).send_json(body))
    }

    pub(super) fn patch<T: DeserializeOwned>(&self, path: &str, body: &Value) -> anyhow::Result<T> {
        let request = self.agent.patch(format!("{}{path}", self.url));
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
        let response = answered.map_err(|error| unanswered(&self.url, error))?;
        if response.status().is_success() {
            return Ok(response);
        }
        let mut problem = problem(response);
        problem.key = matches!(problem.status, 401 | 403).then(|| self.key.describe());
        Err(problem.into())
    }
}

/// An agent that returns every status as an answer, and follows no redirection: the key is for this gateway alone.
/// For a gateway on this machine it ignores the environment's proxy.
///
/// # Errors
/// Certificates that cannot be read, for an `https` URL.
pub(super) fn agent(url: &str) -> anyhow::Result<Agent> {
    let config = Agent::config_builder()
        .http_status_as_error(false)
        .max_redirects(0)
        .max_redirects_will_error(false)
        .timeout_global(Some(REQUEST_MAX));
    let config = if is_loopback(url) { config.proxy(None) } else { config };
    let config = if is_https(url) { config.tls_config(trust::agent_tls()?) } else { config };
    Ok(config.build().new_agent())
}

/// That nobody has answered at `url`, or that who did is not trusted.
pub(super) fn unanswered(url: &str, error: ureq::Error) -> anyhow::Error {
    match trust::explain(&error) {
        Some(words) => anyhow::anyhow!("{url} is not trusted: {words}"),
        None => GatewayAway { place: url.to_owned(), source: Box::new(error) }.into(),
    }
}

/// Whether a URL is of HTTP over TLS.
pub(super) fn is_https(url: &str) -> bool {
    url.parse::<Uri>().is_ok_and(|uri| uri.scheme_str() == Some("https"))
}

/// Reads the problem from an answer that is no success.
pub(super) fn problem(mut response: Response<Body>) -> ProblemAnswer {
    let status = response.status().as_u16();
    let mut problem: ProblemAnswer = response.body_mut().read_json().unwrap_or_default();
    problem.status = status;
    problem
}

/// A variable of the environment. An empty one counts as absent.
pub(super) fn variable(name: &str) -> Option<OsString> {
    env::var_os(name).filter(|value| !value.as_encoded_bytes().trim_ascii().is_empty())
}

/// `HEADGATE_URL`, or the default.
pub(super) fn gateway_url() -> anyhow::Result<String> {
    let Some(url) = variable("HEADGATE_URL") else { return Ok("http://127.0.0.1:8080".to_owned()) };
    let url = url.to_str().context("HEADGATE_URL is not UTF-8")?.trim();
    let uri: Option<Uri> = url.parse().ok();
    let is_usable = |uri: &Uri| {
        matches!(uri.scheme_str(), Some("http" | "https"))
            && uri.host().is_some_and(|host| !host.is_empty())
            && uri.query().is_none()
    };
    match uri.filter(is_usable) {
        // A password in it would be shown in every error, and Headgate knows none.
        Some(uri) if uri.authority().is_some_and(|authority| authority.as_str().contains('@')) => {
            bail!("HEADGATE_URL has a user name in it; the key belongs into HEADGATE_API_KEY")
        }
        Some(_) => Ok(url.to_owned()),
        None => bail!("HEADGATE_URL is {url:?}; it has to be http://HOST[:PORT] or https://HOST[:PORT]"),
    }
}

/// Where a key was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum KeySource {
    /// `HEADGATE_API_KEY`.
    Variable,
    /// The file that `HEADGATE_API_KEY_FILE` names.
    File(PathBuf),
    /// The data directory of a gateway on this machine: its first admin key, good for everything.
    AdminKey(PathBuf),
    /// An answer of the gateway to the command itself.
    Command,
}

impl fmt::Display for KeySource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Variable => f.write_str("HEADGATE_API_KEY"),
            Self::File(file) => write!(f, "the file {} (HEADGATE_API_KEY_FILE)", file.display()),
            Self::AdminKey(file) => write!(f, "the file {}", file.display()),
            Self::Command => f.write_str("this command itself"),
        }
    }
}

/// The key to present to the gateway at `url`. The local `admin.key` is used only for a gateway on
/// this machine: without an explicit key, it must not be sent to another host.
pub(super) fn key_from_environment(url: &str) -> anyhow::Result<KeySecret> {
    if let Some(key) = named_key()? {
        return Ok(key);
    }
    if !is_loopback(url) {
        bail!("no API key for {url}: neither HEADGATE_API_KEY nor HEADGATE_API_KEY_FILE is set");
    }
    let named = variable("HEADGATE_DATA_DIR").map(PathBuf::from);
    let is_named = named.is_some();
    let file = named.unwrap_or_else(|| Config::default().data_dir).join("admin.key");
    let read = |file: &Path| std::fs::read_to_string(file);
    let (file, read) = match read(&file) {
        Err(error) if error.kind() == ErrorKind::NotFound && !is_named => {
            let installed = Path::new(INSTALLED_DATA_DIR).join("admin.key");
            match read(&installed) {
                Err(error) if error.kind() == ErrorKind::NotFound => (file, Err(error)),
                read => (installed, read),
            }
        }
        read => (file, read),
    };
    match read {
        Ok(text) => Ok(KeySecret::from_source(&text, KeySource::AdminKey(file))),
        Err(error) => bail!(
            "no API key: neither HEADGATE_API_KEY nor HEADGATE_API_KEY_FILE is set, and {} cannot be read ({error}); \
             HEADGATE_DATA_DIR says where the gateway keeps its data",
            file.display()
        ),
    }
}

/// The key that the environment names, if any.
pub(super) fn named_key() -> anyhow::Result<Option<KeySecret>> {
    if let Some(key) = variable("HEADGATE_API_KEY") {
        let key = key.to_str().context("HEADGATE_API_KEY is not UTF-8")?;
        return Ok(Some(KeySecret::from_source(key, KeySource::Variable)));
    }
    let Some(file) = variable("HEADGATE_API_KEY_FILE").map(PathBuf::from) else { return Ok(None) };
    let text = std::fs::read_to_string(&file)
        .with_context(|| format!("HEADGATE_API_KEY_FILE: {}", file.display()))?;
    Ok(Some(KeySecret::from_source(&text, KeySource::File(file))))
}

/// Whether `url` is on this machine's loopback.
pub(super) fn is_loopback(url: &str) -> bool {
    let Ok(uri) = url.parse::<Uri>() else { return false };
    is_loopback_host(uri.host().unwrap_or_default())
}

/// Whether a host, which is a name or an address, is this machine's loopback.
pub(super) fn is_loopback_host(host: &str) -> bool {
    let host = host.trim_matches(['[', ']']);
    host == "localhost" || host.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::auth::ApiKey;

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
        for (document, told) in [
            (r#"{"status":404,"title":"Not found","detail":"There is no x."}"#, "not found: there is no x"),
            (r#"{"status":403,"detail":"API key 1 lacks it."}"#, "refused: API key 1 lacks it"),
            (r#"{"status":400,"detail":"grace_seconds is 9."}"#, "refused: --grace is 9"),
            (r#"{"status":409,"title":"It is taken"}"#, "refused: it is taken"),
            (r#"{"status":503,"title":"Not now"}"#, "the gateway cannot do it: not now"),
        ] {
            assert_eq!(problem(document), told);
        }
        let other = problem(r#"{"status":502}"#);
        assert!(other.contains("no gateway") && other.contains("502"), "{other}");
    }

    #[test]
    fn a_refused_key_is_told_by_its_id_and_place_and_no_character_of_it() {
        let secret = ApiKey::generate();
        let key = KeySecret::from_source(secret.expose(), KeySource::Variable);
        let id = secret.digest().key_id().to_string();
        let words = key.describe();
        assert!(words.contains(&id) && words.contains("HEADGATE_API_KEY"), "{words}");
        assert!(!words.contains(&secret.expose()[4..12]), "{words}");
        let cut = KeySecret::from_source(&secret.expose()[..40], KeySource::File("k".into()));
        let words = cut.describe();
        assert!(words.contains("cut short") && words.contains("the file k"), "{words}");
        assert!(!words.contains(&secret.expose()[4..12]), "{words}");
    }
}
