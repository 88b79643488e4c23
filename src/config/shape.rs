//! The shape of the configuration: which settings there are, and of which type each is, as the defaults have them.
//! What a file or the environment says is brought into that shape before it is read: a text becomes the number,
//! the list or the truth value that its setting needs. An error names the setting and never repeats the value,
//! which may be a secret at any place.

use figment::value::{Dict, Num, Tag, Value};

use super::quantity::SettingUnit;
use super::{Config, ConfigError};

/// How many letters a name may differ in to be taken for a misspelt one.
const MISSPELT_LETTERS_MAX: usize = 2;

/// Settings that are known by an earlier name too, each with the present one in the same section.
const RENAMED_SETTINGS: [(&str, &str); 1] = [("storage.sink", "storage.sinks")];

/// The settings, with their defaults.
pub(super) struct ConfigShape(Dict);

impl ConfigShape {
    /// The shape of the defaults.
    pub(super) fn of_defaults() -> Self {
        match Value::serialize(Config::default()) {
            Ok(Value::Dict(_, dict)) => Self(dict),
            // A test compares the shape with the shipped file, so that this is never reached unseen.
            _ => Self(Dict::new()),
        }
    }

    /// The dotted names of all settings.
    pub(super) fn settings(&self) -> Vec<String> {
        let mut names = Vec::new();
        collect_settings(&self.0, "", &mut names);
        names
    }

    /// Whether `path` is a section.
    pub(super) fn is_section(&self, path: &str) -> bool {
        matches!(self.find(path), Some(Value::Dict(..)))
    }

    /// Whether `path` is a setting.
    pub(super) fn is_setting(&self, path: &str) -> bool {
        self.find(path).is_some_and(|value| !matches!(value, Value::Dict(..)))
    }

    /// What a setting is called now.
    pub(super) fn present_name(path: &str) -> &str {
        RENAMED_SETTINGS.iter().find(|(earlier, _)| *earlier == path).map_or(path, |(_, present)| present)
    }

    fn find(&self, path: &str) -> Option<&Value> {
        let mut parts = path.split('.');
        let mut value = self.0.get(parts.next()?)?;
        for part in parts {
            let Value::Dict(_, dict) = value else { return None };
            value = dict.get(part)?;
        }
        Some(value)
    }

    /// The setting whose name is nearest to `path`, if it is near enough to be what was meant.
    pub(super) fn nearest(&self, path: &str) -> Option<String> {
        let bare = |name: &str| name.replace(['.', '_', '-'], "").to_lowercase();
        let wanted = bare(path);
        let letters_max = MISSPELT_LETTERS_MAX.min(wanted.len() / 4);
        let settings = self.settings().into_iter();
        let near = settings.map(|name| (edit_distance(&bare(&name), &wanted), name));
        let (letters, name) = near.min()?;
        (letters <= letters_max).then_some(name)
    }

    /// Brings what `source` says into the shape.
    ///
    /// # Errors
    /// A key that is no setting, a value of the wrong type.
    pub(super) fn conform(&self, said: Dict, source: &str) -> Result<Dict, ConfigError> {
        self.conform_section(said, &self.0, "", source)
    }

    fn conform_section(
        &self,
        said: Dict,
        shape: &Dict,
        section: &str,
        source: &str,
    ) -> Result<Dict, ConfigError> {
        let mut conformed = Dict::new();
        for (name, value) in said {
            let path = join(section, &name);
            let present = Self::present_name(&path).rsplit('.').next().unwrap_or_default();
            let name = if present == name { name } else { present.to_owned() };
            let fault = |fault: String| ConfigError::Setting {
                key: path.clone(),
                source_name: source.to_owned(),
                fault,
            };
            let Some(expected) = shape.get(&name) else {
                let meant = self.nearest(&path).map(|near| format!("; did you mean {near}?"));
                let words = format!("there is no such setting{}", meant.unwrap_or_default());
                return Err(fault(words));
            };
            let value = match (expected, value) {
                (Value::Dict(_, shape), Value::Dict(tag, said)) => {
                    Value::Dict(tag, self.conform_section(said, shape, &path, source)?)
                }
                (Value::Dict(..), _) => return Err(fault("it is a section, and has settings".to_owned())),
                (expected, value) => {
                    conform_value(&name, value, expected).map_err(|rule| fault(rule.to_owned()))?
                }
            };
            if conformed.insert(name, value).is_some() {
                return Err(fault(format!("{path} and an earlier name of it are set both")));
            }
        }
        Ok(conformed)
    }
}

