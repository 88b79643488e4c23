//! The collector that spans go to: OTLP over HTTP as protobuf, by the same hyper and rustls as everything else.
//!
//! Spans are sent by a thread of their own, in batches, from a queue of [`SPANS_WAITING_MAX`]: while the collector is away
//! it is full, and what ends then is lost.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use http_body_util::{BodyExt, Full, Limited};
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::{TokioExecutor, TokioTimer};
use opentelemetry::KeyValue;
use opentelemetry_http::{Bytes, HttpClient, HttpError, Request, Response};
use opentelemetry_otlp::{ExporterBuildError, WithExportConfig, WithHttpConfig};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::trace::{BatchConfigBuilder, BatchSpanProcessor, Sampler, SdkTracerProvider};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use rustls::{ClientConfig, RootCertStore};
use tokio::runtime::Handle;
use tracing::{info, warn};

use super::recorder::set_provider;
use crate::config::OtlpConfig;
use crate::limits::SPANS_WAITING_MAX;
use crate::observe::build::BUILD_VERSION;

/// How long a batch waits for more spans.
const EXPORT_INTERVAL: Duration = Duration::from_secs(1);
/// The most spans of a batch.
const EXPORT_BATCH_SPANS_MAX: usize = 512;
/// How long the collector may take for a batch, and to accept a connection.
const EXPORT_TIME_MAX: Duration = Duration::from_secs(5);
/// How long the end of the process waits for the last batch.
const EXPORT_END_WAIT_MAX: Duration = Duration::from_secs(2);
/// What is read of an answer.
const EXPORT_ANSWER_BYTES_MAX: usize = 64 << 10;
/// How long a connection without requests stays open.
const EXPORT_IDLE_MAX: Duration = Duration::from_secs(30);

