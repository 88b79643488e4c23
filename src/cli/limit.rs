//! `headgate datasource limit` and `headgate key limit`: shows, sets and unsets limits, over the HTTP API.

use std::collections::HashSet;
use std::io::Write;

use serde_json::{Map, Value, json};

use super::client::ApiClient;
use super::exit_code::UsageError;
use super::out::{CommandOutput, print_json, table};
use crate::config::parse_quantity;
use crate::quota::Limit;

/// What to change; nothing only shows.
#[derive(Debug, clap::Args)]
pub(super) struct LimitArgs {
    /// Set a limit: messages_per_s=100, stored_age_s=7d, payload_bytes=4KiB, or with how it counts:
    /// messages_per_s=100,burst=200,policy=reject; may be given more than once
    #[arg(long, value_name = "NAME=MAX", value_parser = parse_setting)]
    set: Vec<(Limit, Value)>,
    /// Take a limit away, so that the default counts; may be given more than once
    #[arg(long, value_name = "NAME", value_parser = parse_name)]
    unset: Vec<Limit>,
    /// Print the limits as JSON
    #[arg(long)]
    json: bool,
}

fn parse_name(text: &str) -> Result<Limit, String> {
    Limit::ALL.into_iter().find(|limit| limit.name() == text).ok_or_else(|| {
        let names: Vec<_> = Limit::ALL.iter().map(|limit| limit.name()).collect();
        format!("there is no such limit; there are {}", names.join(", "))
    })
}

/// Reads `NAME=MAX[,burst=N][,policy=POLICY]`. What a policy may be is the gateway's to say.
fn parse_setting(text: &str) -> Result<(Limit, Value), String> {
    let mut members = text.split(',');
    let (name, max) = members.next().and_then(|first| first.split_once('=')).ok_or("give NAME=MAX")?;
    let number =
        |text: &str| text.parse::<u64>().map_err(|_| format!("{text:?} is not a whole number, 0 or more"));
    let limit = parse_name(name)?;
    let most = parse_quantity(limit.name(), max).map_err(|rule| format!("{max:?}: {rule}"))?;
    let mut setting = Map::from_iter([("max".to_owned(), json!(most))]);
    for member in members {
        let value = match member.split_once('=') {
            Some(("burst", burst)) => ("burst", json!(number(burst)?)),
            Some(("policy", policy)) => ("policy", json!(policy)),
            _ => return Err(format!("{member:?} is neither burst=N nor policy=POLICY")),
        };
        setting.insert(value.0.to_owned(), value.1);
    }
    Ok((limit, setting.into()))
}

impl LimitArgs {
    /// The change, as a JSON merge patch of the limits; `None` for no change.
    fn patch(&self) -> anyhow::Result<Option<Value>> {
        let set = self.set.iter().map(|(limit, value)| (*limit, value.clone()));
        let changes: Vec<_> = set.chain(self.unset.iter().map(|limit| (*limit, Value::Null))).collect();
        let mut named = HashSet::new();
        if let Some((twice, _)) = changes.iter().find(|(limit, _)| !named.insert(*limit)) {
            return Err(UsageError(format!("{} is named twice", twice.name())).into());
        }
        let patch: Map<_, _> = changes.into_iter().map(|(limit, to)| (limit.name().to_owned(), to)).collect();
        Ok((!patch.is_empty()).then(|| json!({ "limits": patch })))
    }

    /// Changes the limits of what is at `path`, if anything is to be changed, and prints them. `find` reads what is there.
    pub(super) fn run(
        &self,
        client: &ApiClient,
        path: &str,
        find: impl FnOnce(&ApiClient) -> anyhow::Result<Value>,
        out: &mut CommandOutput,
    ) -> anyhow::Result<()> {
        let answer: Value = match self.patch()? {
            Some(patch) => client.patch(path, &patch)?,
            None => find(client)?,
        };
        let limits = &answer["limits"];
        if self.json {
            return print_json(limits, out);
        }
        print_limits(limits, out)
    }
}

/// A row for each limit that is set, and how it counts.
pub(super) fn print_limits(limits: &Value, out: &mut CommandOutput) -> anyhow::Result<()> {
    let set = limits.as_object().into_iter().flatten();
    let mut rows = table(&["limit", "max", "burst", "policy"], &[1, 2]);
    for (name, setting) in set {
        let member = |name: &str| match &setting[name] {
            Value::Null => String::new(),
            Value::String(text) => text.clone(),
            other => other.to_string(),
        };
        let max = if setting.is_object() { member("max") } else { setting.to_string() };
        rows.add_row([name.clone(), max, member("burst"), member("policy")]);
    }
    match rows.is_empty() {
        true => Ok(writeln!(out, "no limit is set")?),
        false => Ok(writeln!(out, "{rows}")?),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_is_set_by_its_name_with_how_it_counts() {
        assert_eq!(
            parse_setting("messages_per_s=100,burst=200,policy=reject"),
            Ok((Limit::MessagesPerS, json!({ "max": 100, "burst": 200, "policy": "reject" })))
        );
        for (text, limit, max) in [
            ("topics=0", Limit::Topics, 0),
            ("stored_age_s=7d", Limit::StoredAgeS, 604_800),
            ("payload_bytes=4KiB", Limit::PayloadBytes, 4_096),
        ] {
            assert_eq!(parse_setting(text), Ok((limit, json!({ "max": max }))), "{text}");
        }
        for bad in [
            "",
            "topics",
            "nope=1",
            "topics=",
            "topics=-1",
            "topics=7d",
            "stored_age_s=1x",
            "topics=1,2",
            "topics=1,burst=x",
        ] {
            assert!(parse_setting(bad).is_err(), "{bad}");
        }
        let twice = LimitArgs {
            set: vec![(Limit::Topics, json!({ "max": 1 }))],
            unset: vec![Limit::Topics],
            json: false,
        };
        assert!(twice.patch().is_err());
    }
}
