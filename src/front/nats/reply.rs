//! The answers to refused messages: HTTP's problem documents, with the same status for the same reason. A
//! member `error` like that of JetStream's answers makes a client's `js.publish` fail with the code and the
//! text.

use headgate_bridge_nats::inlet::{InletRefusal, InletVerdict};
use serde_json::json;

use crate::front::problem::{Problem, ProblemReply};

/// The verdict that tells a sender of its refusal.
pub(super) fn refusal_verdict(problem: impl Into<Problem>) -> InletVerdict {
    let (ProblemReply { kind, document, retry_after, .. }, _) = problem.into().into_parts();
    let code = kind.status();
    let mut document = serde_json::to_value(document).unwrap_or_default();
    // nats-py accepts exactly these members.
    document["error"] = json!({ "code": code, "err_code": code, "description": document["detail"] });
    let (text, body) = (kind.title().to_owned(), document.to_string().into_bytes());
    InletVerdict::Refused(Box::new(InletRefusal { code, text, body, retry_after }))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use async_nats::jetstream::response::Response;

    use serde_json::Value;

    use super::*;
    use crate::auth::{GrantDenial, Scope};
    use crate::intake::Refusal;
    use crate::log::AppendError;
    use crate::message::{KeyId, NameError};
    use crate::subject::SubjectError;

    #[test]
    fn a_refusal_has_the_status_that_it_has_over_http() {
        let key_id = KeyId([7; 6]);
        let busy = Refusal::Busy { in_flight_bytes_max: 1, retry_after: Duration::from_secs(5) };
        for (refusal, code) in [
            (GrantDenial::NoKey.into(), 401),
            (GrantDenial::Unknown.into(), 401),
            (GrantDenial::OtherDatasource { key_id }.into(), 401),
            (GrantDenial::MissingScope { key_id, scope: Scope::Ingest }.into(), 403),
            (Refusal::NoDatasource("x".to_owned()), 404),
            (NameError::TopicEmpty.into(), 400),
            (SubjectError::EmptyLevel.into(), 400),
            (Refusal::ReplySubject, 400),
            (Refusal::Header("Nats-Rollup"), 400),
            (Refusal::HeaderForm, 400),
            (Refusal::TooLarge { bytes: 2, bytes_max: 1, limit: "intake.payload_bytes_max" }, 413),
            (busy, 503),
            (AppendError::DiskFull.into(), 503),
        ] {
            let words = refusal.to_string();
            let InletVerdict::Refused(refused) = refusal_verdict(refusal) else { panic!("{words}") };
            assert_eq!(refused.code, code, "{words}");
            assert_eq!(refused.retry_after.is_some(), code == 503, "{words}");
        }
    }

    #[test]
    fn its_body_is_a_problem_and_what_jetstream_would_say() {
        let refusal = Refusal::TooLarge { bytes: 2, bytes_max: 1, limit: "intake.payload_bytes_max" };
        let words = refusal.to_string();
        let InletVerdict::Refused(refused) = refusal_verdict(refusal) else { panic!("a no") };
        let document: Value = serde_json::from_slice(&refused.body).expect("JSON");
        assert_eq!((&document["type"], &document["limit"]), (&json!("/problems/too_large"), &json!(1)));
        let response: Response<async_nats::jetstream::publish::PublishAck> =
            serde_json::from_slice(&refused.body).expect("as a client reads it");
        let Response::Err { error } = response else { panic!("{document}") };
        assert_eq!(error.code(), 413);
        assert!(error.to_string().contains(&words), "{error}");
    }
}
