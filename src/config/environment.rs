//! Settings by environment: `HEADGATE_MQTT__LISTEN=0.0.0.0:1883`. The prefix belongs to others too: Kubernetes
//! gives every container `HEADGATE_SERVICE_HOST` and `HEADGATE_PORT=tcp://…` when there is a service named
//! `headgate`. Such variables are passed over and told; only what was meant as a setting is an error.

use std::ffi::OsString;

use figment::value::{Dict, Value};

use super::ConfigError;
use super::shape::ConfigShape;

/// What the names of all variables begin with.
const ENV_PREFIX: &str = "HEADGATE_";
/// Variables of the commands and of the tests: they have the same prefix but are no settings.
const COMMAND_ENV_VARS: [&str; 6] = ["url", "api_key", "api_key_file", "cacert", "config", "test_log"];

/// What the environment says.
#[derive(Debug, Default)]
pub(super) struct EnvironmentSettings {
    /// The settings, as texts, by their dotted names.
    pub(super) settings: Vec<(String, String)>,
    /// Variables with the prefix that are no settings.
    pub(super) passed_over: Vec<String>,
}

impl EnvironmentSettings {
    /// Sorts the variables into settings and others. An empty one counts as absent.
    ///
    /// # Errors
    /// A variable that is near to a setting and is none, a setting that is not UTF-8. Neither repeats the value.
    pub(super) fn read(
        variables: impl Iterator<Item = (OsString, OsString)>,
        shape: &ConfigShape,
    ) -> Result<Self, ConfigError> {
        let mut read = Self::default();
        for (name, value) in variables {
            let Some(name) = name.to_str().filter(|name| has_prefix(name)) else { continue };
            let path = name[ENV_PREFIX.len()..].to_lowercase().replace("__", ".");
            let path = ConfigShape::present_name(&path).to_owned();
            if value.is_empty() || COMMAND_ENV_VARS.contains(&path.as_str()) {
                continue;
            }
            let fault = |fault: String| ConfigError::Variable { name: name.to_owned(), fault };
            if shape.is_setting(&path) {
                let text = value.to_str().ok_or_else(|| fault("it is not UTF-8".to_owned()))?;
                if !text.trim().is_empty() {
                    read.settings.push((path, text.to_owned()));
                }
            } else if is_of_service(name, &value) {
                read.passed_over.push(name.to_owned());
            } else if shape.is_section(&path) {
                let some = format!("{name}__…");
                return Err(fault(format!("it names a section; its settings are {some}")));
            } else if let Some(near) = shape.nearest(&path) {
                return Err(fault(format!("there is no such setting; did you mean {}?", variable_of(&near))));
            } else if path.split_once('.').is_some_and(|(section, _)| shape.is_section(section)) {
                return Err(fault(
                    "there is no such setting; config/headgate.toml shows every one".to_owned(),
                ));
            } else {
                read.passed_over.push(name.to_owned());
            }
        }
        read.passed_over.sort();
        Ok(read)
    }

    /// The settings as a tree.
    pub(super) fn tree(&self) -> Dict {
        let mut tree = Dict::new();
        for (path, text) in &self.settings {
            let mut dict = &mut tree;
            let (sections, name) = path.rsplit_once('.').unwrap_or(("", path));
            for section in sections.split('.').filter(|section| !section.is_empty()) {
                let entry = dict.entry(section.to_owned()).or_insert_with(|| Value::from(Dict::new()));
                match entry {
                    Value::Dict(_, inner) => dict = inner,
                    _ => return tree,
                }
            }
            dict.insert(name.to_owned(), Value::from(text.as_str()));
        }
        tree
    }
}

/// The variable of a setting.
pub(super) fn variable_of(path: &str) -> String {
    format!("{ENV_PREFIX}{}", path.to_uppercase().replace('.', "__"))
}

fn has_prefix(name: &str) -> bool {
    name.get(..ENV_PREFIX.len()).is_some_and(|begin| begin.eq_ignore_ascii_case(ENV_PREFIX))
}

