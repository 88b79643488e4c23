//! `headgate nats setup`: generates the seeds and passwords that a nats-server and the gateway share, and
//! writes the configuration of both. It prints no secret; each is in a file that only its owner can read.

use std::fs::OpenOptions;
use std::io::Write;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use headgate_bridge_nats::callout::CalloutSeeds;
use rand::TryRng;
use rand::rngs::SysRng;
use serde_json::json;

use super::server::{NatsServerConfig, NatsServerListeners};
use crate::cli::out::{CommandOutput, print_json};
use crate::config::Config;

#[derive(Debug, clap::Args)]
pub(in crate::cli) struct NatsSetupArgs {
    /// Where to write it; the directory is made
    #[arg(long, value_name = "DIR", default_value = "headgate-nats")]
    dir: PathBuf,
    #[command(flatten)]
    listeners: NatsServerListeners,
    /// Write over what is there, with new seeds and passwords: servers and gateways then need a restart
    #[arg(long)]
    force: bool,
    /// Print what was written as JSON
    #[arg(long)]
    json: bool,
}

/// A file of the setup, with mode 0600.
struct SetupFile {
    name: &'static str,
    text: String,
}

pub(super) fn run(args: &NatsSetupArgs, out: &mut CommandOutput) -> anyhow::Result<()> {
    let made = std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&args.dir);
    made.with_context(|| format!("cannot make {}", args.dir.display()))?;
    let dir = args.dir.canonicalize().with_context(|| args.dir.display().to_string())?;
    let dir_text = dir.to_str().filter(|text| !text.contains(['"', '\\', '\n']));
    let dir_text = dir_text.context("the directory's path cannot stand in a configuration file")?;
    let files = setup_files(dir_text, &args.listeners)?;
    if !args.force
        && let Some(there) = files.iter().map(|file| dir.join(file.name)).find(|path| path.exists())
    {
        bail!("{} is there already; --force writes over it, with new secrets", there.display());
    }
    for file in &files {
        write_secret_file(&dir.join(file.name), &file.text)?;
    }
    // Load the written file, so that a mistake shows now and not at the first start.
    Config::load(Some(&dir.join("headgate.toml")))?;
    let port = args.listeners.listen;
    if args.json {
        let files: Vec<&str> = files.iter().map(|file| file.name).collect();
        let server = format!("nats-server --config {dir_text}/nats-server.conf");
        let gateway = format!("headgate serve --config {dir_text}/headgate.toml");
        let set = json!({
            "dir": dir_text, "files": files, "url": format!("nats://{port}"),
            "commands": { "nats_server": server, "headgate": gateway },
        });
        return print_json(&set, out);
    }
    writeln!(
        out,
        "wrote {dir_text}: the configuration of NATS and of Headgate, and their secrets (mode 0600)"
    )?;
    writeln!(out)?;
    writeln!(out, "  nats-server --config {dir_text}/nats-server.conf")?;
    writeln!(out, "  headgate serve --config {dir_text}/headgate.toml")?;
    writeln!(out)?;
    writeln!(out, "A client's API key is its password, with any user name, or its token:")?;
    writeln!(out)?;
    writeln!(out, "  NATS_URL=nats://{port} NATS_USER=device NATS_PASSWORD=$HEADGATE_API_KEY \\")?;
    writeln!(out, "    nats request ingest.DATASOURCE.spindle.temp 21.5")?;
    writeln!(out)?;
    writeln!(
        out,
        "More gateways or servers: copy the directory to each; what it holds lets in whoever has it."
    )?;
    Ok(())
}

fn setup_files(dir: &str, listeners: &NatsServerListeners) -> anyhow::Result<Vec<SetupFile>> {
    let seeds = CalloutSeeds::generate().map_err(anyhow::Error::msg)?;
    let (gateway, callout, system) = (generate_password()?, generate_password()?, generate_password()?);
    let server = NatsServerConfig {
        dir,
        listeners,
        issuer: &seeds.issuer_public,
        curve: &seeds.curve_public,
        gateway: &gateway,
        callout: &callout,
        system: &system,
    };
    let headgate = format!(
        "# Headgate with NATS, written by \"headgate nats setup\". Every other setting is at its default.\n\
         \n\
         [nats]\n\
         servers = [\"nats://{listen}\"]\n\
         user = \"headgate\"\n\
         password_file = \"{dir}/gateway.password\"\n\
         \n\
         [nats.callout]\n\
         issuer_seed_file = \"{dir}/issuer.seed\"\n\
         xkey_seed_file = \"{dir}/curve.seed\"\n\
         account = \"APP\"\n\
         user = \"callout\"\n\
         password_file = \"{dir}/callout.password\"\n\
         system_user = \"system\"\n\
         system_password_file = \"{dir}/system.password\"\n",
        listen = listeners.listen,
    );
    let line = |text: String| format!("{text}\n");
    Ok(vec![
        SetupFile { name: "nats-server.conf", text: server.to_string() },
        SetupFile { name: "headgate.toml", text: headgate },
        SetupFile { name: "issuer.seed", text: line(seeds.issuer) },
        SetupFile { name: "curve.seed", text: line(seeds.curve) },
        SetupFile { name: "gateway.password", text: line(gateway) },
        SetupFile { name: "callout.password", text: line(callout) },
        SetupFile { name: "system.password", text: line(system) },
    ])
}

/// 256 bits from the operating system's random generator, as 43 characters that need no quoting anywhere.
fn generate_password() -> anyhow::Result<String> {
    let mut bits = [0; 32];
    SysRng.try_fill_bytes(&mut bits).context("the operating system's random generator")?;
    Ok(URL_SAFE_NO_PAD.encode(bits))
}

/// Writes a file with mode 0600, whole or not at all.
fn write_secret_file(path: &Path, text: &str) -> anyhow::Result<()> {
    let new = path.with_extension("new");
    let written = std::fs::remove_file(&new)
        .or_else(|error| if error.kind() == std::io::ErrorKind::NotFound { Ok(()) } else { Err(error) })
        .and_then(|()| OpenOptions::new().write(true).create_new(true).mode(0o600).open(&new))
        .and_then(|mut file| {
            file.write_all(text.as_bytes())?;
            file.sync_all()?;
            std::fs::rename(&new, path)
        });
    written.with_context(|| format!("cannot write {}", path.display()))
}
