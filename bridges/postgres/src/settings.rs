//! Where a database is and who connects: a `postgres://` URL as libpq reads it, with what is kept out of it.

use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use percent_encoding::percent_decode_str;
use tokio_postgres::Config;

/// How long the server may take to let a connection in.
const CONNECT_WAIT_MAX: Duration = Duration::from_secs(10);
/// How long a connection may be silent before the other end is asked whether it is there.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(30);
/// How long what was sent may stay unacknowledged by the other end.
const UNACKNOWLEDGED_MAX: Duration = Duration::from_secs(60);

/// Whether TLS is used and what is verified, as libpq's `sslmode`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SslMode {
    /// No TLS.
    Disable,
    /// TLS only if the server refuses otherwise. Nothing is verified.
    Allow,
    /// TLS if the server has it. Nothing is verified.
    Prefer,
    /// TLS. Nothing is verified, unless a file with issuers is given: then as [`SslMode::VerifyCa`].
    Require,
    /// TLS, with a certificate of an issuer that is trusted.
    VerifyCa,
    /// As [`SslMode::VerifyCa`], and the certificate has the name of the host.
    VerifyFull,
}

impl SslMode {
    /// That with this name.
    pub fn parse(name: &str) -> Option<Self> {
        Some(match name {
            "disable" => Self::Disable,
            "allow" => Self::Allow,
            "prefer" => Self::Prefer,
            "require" => Self::Require,
            "verify-ca" => Self::VerifyCa,
            "verify-full" => Self::VerifyFull,
            _ => return None,
        })
    }
}

/// Why settings cannot be used. No text repeats any of them: there may be a password at any place.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{}", self.rule())]
pub enum SettingsFault {
    /// The URL is none.
    Url,
    /// An `sslmode` that libpq does not have.
    SslMode,
    /// It names no host or no user.
    Incomplete,
    /// A certificate of the client's without its key, or a key without its certificate.
    Identity,
}

impl SettingsFault {
    /// What it has to be.
    pub const fn rule(self) -> &'static str {
        match self {
            Self::Url => {
                "it has to be postgres://USER@HOST:PORT/DATABASE, with what is special in a part percent-encoded (%40 \
                 for @)"
            }
            Self::SslMode => {
                "its sslmode has to be disable, allow, prefer, require, verify-ca or verify-full"
            }
            Self::Identity => {
                "sslcert and sslkey come together: the files with a certificate and its key (PEM)"
            }
            Self::Incomplete => "it has to name a user and a host: postgres://USER@HOST/DATABASE",
        }
    }
}

/// Where a database is, and who connects. It has no `Debug`, because it may hold a password.
#[derive(Clone)]
pub struct PostgresSettings {
    pub(crate) config: Config,
    pub(crate) ssl_mode: SslMode,
    /// A file with issuers of certificates (PEM), instead of those that the system trusts.
    pub(crate) ca: Option<PathBuf>,
    /// The files with the certificate that this client shows, and its key (PEM).
    pub(crate) identity: Option<(PathBuf, PathBuf)>,
    /// The place without secrets: `HOST:PORT/DATABASE`.
    pub(crate) place: String,
}

impl PostgresSettings {
    /// Reads a URL. `sslmode`, `sslrootcert`, `sslcert` and `sslkey` may be in it, as for libpq; `ca` counts before `sslrootcert`, `password`
    /// before one in the URL. `name` is how the server lists the connection.
    ///
    /// # Errors
    /// [`SettingsFault`].
    pub fn new(
        url: &str,
        password: Option<&str>,
        ca: Option<PathBuf>,
        name: &str,
    ) -> Result<Self, SettingsFault> {
        if !url.starts_with("postgres://") && !url.starts_with("postgresql://") {
            return Err(SettingsFault::Url);
        }
        let ParsedUrl { url, ssl_mode, root_certificate, certificate, key } = ParsedUrl::read(url)?;
        let identity = match (certificate, key) {
            (Some(certificate), Some(key)) => Some((certificate, key)),
            (None, None) => None,
            _ => return Err(SettingsFault::Identity),
        };
        // Its own errors may quote a part of the URL.
        let mut config = Config::from_str(&url).map_err(|_| SettingsFault::Url)?;
        if config.get_user().is_none_or(str::is_empty) || config.get_hosts().is_empty() {
            return Err(SettingsFault::Incomplete);
        }
        if let Some(password) = password {
            config.password(password);
        }
        if config.get_connect_timeout().is_none() {
            config.connect_timeout(CONNECT_WAIT_MAX);
        }
        config.keepalives_idle(KEEPALIVE_IDLE).tcp_user_timeout(UNACKNOWLEDGED_MAX).application_name(name);
        let ca = ca.or(root_certificate);
        let ssl_mode = match ssl_mode {
            SslMode::Require if ca.is_some() => SslMode::VerifyCa,
            mode => mode,
        };
        let place = place_of(&config);
        Ok(Self { config, ssl_mode, ca, identity, place })
    }