/// Whether a variable tells where a service is, as Kubernetes (its "service links") and Docker name them.
fn is_of_service(name: &str, value: &OsString) -> bool {
    let name = name.to_uppercase();
    let is_url = || {
        let value = value.to_string_lossy().to_lowercase();
        ["tcp://", "udp://", "sctp://"].iter().any(|scheme| value.starts_with(scheme))
    };
    name.ends_with("_SERVICE_HOST")
        || name.ends_with("_SERVICE_PORT")
        || name.contains("_SERVICE_PORT_")
        || name.ends_with("_PORT") && is_url()
        || name.rsplit_once("_PORT_").is_some_and(|(_, rest)| {
            let mut words = rest.split('_');
            words.next().is_some_and(|port| !port.is_empty() && port.bytes().all(|b| b.is_ascii_digit()))
                && words.next().is_some_and(|protocol| matches!(protocol, "TCP" | "UDP" | "SCTP"))
        })
        || ["_TCP_PROTO", "_TCP_PORT", "_TCP_ADDR", "_UDP_PROTO", "_UDP_PORT", "_UDP_ADDR"]
            .iter()
            .any(|end| name.ends_with(end))
}

#[cfg(test)]
mod tests {
    use std::os::unix::ffi::OsStringExt;

    use super::*;

    fn read(variables: &[(&str, &str)]) -> Result<EnvironmentSettings, ConfigError> {
        let variables = variables.iter().map(|(name, value)| (name.into(), value.into()));
        EnvironmentSettings::read(variables, &ConfigShape::of_defaults())
    }

    #[test]
    fn what_kubernetes_and_others_set_is_passed_over() {
        let others = [
            ("HEADGATE_SERVICE_HOST", "10.0.0.1"),
            ("HEADGATE_SERVICE_PORT", "8080"),
            ("HEADGATE_SERVICE_PORT_MQTT", "1883"),
            ("HEADGATE_PORT", "tcp://10.0.0.1:8080"),
            ("HEADGATE_PORT_1883_TCP", "tcp://10.0.0.1:1883"),
            ("HEADGATE_PORT_1883_TCP_ADDR", "10.0.0.1"),
            ("HEADGATE_PORT_1883_TCP_PORT", "1883"),
            ("HEADGATE_PORT_1883_TCP_PROTO", "tcp"),
            ("HEADGATE_MQTT_SERVICE_HOST", "10.0.0.1"),
            ("HEADGATE_MQTT_PORT", "tcp://10.0.0.1:1883"),
            ("HEADGATE_HTTP_PORT_8080_TCP", "tcp://10.0.0.1:8080"),
            ("HEADGATE__MQTT_SERVICE_HOST", "10.0.0.1"),
            ("HEADGATE_IMAGE", "headgate:1"),
            ("HEADGATE_OPERATOR__REPLICAS", "3"),
        ];
        let read = read(&others).expect("none is a setting");
        assert!(read.settings.is_empty(), "{read:?}");
        assert_eq!(read.passed_over.len(), others.len(), "{read:?}");
    }

    #[test]
    fn what_is_nearly_a_setting_is_an_error_that_names_the_setting_and_not_the_value() {
        for (name, meant) in [
            ("HEADGATE_MQTT__LISSEN", "HEADGATE_MQTT__LISTEN"),
            ("HEADGATE_MQTT_LISTEN", "HEADGATE_MQTT__LISTEN"),
            ("HEADGATE_DATADIR", "HEADGATE_DATA_DIR"),
            ("HEADGATE_NATS_PASSWORD", "HEADGATE_NATS__PASSWORD"),
            ("HEADGATE_NATS__PASWORD", "HEADGATE_NATS__PASSWORD"),
            ("HEADGATE_MQTT", "HEADGATE_MQTT__"),
            ("HEADGATE_MQTT__FLAVOUR", "no such setting"),
        ] {
            let error = read(&[(name, "s3cret")]).expect_err(name).to_string();
            assert!(error.contains(name) && error.contains(meant), "{error}");
            assert!(!error.contains("s3cret"), "{error}");
        }
    }

    #[test]
    fn empty_is_absent_and_what_is_no_text_is_an_error_of_a_setting_alone() {
        let read_one = |name: &str, value: &[u8]| {
            let variables = [(name.into(), OsString::from_vec(value.to_vec()))];
            EnvironmentSettings::read(variables.into_iter(), &ConfigShape::of_defaults())
        };
        for name in
            ["HEADGATE_MQTT__LISTEN", "HEADGATE_MQTT__LISSEN", "HEADGATE_NATS__PASSWORD", "HEADGATE_X"]
        {
            assert!(read(&[(name, "")]).expect("absent").settings.is_empty(), "{name}");
        }
        assert!(read_one("HEADGATE_NATS__PASSWORD", b"\xff").is_err());
        assert!(read_one("HEADGATE_ELSE", b"\xff").is_ok());
        assert!(read_one("OTHER", b"\xff").is_ok());
    }
}
