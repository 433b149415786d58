//! Giving containerd's content store a layer that is being pulled here.
//!
//! The bytes go there as they come from the registry, beside the unpacking. containerd compares the digest itself, and shows the blob
//! once it is whole. Until the client that pulls has made its image, which then refers to the blob, a lease of ours keeps it: one per image
//! and namespace, which ends by itself if we do not end it.
//!
//! An ingest that is dropped is aborted there.

use super::content::{ContainerdContent, ContentError};
use super::proto::content::{AbortRequest, WriteAction, WriteContentRequest};
use super::proto::leases::{CreateRequest, DeleteRequest};
use crate::oci::Digest;
use bytes::{Bytes, BytesMut};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tonic::metadata::AsciiMetadataValue;
use tonic::{Code, Status};

/// Key of the metadata that names a lease.
const LEASE: &str = "containerd-lease";
/// When a lease ends by itself: longer than any pull, and short enough that what a crash leaves is soon gone.
const LEASE_ENDS: Duration = Duration::from_secs(3600);
/// Bytes of one message. Each is answered.
const MESSAGE: usize = 512 << 10;
/// Messages between us and the socket: how far containerd's disk may be behind the network before the pull waits for it.
const QUEUE: usize = 4;
/// How long the last message may take: containerd syncs the blob to disk.
const COMMIT_WITHIN: Duration = Duration::from_secs(60);

/// A layer to be put.
pub struct Layer {
    pub digest: Digest,
    pub size: u64,
    pub labels: BTreeMap<String, String>,
}

/// A layer on its way.
pub struct Ingest {
    content: ContainerdContent,
    namespace: String,
    reference: String,
    layer: Layer,
    messages: mpsc::Sender<WriteContentRequest>,
    /// Reads the answers; ends with the last one.
    answers: JoinHandle<Result<(), Status>>,
    pending: BytesMut,
    sent: u64,
    finished: bool,
}

/// The lease that keeps the layers of an image for now.
fn lease(manifest: &Digest) -> String {
    format!("soci-pull-{}", manifest.hex())
}

fn refused(status: Status) -> ContentError {
    ContentError::Refused(status.message().to_owned())
}

impl ContainerdContent {
    /// Begins to put a layer of the image with this manifest.
    pub async fn ingest(&self, namespace: &str, manifest: &Digest, layer: Layer) -> Result<Ingest, ContentError> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let lease = lease(manifest);
        let ends = jiff::Timestamp::from_second(i64::try_from((now + LEASE_ENDS).as_secs()).unwrap_or(i64::MAX));
        let ends = ends.map_or_else(|_| String::new(), |at| at.to_string());
        let labels = BTreeMap::from([("containerd.io/gc.expire".to_owned(), ends)]);
        let create = Self::request(namespace, CreateRequest { id: lease.clone(), labels })?;
        match self.within(self.leases.clone().create(create)).await? {
            Ok(_) => {}
            Err(status) if status.code() == Code::AlreadyExists => {}
            Err(status) => return Err(refused(status)),
        }
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let reference = format!("soci-pull-{}-{}-{number}", layer.digest.hex(), now.as_nanos());
        let (messages, queue) = mpsc::channel(QUEUE);
        let stream = futures::stream::unfold(queue, async |mut queue: mpsc::Receiver<WriteContentRequest>| {
            queue.recv().await.map(|message| (message, queue))
        });
        let mut request = Self::request(namespace, stream)?;
        if let Ok(value) = AsciiMetadataValue::try_from(&lease) {
            request.metadata_mut().insert(LEASE, value);
        }
        let mut client = self.client.clone();
        let answers = tokio::spawn(async move {
            let mut answers = client.write(request).await?.into_inner();
            while let Some(answer) = answers.message().await? {
                if answer.action() == WriteAction::Commit {
                    return Ok(());
                }
            }
            Err(Status::aborted("the stream ended before the layer was whole"))
        });
        let namespace = namespace.to_owned();
        let content = self.clone();
        let pending = BytesMut::new();
        Ok(Ingest { content, namespace, reference, layer, messages, answers, pending, sent: 0, finished: false })
    }

    /// The image has what it needs, or nobody wants it any more: what it does not refer to may go.
    pub async fn end_lease(&self, namespace: &str, manifest: &Digest) -> Result<(), ContentError> {
        let request = Self::request(namespace, DeleteRequest { id: lease(manifest), sync: false })?;
        match self.within(self.leases.clone().delete(request)).await? {
            Err(status) if status.code() != Code::NotFound => Err(refused(status)),
            _ => Ok(()),
        }
    }
}

impl Ingest {
    /// The next bytes.
    pub async fn put(&mut self, bytes: Bytes) -> Result<(), ContentError> {
        self.pending.extend_from_slice(&bytes);
        match self.pending.len() >= MESSAGE {
            true => self.send(WriteAction::Write).await,
            false => Ok(()),
        }
    }

    async fn send(&mut self, action: WriteAction) -> Result<(), ContentError> {
        let data = self.pending.split().freeze();
        let length = data.len() as u64;
        let signed = |number: u64| i64::try_from(number).unwrap_or(i64::MAX);
        let message = WriteContentRequest {
            action: action.into(),
            r#ref: self.reference.clone(),
            total: signed(self.layer.size),
            expected: self.layer.digest.to_string(),
            offset: signed(self.sent),
            data,
            labels: if action == WriteAction::Commit { self.layer.labels.clone() } else { BTreeMap::new() },
        };
        self.sent += length;
        self.messages.send(message).await.map_err(|_| ContentError::Ended)
    }

    /// That was all. Comes back when the blob is there.
    pub async fn finish(mut self) -> Result<(), ContentError> {
        self.end().await
    }

    /// Instead of bytes: takes the blob over from another namespace that has it.
    pub async fn adopt(mut self) -> Result<(), ContentError> {
        // What containerd has anywhere it counts as written already.
        self.sent = self.layer.size;
        let adopted = self.end().await;
        self.finished = adopted.is_ok();
        adopted
    }

    async fn end(&mut self) -> Result<(), ContentError> {
        self.send(WriteAction::Commit).await?;
        let answered = tokio::time::timeout(COMMIT_WITHIN, &mut self.answers).await;
        self.finished = true;
        match answered {
            Ok(Ok(Ok(()))) => Ok(()),
            // Somebody else was first.
            Ok(Ok(Err(status))) if status.code() == Code::AlreadyExists => Ok(()),
            Ok(Ok(Err(status))) => Err(refused(status)),
            Ok(Err(_)) => Err(ContentError::Ended),
            Err(_) => Err(ContentError::Timeout),
        }
    }
}

impl Drop for Ingest {
    fn drop(&mut self) {
        self.answers.abort();
        if self.finished {
            return;
        }
        let Ok(runtime) = tokio::runtime::Handle::try_current() else { return };
        let (mut client, namespace, r#ref) =
            (self.content.client.clone(), self.namespace.clone(), self.reference.clone());
        runtime.spawn(async move {
            // What is not aborted, containerd's garbage collector takes when the lease has ended.
            if let Ok(request) = ContainerdContent::request(&namespace, AbortRequest { r#ref }) {
                let _ = client.abort(request).await;
            }
        });
    }
}
