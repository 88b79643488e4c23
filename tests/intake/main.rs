//! What the intake does not let in, whatever the transport: what is refused, what is held back by a limit,
//! what goes to quarantine because it does not meet its schema, and what misbehaving clients come to.

#[path = "../common/mod.rs"]
mod common;

mod abuse;
mod limits;
mod quarantine;
mod refusals;
mod validation;
