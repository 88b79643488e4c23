//! Questions: messages that are refused now, and may be a repetition of what was let in before a limit or a schema
//! was tightened. They are in their draft and never kept; the log's answer tells.

use crate::auth::Grant;
use crate::log::OnceId;
use crate::message::{DatasourceId, RecordFlags};

use super::draft::scope_of;
use super::{Draft, IncomingMessage, Refusal, check_message_id};

/// A refused message that may be a repetition of one that the log has.
#[derive(Debug, Clone)]
pub struct AskedMessage {
    /// Its origin in the draft, as [`Draft::push`] returns it.
    pub origin: usize,
    /// Why it is refused if the log does not know it.
    pub refusal: Refusal,
}

impl Draft {
    /// Declares, before the first message is added, that its messages are refused, and only ask whether they are
    /// a repetition of what the log has: they are not charged and not validated.
    pub fn only_ask(&mut self) {
        self.only_asks = true;
    }

    /// Refuses a message, unless it may be a repetition of one that the log has: then it is added as a question, and
    /// the log's answer tells. What is refused now may have been let in before.
    #[cold]
    pub(super) fn ask(
        &mut self,
        grant: &Grant,
        datasource: &DatasourceId,
        message: IncomingMessage<'_>,
        refusal: Refusal,
    ) -> Result<Refusal, Refusal> {
        let has_id = message.message_id.is_some_and(|id| check_message_id(id).is_ok());
        if !has_id && message.exchange.is_none() {
            return Err(refusal);
        }
        let message = IncomingMessage { message_id: message.message_id.filter(|_| has_id), ..message };
        let origin = self.question_for(grant, datasource, &message)?;
        self.refusals.push((origin, refusal.clone()));
        Ok(Refusal::Asked(Box::new(AskedMessage { origin, refusal })))
    }

    /// Adds a message that is not kept, but asks whether it is known under its id. Returns its origin.
    ///
    /// # Errors
    /// [`Refusal::MessageId`].
    #[cold]
    pub(super) fn question_for(
        &mut self,
        grant: &Grant,
        datasource: &DatasourceId,
        message: &IncomingMessage<'_>,
    ) -> Result<usize, Refusal> {
        let id_of_all = self.message_id.clone();
        let open = self.sections.len().saturating_sub(1);
        if id_of_all.is_none() || self.sections.is_empty() {
            message.message_id.map_or(Ok(()), check_message_id)?;
            let mut section = self.new_section(grant, datasource);
            section.only_ask();
            let message_id = id_of_all.as_deref().or(message.message_id);
            let scope = scope_of(&self.intake, datasource);
            message_id.into_iter().for_each(|id| section.ask_for(OnceId::of_message(&scope, id)));
            message.exchange.into_iter().for_each(|exchange| section.ask_for(exchange.once_id()));
            self.sections.push(section);
            self.keys.push(grant.key().clone());
        }
        let at = if id_of_all.is_none() { self.sections.len() - 1 } else { open };
        let IncomingMessage { topic, payload, .. } = message;
        let bytes_before = self.memory_bytes_before(at);
        self.sections[at].push(topic, payload, "", &[], RecordFlags::default());
        self.note_memory(at, bytes_before);
        Ok(at)
    }

    /// Adds a message of an open QoS 2 exchange of this connection, which the log has to know: it is not kept
    /// again. Returns its origin.
    ///
    /// # Errors
    /// As [`Draft::push`].
    pub fn push_repeated(
        &mut self,
        grant: &Grant,
        message: IncomingMessage<'_>,
    ) -> Result<usize, Box<Refusal>> {
        let before = std::mem::replace(&mut self.only_asks, true);
        let message = IncomingMessage { message_id: None, ..message };
        let pushed = self.check_and_add(grant, None, message);
        self.only_asks = before;
        pushed
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::super::tests::{intake, message, publish};
    use super::*;
    use crate::auth::{Actor, Scope, Scopes};
    use crate::intake::Intake;
    use crate::log::{Offsets, SectionOutcome};
    use crate::memory::MemoryBudget;
    use crate::message::Transport;
    use crate::retained_topics::RetainedTopics;

    const NOTHING_PASSES: &str = r#"{"last_version":1,"rules":[{"filter":"t","version":1,"schema":false}]}"#;
    const NOTHING_FITS: &str = r#"{"payload_bytes": {"max": 1, "policy": "reject"}}"#;

    fn two_bytes(id: &str) -> IncomingMessage<'_> {
        IncomingMessage { payload: b"12", ..message(Some(id), None) }
    }

    /// What the log says to a message that is refused.
    async fn answer_to_refused(
        intake: &Intake,
        grant: &Grant,
        message: IncomingMessage<'_>,
    ) -> SectionOutcome {
        let mut draft = intake.draft(Transport::Mqtt, 7);
        let origin = match draft.push(grant, None, message).map_err(|refusal| *refusal) {
            Err(Refusal::Quarantined(quarantined)) => quarantined.origin,
            Err(Refusal::Asked(asked)) => asked.origin,
            other => panic!("{other:?}"),
        };
        intake.admit(draft).await.expect("room").await.expect("answered").outcomes.remove(origin)
    }

