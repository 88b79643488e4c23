//! `headgate check-config`: checks a configuration file as `serve` would, without serving.

use std::io::Write;
use std::path::PathBuf;

use serde_json::json;

use super::out::{CommandOutput, print_json};
use crate::config::{LoadedConfig, TlsConfig};
use crate::front::tls::{Tls, TlsFront};
use crate::observe::trace;

#[derive(Debug, clap::Args)]
pub(super) struct CheckConfigArgs {
    /// The configuration (TOML)
    file: PathBuf,
    /// Print what it sets as JSON
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: CheckConfigArgs, out: &mut CommandOutput) -> anyhow::Result<()> {
    let LoadedConfig { config, passed_over } = LoadedConfig::load(Some(&args.file))?;
    trace::parse_filter(&config.trace)?;
    let (mqtt_tls, http_tls) = (&config.mqtt.tls, &config.http.tls);
    for (front, tls) in [(TlsFront::Mqtt, mqtt_tls), (TlsFront::Http, http_tls)] {
        if tls.is_served() {
            Tls::load(front, tls.clone())?;
        }
    }
    if args.json {
        let served = |tls: &TlsConfig| tls.is_served().then(|| tls.listen.to_string());
        let set = json!({
            "file": args.file, "mqtt": config.mqtt.listen.to_string(), "mqtts": served(mqtt_tls),
            "http": config.http.listen.to_string(), "https": served(http_tls),
            "admin": config.http.admin.listen.as_ref().map(ToString::to_string),
            "data_dir": config.data_dir, "passed_over": passed_over,
        });
        return print_json(&set, out);
    }
    writeln!(out, "{}: OK", args.file.display())?;
    writeln!(out, "MQTT   {}", config.mqtt.listen)?;
    if mqtt_tls.is_served() {
        writeln!(out, "MQTTS  {}", mqtt_tls.listen)?;
    }
    writeln!(out, "HTTP   {}", config.http.listen)?;
    if http_tls.is_served() {
        writeln!(out, "HTTPS  {}", http_tls.listen)?;
    }
    if let Some(admin) = &config.http.admin.listen {
        writeln!(out, "admin  {admin}")?;
    }
    writeln!(out, "data   {}", config.data_dir.display())?;
    if !passed_over.is_empty() {
        writeln!(out, "no settings, passed over: {}", passed_over.join(", "))?;
    }
    Ok(())
}