    /// Where the database is, without secrets.
    pub fn place(&self) -> &str {
        &self.place
    }

    /// Whether TLS is used and what is verified.
    pub fn ssl_mode(&self) -> SslMode {
        self.ssl_mode
    }
}

/// A URL without the parameters that are read here.
struct ParsedUrl {
    url: String,
    ssl_mode: SslMode,
    root_certificate: Option<PathBuf>,
    certificate: Option<PathBuf>,
    key: Option<PathBuf>,
}

/// Whether each `%` begins an encoded byte: a bare one in a password would be read as something else.
fn is_percent_encoded(url: &str) -> bool {
    url.split('%').skip(1).all(|part| {
        let digits = part.as_bytes().get(..2);
        digits.is_some_and(|digits| digits.iter().all(u8::is_ascii_hexdigit))
    })
}

impl ParsedUrl {
    fn read(url: &str) -> Result<Self, SettingsFault> {
        if !is_percent_encoded(url) {
            return Err(SettingsFault::Url);
        }
        let (base, parameters) = url.split_once('?').unwrap_or((url, ""));
        let mut read = Self {
            url: base.to_owned(),
            ssl_mode: SslMode::Prefer,
            root_certificate: None,
            certificate: None,
            key: None,
        };
        let mut others = Vec::new();
        for parameter in parameters.split('&').filter(|parameter| !parameter.is_empty()) {
            let (name, value) = parameter.split_once('=').ok_or(SettingsFault::Url)?;
            let value = percent_decode_str(value).decode_utf8().map_err(|_| SettingsFault::Url)?;
            match name {
                "sslmode" => read.ssl_mode = SslMode::parse(&value).ok_or(SettingsFault::SslMode)?,
                // The system's own, as here without any.
                "sslrootcert" if value == "system" => read.ssl_mode = SslMode::VerifyFull,
                "sslrootcert" => read.root_certificate = Some(PathBuf::from(&*value)),
                "sslcert" => read.certificate = Some(PathBuf::from(&*value)),
                "sslkey" => read.key = Some(PathBuf::from(&*value)),
                _ => others.push(parameter),
            }
        }
        if !others.is_empty() {
            read.url = format!("{base}?{}", others.join("&"));
        }
        Ok(read)
    }
}

fn place_of(config: &Config) -> String {
    let hosts = config.get_hosts().iter().enumerate().map(|(place, host)| {
        let ports = config.get_ports();
        let port = ports.get(place).or(ports.first()).copied().unwrap_or(5432);
        match host {
            tokio_postgres::config::Host::Tcp(name) if name.contains(':') => format!("[{name}]:{port}"),
            tokio_postgres::config::Host::Tcp(name) => format!("{name}:{port}"),
            #[cfg(unix)]
            tokio_postgres::config::Host::Unix(directory) => directory.display().to_string(),
        }
    });
    let database = config.get_dbname().or(config.get_user()).unwrap_or_default();
    format!("{}/{database}", hosts.collect::<Vec<_>>().join(","))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(url: &str) -> Result<PostgresSettings, SettingsFault> {
        PostgresSettings::new(url, None, None, "headgate")
    }

    #[test]
    fn a_url_says_what_it_says_to_libpq() {
        let of = |url| read(url).map(|settings| (settings.place, settings.ssl_mode, settings.ca)).expect(url);
        let plain = of("postgres://me@db.example:5433/plant");
        assert_eq!(plain, ("db.example:5433/plant".to_owned(), SslMode::Prefer, None));
        assert_eq!(of("postgresql://me:p%40ss@db/plant?sslmode=disable").1, SslMode::Disable);
        assert_eq!(of("postgres://me@db").0, "db:5432/me");
        let full = of("postgres://me@db/x?sslmode=verify-full&sslrootcert=%2Fetc%2Fca.pem&connect_timeout=3");
        assert_eq!((full.1, full.2), (SslMode::VerifyFull, Some(PathBuf::from("/etc/ca.pem"))));
        assert_eq!(of("postgres://me@db/x?sslmode=require&sslrootcert=/ca.pem").1, SslMode::VerifyCa);
        assert_eq!(of("postgres://me@[::1]:5/x").0, "[::1]:5/x");
        assert_eq!(of("postgres://me@%2Fvar%2Frun/x").0, "/var/run/x");
    }

    #[test]
    fn no_error_repeats_a_part_of_the_url() {
        for url in [
            "postgres://me:s3cret@db:port/x",
            "postgres://me:s3cret@db/x?s3cret",
            "postgres://me:s3cret@db/x?s3cret=1",
            "postgres://me:s3cret@db/x?sslmode=s3cret",
            "postgres://me@db/x?sslcert=s3cret",
            "postgres://me:s3%cret@db/x",
            "me:s3cret@db",
            "postgres:///s3cret",
            "host=db password=s3cret",
        ] {
            let error = read(url).err().unwrap_or_else(|| panic!("{url}"));
            assert!(!error.to_string().contains("s3"), "{error}");
        }
    }
}
