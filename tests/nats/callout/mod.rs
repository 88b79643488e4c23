//! NATS with the API key as the user: a client of a nats-server connects with its key and no more, and
//! can do what the key allows and no more, for as long as the key lives and no longer.

mod ends;
mod lets_in;
mod setup;
mod stage;
mod strangers;
mod tokens;
