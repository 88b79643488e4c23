//! What is read out of a payload, while the payload itself stays as it was sent: its numbers ([`samples`]) and the time
//! at which it was measured ([`event_time`]).
//!
//! The numbers are a function of topic, payload and media type alone, so that every consumer finds the same ones whenever it
//! looks. Payloads come in shapes ([`shape`]): plain JSON, line protocol, ThingsBoard's telemetry, SenML. The time also depends on a setting, which may change: intake works it out once, and the log keeps it with the
//! record.

pub mod event_time;
mod json_path;
pub mod samples;
pub mod shape;

pub use event_time::{EVENT_TIME_PROPERTY, EventTimeRule, EventTimeSetting};
pub use samples::SampleReader;
pub use shape::{ShapedPayload, may_be_shaped};
