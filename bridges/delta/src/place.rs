//! Where a table is: a directory, or a bucket of S3 or of what speaks like it.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use object_store::aws::{AmazonS3Builder, S3ConditionalPut};
use object_store::local::LocalFileSystem;
use object_store::prefix::PrefixStore;
use object_store::{ObjectStore, RetryConfig};
use rustls::crypto::ring::default_provider;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use rustls::{ClientConfig, RootCertStore};

use crate::http_connector::HyperConnector;

/// How often a request is tried again at once. Whoever calls waits longer, and tries again.
const REQUEST_RETRIES_MAX: usize = 2;
/// For how long it is.
const REQUEST_RETRY_TIME_MAX: Duration = Duration::from_secs(15);
const S3_SCHEME: &str = "s3://";
const FILE_SCHEME: &str = "file://";

/// Why a place cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum PlaceError {
    /// Neither a path nor `s3://BUCKET/PREFIX`.
    #[error("{0:?} is neither a directory nor s3://BUCKET/PREFIX")]
    Unreadable(String),
    /// The directory cannot be made or read.
    #[error("{}: {error}", path.display())]
    Directory {
        /// Which.
        path: PathBuf,
        /// What the system says.
        error: std::io::Error,
    },
    /// The store does not take its settings.
    #[error("settings of the store: {0}")]
    Settings(#[from] object_store::Error),
    /// The certificates that were given are none.
    #[error("certificates of the store: {0}")]
    Certificates(String),
}

/// What it takes to get into a bucket. What is not given is taken from the environment as Amazon's own tools do it
/// (`AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`, `AWS_REGION`, roles of containers and instances).
#[derive(Clone, Default, PartialEq, Eq)]
pub struct BucketAccess {
    /// Where a store that is not Amazon's listens: `https://host:port`. With `http://`, nothing is encrypted.
    pub endpoint: Option<String>,
    /// The region; most stores that are not Amazon's do not care.
    pub region: Option<String>,
    /// The public part of the credentials.
    pub access_key_id: Option<String>,
    /// The secret part.
    pub secret_access_key: Option<String>,
    /// The third part of credentials that end.
    pub session_token: Option<String>,
    /// Certificates (PEM) that are trusted instead of the system's.
    pub ca_pem: Option<Vec<u8>>,
}

impl fmt::Debug for BucketAccess {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BucketAccess")
            .field("endpoint", &self.endpoint)
            .field("region", &self.region)
            .finish_non_exhaustive()
    }
}

/// Where a table is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LakePlace {
    /// On a disk. The directory is made.
    Directory(PathBuf),
    /// In a bucket, which is there already.
    Bucket {
        /// Its name.
        bucket: String,
        /// The first part of the names of all objects; may be empty.
        prefix: String,
        /// How to get in.
        access: BucketAccess,
    },
}

impl LakePlace {
    /// `s3://BUCKET/PREFIX`, a path, or `file://PATH`.
    ///
    /// # Errors
    ///
    /// Other schemes, and no bucket.
    pub fn parse(place: &str, access: BucketAccess) -> Result<Self, PlaceError> {
        let unreadable = || PlaceError::Unreadable(place.to_owned());
        if let Some(path) = place.strip_prefix(S3_SCHEME) {
            let (bucket, prefix) = path.split_once('/').unwrap_or((path, ""));
            if bucket.is_empty() || bucket.contains(['@', ':']) {
                return Err(unreadable());
            }
            let prefix = prefix.trim_matches('/').to_owned();
            return Ok(Self::Bucket { bucket: bucket.to_owned(), prefix, access });
        }
        let path = place.strip_prefix(FILE_SCHEME).unwrap_or(place);
        if path.is_empty() || path.contains("://") {
            return Err(unreadable());
        }
        Ok(Self::Directory(PathBuf::from(path)))
    }

    /// Opens it. A bucket is not asked for anything yet.
    ///
    /// # Errors
    ///
    /// A directory that cannot be made, certificates that are none, settings that contradict each other.
    pub fn open(&self) -> Result<Arc<dyn ObjectStore>, PlaceError> {
        match self {
            Self::Directory(path) => {
                std::fs::create_dir_all(path)
                    .map_err(|error| PlaceError::Directory { path: path.clone(), error })?;
                // A commit that is acknowledged survives a power loss, and never names a file that did not.
                Ok(Arc::new(LocalFileSystem::new_with_prefix(path)?.with_fsync(true)))
            }
            Self::Bucket { bucket, prefix, access } => {
                let store = bucket_store(bucket, access)?;
                Ok(if prefix.is_empty() {
                    Arc::new(store)
                } else {
                    Arc::new(PrefixStore::new(store, prefix.as_str()))
                })
            }
        }
    }

    /// Removes what kills have left of files in a directory that were being written: their temporary names end in `#N`,
    /// and no list of objects has them. A bucket has no such thing.
    ///
    /// # Errors
    ///
    /// Those of the file system.
    pub fn remove_unfinished(&self, min_age: Duration) -> Result<usize, PlaceError> {
        match self {
            Self::Directory(path) => remove_staged_files(path, min_age)
                .map_err(|error| PlaceError::Directory { path: path.clone(), error }),
            Self::Bucket { .. } => Ok(0),
        }
    }
}