/// Brings a value into the type of its setting.
fn conform_value(name: &str, value: Value, expected: &Value) -> Result<Value, &'static str> {
    let tag = Tag::Default;
    match (expected, value) {
        (Value::String(..), value @ Value::String(..)) => Ok(value),
        (Value::String(..), _) => Err("it has to be a text, in quotes"),
        (Value::Num(..), Value::String(_, text)) => {
            SettingUnit::of_setting(name).read(&text).map(|number| Value::Num(tag, Num::U64(number)))
        }
        (Value::Num(..), Value::Num(tag, number)) => match number.to_u128() {
            Some(_) => Ok(Value::Num(tag, number)),
            None if number.to_i128().is_some_and(|number| number >= 0) => Ok(Value::Num(tag, number)),
            None => Err("it has to be a whole number that is not negative"),
        },
        (Value::Num(..), _) => Err("it has to be a number"),
        (Value::Bool(..), Value::String(_, text)) => match text.trim().to_ascii_lowercase().as_str() {
            "true" => Ok(Value::Bool(tag, true)),
            "false" => Ok(Value::Bool(tag, false)),
            _ => Err("it has to be true or false"),
        },
        (Value::Bool(..), value @ Value::Bool(..)) => Ok(value),
        (Value::Bool(..), _) => Err("it has to be true or false"),
        (Value::Array(..), Value::String(_, text)) => list_of_text(&text).map(|list| Value::Array(tag, list)),
        (Value::Array(..), Value::Array(tag, list)) => match list.iter().all(|one| one.as_str().is_some()) {
            true => Ok(Value::Array(tag, list)),
            false => Err("it has to be a list of texts, each in quotes"),
        },
        (Value::Array(..), _) => Err("it has to be a list"),
        (_, value) => Ok(value),
    }
}

/// A list that is written as `a,b` or, as TOML has it, `["a", "b"]`.
fn list_of_text(text: &str) -> Result<Vec<Value>, &'static str> {
    #[derive(serde::Deserialize)]
    struct TomlList {
        list: Vec<String>,
    }
    let text = text.trim();
    let items: Vec<String> = if text.starts_with('[') {
        let read: Result<TomlList, _> = toml::from_str(&format!("list = {text}"));
        read.map_err(|_| "it has to be a list: a,b or [\"a\", \"b\"]")?.list
    } else {
        text.split(',').map(str::trim).filter(|item| !item.is_empty()).map(str::to_owned).collect()
    };
    Ok(items.into_iter().map(Value::from).collect())
}

/// A dotted name under a section.
fn join(section: &str, name: &str) -> String {
    if section.is_empty() { name.to_owned() } else { format!("{section}.{name}") }
}

fn collect_settings(dict: &Dict, section: &str, names: &mut Vec<String>) {
    for (name, value) in dict {
        let path = join(section, name);
        match value {
            Value::Dict(_, dict) => collect_settings(dict, &path, names),
            _ => names.push(path),
        }
    }
}

/// How many letters have to be put in, left out or replaced to make one name of the other (Levenshtein).
fn edit_distance(one: &str, other: &str) -> usize {
    let other: Vec<char> = other.chars().collect();
    let mut row: Vec<usize> = (0..=other.len()).collect();
    for (above, letter) in one.chars().enumerate() {
        let mut diagonal = std::mem::replace(&mut row[0], above + 1);
        for (place, of_other) in other.iter().enumerate() {
            let replaced = diagonal + usize::from(letter != *of_other);
            diagonal = row[place + 1];
            row[place + 1] = replaced.min(diagonal + 1).min(row[place] + 1);
        }
    }
    row[other.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_misspelt_name_is_near_its_setting_and_others_are_not() {
        let shape = ConfigShape::of_defaults();
        for (misspelt, meant) in [
            ("mqtt.lissen", "mqtt.listen"),
            ("mqtt_listen", "mqtt.listen"),
            ("datadir", "data_dir"),
            ("nats.pasword", "nats.password"),
            ("mqtt.tls_listen", "mqtt.tls.listen"),
        ] {
            assert_eq!(shape.nearest(misspelt).as_deref(), Some(meant), "{misspelt}");
        }
        for other in ["service_host", "port", "operator.x", "x", "http_port"] {
            assert_eq!(shape.nearest(other), None, "{other}");
        }
    }

    #[test]
    fn distances_are_counted_in_letters() {
        for (one, other, letters) in [("", "", 0), ("a", "", 1), ("abc", "abd", 1), ("kitten", "sitting", 3)]
        {
            assert_eq!(edit_distance(one, other), letters, "{one} {other}");
        }
    }
}
