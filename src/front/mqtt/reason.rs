//! The reason codes of refusals.

use super::codec::ReasonCode;
use crate::auth::GrantDenial;
use crate::intake::{IdConflict, Refusal};
use crate::quota::Limit;

/// The MQTT 5 reason code of a refusal; no other place maps the two.
pub(super) fn refusal_reason_code(refusal: &Refusal) -> ReasonCode {
    match refusal {
        Refusal::Denied(GrantDenial::TooManyFailures { .. }) => ReasonCode::QuotaExceeded,
        Refusal::Denied(_) | Refusal::NoDatasource(_) => ReasonCode::NotAuthorized,
        Refusal::Topic(_) | Refusal::DatasourceMissing | Refusal::Subject(_) => ReasonCode::TopicNameInvalid,
        Refusal::TooLarge { .. } => ReasonCode::PacketTooLarge,
        Refusal::ContentType | Refusal::Quarantined(_) => ReasonCode::PayloadFormatInvalid,
        Refusal::MessageId | Refusal::ReplySubject | Refusal::Header(_) | Refusal::HeaderForm => {
            ReasonCode::ImplementationSpecificError
        }
        Refusal::Conflict(IdConflict::MessageId(_)) => ReasonCode::ImplementationSpecificError,
        Refusal::Conflict(IdConflict::Exchange) => ReasonCode::PacketIdentifierInUse,
        Refusal::Exchanges | Refusal::Ids => ReasonCode::QuotaExceeded,
        Refusal::Asked(asked) => refusal_reason_code(&asked.refusal),
        Refusal::Limited(limited) => match limited.limit {
            Limit::PayloadBytes => ReasonCode::PacketTooLarge,
            _ if limited.is_held_back() => ReasonCode::MessageRateTooHigh,
            _ => ReasonCode::QuotaExceeded,
        },
        Refusal::Busy { .. } | Refusal::Memory(_) | Refusal::Log(_) => ReasonCode::ServerBusy,
    }
}
