//! A store that stops at a call, as a process that is killed there stops: nothing after it happens, and whether the call
//! itself has happened is left open.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use futures_util::stream::BoxStream;
use futures_util::{StreamExt, stream};
use headgate_bridge_delta::object_store::path::Path;
use headgate_bridge_delta::object_store::{
    self as object_store, CopyOptions, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta,
    ObjectStore, PutMultipartOptions, PutOptions, PutPayload, PutResult, Result,
};

#[derive(Debug)]
pub(crate) struct StoppingStore {
    inner: Arc<dyn ObjectStore>,
    calls: AtomicU64,
    /// The call that is the last, counted from 0.
    last_call: u64,
    /// Whether the last call happens, although its answer is lost.
    is_last_done: bool,
}

/// What a call may do.
enum CallFate {
    Happens,
    HappensUnanswered,
    Nothing,
}

impl StoppingStore {
    pub(crate) fn new(inner: Arc<dyn ObjectStore>, last_call: u64, is_last_done: bool) -> Arc<Self> {
        Arc::new(Self { inner, calls: AtomicU64::new(0), last_call, is_last_done })
    }

    fn fate(&self) -> CallFate {
        match self.calls.fetch_add(1, Ordering::SeqCst) {
            call if call < self.last_call => CallFate::Happens,
            call if call == self.last_call && self.is_last_done => CallFate::HappensUnanswered,
            _ => CallFate::Nothing,
        }
    }

    async fn call<T>(&self, call: impl Future<Output = Result<T>>) -> Result<T> {
        match self.fate() {
            CallFate::Happens => call.await,
            CallFate::HappensUnanswered => {
                let _ = call.await;
                Err(stopped())
            }
            CallFate::Nothing => Err(stopped()),
        }
    }
}

fn stopped() -> object_store::Error {
    object_store::Error::Generic { store: "stopping", source: "stopped".into() }
}

impl fmt::Display for StoppingStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("stopping")
    }
}

#[async_trait::async_trait]
impl ObjectStore for StoppingStore {
    async fn put_opts(&self, location: &Path, payload: PutPayload, options: PutOptions) -> Result<PutResult> {
        self.call(self.inner.put_opts(location, payload, options)).await
    }

    async fn put_multipart_opts(&self, _: &Path, _: PutMultipartOptions) -> Result<Box<dyn MultipartUpload>> {
        unreachable!("files are stored at once")
    }

    async fn get_opts(&self, location: &Path, options: GetOptions) -> Result<GetResult> {
        self.call(self.inner.get_opts(location, options)).await
    }

    fn delete_stream(&self, locations: BoxStream<'static, Result<Path>>) -> BoxStream<'static, Result<Path>> {
        match self.fate() {
            CallFate::Happens => self.inner.delete_stream(locations),
            CallFate::HappensUnanswered => self
                .inner
                .delete_stream(locations)
                .map(|deleted| deleted.and_then(|_| Err(stopped())))
                .boxed(),
            CallFate::Nothing => stream::iter([Err(stopped())]).boxed(),
        }
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        match self.fate() {
            CallFate::Happens => self.inner.list(prefix),
            _ => stream::iter([Err(stopped())]).boxed(),
        }
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        self.call(self.inner.list_with_delimiter(prefix)).await
    }

    async fn copy_opts(&self, _: &Path, _: &Path, _: CopyOptions) -> Result<()> {
        unreachable!("nothing is copied")
    }
}
