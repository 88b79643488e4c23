//! `headgate check-config`: checks a configuration file as `serve` would, without serving.

use std::io::Write;
use std::path::PathBuf;

use super::out::CommandOutput;
use crate::config::LoadedConfig;
use crate::front::mqtt;
use crate::observe::trace;

#[derive(Debug, clap::Args)]
pub(super) struct CheckConfigArgs {
    /// The configuration (TOML)
    file: PathBuf,
}

pub(super) fn run(args: CheckConfigArgs, out: &mut CommandOutput) -> anyhow::Result<()> {
    let LoadedConfig { config, passed_over } = LoadedConfig::load(Some(&args.file))?;
    trace::parse_filter(&config.trace)?;
    let tls = &config.mqtt.tls;
    if tls.is_served() {
        mqtt::Tls::load(tls.clone())?;
    }
    writeln!(out, "{}: OK", args.file.display())?;
    writeln!(out, "MQTT   {}", config.mqtt.listen)?;
    if tls.is_served() {
        writeln!(out, "MQTTS  {}", tls.listen)?;
    }
    writeln!(out, "HTTP   {}", config.http.listen)?;
    writeln!(out, "data   {}", config.data_dir.display())?;
    if !passed_over.is_empty() {
        writeln!(out, "no settings, passed over: {}", passed_over.join(", "))?;
    }
    Ok(())
}
