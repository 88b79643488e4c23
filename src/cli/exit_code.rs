//! The exit codes of the commands: what a script can tell of a failure without reading its words.

use anyhow::Error;

use super::client::{GatewayAway, ProblemAnswer};
use super::session::MqttClientError;
use crate::gateway::ClusterCommandError;
use crate::message::NameError;

/// What did not fit any of those below.
const FAILED: u8 = 1;
/// The command line cannot be used; clap exits with it too.
const WRONG_USAGE: u8 = 2;
/// The gateway has refused.
const REFUSED: u8 = 3;
/// There is nothing of that name.
const NOT_FOUND: u8 = 4;
/// No gateway has answered, or it asks to come again later.
const AWAY: u8 = 5;

/// The codes, as `--help` and the manual pages list them.
pub(super) const EXIT_CODES_HELP: &str = "\
Exit codes:
  0  done
  1  it failed in another way than those below
  2  the command line cannot be used: an argument is missing, unknown or not in order
  3  the gateway or the cluster refused it: the key is not good for it, a limit is reached, or it conflicts with what exists
  4  not found: there is no datasource, key or other thing of that name
  5  no gateway answers, or NATS for a cluster, or it cannot be done right now: try again later
  130, 141  ended by Ctrl-C while draining; whoever read the output has closed it";

/// An argument that cannot be used, found only once all of them are read.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(super) struct UsageError(pub(super) String);

/// What the command itself refuses to have the gateway do.
#[derive(Debug, thiserror::Error)]
#[error("refused: {0}")]
pub(super) struct RefusedHere(pub(super) String);

/// `headgate doctor` has found so many bad things.
#[derive(Debug, thiserror::Error)]
#[error("{0} of this is bad")]
pub(super) struct FindingsAreBad(pub(super) usize);

/// A gateway answers, and takes no messages.
#[derive(Debug, thiserror::Error)]
#[error("the gateway takes no messages: {0}")]
pub(super) struct NotReady(pub(super) String);

/// What the command itself has not found.
#[derive(Debug, thiserror::Error)]
#[error("not found: {0}")]
pub(super) struct NotFoundHere(pub(super) String);

/// The code of a failed command.
pub(super) fn exit_code(error: &Error) -> u8 {
    if let Some(problem) = error.downcast_ref::<ProblemAnswer>() {
        return of_problem(problem);
    }
    if error.downcast_ref::<UsageError>().is_some() || error.downcast_ref::<NameError>().is_some() {
        return WRONG_USAGE;
    }
    if error.downcast_ref::<NotFoundHere>().is_some() {
        return NOT_FOUND;
    }
    if error.downcast_ref::<RefusedHere>().is_some() {
        return REFUSED;
    }
    if error.downcast_ref::<GatewayAway>().is_some() || error.downcast_ref::<NotReady>().is_some() {
        return AWAY;
    }
    match error.downcast_ref::<ClusterCommandError>() {
        Some(ClusterCommandError::Away(_)) => return AWAY,
        Some(ClusterCommandError::Refused(_)) => return REFUSED,
        None => {}
    }
    match error.downcast_ref::<MqttClientError>() {
        Some(MqttClientError::Refused(_)) => REFUSED,
        Some(MqttClientError::Broken(_)) => AWAY,
        None => FAILED,
    }
}

/// Whether it says that the gateway has refused.
pub(super) fn is_refusal(error: &Error) -> bool {
    exit_code(error) == REFUSED
}

fn of_problem(problem: &ProblemAnswer) -> u8 {
    match (problem.status, problem.is_gateways()) {
        (502..=504, _) => AWAY,
        // Whatever answers there is no gateway.
        (_, false) => FAILED,
        (404, _) => NOT_FOUND,
        (400..500, _) => REFUSED,
        _ => FAILED,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn problem(status: u16, kind: &str) -> Error {
        let text = format!(r#"{{"type":"{kind}","status":{status},"title":"T"}}"#);
        Error::new(serde_json::from_str::<ProblemAnswer>(&text).expect("a problem"))
    }

    #[test]
    fn a_failure_has_the_code_of_its_kind_whatever_was_added_to_it() {
        let refused = MqttClientError::Refused("NotAuthorized".to_owned());
        for (error, code) in [
            (problem(401, "/problems/unauthorized"), 3),
            (problem(409, "/problems/conflict"), 3),
            (problem(429, "/problems/too_many_requests"), 3),
            (problem(404, "/problems/not_found"), 4),
            (problem(503, "/problems/unavailable"), 5),
            (problem(502, "about:blank"), 5),
            (problem(500, "/problems/internal"), 1),
            (problem(404, "about:blank"), 1),
            (Error::new(refused), 3),
            (Error::new(MqttClientError::Broken("gone".to_owned())), 5),
            (Error::new(ClusterCommandError::Away("NATS is away".to_owned())), 5),
            (Error::new(ClusterCommandError::Refused("no key".to_owned())), 3),
            (Error::new(NotReady("the disk is full".to_owned())), 5),
            (Error::new(NameError::KeyId), 2),
            (Error::new(UsageError("no".to_owned())), 2),
            (anyhow::anyhow!("anything"), 1),
        ] {
            assert_eq!(exit_code(&error), code, "{error}");
            assert_eq!(exit_code(&error.context("while doing it")), code);
        }
    }
}