    #[tokio::test]
    async fn a_question_is_about_the_incarnation_that_it_is_asked_in() {
        for (schema, limits) in [(Some(NOTHING_PASSES), None), (None, Some(NOTHING_FITS))] {
            let (_dir, intake, grant) = intake();
            let (registry, press) = (intake.authorizer().registry(), grant.datasource().clone());
            publish(&intake, &grant, &[two_bytes("first")]).await;
            registry.delete_datasource(&Actor::SYSTEM, &press).expect("there");
            let scopes = Scopes::from_slice(&[Scope::Ingest]);
            let (_, _, key) =
                registry.create_datasource(&Actor::SYSTEM, None, "press-4", scopes).expect("created again");
            let grant = intake.authorizer().identify(key.expose().as_bytes()).expect("a valid key");
            publish(&intake, &grant, &[two_bytes("second")]).await;
            registry.set_datasource_schemas(&Actor::SYSTEM, &press, schema.map(str::to_owned)).expect("set");
            registry.set_datasource_limits(&Actor::SYSTEM, &press, limits.map(str::to_owned)).expect("set");
            let of_the_first = answer_to_refused(&intake, &grant, two_bytes("first")).await;
            let is_news = matches!(of_the_first, SectionOutcome::Kept(_) | SectionOutcome::Unknown);
            assert!(is_news, "{schema:?} {limits:?}: {of_the_first:?}");
            let repeated = answer_to_refused(&intake, &grant, two_bytes("second")).await;
            assert_eq!(repeated, SectionOutcome::Known(Offsets::consecutive(1, 1)), "{schema:?} {limits:?}");
        }
    }

    #[tokio::test]
    async fn a_retained_message_that_the_log_has_is_known_when_there_is_no_room_for_it_any_more() {
        let (_dir, intake, grant) = intake();
        let (registry, press) = (intake.authorizer().registry(), grant.datasource().clone());
        let topics = Arc::new(RetainedTopics::default());
        intake.set_retained_topics(topics.clone());
        let limits = r#"{"retained_topics": {"max": 1}}"#;
        registry.set_datasource_limits(&Actor::SYSTEM, &press, Some(limits.to_owned())).expect("set");
        let retained = |topic, id| {
            let flags = RecordFlags::default().with(RecordFlags::RETAIN);
            IncomingMessage { topic, flags, ..message(id, None) }
        };
        publish(&intake, &grant, &[retained("t", Some("a"))]).await;
        // It was cleared since, and another one has its place.
        topics.confirm(press.as_str(), "t", 1_000);
        topics.confirm(press.as_str(), "t", 0);
        publish(&intake, &grant, &[retained("u", Some("b"))]).await;
        let repeated = answer_to_refused(&intake, &grant, retained("t", Some("a"))).await;
        assert_eq!(repeated, SectionOutcome::Known(Offsets::consecutive(0, 1)));
        let news = answer_to_refused(&intake, &grant, retained("t", Some("c"))).await;
        assert_eq!(news, SectionOutcome::Unknown);
        let mut draft = intake.draft(Transport::Mqtt, 7);
        let without_id = draft.push(&grant, None, retained("t", None));
        assert!(
            matches!(without_id.as_ref().map_err(Box::as_ref), Err(Refusal::Limited(_))),
            "{without_id:?}"
        );
        let bad_id = draft.push(&grant, None, retained("t", Some("\n")));
        assert!(matches!(bad_id.as_ref().map_err(Box::as_ref), Err(Refusal::MessageId)), "{bad_id:?}");
    }

    #[test]
    fn questions_are_charged_for_as_they_come_and_give_all_of_it_back() {
        let (_dir, intake, grant) = intake();
        let account = MemoryBudget::new(4 << 20, 1 << 20).account_of_key(grant.key_id(), grant.datasource());
        let payload = vec![b'x'; 10_000];
        for id_of_all in [None, Some("all")] {
            let mut draft = intake.draft(Transport::Http, 0);
            id_of_all.into_iter().for_each(|id| draft.keep_once(id).expect("a good id"));
            draft.only_ask();
            draft.charge_to(&account, grant.key_id());
            let ids: Vec<String> = (0..200).map(|n| n.to_string()).collect();
            let refused = ids.iter().position(|id| {
                let id = id_of_all.is_none().then_some(&**id);
                let pushed =
                    draft.push(&grant, None, IncomingMessage { payload: &payload, ..message(id, None) });
                match pushed.map_err(|refusal| *refusal) {
                    Ok(_) => false,
                    Err(Refusal::Memory(_)) => true,
                    Err(other) => panic!("{other}"),
                }
            });
            assert!(refused.expect("the share is used up before") > 30);
            // A section grows to twice its size at once.
            assert!(draft.memory_bytes() <= 2 << 20, "{} bytes", draft.memory_bytes());
            drop(draft);
            assert!(account.charge(1 << 20).is_ok(), "all of it is free again");
        }
    }
}
