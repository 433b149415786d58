//! Reading from containerd's content store: a layer that is there need not be fetched.
//!
//! containerd may not run yet, may not answer, or may lose the blob between two calls. None of that delays anybody: the
//! connection is made on first use, each call has a deadline, and after a failure nothing is tried for a while.

use super::labels::NAMESPACE;
use super::proto::content::content_client::ContentClient;
use super::proto::content::{InfoRequest, ReadContentRequest};
use super::proto::leases::leases_client::LeasesClient;
use crate::oci::Digest;
use bytes::Bytes;
use hyper_util::rt::TokioIo;
use std::io;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tokio::net::UnixStream;
use tonic::metadata::AsciiMetadataValue;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request, Status};

/// For connecting and for each message: a local socket answers in a millisecond or is not going to.
const DEADLINE: Duration = Duration::from_secs(1);
/// After a failure, how long containerd counts as absent.
const ABSENT: Duration = Duration::from_secs(10);
/// One message of a read. containerd sends 1 MiB or less.
const MAX_MESSAGE: usize = 16 << 20;

/// Why containerd's content store did not help.
#[derive(Debug, thiserror::Error)]
pub enum ContentError {
    #[error("containerd did not answer a moment ago")]
    Absent,
    #[error("containerd does not answer")]
    Timeout,
    #[error("containerd refused: {0}")]
    Refused(String),
    #[error("containerd sent bytes {got:?} where {wanted:?} were asked for")]
    WrongRange { wanted: Range<u64>, got: Range<u64> },
    #[error("namespace {0:?} cannot be sent")]
    Namespace(String),
    #[error("containerd has stopped listening")]
    Ended,
}

/// containerd's content store. Cheap to clone.
#[derive(Clone)]
pub struct ContainerdContent {
    pub(super) client: ContentClient<Channel>,
    pub(super) leases: LeasesClient<Channel>,
    /// Until when containerd counts as absent.
    absent: Arc<Mutex<Option<Instant>>>,
}

impl ContainerdContent {
    /// A client of the socket at `path`, which need not exist yet. Call within a tokio runtime.
    pub fn new(path: impl Into<PathBuf>) -> ContainerdContent {
        let path = path.into();
        // The connector below decides where to go; the address only fills the authority header.
        let channel = Endpoint::from_static("http://containerd.local").connect_timeout(DEADLINE);
        let connector = tower::service_fn(move |_: http::Uri| {
            let path = path.clone();
            async move { io::Result::Ok(TokioIo::new(UnixStream::connect(path).await?)) }
        });
        let channel = channel.connect_with_connector_lazy(connector);
        let client = ContentClient::new(channel.clone()).max_decoding_message_size(MAX_MESSAGE);
        ContainerdContent { client, leases: LeasesClient::new(channel), absent: Arc::default() }
    }

    pub(super) fn request<T>(namespace: &str, message: T) -> Result<Request<T>, ContentError> {
        let value = AsciiMetadataValue::try_from(namespace);
        let value = value.map_err(|_| ContentError::Namespace(namespace.chars().take(100).collect()))?;
        let mut request = Request::new(message);
        request.metadata_mut().insert(NAMESPACE, value);
        Ok(request)
    }

    /// Waits for `call`, but not long, and not at all while containerd counts as absent.
    pub(super) async fn within<T>(
        &self,
        call: impl Future<Output = Result<T, Status>>,
    ) -> Result<Result<T, Status>, ContentError> {
        let lock = || self.absent.lock().unwrap_or_else(PoisonError::into_inner);
        if lock().is_some_and(|until| Instant::now() < until) {
            return Err(ContentError::Absent);
        }
        let answer = tokio::time::timeout(DEADLINE, call).await;
        let gone = match &answer {
            Err(_) => true,
            Ok(Err(status)) => matches!(status.code(), Code::Unavailable | Code::DeadlineExceeded),
            Ok(Ok(_)) => false,
        };
        *lock() = gone.then(|| Instant::now() + ABSENT);
        answer.map_err(|_| ContentError::Timeout)
    }

    /// Size of the blob in `namespace`; `None` where it is not there.
    pub async fn size(&self, namespace: &str, digest: &Digest) -> Result<Option<u64>, ContentError> {
        let request = Self::request(namespace, InfoRequest { digest: digest.to_string() })?;
        match self.within(self.client.clone().info(request)).await? {
            Ok(response) => Ok(response.into_inner().info.and_then(|info| u64::try_from(info.size).ok())),
            Err(status) if status.code() == Code::NotFound => Ok(None),
            Err(status) => Err(ContentError::Refused(status.message().to_owned())),
        }
    }

    /// The bytes `range` of the blob, exactly. Nothing is verified here: the caller knows the digests.
    pub async fn read(&self, namespace: &str, digest: &Digest, range: Range<u64>) -> Result<Bytes, ContentError> {
        let wrong = |got: Range<u64>| ContentError::WrongRange { wanted: range.clone(), got };
        let wanted = range.end.saturating_sub(range.start);
        if wanted == 0 {
            // The wire's zero means "to the end".
            return Ok(Bytes::new());
        }
        let (Ok(offset), Ok(size)) = (i64::try_from(range.start), i64::try_from(wanted)) else {
            return Err(wrong(0..0));
        };
        let message = ReadContentRequest { digest: digest.to_string(), offset, size };
        let request = Self::request(namespace, message)?;
        let refused = |status: Status| ContentError::Refused(status.message().to_owned());
        let mut stream = self.within(self.client.clone().read(request)).await?.map_err(refused)?.into_inner();
        let mut out = Vec::new();
        while let Some(chunk) = self.within(stream.message()).await?.map_err(refused)? {
            let so_far = out.len() as u64;
            let got = u64::try_from(chunk.offset).unwrap_or(u64::MAX);
            // containerd counts from where the read began; the protocol's description can be read as "within the blob", too.
            let is_next = got == so_far || got == range.start + so_far;
            let got = got..got.saturating_add(chunk.data.len() as u64);
            if !is_next || so_far + chunk.data.len() as u64 > wanted {
                return Err(wrong(got));
            }
            out.extend_from_slice(&chunk.data);
        }
        match out.len() as u64 == wanted {
            true => Ok(out.into()),
            false => Err(wrong(range.start..range.start + out.len() as u64)),
        }
    }
}
