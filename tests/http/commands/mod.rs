//! What the commands say: exit codes, times, tables, questions on a terminal, answers in JSON.

mod answers;
mod exit_codes;
mod looks;
mod terminal;
mod times;