/// Why spans cannot be exported.
#[derive(Debug, thiserror::Error)]
pub enum SpanExportError {
    /// The issuers that are to be trusted.
    #[error("trace.otlp.ca ({}): {reason}", .file.display())]
    Issuers {
        /// The file.
        file: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The exporter cannot be made.
    #[error("trace.otlp.endpoint: {0}")]
    Endpoint(#[from] ExporterBuildError),
    /// No TLS.
    #[error("trace.otlp: {0}")]
    Tls(#[from] rustls::Error),
}

/// The export of this process' spans.
pub struct SpanExport(Option<SdkTracerProvider>);

impl SpanExport {
    /// Begins to export, if there is an endpoint. Called within the runtime whose threads send the spans.
    ///
    /// # Errors
    /// [`SpanExportError`].
    pub fn begin(config: &OtlpConfig) -> Result<Self, SpanExportError> {
        let Some(endpoint) = config.traces_url() else { return Ok(Self(None)) };
        let client = CollectorClient::new(config)?;
        let exporter = opentelemetry_otlp::SpanExporter::builder()
            .with_http()
            .with_http_client(client)
            .with_endpoint(&endpoint)
            .with_timeout(EXPORT_TIME_MAX)
            .build()?;
        let batches = BatchConfigBuilder::default()
            .with_max_queue_size(SPANS_WAITING_MAX)
            .with_max_export_batch_size(EXPORT_BATCH_SPANS_MAX)
            .with_scheduled_delay(EXPORT_INTERVAL)
            .build();
        let provider = SdkTracerProvider::builder()
            .with_span_processor(BatchSpanProcessor::builder(exporter).with_batch_config(batches).build())
            .with_sampler(Sampler::ParentBased(Box::new(Sampler::TraceIdRatioBased(config.ratio()))))
            .with_resource(
                Resource::builder()
                    .with_service_name("headgate")
                    .with_attribute(KeyValue::new("service.version", BUILD_VERSION))
                    .build(),
            )
            .build();
        set_provider(&provider);
        info!(endpoint, "spans are sent to a collector");
        Ok(Self(Some(provider)))
    }

    /// Sends what waits, for [`EXPORT_END_WAIT_MAX`] at most.
    pub async fn end(self) {
        let Some(provider) = self.0 else { return };
        let end = tokio::task::spawn_blocking(move || provider.shutdown_with_timeout(EXPORT_END_WAIT_MAX));
        // Where it waits for a collector that does not answer it is left behind.
        if !matches!(tokio::time::timeout(2 * EXPORT_END_WAIT_MAX, end).await, Ok(Ok(Ok(())))) {
            warn!("the last spans were not sent");
        }
    }
}

/// The HTTP client of the exporter, whose thread is none of the runtime's.
#[derive(Debug)]
struct CollectorClient {
    client: Client<HttpsConnector<HttpConnector>, Full<Bytes>>,
    runtime: Handle,
    /// It was said that the collector is away.
    is_away_said: AtomicBool,
}

impl CollectorClient {
    fn new(config: &OtlpConfig) -> Result<Self, SpanExportError> {
        let mut tcp = HttpConnector::new();
        tcp.set_connect_timeout(Some(EXPORT_TIME_MAX));
        tcp.enforce_http(false);
        let connector = HttpsConnectorBuilder::new()
            .with_tls_config(client_tls(&config.ca)?)
            .https_or_http()
            .enable_http1()
            .wrap_connector(tcp);
        let client = Client::builder(TokioExecutor::new())
            .pool_idle_timeout(EXPORT_IDLE_MAX)
            .pool_timer(TokioTimer::new())
            .build(connector);
        Ok(Self { client, runtime: Handle::current(), is_away_said: AtomicBool::new(false) })
    }

    async fn send(&self, request: Request<Bytes>) -> Result<Response<Bytes>, HttpError> {
        let client = self.client.clone();
        let sending = self.runtime.spawn(async move {
            let answer = client.request(request.map(Full::new)).await?;
            let (parts, body) = answer.into_parts();
            let body = Limited::new(body, EXPORT_ANSWER_BYTES_MAX).collect().await?.to_bytes();
            Ok::<_, HttpError>(Response::from_parts(parts, body))
        });
        let abort = sending.abort_handle();
        let timer = self.runtime.spawn(async move {
            tokio::time::sleep(EXPORT_TIME_MAX).await;
            abort.abort();
        });
        let sent = sending.await;
        timer.abort();
        sent.map_err(|_| HttpError::from("it does not answer"))?
    }
}

#[async_trait]
impl HttpClient for CollectorClient {
    async fn send_bytes(&self, request: Request<Bytes>) -> Result<Response<Bytes>, HttpError> {
        let sent = self.send(request).await;
        let fault = match &sent {
            Ok(answer) if answer.status().is_success() => None,
            Ok(answer) => Some(format!("it answers {}", answer.status())),
            Err(error) => Some(error.to_string()),
        };
        let was_said = self.is_away_said.swap(fault.is_some(), Ordering::Relaxed);
        match fault {
            Some(fault) if !was_said => warn!(fault, "the collector takes no spans; they are lost meanwhile"),
            None if was_said => info!("the collector takes spans again"),
            _ => {}
        }
        sent
    }
}

/// Trusts what the system trusts, and the issuers in `ca`, if it names a file.
fn client_tls(ca: &Path) -> Result<ClientConfig, SpanExportError> {
    let mut roots = RootCertStore::empty();
    roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
    if !ca.as_os_str().is_empty() {
        let no = |reason: String| SpanExportError::Issuers { file: ca.to_owned(), reason };
        let pem = std::fs::read(ca).map_err(|error| no(error.to_string()))?;
        let own: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&pem).collect();
        let own = own.map_err(|error| no(error.to_string()))?;
        if own.is_empty() {
            return Err(no("there is no certificate in it (PEM)".to_owned()));
        }
        roots.add_parsable_certificates(own);
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions()?;
    Ok(builder.with_root_certificates(roots).with_no_client_auth())
}
