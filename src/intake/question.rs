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
    pub fn push_repeated(&mut self, grant: &Grant, message: IncomingMessage<'_>) -> Result<usize, Refusal> {
        let before = std::mem::replace(&mut self.only_asks, true);
        let message = IncomingMessage { message_id: None, ..message };
        let pushed = self.check_and_add(grant, None, message);
        self.only_asks = before;
        pushed
    }
}