impl fmt::Display for LakePlace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Directory(path) => path.display().fmt(f),
            Self::Bucket { bucket, prefix, .. } if prefix.is_empty() => write!(f, "{S3_SCHEME}{bucket}"),
            Self::Bucket { bucket, prefix, .. } => write!(f, "{S3_SCHEME}{bucket}/{prefix}"),
        }
    }
}

fn bucket_store(bucket: &str, access: &BucketAccess) -> Result<impl ObjectStore + use<>, PlaceError> {
    let mut builder = AmazonS3Builder::from_env()
        .with_bucket_name(bucket)
        .with_conditional_put(S3ConditionalPut::ETagMatch)
        .with_retry(RetryConfig {
            max_retries: REQUEST_RETRIES_MAX,
            retry_timeout: REQUEST_RETRY_TIME_MAX,
            ..RetryConfig::default()
        })
        .with_http_connector(HyperConnector::new(Arc::new(tls_config(access.ca_pem.as_deref())?)));
    if let Some(endpoint) = &access.endpoint {
        builder = builder.with_endpoint(endpoint).with_allow_http(endpoint.starts_with("http://"));
    }
    if let Some(region) = &access.region {
        builder = builder.with_region(region);
    }
    if let (Some(id), Some(secret)) = (&access.access_key_id, &access.secret_access_key) {
        builder = builder.with_access_key_id(id).with_secret_access_key(secret);
    }
    if let Some(token) = &access.session_token {
        builder = builder.with_token(token);
    }
    Ok(builder.build()?)
}

fn tls_config(ca_pem: Option<&[u8]>) -> Result<ClientConfig, PlaceError> {
    let mut roots = RootCertStore::empty();
    match ca_pem {
        Some(pem) => {
            for certificate in CertificateDer::pem_slice_iter(pem) {
                let certificate = certificate.map_err(|e| PlaceError::Certificates(e.to_string()))?;
                roots.add(certificate).map_err(|e| PlaceError::Certificates(e.to_string()))?;
            }
            if roots.is_empty() {
                return Err(PlaceError::Certificates("there is none in the file".to_owned()));
            }
        }
        None => {
            roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
        }
    }
    let config = ClientConfig::builder_with_provider(Arc::new(default_provider()))
        .with_safe_default_protocol_versions()
        .map_err(|e| PlaceError::Certificates(e.to_string()))?;
    Ok(config.with_root_certificates(roots).with_no_client_auth())
}

fn remove_staged_files(directory: &Path, min_age: Duration) -> std::io::Result<usize> {
    let mut removed = 0;
    for entry in std::fs::read_dir(directory)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            removed += remove_staged_files(&entry.path(), min_age)?;
        } else if is_staged_name(&entry.file_name().to_string_lossy())
            && let Ok(written) = entry.metadata().and_then(|m| m.modified())
            && SystemTime::now().duration_since(written).is_ok_and(|age| age >= min_age)
        {
            std::fs::remove_file(entry.path())?;
            removed += 1;
        }
    }
    Ok(removed)
}

fn is_staged_name(name: &str) -> bool {
    name.rsplit_once('#').is_some_and(|(_, n)| !n.is_empty() && n.bytes().all(|b| b.is_ascii_digit()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_is_a_directory_or_a_bucket() {
        let parse = |text| LakePlace::parse(text, BucketAccess::default());
        assert_eq!(parse("/var/lake").expect("path"), LakePlace::Directory("/var/lake".into()));
        assert_eq!(parse("file:///var/lake").expect("url").to_string(), "/var/lake");
        assert_eq!(parse("s3://b/a/c/").expect("bucket").to_string(), "s3://b/a/c");
        for bad in ["", "s3://", "s3:///x", "s3://key:secret@b/x", "gs://b", "http://h/b"] {
            parse(bad).expect_err(bad);
        }
    }

    #[test]
    fn secrets_are_in_no_debug_text() {
        let access = BucketAccess { secret_access_key: Some("hush".to_owned()), ..BucketAccess::default() };
        assert!(!format!("{:?}", LakePlace::parse("s3://b", access)).contains("hush"));
    }

    #[test]
    fn temporary_names_of_killed_writers_are_removed_and_nothing_else() {
        let directory = tempfile::tempdir().expect("directory");
        let folder = directory.path().join("day=1");
        std::fs::create_dir(&folder).expect("folder");
        for name in ["a.parquet#1", "b.parquet", "c#x", "d#"] {
            std::fs::write(folder.join(name), b"x").expect("file");
        }
        let place = LakePlace::Directory(directory.path().to_owned());
        assert_eq!(place.remove_unfinished(Duration::from_secs(60)).expect("young"), 0);
        assert_eq!(place.remove_unfinished(Duration::ZERO).expect("old"), 1);
        assert!(!folder.join("a.parquet#1").exists() && folder.join("b.parquet").exists());
    }
}
