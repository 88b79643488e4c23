//! `headgate datasource show`: all that an operator asks about one datasource, from several answers of the gateway.

use std::io::Write;

use serde::Deserialize;
use serde_json::{Map, Value};

use super::client::ApiClient;
use super::datasource::{self, DatasourceAnswer, print_connect};
use super::key;
use super::key_table::{self, KeyListAnswer};
use super::limit::print_limits;
use super::out::{CommandOutput, grouped};
use super::records::for_each_record;
use super::time_argument::ago;

/// Where the gateway is, and lines to connect to the datasource.
#[derive(Deserialize)]
struct PlacesAnswer {
    mqtt: Vec<String>,
    http: String,
    connect: Map<String, Value>,
}

pub(super) fn print(client: &ApiClient, id: &str, out: &mut CommandOutput) -> anyhow::Result<()> {
    let shown: Value = client.get(&datasource::path(id)?, &[])?;
    let places: PlacesAnswer = client.get("/v1/connect", &[("datasource", id)])?;
    let keys: Value = client.get(&key::path(id)?, &[])?;
    let DatasourceAnswer { name, created_at, .. } = serde_json::from_value(shown.clone())?;
    writeln!(out, "id            {id}")?;
    writeln!(out, "name          {name}")?;
    writeln!(out, "created       {created_at}")?;
    if let Some(incarnation) = shown["incarnation"].as_u64().filter(|&incarnation| incarnation > 1) {
        writeln!(out, "incarnation   {incarnation}: there were others of this id before")?;
    }
    if !shown["event_time"].is_null() {
        writeln!(out, "event time    {}", shown["event_time"])?;
    }
    writeln!(out, "publish       {}/v1/ingest/{id}/TOPIC", places.http)?;
    writeln!(out, "read          {}/v1/datasources/{id}/records", places.http)?;
    for mqtt in &places.mqtt {
        writeln!(out, "MQTT          {mqtt}, topics as the device names them")?;
    }
    let list: KeyListAnswer = serde_json::from_value(keys.clone())?;
    let sum = |of: fn(&key_table::KeyAnswer) -> u64| grouped(list.keys.iter().map(of).sum());
    let (accepted, refused) = (sum(|key| key.accepted), sum(|key| key.refused));
    writeln!(out, "messages      {accepted} accepted and {refused} refused, under the keys that live")?;
    writeln!(out, "connections   {}", sum(|key| key.connections))?;
    writeln!(out, "last message  {}", last_message(client, id)?)?;
    writeln!(out)?;
    key_table::print_keys(keys, out)?;
    print_limits(&shown["limits"], out)?;
    Ok(print_connect(&places.connect, out)?)
}

/// The newest record that is stored, in one line.
fn last_message(client: &ApiClient, id: &str) -> anyhow::Result<String> {
    #[derive(Deserialize)]
    struct LastRecord {
        offset: u64,
        topic: String,
        received_at: String,
    }
    let mut words = "none is stored".to_owned();
    let read = for_each_record(client, id, &[("order", "newest"), ("limit", "1")], |line| {
        let LastRecord { offset, topic, received_at } = serde_json::from_str(line)?;
        words = format!("{} on {topic}, offset {offset}, at {received_at}", ago(&received_at));
        Ok(())
    });
    match read {
        Ok(()) => Ok(words),
        // Nothing is stored for reading here.
        Err(error) if key_table::is_not_found(&error) => Ok(format!("unknown: {error}")),
        Err(error) => Err(error),
    }
}
