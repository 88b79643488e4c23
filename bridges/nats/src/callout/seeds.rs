//! Generates the seeds of auth callout.

use std::fmt;

use nkeys::{KeyPair, XKey};

/// The seeds of auth callout, with the public keys for the server's configuration.
pub struct CalloutSeeds {
    /// The seed that answers are signed with (`SA…`).
    pub issuer: String,
    /// Its public key (`A…`).
    pub issuer_public: String,
    /// The curve seed that requests are encrypted to (`SX…`).
    pub curve: String,
    /// Its public key (`X…`).
    pub curve_public: String,
}

impl CalloutSeeds {
    /// Generates new seeds with the operating system's random generator.
    ///
    /// # Errors
    /// The text of nkeys' error if a seed cannot be encoded.
    pub fn generate() -> Result<Self, String> {
        let (issuer, curve) = (KeyPair::new_account(), XKey::new());
        Ok(Self {
            issuer: issuer.seed().map_err(|error| error.to_string())?,
            issuer_public: issuer.public_key(),
            curve: curve.seed().map_err(|error| error.to_string())?,
            curve_public: curve.public_key(),
        })
    }
}

impl fmt::Debug for CalloutSeeds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CalloutSeeds")
            .field("issuer_public", &self.issuer_public)
            .field("curve_public", &self.curve_public)
            .finish_non_exhaustive()
    }
}
