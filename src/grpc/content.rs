//! Layers that containerd's content store already has are read from there and never fetched.
//!
//! containerd may be down, or hang while it waits for us: asking it is bounded by [`PATIENCE`], and after a silence it is not asked
//! again for [`SULK`], so that it never delays a Prepare twice.

use super::proto::content::{
    InfoRequest, ReadContentRequest, ReadContentResponse, content_client::ContentClient,
};
use crate::{
    layers::{Body, Remedy, Source, SourceError},
    oci::Digest,
    registry::HostId,
};
use bytes::Bytes;
use futures::future::BoxFuture;
use hyper_util::rt::TokioIo;
use std::{
    ops::Range,
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};
use tonic::{
    Request,
    transport::{Channel, Endpoint, Uri},
};

/// A healthy containerd answers in a millisecond.
const PATIENCE: Duration = Duration::from_millis(200);
/// How long a containerd that did not answer is left alone.
const SULK: Duration = Duration::from_secs(10);
/// A piece of content on its way: containerd sends 64 KiB or so at a time, and none of it over a network.
const PIECE_PATIENCE: Duration = Duration::from_secs(10);

/// containerd's content store, as a client sees it. Cheap to clone; connects when first asked.
#[derive(Clone)]
pub struct ContainerdContent {
    channel: Channel,
    silent_until: Arc<Mutex<Option<Instant>>>,
}

impl ContainerdContent {
    /// The store behind the containerd socket `path`. Must be called within a runtime.
    pub fn new(path: PathBuf) -> ContainerdContent {
        let connector = tower::service_fn(move |_: Uri| {
            let path = path.clone();
            async move { Ok::<_, std::io::Error>(TokioIo::new(tokio::net::UnixStream::connect(path).await?)) }
        });
        // The address is only a name: the connector knows where to go.
        let channel = Endpoint::from_static("http://containerd").connect_with_connector_lazy(connector);
        ContainerdContent { channel, silent_until: Arc::default() }
    }

    fn client(&self) -> ContentClient<Channel> {
        ContentClient::new(self.channel.clone())
    }

    /// Whether `blob` is there, as far as can be learnt quickly.
    pub async fn has(&self, namespace: &str, blob: &Digest) -> bool {
        let silent = || self.silent_until.lock().unwrap_or_else(PoisonError::into_inner);
        if silent().is_some_and(|until| until > Instant::now()) {
            return false;
        }
        let Some(request) = in_namespace(namespace, InfoRequest { digest: blob.to_string() }) else { return false };
        match tokio::time::timeout(PATIENCE, self.client().info(request)).await {
            Ok(Ok(_)) => true,
            Ok(Err(status)) if status.code() == tonic::Code::NotFound => false,
            Ok(Err(_)) | Err(_) => {
                *silent() = Some(Instant::now() + SULK);
                false
            }
        }
    }

    /// `blob`, as a source of layers.
    pub fn blob(&self, namespace: String, blob: Digest) -> ContainerdBlob {
        ContainerdBlob { content: self.clone(), namespace, blob }
    }
}

fn in_namespace<T>(namespace: &str, message: T) -> Option<Request<T>> {
    let mut request = Request::new(message);
    request.metadata_mut().insert("containerd-namespace", namespace.parse().ok()?);
    Some(request)
}

/// A blob in containerd's content store.
pub struct ContainerdBlob {
    content: ContainerdContent,
    namespace: String,
    blob: Digest,
}

/// What does not come from containerd may come from the registry.
fn elsewhere(reason: String) -> SourceError {
    SourceError { reason, remedy: Remedy::OtherSource }
}

impl Source for ContainerdBlob {
    fn open<'a>(&'a self, range: Range<u64>, _: &'a [HostId]) -> BoxFuture<'a, Result<Box<dyn Body>, SourceError>> {
        Box::pin(async move {
            let left = range.end - range.start;
            let message = ReadContentRequest {
                digest: self.blob.to_string(),
                offset: range.start as i64,
                size: left as i64,
            };
            let request = in_namespace(&self.namespace, message).ok_or_else(|| elsewhere("namespace".into()))?;
            let mut client = self.content.client();
            let answer = tokio::time::timeout(PIECE_PATIENCE, client.read(request)).await;
            let stream = match answer {
                Ok(Ok(answer)) => answer.into_inner(),
                Ok(Err(status)) => return Err(elsewhere(format!("containerd's content store: {}", status.message()))),
                Err(_) => return Err(elsewhere("containerd's content store does not answer".into())),
            };
            Ok(Box::new(ContentBody { stream, left }) as Box<dyn Body>)
        })
    }

    fn is_remote(&self) -> bool {
        false
    }
}

struct ContentBody {
    stream: tonic::Streaming<ReadContentResponse>,
    left: u64,
}

impl Body for ContentBody {
    fn chunk(&mut self) -> BoxFuture<'_, Result<Option<Bytes>, SourceError>> {
        Box::pin(async move {
            if self.left == 0 {
                return Ok(None);
            }
            match tokio::time::timeout(PIECE_PATIENCE, self.stream.message()).await {
                Ok(Ok(Some(piece))) => {
                    let take = (piece.data.len() as u64).min(self.left);
                    self.left -= take;
                    Ok(Some(piece.data.slice(..take as usize)))
                }
                Ok(Ok(None)) => Err(elsewhere("containerd's content store sent too little".into())),
                Ok(Err(status)) => Err(elsewhere(format!("containerd's content store: {}", status.message()))),
                Err(_) => Err(elsewhere("containerd's content store does not answer".into())),
            }
        })
    }

    fn host(&self) -> Option<HostId> {
        None
    }
}
