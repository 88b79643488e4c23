//! What access tokens are signed with: 32 random bytes that belong to the registry. They are made for the first token, as
//! a change like any other: in `registry.db`, or in a cluster in the registry's bucket, so that a token of one gateway is
//! good on every other, also after a restart. No token is written down.
//!
//! Whoever can read them can make tokens for every key, as whoever can write the registry can make keys: both are for
//! gateways alone. They are in no export and in no copy of a cluster's registry.

use std::sync::Arc;

use headgate_format::key::API_KEY_PREFIX;
use rand::TryRng;
use rand::rngs::SysRng;
use rusqlite::OptionalExtension;

use super::Registry;
use super::database::RegistryDatabase;
use super::error::RegistryError;
use super::key::Key;
use super::transaction::RegistryTransaction;
use crate::auth::scope::Scopes;
use crate::auth::token::{AccessToken, TokenClaims, TokenSecret};
use crate::filter::TopicFilter;
use crate::message::TimeMicros;

/// Its name among the registry's secrets.
pub(super) const TOKEN_SECRET_NAME: &str = "token";

/// An access token that was made, and what it says.
#[derive(Debug)]
pub struct NewToken {
    /// The token, shown once.
    pub token: AccessToken,
    /// What it says.
    pub claims: TokenClaims,
}

impl Registry {
    /// What access tokens are signed with, once there is a token.
    pub(in crate::auth) fn token_secret(&self) -> Option<Arc<TokenSecret>> {
        self.token_secret.load_full()
    }

    /// Makes an access token of a key. It is good until `ends_at`, or the end of the key if that is earlier, for those of
    /// `scopes` that the key has, and for these topics or, if there are none, for all of them. Only the first token of a
    /// registry is a change; that one is durable on return.
    ///
    /// # Errors
    /// [`RegistryError::InvalidName`] if no scope is left; [`RegistryError::Database`], and in a cluster the errors of
    /// any change.
    pub fn make_token(
        &self,
        key: &Key,
        scopes: Scopes,
        ends_at: TimeMicros,
        topics: Vec<TopicFilter>,
    ) -> Result<NewToken, RegistryError> {
        let scopes = key.scopes.of_token(scopes);
        if scopes.is_empty() {
            let words = "an access token has the scopes ingest or subscribe, if its key has them";
            return Err(RegistryError::InvalidName(words.to_owned()));
        }
        let ends_at = key.ends_at().map_or(ends_at, |at| at.min(ends_at));
        let mut claims = TokenClaims { key: key.digest.beginning(), scopes, ends_at, topics };
        let secret = match self.token_secret() {
            Some(secret) => secret,
            None => self.make_token_secret()?,
        };
        loop {
            let token = AccessToken::sign(&claims, &secret);
            // One in hundreds of thousands has what a key begins with, and would be taken for one in a URL.
            let looks_like_key = |part: &[u8]| part.eq_ignore_ascii_case(API_KEY_PREFIX);
            if !token.expose().as_bytes().windows(API_KEY_PREFIX.len()).any(looks_like_key) {
                return Ok(NewToken { token, claims });
            }
            claims.ends_at -= 1;
        }
    }

    fn make_token_secret(&self) -> Result<Arc<TokenSecret>, RegistryError> {
        self.make_change(|database| {
            // Another thread or another node may just have made it.
            let secret = match database.token_secret()? {
                Some(secret) => secret,
                None => {
                    let mut bytes = [0; 32];
                    let made = SysRng.try_fill_bytes(&mut bytes);
                    made.expect("the operating system's random generator works");
                    let change = database.begin()?;
                    change.insert_secret(TOKEN_SECRET_NAME, &bytes)?;
                    change.commit()?;
                    TokenSecret(bytes)
                }
            };
            let secret = Arc::new(secret);
            self.token_secret.store(Some(secret.clone()));
            Ok(secret)
        })
    }

    /// Takes over the secret that a database has.
    pub(super) fn load_token_secret(&self, database: &RegistryDatabase) -> Result<(), RegistryError> {
        let secret = database.token_secret()?.map(Arc::new);
        self.token_secret.store(secret);
        Ok(())
    }
}

impl RegistryDatabase {
    /// What access tokens are signed with, if there is a token.
    fn token_secret(&self) -> Result<Option<TokenSecret>, RegistryError> {
        let mut select = self.connection.prepare_cached("SELECT value FROM secrets WHERE name = ?1")?;
        let bytes = select.query_row([TOKEN_SECRET_NAME], |row| row.get::<_, [u8; 32]>(0)).optional()?;
        Ok(bytes.map(TokenSecret))
    }
}

impl RegistryTransaction<'_> {
    fn insert_secret(&self, name: &'static str, value: &[u8; 32]) -> rusqlite::Result<()> {
        let mut insert =
            self.connection().prepare_cached("INSERT INTO secrets (name, value) VALUES (?1, ?2)")?;
        insert.execute(rusqlite::params![name, value])?;
        self.touch_secret(name);
        Ok(())
    }
}
