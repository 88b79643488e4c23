//! A `.creds` file: the token of a user of NATS', and the seed that signs what servers ask. It is read at each connection,
//! because tokens end and files are replaced.

use std::io;
use std::path::{Path, PathBuf};

use nkeys::KeyPair;

/// What is in such a file.
pub(crate) struct CredentialsFile {
    path: PathBuf,
    /// The user's token.
    pub(crate) jwt: String,
    signer: KeyPair,
}

impl CredentialsFile {
    /// Reads it.
    ///
    /// # Errors
    /// The operating system's, and for what is no such file.
    pub(crate) fn read(path: &Path) -> io::Result<Self> {
        let text = std::fs::read_to_string(path)?;
        let (jwt, seed) = token_and_seed(&text).ok_or_else(|| unusable(path))?;
        let signer = KeyPair::from_seed(seed).map_err(|_| unusable(path))?;
        Ok(Self { path: path.to_owned(), jwt: jwt.to_owned(), signer })
    }

    /// The signature of what a server has sent.
    ///
    /// # Errors
    /// The seed cannot sign.
    pub(crate) fn sign(&self, nonce: &[u8]) -> io::Result<Vec<u8>> {
        self.signer.sign(nonce).map_err(|_| unusable(&self.path))
    }

    /// The user's public key.
    pub(crate) fn public_key(&self) -> String {
        self.signer.public_key()
    }
}

/// The error for a file, without anything from it.
fn unusable(path: &Path) -> io::Error {
    io::Error::other(format!("{} is no .creds file", path.display()))
}

/// Each is on the line after its header.
fn token_and_seed(text: &str) -> Option<(&str, &str)> {
    let after = |header: &str| {
        let mut lines = text.lines().skip_while(|line| !line.contains(header)).skip(1);
        lines.next().map(str::trim).filter(|line| !line.is_empty())
    };
    Some((after("BEGIN NATS USER JWT")?, after("BEGIN USER NKEY SEED")?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn token_and_seed_are_found_in_a_credentials_file() {
        let text = "-----BEGIN NATS USER JWT-----\neyJ0\n------END NATS USER JWT------\n\n*** IMPORTANT ***\n\
                    -----BEGIN USER NKEY SEED-----\nSUA\n------END USER NKEY SEED------\n";
        assert_eq!(token_and_seed(text), Some(("eyJ0", "SUA")));
        assert_eq!(token_and_seed("SUA"), None);
    }
}
