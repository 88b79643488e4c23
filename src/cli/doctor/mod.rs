//! `headgate doctor`: looks at the machine as a gateway with this configuration would find it, whether one runs or not, and
//! says of each thing whether it is well and what to do if it is not.

mod machine;
mod neighbours;

use std::io::Write;
use std::path::PathBuf;

use serde::Serialize;
use serde_json::json;

use super::exit_code::FindingsAreBad;
use super::out::{CommandOutput, print_json};
use super::serve;
use crate::config::LoadedConfig;

#[derive(Debug, clap::Args)]
pub(super) struct DoctorArgs {
    /// The configuration (TOML) of the gateway [env: HEADGATE_CONFIG]; without it, the defaults and the environment
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// The data directory, whatever the configuration says
    #[arg(long, value_name = "DIR")]
    data_dir: Option<PathBuf>,
    /// Print the findings as JSON
    #[arg(long)]
    json: bool,
}

/// How well a thing is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
enum FindingGrade {
    Ok,
    /// It works, and may not for long, or not for everything.
    Warn,
    /// A gateway would not start, or not keep its promises.
    Bad,
}

/// One thing that was looked at.
#[derive(Debug, Serialize)]
struct DoctorFinding {
    grade: FindingGrade,
    what: String,
    found: String,
    /// What to do.
    #[serde(skip_serializing_if = "Option::is_none")]
    advice: Option<String>,
}

impl DoctorFinding {
    fn ok(what: &str, found: impl Into<String>) -> Self {
        Self { grade: FindingGrade::Ok, what: what.to_owned(), found: found.into(), advice: None }
    }

    fn warn(what: &str, found: impl Into<String>, advice: impl Into<String>) -> Self {
        Self { grade: FindingGrade::Warn, advice: Some(advice.into()), ..Self::ok(what, found) }
    }

    fn bad(what: &str, found: impl Into<String>, advice: impl Into<String>) -> Self {
        Self { grade: FindingGrade::Bad, advice: Some(advice.into()), ..Self::ok(what, found) }
    }
}

pub(super) fn run(args: DoctorArgs, out: &mut CommandOutput) -> anyhow::Result<()> {
    let findings = look(args.config, args.data_dir);
    let bad = findings.iter().filter(|finding| finding.grade == FindingGrade::Bad).count();
    if args.json {
        print_json(&json!({ "ok": bad == 0, "findings": findings }), out)?;
    } else {
        for DoctorFinding { grade, what, found, advice } in &findings {
            let grade = match grade {
                FindingGrade::Ok => "ok  ",
                FindingGrade::Warn => "warn",
                FindingGrade::Bad => "bad ",
            };
            writeln!(out, "{grade}  {what}: {found}")?;
            if let Some(advice) = advice {
                writeln!(out, "      {advice}")?;
            }
        }
    }
    match bad {
        0 => Ok(()),
        _ => Err(FindingsAreBad(bad).into()),
    }
}

fn look(config: Option<PathBuf>, data_dir: Option<PathBuf>) -> Vec<DoctorFinding> {
    const WHAT: &str = "configuration";
    let file = serve::config_file(config);
    let name = file
        .as_ref()
        .map_or("the defaults and the environment".to_owned(), |file| file.display().to_string());
    let LoadedConfig { mut config, passed_over } = match LoadedConfig::load(file.as_deref()) {
        Ok(loaded) => loaded,
        Err(error) => {
            let error = super::error_text(&anyhow::Error::new(error));
            let error = error.strip_prefix("configuration: ").unwrap_or(&error);
            return vec![DoctorFinding::bad(WHAT, error, "correct it: nothing else can be looked at before")];
        }
    };
    let mut findings = vec![match passed_over.is_empty() {
        true => DoctorFinding::ok(WHAT, name),
        false => DoctorFinding::warn(
            WHAT,
            format!("{name}; {} are no settings and passed over", passed_over.join(", ")),
            "remove these variables from the environment, if they were meant as settings",
        ),
    }];
    if let Some(data_dir) = data_dir {
        config.data_dir = data_dir;
    }
    findings.extend(machine::look_at_data(&config));
    findings.push(machine::look_at_open_files(&config));
    findings.extend(machine::look_at_clock());
    findings.extend(machine::look_at_certificates(&config));
    let running = neighbours::RunningGateway::find(&config);
    findings.extend(running.look_at_ports(&config));
    findings.extend(running.look_at_readiness());
    findings.extend(neighbours::look_at_nats(&config));
    findings.extend(neighbours::look_at_sinks(&config));
    findings
}
